-- What happened inside a run. The key is unique in its run, so a repeated request stores nothing twice; the
-- second index answers a run's events in order, by time and then by arrival. Rows refer to the run's number, not
-- to its event_id, which would stand in the table and in both indexes. Foreign keys are not enforced (older
-- databases bring tables whose references cannot be): pruning deletes a run's rows itself, `check` finds strays.
CREATE TABLE run_events (
    id INTEGER PRIMARY KEY,
    run INTEGER NOT NULL REFERENCES agent_runs (id) ON DELETE CASCADE,
    event_key TEXT NOT NULL CHECK (length(event_key) BETWEEN 1 AND 255),
    event_type TEXT NOT NULL,
    timestamp TEXT NOT NULL,
    payload TEXT CHECK (payload IS NULL OR json_valid(payload))
) STRICT;

CREATE UNIQUE INDEX idx_events_key ON run_events (run, event_key);
CREATE INDEX idx_events_time ON run_events (run, timestamp);

-- The process that works on a run, as the daemon itself saw it, and what was written about its end: a finish
-- that arrives later clears exactly that. `machine` is a hash of the machine's id.
CREATE TABLE run_processes (
    run INTEGER PRIMARY KEY REFERENCES agent_runs (id) ON DELETE CASCADE,
    pid INTEGER NOT NULL,
    start_time INTEGER NOT NULL,
    boot_id TEXT NOT NULL,
    machine TEXT NOT NULL,
    pid_namespace TEXT NOT NULL,
    cgroup TEXT,
    oom_kills INTEGER,
    registered_at TEXT NOT NULL,
    certified_at TEXT,
    error_summary TEXT,
    error_details TEXT
) STRICT;

-- The registrations that still wait for an end.
CREATE INDEX idx_processes_waiting ON run_processes (pid, start_time) WHERE certified_at IS NULL;
