-- The schema of a database on PostgreSQL. Text is compared bytewise, as SQLite and Python do, whatever the locale.

-- Ids of runs and numbers of changes come from one counter: a run's number is always above its id.
CREATE SEQUENCE numbers AS bigint;
CREATE SEQUENCE event_numbers AS bigint;

CREATE TABLE agent_runs (
    id bigint PRIMARY KEY DEFAULT nextval('numbers'),
    event_id text COLLATE "C" NOT NULL CHECK (length(event_id) BETWEEN 1 AND 255),
    run_id text COLLATE "C" NOT NULL,
    created_at text COLLATE "C" NOT NULL,
    updated_at text COLLATE "C" NOT NULL,
    start_time text COLLATE "C" NOT NULL,
    end_time text COLLATE "C",
    agent_name text COLLATE "C" NOT NULL,
    job_type text COLLATE "C" NOT NULL,
    status text COLLATE "C" NOT NULL DEFAULT 'running'
        CHECK (status IN ('running', 'success', 'failure', 'partial', 'timeout', 'cancelled')),
    product text COLLATE "C",
    product_family text COLLATE "C",
    platform text COLLATE "C",
    subdomain text COLLATE "C",
    website text COLLATE "C",
    website_section text COLLATE "C",
    item_name text COLLATE "C",
    items_discovered bigint NOT NULL DEFAULT 0 CHECK (items_discovered >= 0),
    items_succeeded bigint NOT NULL DEFAULT 0 CHECK (items_succeeded >= 0),
    items_failed bigint NOT NULL DEFAULT 0 CHECK (items_failed >= 0),
    items_skipped bigint NOT NULL DEFAULT 0 CHECK (items_skipped >= 0),
    duration_ms bigint NOT NULL DEFAULT 0 CHECK (duration_ms >= 0),
    input_summary text COLLATE "C",
    output_summary text COLLATE "C",
    source_ref text COLLATE "C",
    target_ref text COLLATE "C",
    error_summary text COLLATE "C",
    error_details text COLLATE "C",
    git_repo text COLLATE "C",
    git_branch text COLLATE "C",
    git_commit_hash text COLLATE "C",
    git_run_tag text COLLATE "C",
    host text COLLATE "C",
    environment text COLLATE "C",
    trigger_type text COLLATE "C",
    metrics_json json,
    context_json json,
    api_posted bigint NOT NULL DEFAULT 0 CHECK (api_posted IN (0, 1)),
    api_posted_at text COLLATE "C",
    api_retry_count bigint NOT NULL DEFAULT 0 CHECK (api_retry_count >= 0),
    insight_id text COLLATE "C",
    parent_run_id text COLLATE "C",
    git_commit_source text COLLATE "C"
        CHECK (git_commit_source IS NULL OR git_commit_source IN ('manual', 'llm', 'ci')),
    git_commit_author text COLLATE "C",
    git_commit_timestamp text COLLATE "C",
    labels json,
    attempt bigint CHECK (attempt IS NULL OR attempt >= 1),
    retry_of text COLLATE "C",
    conversation_id text COLLATE "C",
    trace_id text COLLATE "C",
    span_id text COLLATE "C",
    expected_by text COLLATE "C",
    body_digest bigint
) WITH (fillfactor = 90, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.02);
CREATE UNIQUE INDEX idx_runs_event_id ON agent_runs (event_id);
CREATE INDEX idx_runs_created_desc ON agent_runs (created_at, id);
CREATE INDEX idx_runs_status ON agent_runs (status, created_at, id);
CREATE INDEX idx_runs_agent ON agent_runs (agent_name, job_type, status, created_at, id);
CREATE INDEX idx_runs_agent_created ON agent_runs (agent_name, created_at, id);
CREATE INDEX idx_runs_agent_status_created ON agent_runs (agent_name, status, created_at, id);
CREATE INDEX idx_runs_job ON agent_runs (job_type, status, created_at, id);
CREATE INDEX idx_runs_start ON agent_runs (start_time, id) INCLUDE (created_at);
CREATE INDEX idx_runs_run_id ON agent_runs (run_id, created_at, id);
CREATE INDEX idx_runs_expected ON agent_runs (expected_by) WHERE expected_by IS NOT NULL AND status = 'running';

-- These texts may have any length, an entry of an index may not: a query for a short text must say that it is one.
CREATE INDEX idx_runs_conversation_id ON agent_runs (conversation_id, created_at, id) WHERE length(conversation_id) <= 255;
CREATE INDEX idx_runs_environment ON agent_runs (environment, created_at, id) WHERE length(environment) <= 255;
CREATE INDEX idx_runs_git_commit_hash ON agent_runs (git_commit_hash, created_at, id) WHERE length(git_commit_hash) <= 255;
CREATE INDEX idx_runs_host ON agent_runs (host, created_at, id) WHERE length(host) <= 255;
CREATE INDEX idx_runs_insight_id ON agent_runs (insight_id, created_at, id) WHERE length(insight_id) <= 255;
CREATE INDEX idx_runs_parent_run_id ON agent_runs (parent_run_id, created_at, id) WHERE length(parent_run_id) <= 255;
CREATE INDEX idx_runs_product ON agent_runs (product, created_at, id) WHERE length(product) <= 255;
CREATE INDEX idx_runs_retry_of ON agent_runs (retry_of, created_at, id) WHERE length(retry_of) <= 255;
CREATE INDEX idx_runs_trace_id ON agent_runs (trace_id, created_at, id) WHERE length(trace_id) <= 255;
CREATE INDEX idx_runs_website ON agent_runs (website, created_at, id) WHERE length(website) <= 255;

-- No references are enforced: each would lock the run for every event. A deletion takes all that belongs to a run.
CREATE TABLE run_events (
    id bigint PRIMARY KEY,
    run bigint NOT NULL,
    event_key text COLLATE "C" NOT NULL CHECK (length(event_key) BETWEEN 1 AND 255),
    event_type text COLLATE "C" NOT NULL,
    timestamp text COLLATE "C" NOT NULL,
    payload json
);
CREATE UNIQUE INDEX idx_events_key ON run_events (run, event_key);
CREATE INDEX idx_events_time ON run_events (run, timestamp, id);

-- Every run has a row here, also a new one: its number is drawn at COMMIT, its id before.
CREATE TABLE run_changes (
    run bigint PRIMARY KEY,
    seq bigint NOT NULL
) WITH (fillfactor = 90, autovacuum_vacuum_scale_factor = 0.02);
CREATE UNIQUE INDEX idx_changes_seq ON run_changes (seq);

CREATE TABLE run_deletions (
    seq bigint PRIMARY KEY,
    event_id text COLLATE "C" NOT NULL
);

CREATE TABLE change_feed (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch text COLLATE "C" NOT NULL,
    floor bigint NOT NULL,
    horizon bigint NOT NULL
);
INSERT INTO change_feed (epoch, floor, horizon)
    VALUES (left(replace(gen_random_uuid()::text, '-', ''), 12), 0, 0);

CREATE TABLE run_labels (
    key text COLLATE "C" NOT NULL,
    value text COLLATE "C" NOT NULL,
    created text COLLATE "C" NOT NULL,
    run bigint NOT NULL,
    PRIMARY KEY (key, value, created, run)
);

CREATE FUNCTION run_labels_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' AND OLD.labels IS NOT NULL THEN
        DELETE FROM run_labels USING json_each(OLD.labels) AS label WHERE run_labels.key = label.key
            AND run_labels.value = label.value #>> '{}' AND created = OLD.created_at AND run = OLD.id;
    END IF;
    IF TG_OP <> 'DELETE' AND NEW.labels IS NOT NULL THEN
        INSERT INTO run_labels (key, value, created, run)
            SELECT label.key, label.value #>> '{}', NEW.created_at, NEW.id FROM json_each(NEW.labels) AS label
            WHERE json_typeof(label.value) = 'string' ON CONFLICT DO NOTHING;
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER run_labels_created AFTER INSERT ON agent_runs FOR EACH ROW
    WHEN (NEW.labels IS NOT NULL) EXECUTE FUNCTION run_labels_changed();
CREATE TRIGGER run_labels_changed AFTER UPDATE OF id, created_at, labels ON agent_runs FOR EACH ROW
    WHEN (OLD.labels IS NOT NULL OR NEW.labels IS NOT NULL) EXECUTE FUNCTION run_labels_changed();
CREATE TRIGGER run_labels_removed AFTER DELETE ON agent_runs FOR EACH ROW
    WHEN (OLD.labels IS NOT NULL) EXECUTE FUNCTION run_labels_changed();

CREATE TABLE run_arrivals (
    created_at text COLLATE "C" NOT NULL,
    run bigint NOT NULL,
    agent_name text COLLATE "C" NOT NULL,
    arrived_at text COLLATE "C" NOT NULL,
    PRIMARY KEY (created_at, run)
);
CREATE INDEX idx_arrivals_agent ON run_arrivals (agent_name, arrived_at);

CREATE TABLE run_processes (
    run bigint PRIMARY KEY,
    pid bigint NOT NULL,
    start_time bigint NOT NULL,
    boot_id text COLLATE "C" NOT NULL,
    machine text COLLATE "C" NOT NULL,
    pid_namespace text COLLATE "C" NOT NULL,
    cgroup text COLLATE "C",
    oom_kills bigint,
    registered_at text COLLATE "C" NOT NULL,
    certified_at text COLLATE "C",
    error_summary text COLLATE "C",
    error_details text COLLATE "C"
);
CREATE INDEX idx_processes_waiting ON run_processes (pid, start_time) WHERE certified_at IS NULL;

-- What each group of commands changed: one row, until it is added to the three tables after it. Nobody waits for a row.
-- `stats` and `minutes` are JSON arrays without their brackets, so that many are joined to one.
CREATE TABLE run_deltas (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    changes bigint NOT NULL,
    stats text COLLATE "C",
    minutes text COLLATE "C"
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

CREATE TABLE run_stats (
    hours bigint NOT NULL CHECK (hours IN (1, 6, 24)),
    names bigint NOT NULL CHECK (names BETWEEN 0 AND 3),
    start bigint NOT NULL,
    agent_name text COLLATE "C" NOT NULL,
    job_type text COLLATE "C" NOT NULL,
    status text COLLATE "C" NOT NULL,
    runs bigint NOT NULL,
    finished bigint NOT NULL,
    successes bigint NOT NULL,
    items_discovered numeric NOT NULL,
    items_succeeded numeric NOT NULL,
    items_failed numeric NOT NULL,
    items_skipped numeric NOT NULL,
    duration_ms numeric NOT NULL,
    bins bytea NOT NULL,
    PRIMARY KEY (hours, names, start, agent_name, job_type, status)
);

CREATE TABLE run_totals (
    agent_name text COLLATE "C" NOT NULL,
    job_type text COLLATE "C" NOT NULL,
    status text COLLATE "C" NOT NULL,
    runs bigint NOT NULL,
    PRIMARY KEY (agent_name, job_type, status)
);

CREATE TABLE run_minutes (
    minute text COLLATE "C" PRIMARY KEY,
    runs bigint NOT NULL
);

CREATE TABLE alert_states (
    rule text COLLATE "C" NOT NULL,
    agent_name text COLLATE "C" NOT NULL,
    job_type text COLLATE "C" NOT NULL,
    measure text COLLATE "C" NOT NULL,
    first_bad_commit text COLLATE "C" NOT NULL,
    since text COLLATE "C" NOT NULL,
    seq bigint NOT NULL,
    summary text COLLATE "C" NOT NULL,
    details json NOT NULL,
    PRIMARY KEY (rule, agent_name, job_type, measure, first_bad_commit)
);

CREATE TABLE alert_deliveries (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    webhook text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    created_at text COLLATE "C" NOT NULL,
    body text COLLATE "C" NOT NULL
);
CREATE INDEX idx_deliveries_webhook ON alert_deliveries (webhook, number);

CREATE TABLE followed_feed (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch text COLLATE "C" NOT NULL,
    seq bigint NOT NULL,
    begun bigint NOT NULL
);

CREATE TABLE confirmed_prune (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    after_s double precision NOT NULL,
    confirmed_at text COLLATE "C" NOT NULL
);

CREATE TABLE trusted_clock (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    moment text COLLATE "C" NOT NULL,
    boot_id text COLLATE "C" NOT NULL,
    up_s double precision NOT NULL
);

CREATE TABLE unconverted_values (
    run bigint NOT NULL,
    field text COLLATE "C" NOT NULL,
    reason text COLLATE "C" NOT NULL,
    original text COLLATE "C" NOT NULL,
    PRIMARY KEY (run, field)
);

-- The words of a run's texts, as SQLite's unicode61 has them: letters and digits without accents, in lower case. Of each
-- text the first 62,500 characters count: so no run has more words than a tsvector may hold (1 MB). A word that no text
-- can have stands between two texts, so that no phrase goes across.
CREATE FUNCTION telemetryd_plain(given text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN regexp_replace(
        regexp_replace(
            lower(normalize(left(given, 62500), NFD) COLLATE "und-x-icu"), '[\u0300-\u036f]', '', 'g'
        ),
        '[^[:alnum:]]+' COLLATE "und-x-icu", ' ', 'g'
    );
CREATE FUNCTION telemetryd_words(input_summary text, output_summary text, error_summary text, error_details text)
    RETURNS tsvector LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN ts_delete(
        to_tsvector(
            'pg_catalog.simple',
            concat_ws(
                ' 0endoftext0 ', telemetryd_plain(input_summary), telemetryd_plain(output_summary),
                telemetryd_plain(error_summary), telemetryd_plain(error_details)
            )
        ),
        '0endoftext0'
    );

-- Stops where no standby would hold a group although one is asked for, or where none was asked for any more when it was
-- committed: then it may be on the primary only.
CREATE FUNCTION telemetryd_require_standby(is_committed boolean) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('synchronous_standby_names') = '' THEN
        RAISE EXCEPTION 'synchronous_standby_names is empty'
            USING ERRCODE = CASE WHEN is_committed THEN 'TD002' ELSE 'TD001' END;
    END IF;
END
$$;

-- What comes before the numbers of a group are drawn: they stand in the order of the commits, so one group at a time draws
-- them, and its COMMIT comes with them.
CREATE FUNCTION telemetryd_take_turn(needs_standby boolean) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7626853, 1);
    IF needs_standby THEN
        PERFORM telemetryd_require_standby(false);
    END IF;
END
$$;
