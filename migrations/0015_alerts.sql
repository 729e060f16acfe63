-- What the rules of alerts have found: a row for each subject of each rule that is firing now. A rule is about an agent,
-- or about a job type of an agent; else job_type is ''. `seq` is where the commit sequence stood when it was found.
CREATE TABLE alert_states (
    rule TEXT NOT NULL,
    agent_name TEXT NOT NULL,
    job_type TEXT NOT NULL,
    since TEXT NOT NULL,
    seq INTEGER NOT NULL,
    summary TEXT NOT NULL,
    details TEXT NOT NULL CHECK (json_valid(details)),
    PRIMARY KEY (rule, agent_name, job_type)
) STRICT, WITHOUT ROWID;

-- What is to be delivered to webhooks, written with the change that it tells of, and deleted when it is confirmed.
CREATE TABLE alert_deliveries (
    number INTEGER PRIMARY KEY,
    webhook TEXT NOT NULL,
    id TEXT NOT NULL,
    created_at TEXT NOT NULL,
    body TEXT NOT NULL
) STRICT;

CREATE INDEX idx_deliveries_webhook ON alert_deliveries (webhook, number);
