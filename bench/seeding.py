"""Makes databases of any size by SQL: telemetryd's own schema, filled without telemetryd."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.workplace import TELEMETRYD_WAL, Workplace
from telemetryd.engine.sqlite.statements import rollups
from telemetryd.engine.sqlite.tools import migrate

STEP_S: Final = 3
"""Seconds between two runs, so that a larger database has a longer history, not a denser one."""

# Every combination of the 10 agents, 5 job types and 6 statuses is equally frequent and spread over all times.
# The event_id begins with digits that look random; bench/lua/patch.lua makes the same ones. Durations are spread from
# 0.1 to 100 s, so that statistics have as many bins to read as they do in use.
_FILL: Final = """
    WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :rows),
        moments AS (SELECT n, :now - (:rows - n) * :step AS moment FROM numbers)
    INSERT INTO agent_runs (
        id, event_id, run_id, created_at, updated_at, start_time, end_time, agent_name, job_type, status,
        items_discovered, items_succeeded, items_failed, duration_ms, metrics_json, host, environment, git_repo,
        git_branch, git_commit_hash, product, trigger_type
    )
    SELECT
        n,
        printf('%08x-seed-%d', n * 2654435761 % 4294967296, n),
        printf('20251231T153045Z-hugo-translator-%08d', n),
        strftime('%Y-%m-%dT%H:%M:%S.000000Z', moment, 'unixepoch'),
        strftime('%Y-%m-%dT%H:%M:%S.000000Z', moment, 'unixepoch'),
        strftime('%Y-%m-%dT%H:%M:%S.000000Z', moment - 60, 'unixepoch'),
        strftime('%Y-%m-%dT%H:%M:%S.000000Z', moment - 1, 'unixepoch'),
        'agent-' || (n % 10),
        'job-' || (n / 10 % 5),
        CASE n / 50 % 6 WHEN 0 THEN 'running' WHEN 1 THEN 'success' WHEN 2 THEN 'failure' WHEN 3 THEN 'partial'
            WHEN 4 THEN 'timeout' ELSE 'cancelled' END,
        100, 98, 2, 100 * (1 + n * 7919 % 1000), '{"tokens":12345,"cost":0.25}', 'worker-7', 'prod',
        'git@github.com:acme/site.git', 'main', 'abcdef1234567', 'words', 'cron'
    FROM moments
"""


@dataclass(frozen=True, slots=True)
class Seeds:
    """The seeded databases of a run of the benchmark, each made when it is first asked for.

    Args:
        place: where they are made, and where telemetryd makes its schema.
        folder: where they stay.
        say: told of what takes long.

    """

    place: Workplace
    folder: Path
    say: Callable[[str], None]

    def database(self, rows: int) -> Path:
        """Return the database with so many runs; loads may have added others."""
        database = self.folder / f"seed-{rows}" / "telemetry.sqlite"
        if not database.exists():
            self._make(database, rows)
        return database

    def copy(self, rows: int, folder: Path) -> Path:
        """Return a copy of it that nobody else uses; meant for small ones."""
        copy = folder / "telemetry.sqlite"
        shutil.copyfile(self.database(rows), copy)
        return copy

    def _make(self, database: Path, rows: int) -> None:
        started = time.monotonic()
        self.say(f"making a database of {rows:,} runs")
        with self.place.corner() as corner:
            fresh = corner / database.name
            with self.place.serving(TELEMETRYD_WAL, fresh) as server:
                server.stop()
            with closing(sqlite3.connect(fresh, isolation_level=None)) as connection:
                _fill(connection, rows)
            database.parent.mkdir(parents=True, exist_ok=True)
            fresh.rename(database)
        self.say(f"made in {time.monotonic() - started:.0f} s, {database.stat().st_size / 2**20:,.0f} MiB")


def _fill(connection: sqlite3.Connection, rows: int) -> None:
    # A crash may ruin the file: it does not have its name yet.
    for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -262144", "threads = 2"):
        connection.execute(f"PRAGMA {pragma}")
    indexes = connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    ).fetchall()
    connection.execute("BEGIN")
    for name, _ in indexes:
        connection.execute(f"DROP INDEX {name}")
    connection.execute(_FILL, {"rows": rows, "step": STEP_S, "now": int(time.time())})
    for _, sql in indexes:
        connection.execute(sql)
    migrate.derive(connection)
    rollups.rebuild(connection)
    connection.execute("COMMIT")
