-- What later reports bring along: OpenTelemetry and OpenLineage (trace_id, span_id, conversation_id), retries (attempt,
-- retry_of: an event_id, which names one run, while attempts may share a run_id), deadlines (expected_by) and labels.
ALTER TABLE agent_runs ADD COLUMN labels TEXT CHECK (labels IS NULL OR json_valid(labels));
ALTER TABLE agent_runs ADD COLUMN attempt INTEGER CHECK (attempt IS NULL OR attempt >= 1);
ALTER TABLE agent_runs ADD COLUMN retry_of TEXT;
ALTER TABLE agent_runs ADD COLUMN conversation_id TEXT;
ALTER TABLE agent_runs ADD COLUMN trace_id TEXT;
ALTER TABLE agent_runs ADD COLUMN span_id TEXT;
ALTER TABLE agent_runs ADD COLUMN expected_by TEXT;
-- 64 bits of the first body that was accepted, by which a repeat is known from another body with the same event_id. NULL:
-- it is not known, because the run was migrated, copied or redacted.
ALTER TABLE agent_runs ADD COLUMN body_digest INTEGER;

CREATE INDEX idx_runs_retry_of ON agent_runs (retry_of, created_at) WHERE retry_of IS NOT NULL;
CREATE INDEX idx_runs_conversation_id ON agent_runs (conversation_id, created_at) WHERE conversation_id IS NOT NULL;
CREATE INDEX idx_runs_trace_id ON agent_runs (trace_id, created_at) WHERE trace_id IS NOT NULL;
CREATE INDEX idx_runs_expected ON agent_runs (expected_by) WHERE expected_by IS NOT NULL AND status = 'running';

-- The index of the labels, in the order of every answer; `created` is the run's created_at under another name, so that both
-- tables can stand in one query. Whoever inserts runs with labels fills it; the triggers keep it when runs are changed or
-- deleted, by whatever program. (A trigger on inserts would cost every run without labels a microsecond.)
CREATE TABLE run_labels (
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    created TEXT NOT NULL,
    run INTEGER NOT NULL,
    PRIMARY KEY (key, value, created, run)
) STRICT, WITHOUT ROWID;

INSERT INTO run_labels (key, value, created, run)
    SELECT label.key, label.value, created_at, agent_runs.id FROM agent_runs CROSS JOIN json_each(labels) AS label
    WHERE labels IS NOT NULL AND label.type = 'text'
    ON CONFLICT DO NOTHING;

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
