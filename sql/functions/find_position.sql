-- Where the server stands. A restore, a promotion and a restart change history; what only goes back lowers wal_bytes.
-- What the server or the role's privileges do not give is left out. One row.
CREATE OR REPLACE FUNCTION find_position() RETURNS TABLE (history text, wal_bytes bigint)
LANGUAGE plpgsql AS $$
DECLARE
    server text;
    timeline text;
BEGIN
    BEGIN
        SELECT system_identifier::text INTO server FROM pg_control_system();
    EXCEPTION WHEN OTHERS THEN
        NULL;
    END;
    BEGIN
        timeline := substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8); -- the last checkpoint may be of the one before
        wal_bytes := pg_current_wal_lsn() - '0/0'::pg_lsn;
    EXCEPTION WHEN OTHERS THEN
        NULL;
    END;
    SELECT concat_ws('/', coalesce(server, '-'), coalesce(timeline, '-'), oid, extract(EPOCH FROM pg_postmaster_start_time()))
    INTO history FROM pg_database WHERE datname = current_database();
    RETURN NEXT;
END $$;
