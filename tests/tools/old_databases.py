"""Makes databases in the layouts of the service that telemetryd replaces, with the faults met in the field."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

_V5_FIELDS = """
    agent_name TEXT NOT NULL, job_type TEXT, status TEXT DEFAULT 'running', start_time TEXT NOT NULL, end_time TEXT,
    product TEXT, product_family TEXT, platform TEXT, subdomain TEXT, website TEXT, website_section TEXT,
    item_name TEXT, items_discovered INTEGER DEFAULT 0, items_succeeded INTEGER DEFAULT 0,
    items_failed INTEGER DEFAULT 0, items_skipped INTEGER DEFAULT 0, duration_ms INTEGER DEFAULT 0,
    input_summary TEXT, output_summary TEXT, source_ref TEXT, target_ref TEXT, error_summary TEXT,
    error_details TEXT, git_repo TEXT, git_branch TEXT, git_commit_hash TEXT, git_run_tag TEXT, host TEXT,
    environment TEXT, trigger_type TEXT, metrics_json TEXT, context_json TEXT, api_posted INTEGER DEFAULT 0,
    api_posted_at TEXT, api_retry_count INTEGER DEFAULT 0, insight_id TEXT, parent_run_id TEXT,
    created_at TEXT DEFAULT (datetime('now')), updated_at TEXT DEFAULT (datetime('now'))
"""
_COMMIT_FIELDS = ", git_commit_source TEXT, git_commit_author TEXT, git_commit_timestamp TEXT"
_OWNER_FIELDS = ", schema_version INTEGER DEFAULT {version}, agent_owner TEXT"

LAYOUTS = {
    "v5": f"CREATE TABLE agent_runs (run_id TEXT PRIMARY KEY, {_V5_FIELDS}"
    + _COMMIT_FIELDS.replace(", git_commit_source TEXT", ", job_source TEXT")
    + ", agent_owner TEXT)",
    "v5-without-rowid": f"CREATE TABLE agent_runs (run_id TEXT PRIMARY KEY, {_V5_FIELDS}) WITHOUT ROWID",
    "v6-run-id": "CREATE TABLE agent_runs (run_id TEXT PRIMARY KEY, event_id TEXT NOT NULL UNIQUE, "
    f"{_V5_FIELDS}{_OWNER_FIELDS.format(version=6)})",
    "v6-id": "CREATE TABLE agent_runs (id INTEGER PRIMARY KEY AUTOINCREMENT, event_id TEXT NOT NULL, run_id TEXT, "
    f"{_V5_FIELDS})",
    "v7": "CREATE TABLE agent_runs (id INTEGER PRIMARY KEY AUTOINCREMENT, event_id TEXT NOT NULL UNIQUE, "
    f"run_id TEXT NOT NULL, {_V5_FIELDS}{_COMMIT_FIELDS}{_OWNER_FIELDS.format(version=7)})",
}

_LOGS = {
    "none": "",
    "version": "CREATE TABLE schema_migrations (version INTEGER PRIMARY KEY, description TEXT, applied_at TEXT);"
    "INSERT INTO schema_migrations VALUES (1, 'first', '2025-01-01'), ({version}, 'newest', '2025-06-01');",
    "id": "CREATE TABLE schema_migrations (id INTEGER PRIMARY KEY, name TEXT);"
    "INSERT INTO schema_migrations VALUES ({version}, 'newest');",
}

_NEIGHBOURS = """
    CREATE TABLE run_events (id INTEGER PRIMARY KEY, run_id TEXT NOT NULL, event TEXT,
        FOREIGN KEY (run_id) REFERENCES agent_runs (run_id) ON DELETE CASCADE);
    CREATE INDEX idx_events_run ON run_events (run_id);
    CREATE TABLE commits (hash TEXT PRIMARY KEY, message TEXT);
    INSERT INTO run_events (run_id, event) VALUES ('run-1', 'started'), ('run-1', 'ended'), ('run-2', 'started');
    INSERT INTO commits VALUES ('abc1234', 'a commit');
    CREATE VIEW latest AS SELECT run_id, max(created_at) FROM agent_runs GROUP BY run_id;
    CREATE TRIGGER touch AFTER UPDATE ON agent_runs BEGIN SELECT 1; END;
"""

_INDEXES = """
    CREATE INDEX idx_runs_agent ON agent_runs (agent_name);
    CREATE INDEX idx_runs_status ON agent_runs (status);
    CREATE INDEX idx_runs_start ON agent_runs (start_time);
"""


def make_old_database(
    path: Path, layout: str, rows: int = 20, *, log: str = "version", neighbours: bool = True, wal: bool = False
) -> Path:
    """Make a database of an old layout; every third run has a fault that a migration must normalise."""
    version = int(layout[1])
    with closing(sqlite3.connect(path)) as connection, connection:
        if wal:
            connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(LAYOUTS[layout] + ";" + _INDEXES)
        connection.executescript(_LOGS[log].format(version=version))
        if neighbours:
            connection.executescript(_NEIGHBOURS)
        names = [row[1] for row in connection.execute("PRAGMA table_info(agent_runs)")]
        wanted = [name for name in _row(0) if name in names]
        connection.executemany(
            f"INSERT INTO agent_runs ({', '.join(wanted)}) VALUES ({', '.join('?' * len(wanted))})",
            ([row[name] for name in wanted] for row in map(_row, range(rows))),
        )
    return path


def _row(number: int) -> dict[str, object]:
    is_odd_one = number % 3 == 2
    day = 1 + number % 28
    return {
        "run_id": f"run-{number}",
        "event_id": f"event-{number}",
        "agent_name": f"agent-{number % 5}",
        "job_type": None if is_odd_one else "translate",
        "status": ("failed", "completed", "success", "running")[number % 4],
        "start_time": f"2025-01-{day:02d}T10:00:00+02:00",
        "end_time": None if number % 2 else f"2025-01-{day:02d} 11:30:00",
        "created_at": f"2025-01-{day:02d} 10:00:00",
        "updated_at": f"2025-01-{day:02d} 10:30:00",
        "duration_ms": None if is_odd_one else number,
        "items_failed": None if is_odd_one else 1,
        "metrics_json": '{"tokens": 5}',
        "agent_owner": "team-a",
        "git_commit_source": "llm",
        "git_commit_author": "A. Uthor",
        "api_posted": 1,
    }


FAULTS: dict[str, object] = {
    "status": "exploded",
    "start_time": "yesterday",
    "end_time": 1735725600,
    "duration_ms": -5,
    "items_failed": 1.5,
    "metrics_json": "{not json",
    "context_json": "[1, 2]",
    "error_summary": b"\xff\xfe broken",
    "api_posted": 7,
}


def spoil(path: Path, run_id: str = "run-3") -> None:
    """Put a value that has no form of today into many fields of one run."""
    with closing(sqlite3.connect(path)) as connection, connection:
        names = [row[1] for row in connection.execute("PRAGMA table_info(agent_runs)")]
        given = {name: value for name, value in FAULTS.items() if name in names}
        connection.execute(
            f"UPDATE agent_runs SET {', '.join(f'{name} = ?' for name in given)} WHERE run_id = ?",
            (*given.values(), run_id),
        )
