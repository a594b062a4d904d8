-- name: create_migrations_table
-- The applied migrations, with the SHA-256 of their text. Harmless when it exists.
CREATE TABLE IF NOT EXISTS schema_migrations (
    name text PRIMARY KEY,
    checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now(),
    version text -- of GPTutor; NULL: an early 0.2.0
);

-- name: add_version_to_migrations
-- To the table of an early 0.2.0. Harmless when it exists.
ALTER TABLE schema_migrations ADD COLUMN IF NOT EXISTS version text;

-- name: create_functions_table
-- The applied files of functions, with the SHA-256 of their text. Harmless when it exists.
CREATE TABLE IF NOT EXISTS schema_functions (
    name text PRIMARY KEY,
    checksum text NOT NULL,
    version text NOT NULL, -- of GPTutor
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- name: lock_migrations
-- One migrator at a time, until the end of its transaction.
SELECT pg_advisory_xact_lock(hashtext('gptutor migrations'));

-- name: find_migrations_tables
-- Which of the two tables exist. One row.
SELECT
    to_regclass('schema_migrations') IS NOT NULL AS has_migrations,
    to_regclass('schema_functions') IS NOT NULL AS has_functions;

-- name: list_migrations
-- The applied migrations, and the version of GPTutor that applied each. The table of an early 0.2.0 has no such column: NULL.
SELECT
    name,
    checksum,
    to_jsonb(schema_migrations) ->> 'version' AS version
FROM schema_migrations
ORDER BY name;

-- name: record_migration
-- $1 name, $2 checksum, $3 version of GPTutor.
INSERT INTO schema_migrations (name, checksum, version)
VALUES ($1::text, $2::text, $3::text);

-- name: list_functions
-- The applied files of functions, and the version of GPTutor that applied each.
SELECT
    name,
    checksum,
    version
FROM schema_functions
ORDER BY name;

-- name: record_function
-- $1 name, $2 checksum, $3 version of GPTutor.
INSERT INTO schema_functions (name, checksum, version)
VALUES ($1::text, $2::text, $3::text)
ON CONFLICT (name) DO UPDATE
    SET checksum = excluded.checksum, version = excluded.version, applied_at = now();
