"""SQL for the index of labels: fills it for new runs, and compares it with the runs."""

from __future__ import annotations

import sqlite3
from typing import Final

_OF_RUNS: Final = """
    SELECT label.key AS key, label.value AS value, created_at AS created, agent_runs.id AS run
    FROM agent_runs NOT INDEXED CROSS JOIN json_each(labels) AS label
    WHERE labels IS NOT NULL AND label.type = 'text'
"""
_KEPT: Final = "SELECT key, value, created, run FROM run_labels"
_COUNT_WRONG: Final = f"""
    SELECT (SELECT count(*) FROM ({_OF_RUNS} EXCEPT {_KEPT})) + (SELECT count(*) FROM ({_KEPT} EXCEPT {_OF_RUNS}))
"""
_INDEX: Final = f"INSERT OR IGNORE INTO run_labels (key, value, created, run) {_OF_RUNS}"
_INDEX_AFTER: Final = f"{_INDEX} AND agent_runs.id > ?"
_INDEX_ONE: Final = f"{_INDEX} AND agent_runs.id = ?"


def index_after(cursor: sqlite3.Cursor, last: int) -> None:
    """Take in the labels of the runs that were stored after an id."""
    cursor.execute(_INDEX_AFTER, (last,))


def index_one(cursor: sqlite3.Cursor, run: int) -> None:
    """Take in the labels of a run that was just stored."""
    cursor.execute(_INDEX_ONE, (run,))


def rebuild(connection: sqlite3.Connection) -> None:
    """Fill the index anew, inside the caller's transaction."""
    connection.execute("DELETE FROM run_labels")
    connection.execute(_INDEX)


def count_wrong(connection: sqlite3.Connection) -> int:
    """Count the labels of runs that their index lacks, and those that it has and no run."""
    return int(connection.execute(_COUNT_WRONG).fetchone()[0])
