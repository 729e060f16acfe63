-- Of each hour of created_at the first and the last hour in which its runs started, so that a page of those that started in
-- some time, in the order of created_at, is looked for where they can be. Both are hours, so that they hardly ever change:
-- writers wait for each other only when one does.
CREATE TABLE run_hours (
    hour text COLLATE "C" PRIMARY KEY,
    first_start text COLLATE "C" NOT NULL,
    last_start text COLLATE "C" NOT NULL
);

CREATE FUNCTION run_hours_created() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO run_hours (hour, first_start, last_start)
        SELECT left(created_at, 13), min(left(start_time, 13)), max(left(start_time, 13)) FROM created
        WHERE NOT EXISTS (
            SELECT 1 FROM run_hours AS known WHERE known.hour = left(created_at, 13)
                AND left(start_time, 13) BETWEEN known.first_start AND known.last_start
        )
        GROUP BY 1 ORDER BY 1
        ON CONFLICT (hour) DO UPDATE SET
            first_start = least(run_hours.first_start, excluded.first_start),
            last_start = greatest(run_hours.last_start, excluded.last_start);
    RETURN NULL;
END
$$;
CREATE FUNCTION run_hours_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO run_hours (hour, first_start, last_start)
        VALUES (left(NEW.created_at, 13), left(NEW.start_time, 13), left(NEW.start_time, 13))
        ON CONFLICT (hour) DO UPDATE SET
            first_start = least(run_hours.first_start, excluded.first_start),
            last_start = greatest(run_hours.last_start, excluded.last_start);
    RETURN NULL;
END
$$;
CREATE TRIGGER run_hours_created AFTER INSERT ON agent_runs REFERENCING NEW TABLE AS created
    FOR EACH STATEMENT EXECUTE FUNCTION run_hours_created();
CREATE TRIGGER run_hours_changed AFTER UPDATE OF created_at, start_time ON agent_runs FOR EACH ROW
    WHEN (OLD.created_at <> NEW.created_at OR OLD.start_time <> NEW.start_time) EXECUTE FUNCTION run_hours_changed();

-- After the triggers: nobody writes runs any more until all of this is committed.
INSERT INTO run_hours (hour, first_start, last_start)
    SELECT left(created_at, 13), min(left(start_time, 13)), max(left(start_time, 13)) FROM agent_runs GROUP BY 1;

-- The same words, found in a fraction of the time where all characters are of ASCII.
CREATE OR REPLACE FUNCTION telemetryd_plain(given text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN octet_length(given) = length(given)
        THEN regexp_replace(lower(left(given, 62500) COLLATE "C"), '[^a-z0-9]+', ' ', 'g') COLLATE "default"
        ELSE regexp_replace(
            regexp_replace(
                lower(normalize(left(given, 62500), NFD) COLLATE "und-x-icu"), '[\u0300-\u036f]', '', 'g'
            ),
            '[^[:alnum:]]+' COLLATE "und-x-icu", ' ', 'g'
        ) COLLATE "default"
    END;
