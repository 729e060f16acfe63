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

INSERT INTO run_totals (agent_name, job_type, status, runs)
    SELECT agent_name, job_type, status, count(*) FROM agent_runs GROUP BY agent_name, job_type, status;

INSERT INTO run_minutes (minute, runs)
    SELECT substr(created_at, 1, 16), count(*) FROM agent_runs GROUP BY substr(created_at, 1, 16);
