"""Makes a current database with many runs, faster than over HTTP, through the daemon's own statements."""

from __future__ import annotations

import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from telemetryd.engine.sqlite.connection import connect
from telemetryd.engine.sqlite.statements.commands import Transaction
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.model.commands import CreateRuns
from telemetryd.model.runs import parse_run
from telemetryd.model.values import format_timestamp

_SLICE = 5000
_STATUSES = ("success", "failure", "running", "partial", "timeout", "cancelled")


def make_database(path: Path, runs: int, *, days: int = 120) -> Path:
    """Make a database whose runs were created evenly over the last days, the newest last."""
    now = datetime.now(UTC)
    with closing(connect(path, "rwc")) as connection:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA synchronous = OFF")
        migrate.create(connection, format_timestamp(now))
        for start in range(0, runs, _SLICE):
            rows = tuple(
                parse_run(_run(number, now - timedelta(days=days * (1 - number / runs)))).row
                for number in range(start, min(start + _SLICE, runs))
            )
            connection.execute("BEGIN IMMEDIATE")
            transaction = Transaction(connection, format_timestamp(now))
            transaction.apply([CreateRuns(rows)])
            transaction.finish()
            connection.execute("COMMIT")
        connection.execute("UPDATE agent_runs SET updated_at = created_at")
    return path


def _run(number: int, created: datetime) -> dict[str, object]:
    return {
        "event_id": f"{number:08d}-4266-4141-8000-{number * 7919 % 10**12:012d}",
        "run_id": f"run-{number}",
        "created_at": format_timestamp(created),
        "start_time": format_timestamp(created),
        "agent_name": f"agent-{number % 20}",
        "job_type": f"job-{number % 7}",
        "status": _STATUSES[number % 6],
        "items_succeeded": number % 100,
        "duration_ms": number % 60_000,
        "metrics_json": {"tokens": number, "model": "m" * (number % 30)},
        "error_summary": "x" * (number % 80),
    }


if __name__ == "__main__":
    make_database(Path(sys.argv[1]), int(sys.argv[2]))
