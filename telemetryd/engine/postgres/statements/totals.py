"""SQL for totals that are exact at any moment: what is added up already, and what the groups since then changed."""

from __future__ import annotations

from typing import Final

# The changes of a group are JSON: by hour, agent, job type and status the sums, of which the first counts the runs; and
# by minute the number of runs.
TOTALS: Final = """(
    SELECT agent_name, job_type, status, runs FROM run_totals
    UNION ALL
    SELECT (entry ->> 1) COLLATE "C", (entry ->> 2) COLLATE "C", (entry ->> 3) COLLATE "C", (entry -> 4 ->> 0)::bigint
    FROM run_deltas CROSS JOIN json_array_elements(('[' || facts || ']')::json) AS entry WHERE facts <> ''
) AS run_totals"""
"""The rows of `run_totals`, and those that the changes add to them; several may have the same names."""

MINUTES: Final = """(
    SELECT minute, runs FROM run_minutes
    UNION ALL
    SELECT (entry ->> 0) COLLATE "C", (entry ->> 1)::bigint
    FROM run_deltas CROSS JOIN json_array_elements(('[' || minutes || ']')::json) AS entry WHERE minutes <> ''
) AS run_minutes"""
"""The same of `run_minutes`."""
