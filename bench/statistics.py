"""What the statistics cost when runs are stored: processor time of all of it, and of the statistics alone.

It stores runs through the daemon's own statements, and counts the same runs in a second database. What a query costs,
the scenario `stats` of `make bench-large` measures.
"""

from __future__ import annotations

import random
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path

import click

from telemetryd.engine.sqlite.connection import connect
from telemetryd.engine.sqlite.statements import rollups
from telemetryd.engine.sqlite.statements.commands import Transaction
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.model.commands import CreateRuns
from telemetryd.model.runs import STORED, parse_run
from telemetryd.model.stats import FACTS, Facts
from telemetryd.model.values import Row, format_timestamp

_END = datetime(2026, 1, 31, tzinfo=UTC)
_NOW = format_timestamp(_END)
_OUTCOMES = random.Random(1).choices(  # noqa: S311 - made-up runs
    ("success", "failure", "partial", "timeout", "cancelled", "running"), (88, 6, 2, 2, 1, 1), k=10_007
)


def _facts(runs: int, days: float) -> Iterator[Facts]:
    """Yield what the statistics know of runs of 20 agents with 5 job types each, the oldest first."""
    chance = random.Random(2)  # noqa: S311 - made-up runs
    durations = [[round(chance.lognormvariate(7 + agent * 0.4, 0.8)) for _ in range(5003)] for agent in range(20)]
    for number in range(runs):
        agent = number * 7919 % 20
        created = _END - timedelta(days=days * (1 - number / runs))
        status, duration = _OUTCOMES[number % 10_007], durations[agent][number % 5003]
        yield format_timestamp(created), f"agent-{agent}", f"job-{number // 20 % 5}", status, 100, 98, 2, 0, duration


def _row(number: int, facts: Facts) -> Row:
    given = dict(zip(FACTS, facts, strict=True))
    run = {"event_id": f"{random.getrandbits(32):08x}-{number}", "run_id": f"run-{number}", "host": "worker-7"}
    return parse_run({**run, **given, "start_time": given["created_at"], "metrics_json": {"tokens": number}}).row


def _database(path: Path) -> sqlite3.Connection:
    connection = connect(path, "rwc")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = OFF")
    migrate.create(connection, _NOW)
    return connection


def _ingest(folder: Path, rows: list[Row], size: int) -> tuple[float, float]:
    """Return the microseconds for each run of all that the writer's thread does, and of the statistics alone."""
    folder.mkdir(exist_ok=True)
    facts = [tuple(row[STORED.index(name)] for name in FACTS) for row in rows]
    with closing(_database(folder / f"all-{size}")) as whole, closing(_database(folder / f"part-{size}")) as part:
        used = [0.0, 0.0]
        for start in range(0, len(rows), size):
            for place, connection in enumerate((whole, part)):
                begun = time.thread_time()
                connection.execute("BEGIN IMMEDIATE")
                if place == 0:
                    transaction = Transaction(connection, _NOW)
                    transaction.apply([CreateRuns((row,)) for row in rows[start : start + size]])
                    transaction.finish()
                else:
                    summary: rollups.Summary = {}
                    rollups.summarize(summary, facts[start : start + size])
                    rollups.record(connection.cursor(), summary, size)
                connection.execute("COMMIT")
                used[place] += time.thread_time() - begun
    return used[0] / len(rows) * 1e6, used[1] / len(rows) * 1e6


@click.command()
@click.option("--stored", default=50_000, help="Runs to store.")
def main(stored: int) -> None:
    """Print what the statistics cost."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        for hours, size in product((1, 24), (64, 1000)):
            rows = [_row(number, facts) for number, facts in enumerate(_facts(stored, hours / 24))]
            whole, part = _ingest(folder / str(hours), rows, size)
            click.echo(
                f"{hours:2} h, groups of {size:5,}: {whole:6.1f} µs of processor time, {part:5.2f} µs for statistics"
            )


if __name__ == "__main__":
    main()
