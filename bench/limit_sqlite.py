"""limit-sqlite: `executemany` of the same rows into the same schema in one transaction, as a process of its own."""

from __future__ import annotations

import gc
import sqlite3
import time
from pathlib import Path
from typing import Final

import click

from bench.rows import make_row
from telemetryd.model.runs import CREATED_AT, STORED

SCHEMA: Final = Path(__file__).parents[1] / "schema" / "telemetry.sql"
_NOW: Final = "2025-12-31T15:30:45.000000Z"
_INSERT: Final = (
    f"INSERT INTO agent_runs ({', '.join(STORED)}, updated_at) VALUES ({', '.join('?' * (len(STORED) + 1))}) "
    "ON CONFLICT (event_id) DO NOTHING"
)


def rows_per_second(database: Path, count: int) -> float:
    """Store so many rows, which were made before, in one durable transaction; return rows per second."""
    rows = []
    for number in range(count):
        values = [*make_row("limit", number), _NOW]
        values[CREATED_AT] = _NOW
        rows.append(tuple(values))
    gc.disable()
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA cache_size = -{64 * 1024}")
    connection.executescript(SCHEMA.read_text("utf-8"))
    started = time.perf_counter()
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(_INSERT, rows)
    connection.execute("COMMIT")
    seconds = time.perf_counter() - started
    connection.close()
    return count / seconds


@click.command()
@click.option("--database", type=click.Path(path_type=Path), required=True)
@click.option("--rows", type=int, default=100_000)
def main(database: Path, rows: int) -> None:
    """Print rows per second."""
    click.echo(rows_per_second(database, rows))


if __name__ == "__main__":
    main()
