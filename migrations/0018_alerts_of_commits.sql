-- An alert may be about a commit that made one measure (success_rate or duration) of a job type worse: both belong to what
-- it is about, so that another bad commit is another alert. Of all other alerts they are ''.
ALTER TABLE alert_states RENAME TO old_alert_states;

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

INSERT INTO alert_states SELECT rule, agent_name, job_type, '', '', since, seq, summary, details FROM old_alert_states;

DROP TABLE old_alert_states;
