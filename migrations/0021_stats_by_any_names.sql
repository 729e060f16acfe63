-- Statistics by any names: a row stands for the runs of one hour, six hours or one day (`hours`), apart by those names of
-- which `names` holds the bit (1 agent, 2 job type; a name that is not kept apart is ''), and by status. A status of ''
-- counts every run, the others only theirs; success has no rows, because its runs are those that are left. So most runs are
-- counted once, and every grouping reads few rows. `finished` and `successes` are parts of `runs`. The rest is as it was; the
-- program counts the rows anew after this step.
DROP TABLE run_stats;

CREATE TABLE run_stats (
    hours INTEGER NOT NULL CHECK (hours IN (1, 6, 24)),
    names INTEGER NOT NULL CHECK (names BETWEEN 0 AND 3),
    start INTEGER NOT NULL,
    agent_name TEXT NOT NULL,
    job_type TEXT NOT NULL,
    status TEXT NOT NULL,
    runs INTEGER NOT NULL,
    finished INTEGER NOT NULL,
    successes INTEGER NOT NULL,
    items_discovered ANY NOT NULL,
    items_succeeded ANY NOT NULL,
    items_failed ANY NOT NULL,
    items_skipped ANY NOT NULL,
    duration_ms ANY NOT NULL,
    bins BLOB NOT NULL,
    PRIMARY KEY (hours, names, start, agent_name, job_type, status)
) STRICT, WITHOUT ROWID;
