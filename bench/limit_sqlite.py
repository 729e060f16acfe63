"""limit-sqlite-1000: the same rows into the same schema in durable transactions of 1,000, as a process of its own."""

from __future__ import annotations

import gc
import sqlite3
import time
from pathlib import Path
from typing import Final

import click

from bench.rows import Ids, make_row
from telemetryd.model.runs import CREATED_AT, STORED

SCHEMA: Final = Path(__file__).parents[1] / "schema" / "telemetry.sql"
_NOW: Final = "2025-12-31T15:30:45.000000Z"
_INSERT: Final = (
    f"INSERT INTO agent_runs ({', '.join(STORED)}, updated_at) VALUES ({', '.join('?' * (len(STORED) + 1))}) "
    "ON CONFLICT (event_id) DO NOTHING"
)
_TRANSACTION: Final = 1000
# The daemon's own settings, so that checkpoints cost the limit as much as the daemon.
_PRAGMAS: Final = ("journal_mode = WAL", "synchronous = FULL", "cache_size = -40960", "wal_autocheckpoint = 8000")


def rows_per_second(database: Path, count: int, ids: Ids) -> float:
    """Store so many rows, which were made before, in durable transactions of 1,000; return rows per second."""
    rows = []
    for number in range(count):
        values = [*make_row("limit", number, ids), _NOW]
        values[CREATED_AT] = _NOW
        rows.append(tuple(values))
    gc.disable()
    connection = sqlite3.connect(database, isolation_level=None)
    for pragma in _PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
    connection.executescript(SCHEMA.read_text("utf-8"))
    started = time.perf_counter()
    for start in range(0, count, _TRANSACTION):
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(_INSERT, rows[start : start + _TRANSACTION])
        connection.execute("COMMIT")
    seconds = time.perf_counter() - started
    connection.close()
    return count / seconds


@click.command()
@click.option("--database", type=click.Path(path_type=Path), required=True)
@click.option("--rows", type=int, default=50_000)
@click.option("--ids", type=Ids, default=Ids.ORDERED)
def main(database: Path, rows: int, ids: Ids) -> None:
    """Print rows per second."""
    click.echo(rows_per_second(database, rows, ids))


if __name__ == "__main__":
    main()
