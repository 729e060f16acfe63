-- Databases of other machines that are followed into this one. Each has its place: how far its changes are taken over,
-- and which of its runs is which one here.
CREATE TABLE followed_feeds (
    source text COLLATE "C" PRIMARY KEY,
    epoch text COLLATE "C" NOT NULL,
    seq bigint NOT NULL,
    begun bigint NOT NULL,
    last_event bigint NOT NULL,
    known text COLLATE "C" NOT NULL,
    taken_at text COLLATE "C" NOT NULL
);

-- Events name a run by its id there (`number`). A run that was stored here by a request has a row of the source '', so
-- that no deletion elsewhere takes it away.
CREATE TABLE followed_runs (
    source text COLLATE "C" NOT NULL,
    number bigint NOT NULL,
    run bigint NOT NULL,
    PRIMARY KEY (source, number)
);
CREATE INDEX idx_followed_run ON followed_runs (run, source);

-- What of SQLite's values the text of an original stands for.
ALTER TABLE unconverted_values ADD COLUMN kind text COLLATE "C" NOT NULL DEFAULT 'text';
