"""Leaves a database as SIGKILL leaves it in the middle of a commit with a rollback journal."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path


def cut_off_growing(path: Path) -> None:
    """Cut off a commit after its first write: page 1 names more pages than the file has (fileformat2.html, 1.3)."""
    journal = path.with_name(f"{path.name}-journal")
    before = path.read_bytes()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN")
        connection.execute("CREATE TABLE grown AS SELECT randomblob(2000) FROM agent_runs")
        connection.execute("UPDATE agent_runs SET updated_at = updated_at")
        log = journal.read_bytes()
        connection.execute("ROLLBACK")
    pages = int.from_bytes(before[28:32], "big")
    first = before[:28] + (pages + 20).to_bytes(4, "big") + before[32:]
    assert int.from_bytes(before[24:28], "big") == int.from_bytes(before[92:96], "big")
    path.write_bytes(first)
    journal.write_bytes(log)
