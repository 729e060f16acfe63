-- What runs are filtered by beside agent, job and status. A run without such a field has no entry, so it pays
-- nothing; run_id is the only one that every run has.
CREATE INDEX idx_runs_run_id ON agent_runs (run_id, created_at);
CREATE INDEX idx_runs_parent_run_id ON agent_runs (parent_run_id, created_at) WHERE parent_run_id IS NOT NULL;
CREATE INDEX idx_runs_insight_id ON agent_runs (insight_id, created_at) WHERE insight_id IS NOT NULL;
CREATE INDEX idx_runs_git_commit_hash ON agent_runs (git_commit_hash, created_at) WHERE git_commit_hash IS NOT NULL;
CREATE INDEX idx_runs_website ON agent_runs (website, created_at) WHERE website IS NOT NULL;
CREATE INDEX idx_runs_product ON agent_runs (product, created_at) WHERE product IS NOT NULL;
CREATE INDEX idx_runs_host ON agent_runs (host, created_at) WHERE host IS NOT NULL;
CREATE INDEX idx_runs_environment ON agent_runs (environment, created_at) WHERE environment IS NOT NULL;
