-- One number for every committed change, drawn in the order of the commits and never twice: a new run's is its id,
-- which costs nothing. Here stands the newest number of each run that was changed since, and that of each deletion.
CREATE TABLE run_changes (
    run INTEGER PRIMARY KEY REFERENCES agent_runs (id) ON DELETE CASCADE,
    seq INTEGER NOT NULL
) STRICT;

CREATE UNIQUE INDEX idx_changes_seq ON run_changes (seq);

CREATE TABLE run_deletions (
    seq INTEGER PRIMARY KEY,
    event_id TEXT NOT NULL
) STRICT;

-- One row. The epoch is another one after a restore or a salvage, which may give numbers another meaning; no number
-- up to the floor is drawn any more; deletions up to the horizon are forgotten.
CREATE TABLE change_feed (
    epoch TEXT NOT NULL,
    floor INTEGER NOT NULL,
    horizon INTEGER NOT NULL
) STRICT;

INSERT INTO change_feed (epoch, floor, horizon) VALUES (lower(hex(randomblob(6))), 0, 0);

-- How far a follower (`telemetryd follow`) has come in the sequence of another database, whose copy this one is: one
-- row, or none if it is nobody's copy. `begun` is where that sequence stood when it began.
CREATE TABLE followed_feed (
    epoch TEXT NOT NULL,
    seq INTEGER NOT NULL,
    begun INTEGER NOT NULL
) STRICT;
