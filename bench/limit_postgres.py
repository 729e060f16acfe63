"""limit-postgres-1000: the same rows into the same schema in durable transactions of 1,000, as a process of its own."""

from __future__ import annotations

import gc
import time
from typing import Final

import click
import psycopg

from bench.rows import Ids, make_row
from telemetryd.model.runs import CREATED_AT, STORED, TEXTS, columns
from telemetryd.model.values import Role

_NOW: Final = "2025-12-31T15:30:45.000000Z"
_COLUMNS: Final = (*STORED, "updated_at")
_JSON: Final = columns(Role.JSON)
_ARRAYS: Final = ", ".join(f"%s::{'text' if name in TEXTS else 'bigint'}[]" for name in _COLUMNS)
_VALUES: Final = ", ".join(f"{name}::json" if name in _JSON else name for name in _COLUMNS)
_INSERT: Final = f"""
    INSERT INTO agent_runs ({", ".join(_COLUMNS)})
    SELECT {_VALUES} FROM unnest({_ARRAYS}) AS given ({", ".join(_COLUMNS)}) ON CONFLICT (event_id) DO NOTHING
"""
_TRANSACTION: Final = 1000


def rows_per_second(url: str, count: int, ids: Ids) -> float:
    """Store so many rows, which were made before, in durable transactions of 1,000; return rows per second."""
    rows = []
    for number in range(count):
        values = [*make_row("limit", number, ids), _NOW]
        values[CREATED_AT] = _NOW
        rows.append([int(value) if isinstance(value, bool) else value for value in values])
    gc.disable()
    with psycopg.connect(url, autocommit=True, prepare_threshold=0) as connection:
        started = time.perf_counter()
        for start in range(0, count, _TRANSACTION):
            group = rows[start : start + _TRANSACTION]
            connection.execute(_INSERT.encode(), [[*column] for column in zip(*group, strict=True)])
        return count / (time.perf_counter() - started)


@click.command()
@click.option("--url", required=True)
@click.option("--rows", type=int, default=50_000)
@click.option("--ids", type=Ids, default=Ids.ORDERED)
def main(url: str, rows: int, ids: Ids) -> None:
    """Print rows per second."""
    click.echo(rows_per_second(url, rows, ids))


if __name__ == "__main__":
    main()
