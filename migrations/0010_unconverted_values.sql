-- Originals of values that `telemetryd migrate` (or the salvage of a damaged file) could not bring into a
-- field of agent_runs, verbatim and in their own type: what stood there, in which field, and why it could
-- not stay. Empty in a database that was never older.
CREATE TABLE unconverted_values (
    run INTEGER NOT NULL,
    field TEXT NOT NULL,
    reason TEXT NOT NULL,
    original ANY NOT NULL,
    PRIMARY KEY (run, field)
) STRICT, WITHOUT ROWID;
