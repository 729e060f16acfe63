-- Which server holds the database, as far as it is known: the identifier of its files and its timeline. A server that took
-- over, or into which a dump was restored, may lack changes that subscribers know of.
ALTER TABLE change_feed ADD COLUMN lineage text COLLATE "C" NOT NULL DEFAULT '';

-- Stops where a group was committed to a disk that the server does not sync any more.
CREATE FUNCTION telemetryd_require_disk() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('fsync') = 'off' OR current_setting('full_page_writes') = 'off' THEN
        RAISE EXCEPTION 'fsync or full_page_writes is off' USING ERRCODE = 'TD003';
    END IF;
END
$$;
