-- What /metrics and /metadata answer, kept by the writer in the transaction of the change itself, so that
-- they cost the same at any number of runs.
CREATE TABLE run_totals (
    agent_name TEXT NOT NULL,
    job_type TEXT NOT NULL,
    status TEXT NOT NULL,
    runs INTEGER NOT NULL CHECK (runs >= 0),
    PRIMARY KEY (agent_name, job_type, status)
) STRICT, WITHOUT ROWID;

-- Runs by the minute of their created_at (2025-12-24T10:00), for the count of the last 24 hours.
CREATE TABLE run_minutes (
    minute TEXT NOT NULL PRIMARY KEY,
    runs INTEGER NOT NULL CHECK (runs >= 0)
) STRICT, WITHOUT ROWID;

-- For each hour of created_at (2025-12-24T10) the span of the start times in it, so that a query by start time
-- need not walk through runs that were created long before or after. A span never shrinks.
CREATE TABLE run_hours (
    hour TEXT NOT NULL PRIMARY KEY,
    first_start TEXT NOT NULL,
    last_start TEXT NOT NULL
) STRICT, WITHOUT ROWID;

INSERT INTO run_totals (agent_name, job_type, status, runs)
    SELECT agent_name, job_type, status, count(*) FROM agent_runs GROUP BY agent_name, job_type, status;

INSERT INTO run_minutes (minute, runs)
    SELECT substr(created_at, 1, 16), count(*) FROM agent_runs GROUP BY substr(created_at, 1, 16);

INSERT INTO run_hours (hour, first_start, last_start)
    SELECT substr(created_at, 1, 13), min(start_time), max(start_time) FROM agent_runs GROUP BY substr(created_at, 1, 13);
