-- For each day of created_at (2025-12-24) the span of the start times in it, as run_hours has it for each hour: a query by
-- start time looks at days first, so that it does not read every hour of years. A span never shrinks.
CREATE TABLE run_days (
    day TEXT NOT NULL PRIMARY KEY,
    first_start TEXT NOT NULL,
    last_start TEXT NOT NULL
) STRICT, WITHOUT ROWID;

INSERT INTO run_days (day, first_start, last_start)
    SELECT substr(created_at, 1, 10), min(start_time), max(start_time) FROM agent_runs GROUP BY substr(created_at, 1, 10);
