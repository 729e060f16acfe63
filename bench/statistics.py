"""What the statistics cost: in ingest, on the disk, and when they are asked for.

The first part stores runs through the daemon's own statements and takes the processor time of all of it, and of the
statistics alone for the same runs on a second database. The second part counts very many runs in the statistics,
without storing the runs themselves, and asks.
"""

from __future__ import annotations

import random
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import groupby, product
from pathlib import Path

import click

from telemetryd.engine import stats_log
from telemetryd.engine.sqlite.connection import connect
from telemetryd.engine.sqlite.statements import derived, rollups
from telemetryd.engine.sqlite.statements.commands import Transaction
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.model import stats
from telemetryd.model.commands import CreateRuns
from telemetryd.model.runs import STORED, parse_run
from telemetryd.model.stats import FACTS, Facts
from telemetryd.model.values import Row, format_timestamp

_END = datetime(2026, 1, 31, tzinfo=UTC)
_NOW = format_timestamp(_END)
_OUTCOMES = random.Random(1).choices(  # noqa: S311 - made-up runs
    ("success", "failure", "partial", "timeout", "cancelled", "running"), (88, 6, 2, 2, 1, 1), k=10_007
)
_DATE = len("2026-01-31")
_QUERIES = (
    "group_by=agent_name&from=-24h",
    "group_by=status&bucket=1h&from=-24h",
    "bucket=1h&from=-30d",
    "group_by=status&bucket=1h&from=-30d",
    "group_by=agent_name,status&bucket=1d&from=-30d",
    "group_by=agent_name,status&bucket=1d&utc_offset=%2B05:00&from=-30d",
    "group_by=agent_name,job_type,status&from=-30d",
    "group_by=agent_name,job_type&bucket=1d&from=-30d",
    "group_by=agent_name,job_type&bucket=8h&from=-30d",
    "agent_name=agent-3&bucket=1h&from=-30d",
    "status=failure&bucket=1h&from=-30d",
    "group_by=agent_name&bucket=6h&from=-30d",
    "group_by=agent_name&bucket=2h&from=-30d",
    "group_by=agent_name,status&bucket=12h&from=-30d",
    "group_by=job_type&bucket=1h&from=-30d",
    "group_by=job_type,status&bucket=3h&from=-30d",
)


def _facts(runs: int, days: float) -> Iterator[Facts]:
    """Yield what the statistics know of runs of 20 agents with 5 job types each, the oldest first."""
    chance = random.Random(2)  # noqa: S311 - made-up runs
    durations = [[round(chance.lognormvariate(7 + agent * 0.4, 0.8)) for _ in range(5003)] for agent in range(20)]
    for number in range(runs):
        agent = number * 7919 % 20
        created = _END - timedelta(days=days * (1 - number / runs))
        status, duration = _OUTCOMES[number % 10_007], durations[agent][number % 5003]
        commit = f"{number * 100 // runs:07x}"  # one in so many runs, as an agent that is released now and then
        yield (
            *(format_timestamp(created), f"agent-{agent}", f"job-{number // 20 % 5}", status),
            *(100, 98, 2, 0, duration, commit),
        )


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


def _record(connection: sqlite3.Connection, summary: stats_log.Summary, changes: int) -> None:
    """Store what a group of runs adds to the statistics alone, as the writer does."""
    cursor = connection.cursor()
    logged, is_prepared = cursor.execute(f"SELECT {rollups.LOGGED}, {derived.IS_PREPARED}").fetchone()
    if not is_prepared:
        derived.prepare(cursor)
    derived.store(cursor, derived.Derived((), (), (), (), changes, stats_log.to_log(summary)), logged)


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
                    summary: stats_log.Summary = {}
                    stats_log.summarize(summary, facts[start : start + size])
                    _record(connection, summary, size)
                connection.execute("COMMIT")
                used[place] += time.thread_time() - begun
    return used[0] / len(rows) * 1e6, used[1] / len(rows) * 1e6


@click.command()
@click.option("--stored", default=50_000, help="Runs to store for the first part.")
@click.option("--counted", default=10_000_000, help="Runs to count for the second part.")
@click.option("--days", default=30, help="Days over which they are spread.")
def main(stored: int, counted: int, days: int) -> None:
    """Print what the statistics cost."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        for hours, size in product((1, 24), (64, 1000)):
            rows = [_row(number, facts) for number, facts in enumerate(_facts(stored, hours / 24))]
            whole, part = _ingest(folder / str(hours), rows, size)
            click.echo(
                f"{hours:2} h, groups of {size:5,}: {whole:6.1f} µs of processor time, {part:5.2f} µs for statistics"
            )
        with closing(_database(folder / "counted")) as connection:
            begun = time.thread_time()
            for _, facts in groupby(_facts(counted, days), key=lambda facts: facts[0][:_DATE]):
                summary: stats_log.Summary = {}
                stats_log.summarize(summary, facts)
                connection.execute("BEGIN IMMEDIATE")
                _record(connection, summary, rollups.FOLD_AT)
                connection.execute("COMMIT")
            cells, size = connection.execute("SELECT count(*), sum(length(bins)) FROM run_stats").fetchone()
            pages = connection.execute("PRAGMA page_count").fetchone()[0] * 4096
            click.echo(
                f"{counted:,} runs in {days} days ({time.thread_time() - begun:.0f} s): {cells:,} cells, "
                f"{size / 1e6:.0f} MB of bins, {pages / 1e6:.0f} MB in all, {pages / counted:.1f} bytes for each run"
            )
            for text in _QUERIES:
                query = stats.parse(text, _END)
                times = []
                for _ in range(5):
                    begun = time.thread_time()
                    groups = rollups.fetch_stats(connection, query)
                    times.append(time.thread_time() - begun)
                click.echo(f"{min(times) * 1000:7.1f} ms {len(groups):6,} groups  {text}")


if __name__ == "__main__":
    main()
