"""SQL that reading and writing share: the newest numbers."""

from __future__ import annotations

from typing import Final

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
