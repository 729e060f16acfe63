-- Which commit broke it: what counts of the finished runs of each commit, by six hours of their created_at (`slot` counts
-- them since 1970), agent and job type. Runs without a commit have rows under ''. Every number is a sum, so a change takes
-- away exactly what was counted: `timed` counts successful runs with a duration, `bins` adds up in which bins these fall
-- (telemetryd/model/sketches.py), `seconds` how long after the slot's begin runs were created. The writer logs what it
-- changes in run_stats_log and adds the log up, as it does for run_stats; the program counts all of it anew after this step.
CREATE TABLE run_commits (
    slot INTEGER NOT NULL,
    agent_name TEXT NOT NULL,
    job_type TEXT NOT NULL,
    git_commit_hash TEXT NOT NULL,
    runs INTEGER NOT NULL,
    failures INTEGER NOT NULL,
    timed INTEGER NOT NULL,
    bins INTEGER NOT NULL,
    seconds INTEGER NOT NULL,
    PRIMARY KEY (slot, agent_name, job_type, git_commit_hash)
) STRICT, WITHOUT ROWID;
