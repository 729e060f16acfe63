-- The clock of an agent may be ahead. Here stand the runs whose created_at lay ahead of their arrival, with that moment by
-- the daemon's clock: how old such a run is counts from there. A run that is not here is as old as its created_at says.
-- Of runs from before this step only the last change is known, which lies at their arrival or after it.
CREATE TABLE run_arrivals (
    created_at TEXT NOT NULL,
    run INTEGER NOT NULL REFERENCES agent_runs (id) ON DELETE CASCADE,
    agent_name TEXT NOT NULL,
    arrived_at TEXT NOT NULL,
    PRIMARY KEY (created_at, run)
) STRICT, WITHOUT ROWID;

CREATE INDEX idx_arrivals_agent ON run_arrivals (agent_name, arrived_at);

INSERT INTO run_arrivals (created_at, run, agent_name, arrived_at)
    SELECT created_at, id, agent_name, updated_at FROM agent_runs WHERE created_at > updated_at
    ON CONFLICT DO NOTHING;

-- Which age the operator has confirmed, in seconds: runs that are older may be deleted without being asked again. One row,
-- or none while nothing may be deleted without a command.
CREATE TABLE confirmed_prune (
    after_s REAL NOT NULL,
    confirmed_at TEXT NOT NULL
) STRICT;

-- When the clock was last known to be right: one row, or none if it was never asked for. The machine had then been up for
-- `up_s` seconds of the boot `boot_id`, so within that boot any later jump of the clock shows; after it, the moment alone
-- tells. A boot_id of '' says that only the moment is known.
CREATE TABLE trusted_clock (
    moment TEXT NOT NULL,
    boot_id TEXT NOT NULL,
    up_s REAL NOT NULL
) STRICT;

-- In a backup, and only there: its place in the order in which the backups of its folder were made, and when it was made by
-- the clock of that moment. Rotation goes by the number, because a clock may be set back.
CREATE TABLE backup_mark (
    number INTEGER NOT NULL,
    made_at TEXT NOT NULL
) STRICT;
