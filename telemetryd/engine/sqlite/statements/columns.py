"""SQL that reading and writing share: lengths of truncated times, columns of a process, newest numbers."""

from __future__ import annotations

from dataclasses import fields
from typing import Final

from telemetryd.model.processes import Process

MINUTE: Final = len("2025-12-24T10:00")
HOUR: Final = len("2025-12-24T10")
DAY: Final = len("2025-12-24")

PROCESS: Final = tuple(field.name for field in fields(Process))

NEWEST: Final = """max(
    (SELECT coalesce(max(id), 0) FROM agent_runs),
    (SELECT coalesce(max(seq), 0) FROM run_changes),
    (SELECT coalesce(max(seq), 0) FROM run_deletions),
    (SELECT coalesce(max(max(floor, horizon)), 0) FROM change_feed)
)"""
"""SQL for the last number that was drawn."""

NEWEST_EVENT: Final = """max(
    (SELECT coalesce(max(id), 0) FROM run_events), (SELECT coalesce(max(event_floor), 0) FROM change_feed)
)"""
"""SQL for the highest id that an event has had."""
