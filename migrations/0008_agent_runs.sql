-- The runs, in the layout of the replaced service's version 7 with what it lacked: STRICT types, CHECK
-- constraints that hold (a NULL inside IN (...) admits anything), and timestamps in one fixed-width UTC
-- form, so that text order is time order.
CREATE TABLE agent_runs (
    id INTEGER PRIMARY KEY,
    event_id TEXT NOT NULL CHECK (length(event_id) BETWEEN 1 AND 255),
    run_id TEXT NOT NULL,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    start_time TEXT NOT NULL,
    end_time TEXT,
    agent_name TEXT NOT NULL,
    job_type TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'running'
        CHECK (status IN ('running', 'success', 'failure', 'partial', 'timeout', 'cancelled')),
    product TEXT,
    product_family TEXT,
    platform TEXT,
    subdomain TEXT,
    website TEXT,
    website_section TEXT,
    item_name TEXT,
    items_discovered INTEGER NOT NULL DEFAULT 0 CHECK (items_discovered >= 0),
    items_succeeded INTEGER NOT NULL DEFAULT 0 CHECK (items_succeeded >= 0),
    items_failed INTEGER NOT NULL DEFAULT 0 CHECK (items_failed >= 0),
    items_skipped INTEGER NOT NULL DEFAULT 0 CHECK (items_skipped >= 0),
    duration_ms INTEGER NOT NULL DEFAULT 0 CHECK (duration_ms >= 0),
    input_summary TEXT,
    output_summary TEXT,
    source_ref TEXT,
    target_ref TEXT,
    error_summary TEXT,
    error_details TEXT,
    git_repo TEXT,
    git_branch TEXT,
    git_commit_hash TEXT,
    git_run_tag TEXT,
    host TEXT,
    environment TEXT,
    trigger_type TEXT,
    metrics_json TEXT CHECK (metrics_json IS NULL OR json_valid(metrics_json)),
    context_json TEXT CHECK (context_json IS NULL OR json_valid(context_json)),
    api_posted INTEGER NOT NULL DEFAULT 0 CHECK (api_posted IN (0, 1)),
    api_posted_at TEXT,
    api_retry_count INTEGER NOT NULL DEFAULT 0 CHECK (api_retry_count >= 0),
    insight_id TEXT,
    parent_run_id TEXT,
    git_commit_source TEXT CHECK (git_commit_source IS NULL OR git_commit_source IN ('manual', 'llm', 'ci')),
    git_commit_author TEXT,
    git_commit_timestamp TEXT
) STRICT;

-- Every index ends in the rowid, so one on (…, created_at) read backwards gives the order of every answer,
-- created_at DESC, id DESC, without a sort. The names are the guide's; only idx_runs_job is new. A filter
-- without a status is answered by merging the six statuses of an index that has one (statements.py).
CREATE UNIQUE INDEX idx_runs_event_id ON agent_runs (event_id);
CREATE INDEX idx_runs_created_desc ON agent_runs (created_at);
CREATE INDEX idx_runs_status ON agent_runs (status, created_at);
CREATE INDEX idx_runs_agent_created ON agent_runs (agent_name, created_at);
CREATE INDEX idx_runs_agent_status_created ON agent_runs (agent_name, status, created_at);
CREATE INDEX idx_runs_agent ON agent_runs (agent_name, job_type, status, created_at);
CREATE INDEX idx_runs_job ON agent_runs (job_type, status, created_at);
-- No query of ours walks this one (ranges of start_time go through run_hours): the guide names it, people who look
-- with sqlite3 use it, and a repair finds runs by it.
CREATE INDEX idx_runs_start ON agent_runs (start_time);

CREATE TABLE schema_migrations (
    version INTEGER PRIMARY KEY,
    description TEXT NOT NULL,
    applied_at TEXT NOT NULL
) STRICT;
