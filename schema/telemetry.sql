-- The schema of a telemetryd database, version 22.
-- Generated from migrations/ by `make schema`; do not edit.

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
, labels TEXT CHECK (labels IS NULL OR json_valid(labels)), attempt INTEGER CHECK (attempt IS NULL OR attempt >= 1), retry_of TEXT, conversation_id TEXT, trace_id TEXT, span_id TEXT, expected_by TEXT, body_digest INTEGER) STRICT;

CREATE TABLE alert_deliveries (
    number INTEGER PRIMARY KEY,
    webhook TEXT NOT NULL,
    id TEXT NOT NULL,
    created_at TEXT NOT NULL,
    body TEXT NOT NULL
) STRICT;

CREATE TABLE alert_states (
    rule TEXT NOT NULL,
    agent_name TEXT NOT NULL,
    job_type TEXT NOT NULL,
    measure TEXT NOT NULL,
    first_bad_commit TEXT NOT NULL,
    since TEXT NOT NULL,
    seq INTEGER NOT NULL,
    summary TEXT NOT NULL,
    details TEXT NOT NULL CHECK (json_valid(details)),
    PRIMARY KEY (rule, agent_name, job_type, measure, first_bad_commit)
) STRICT, WITHOUT ROWID;

CREATE TABLE backup_mark (
    number INTEGER NOT NULL,
    made_at TEXT NOT NULL
) STRICT;

CREATE TABLE change_feed (
    epoch TEXT NOT NULL,
    floor INTEGER NOT NULL,
    horizon INTEGER NOT NULL
, event_floor INTEGER NOT NULL DEFAULT 0) STRICT;

CREATE TABLE confirmed_prune (
    after_s REAL NOT NULL,
    confirmed_at TEXT NOT NULL
) STRICT;

CREATE TABLE followed_feed (
    epoch TEXT NOT NULL,
    seq INTEGER NOT NULL,
    begun INTEGER NOT NULL
) STRICT;

CREATE TABLE run_arrivals (
    created_at TEXT NOT NULL,
    run INTEGER NOT NULL REFERENCES agent_runs (id) ON DELETE CASCADE,
    agent_name TEXT NOT NULL,
    arrived_at TEXT NOT NULL,
    PRIMARY KEY (created_at, run)
) STRICT, WITHOUT ROWID;

CREATE TABLE run_changes (
    run INTEGER PRIMARY KEY REFERENCES agent_runs (id) ON DELETE CASCADE,
    seq INTEGER NOT NULL
) STRICT;

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

CREATE TABLE run_days (
    day TEXT NOT NULL PRIMARY KEY,
    first_start TEXT NOT NULL,
    last_start TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE run_deletions (
    seq INTEGER PRIMARY KEY,
    event_id TEXT NOT NULL
) STRICT;

CREATE TABLE run_events (
    id INTEGER PRIMARY KEY,
    run INTEGER NOT NULL REFERENCES agent_runs (id) ON DELETE CASCADE,
    event_key TEXT NOT NULL CHECK (length(event_key) BETWEEN 1 AND 255),
    event_type TEXT NOT NULL,
    timestamp TEXT NOT NULL,
    payload TEXT CHECK (payload IS NULL OR json_valid(payload))
) STRICT;

CREATE TABLE run_hours (
    hour TEXT NOT NULL PRIMARY KEY,
    first_start TEXT NOT NULL,
    last_start TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE run_labels (
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    created TEXT NOT NULL,
    run INTEGER NOT NULL,
    PRIMARY KEY (key, value, created, run)
) STRICT, WITHOUT ROWID;

CREATE TABLE run_minutes (
    minute TEXT NOT NULL PRIMARY KEY,
    runs INTEGER NOT NULL CHECK (runs >= 0)
) STRICT, WITHOUT ROWID;

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

CREATE TABLE run_stats_log (
    id INTEGER PRIMARY KEY,
    total INTEGER NOT NULL,
    changes TEXT NOT NULL
) STRICT;

CREATE TABLE run_totals (
    agent_name TEXT NOT NULL,
    job_type TEXT NOT NULL,
    status TEXT NOT NULL,
    runs INTEGER NOT NULL CHECK (runs >= 0),
    PRIMARY KEY (agent_name, job_type, status)
) STRICT, WITHOUT ROWID;

CREATE TABLE schema_migrations (
    version INTEGER PRIMARY KEY,
    description TEXT NOT NULL,
    applied_at TEXT NOT NULL
) STRICT;

CREATE TABLE trusted_clock (
    moment TEXT NOT NULL,
    boot_id TEXT NOT NULL,
    up_s REAL NOT NULL
) STRICT;

CREATE TABLE unconverted_values (
    run INTEGER NOT NULL,
    field TEXT NOT NULL,
    reason TEXT NOT NULL,
    original ANY NOT NULL,
    PRIMARY KEY (run, field)
) STRICT, WITHOUT ROWID;

CREATE INDEX idx_arrivals_agent ON run_arrivals (agent_name, arrived_at);

CREATE UNIQUE INDEX idx_changes_seq ON run_changes (seq);

CREATE INDEX idx_deliveries_webhook ON alert_deliveries (webhook, number);

CREATE UNIQUE INDEX idx_events_key ON run_events (run, event_key);

CREATE INDEX idx_events_time ON run_events (run, timestamp);

CREATE INDEX idx_processes_waiting ON run_processes (pid, start_time) WHERE certified_at IS NULL;

CREATE INDEX idx_runs_agent ON agent_runs (agent_name, job_type, status, created_at);

CREATE INDEX idx_runs_agent_created ON agent_runs (agent_name, created_at);

CREATE INDEX idx_runs_agent_status_created ON agent_runs (agent_name, status, created_at);

CREATE INDEX idx_runs_conversation_id ON agent_runs (conversation_id, created_at) WHERE conversation_id IS NOT NULL;

CREATE INDEX idx_runs_created_desc ON agent_runs (created_at);

CREATE INDEX idx_runs_environment ON agent_runs (environment, created_at) WHERE environment IS NOT NULL;

CREATE UNIQUE INDEX idx_runs_event_id ON agent_runs (event_id);

CREATE INDEX idx_runs_expected ON agent_runs (expected_by) WHERE expected_by IS NOT NULL AND status = 'running';

CREATE INDEX idx_runs_git_commit_hash ON agent_runs (git_commit_hash, created_at) WHERE git_commit_hash IS NOT NULL;

CREATE INDEX idx_runs_host ON agent_runs (host, created_at) WHERE host IS NOT NULL;

CREATE INDEX idx_runs_insight_id ON agent_runs (insight_id, created_at) WHERE insight_id IS NOT NULL;

CREATE INDEX idx_runs_job ON agent_runs (job_type, status, created_at);

CREATE INDEX idx_runs_parent_run_id ON agent_runs (parent_run_id, created_at) WHERE parent_run_id IS NOT NULL;

CREATE INDEX idx_runs_product ON agent_runs (product, created_at) WHERE product IS NOT NULL;

CREATE INDEX idx_runs_retry_of ON agent_runs (retry_of, created_at) WHERE retry_of IS NOT NULL;

CREATE INDEX idx_runs_run_id ON agent_runs (run_id, created_at);

CREATE INDEX idx_runs_start ON agent_runs (start_time);

CREATE INDEX idx_runs_status ON agent_runs (status, created_at);

CREATE INDEX idx_runs_trace_id ON agent_runs (trace_id, created_at) WHERE trace_id IS NOT NULL;

CREATE INDEX idx_runs_website ON agent_runs (website, created_at) WHERE website IS NOT NULL;

CREATE TRIGGER run_labels_changed AFTER UPDATE OF id, created_at, labels ON agent_runs
WHEN old.labels IS NOT NULL OR new.labels IS NOT NULL BEGIN
    DELETE FROM run_labels WHERE (key, value, created, run) IN (
        SELECT key, value, old.created_at, old.id FROM json_each(old.labels) WHERE type = 'text'
    );
    INSERT OR IGNORE INTO run_labels (key, value, created, run)
        SELECT key, value, new.created_at, new.id FROM json_each(new.labels) WHERE type = 'text';
END;

CREATE TRIGGER run_labels_removed AFTER DELETE ON agent_runs WHEN old.labels IS NOT NULL BEGIN
    DELETE FROM run_labels WHERE (key, value, created, run) IN (
        SELECT key, value, old.created_at, old.id FROM json_each(old.labels) WHERE type = 'text'
    );
END;

PRAGMA application_id = 1953262948;
PRAGMA user_version = 22;
