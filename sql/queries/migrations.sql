-- name: create_migrations_table
-- What has been applied, with the checksum of its text. Harmless when it exists.
CREATE TABLE IF NOT EXISTS schema_migrations (
    name text PRIMARY KEY,
    checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- name: lock_migrations
-- One migrator at a time, until the end of its transaction.
SELECT pg_advisory_xact_lock(hashtext('gptutor migrations'));

-- name: has_migrations_table
SELECT to_regclass('schema_migrations') IS NOT NULL AS present;

-- name: list_migrations
SELECT
    name,
    checksum
FROM schema_migrations
ORDER BY name;

-- name: record_migration
-- $1 name, $2 checksum.
INSERT INTO schema_migrations (name, checksum)
VALUES ($1::text, $2::text);
