"""The same data in both engines: copies what SQLite holds into PostgreSQL, so that their answers can be compared."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager

import orjson
from pydantic import SecretStr

from telemetryd.engine.postgres.connection import Plain, Target, connect_plainly
from telemetryd.engine.postgres.reading import session
from telemetryd.engine.postgres.statements.full_text import INDEX, WORDS
from telemetryd.engine.sqlite.statements import rollups
from telemetryd.model import events
from telemetryd.model.runs import TABLE
from telemetryd.settings import Settings, Sync

_TABLES = {
    "agent_runs": TABLE,
    "run_events": ("run", *events.COLUMNS),
    "run_deletions": ("seq", "event_id"),
    "run_arrivals": ("created_at", "run", "agent_name", "arrived_at"),
    "run_processes": (
        "run", "pid", "start_time", "boot_id", "machine", "pid_namespace", "cgroup", "oom_kills", "registered_at",
        "certified_at", "error_summary", "error_details",
    ),
    "run_totals": ("agent_name", "job_type", "status", "runs"),
    "run_minutes": ("minute", "runs"),
    "run_stats": (
        "hours", "names", "start", "agent_name", "job_type", "status", "runs", "finished", "successes",
        "items_discovered", "items_succeeded", "items_failed", "items_skipped", "duration_ms", "bins",
    ),
    "run_commits": (
        "slot", "agent_name", "job_type", "git_commit_hash", "runs", "failures", "timed", "bins", "seconds",
    ),
    "alert_states": (
        "rule", "agent_name", "job_type", "measure", "first_bad_commit", "since", "seq", "summary", "details",
    ),
    "alert_deliveries": ("number", "webhook", "id", "created_at", "body"),
    "followed_feed": ("epoch", "seq", "begun"),
    "confirmed_prune": ("after_s", "confirmed_at"),
    "trusted_clock": ("moment", "boot_id", "up_s"),
}  # fmt: skip


_ADDED_UP = ("run_totals", "run_minutes", "run_stats", "run_commits")


def target_of(url: str) -> Target:
    return Target.of(Settings(db_url=SecretStr(url), db_sync=Sync.NONE))


@contextmanager
def reading(url: str, timeout_s: float = 60) -> Iterator[Plain]:
    """A connection as readers have it."""
    with closing(connect_plainly(target_of(url), "test", session(timeout_s))) as plain:
        yield plain


def copy(connection: sqlite3.Connection, url: str, *, full_text: bool = False) -> None:
    """Copy everything that queries read; what SQLite has not added up yet waits here, too."""
    is_folded = connection.execute("SELECT EXISTS (SELECT 1 FROM run_stats)").fetchone()[0]
    if is_folded:
        rollups.fold(connection.cursor())
    with closing(connect_plainly(target_of(url), "test", {})) as plain, plain.transaction():
        for table, columns in _TABLES.items():
            if table in _ADDED_UP and not is_folded:
                continue
            rows = connection.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall()
            plain.execute(f"DELETE FROM {table}")
            _insert(plain, table, columns, rows)
        numbers = "SELECT id, coalesce((SELECT seq FROM run_changes WHERE run = id), id) FROM agent_runs"
        _insert(plain, "run_changes", ("run", "seq"), connection.execute(numbers).fetchall())
        if not is_folded:
            log = [changes for (changes,) in connection.execute("SELECT changes FROM run_stats_log ORDER BY id")]
            minutes = orjson.dumps([*map(list, connection.execute("SELECT minute, runs FROM run_minutes"))]).decode()
            _insert(plain, "run_deltas", ("changes", "facts", "minutes"), [(1, changes, None) for changes in log])
            _insert(plain, "run_deltas", ("changes", "facts", "minutes"), [(1, None, minutes[1:-1])])
        epoch, horizon, floor = connection.execute("SELECT epoch, horizon, floor FROM change_feed").fetchone()
        plain.execute("UPDATE change_feed SET epoch = %s, horizon = %s, floor = %s", (epoch, horizon, floor))
        applied = connection.execute("SELECT max(applied_at) FROM schema_migrations").fetchone()
        plain.execute("UPDATE schema_migrations SET applied_at = %s", applied)
        if full_text:
            index_words(plain)


def index_words(plain: Plain) -> None:
    plain.execute(f"CREATE INDEX {INDEX} ON agent_runs USING gin ({WORDS}) WITH (fastupdate = off)")


def _insert(plain: Plain, table: str, columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    with plain.cursor() as cursor:
        places = ", ".join(["%s"] * len(columns))
        named = f"{table} ({', '.join(columns)}) OVERRIDING SYSTEM VALUE"
        cursor.executemany(f"INSERT INTO {named} VALUES ({places})", rows)
