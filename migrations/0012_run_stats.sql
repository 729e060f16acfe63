-- Statistics of the runs by the time of their created_at, kept by the writer in the transaction of the change itself.
-- A row stands for the runs of one hour or one day (`hours`), apart by status alone, by agent and status, or by agent,
-- job type and status (`names` is how many; a name that is not kept apart is ''). `start` counts hours since 1970.
-- A sum beyond 64 bits is stored as its decimal digits. Sums of durations and `bins` (telemetryd/sketches.py) leave
-- running runs out.
CREATE TABLE run_stats (
    hours INTEGER NOT NULL CHECK (hours IN (1, 24)),
    names INTEGER NOT NULL CHECK (names IN (1, 2, 3)),
    start INTEGER NOT NULL,
    agent_name TEXT NOT NULL,
    job_type TEXT NOT NULL,
    status TEXT NOT NULL,
    runs INTEGER NOT NULL,
    items_discovered ANY NOT NULL,
    items_succeeded ANY NOT NULL,
    items_failed ANY NOT NULL,
    items_skipped ANY NOT NULL,
    duration_ms ANY NOT NULL,
    bins BLOB NOT NULL,
    PRIMARY KEY (hours, names, start, agent_name, job_type, status)
) STRICT, WITHOUT ROWID;

-- What recent commits changed in them, each as one JSON text; the writer adds them up when they are many. Whoever
-- reads the statistics counts both. `total` counts the changes up to this row.
CREATE TABLE run_stats_log (
    id INTEGER PRIMARY KEY,
    total INTEGER NOT NULL,
    changes TEXT NOT NULL
) STRICT;
