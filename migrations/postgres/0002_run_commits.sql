-- Which commit broke it: see 0022 of SQLite. A daemon of before must not append what it counts without the commit, so the
-- column has another name: it is refused, and clients send again. The program counts everything anew after this step.
-- Compatible from 2.
CREATE TABLE run_commits (
    slot bigint NOT NULL,
    agent_name text COLLATE "C" NOT NULL,
    job_type text COLLATE "C" NOT NULL,
    git_commit_hash text COLLATE "C" NOT NULL,
    runs bigint NOT NULL,
    failures bigint NOT NULL,
    timed bigint NOT NULL,
    bins bigint NOT NULL,
    seconds bigint NOT NULL,
    PRIMARY KEY (slot, agent_name, job_type, git_commit_hash)
);

ALTER TABLE run_deltas RENAME COLUMN stats TO facts;
