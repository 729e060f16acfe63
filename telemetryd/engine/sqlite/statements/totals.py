"""Maintains the counts of runs by agent, minute, hour and day as a group of commands changes them."""

from __future__ import annotations

from typing import Final

# What is added to the totals goes in as one JSON array, in one step of SQLite (see `Transaction`).
_ADD_TO_TOTALS: Final = """
    INSERT INTO run_totals (agent_name, job_type, status, runs)
    SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
        json_extract(value, '$[3]') FROM json_each(?) WHERE true
    ON CONFLICT (agent_name, job_type, status) DO UPDATE SET runs = runs + excluded.runs
"""

_ADD_TO_MINUTES: Final = """
    INSERT INTO run_minutes (minute, runs)
    SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(?) WHERE true
    ON CONFLICT (minute) DO UPDATE SET runs = runs + excluded.runs
"""

_WIDEN_HOURS, _WIDEN_DAYS = (
    f"""
    INSERT INTO {table} ({key}, first_start, last_start)
    SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]')
        FROM json_each(?) WHERE true
    ON CONFLICT ({key}) DO UPDATE SET
        first_start = min(first_start, excluded.first_start), last_start = max(last_start, excluded.last_start)
"""
    for table, key in (("run_hours", "hour"), ("run_days", "day"))
)


# A total that has drifted (a row changed by hand) is no reason to refuse what agents send.
_TAKE_FROM_TOTAL: Final = """
    UPDATE run_totals SET runs = max(runs - ?, 0) WHERE agent_name = ? AND job_type = ? AND status = ?
"""

_TAKE_FROM_MINUTE: Final = "UPDATE run_minutes SET runs = max(runs - ?, 0) WHERE minute = ?"


_DROP_TOTAL: Final = "DELETE FROM run_totals WHERE agent_name = ? AND job_type = ? AND status = ? AND runs = 0"


_DROP_MINUTE: Final = "DELETE FROM run_minutes WHERE minute = ? AND runs = 0"


_DROP_HOUR: Final = """
    DELETE FROM run_hours WHERE hour = :hour
        AND NOT EXISTS (SELECT 1 FROM run_minutes WHERE minute >= :hour || ':' AND minute < :hour || ';')
"""

_DROP_DAY: Final = """
    DELETE FROM run_days WHERE day = :day
        AND NOT EXISTS (SELECT 1 FROM run_hours WHERE hour >= :day AND hour < :day || 'U')
"""  # U is the character after T
