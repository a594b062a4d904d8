-- name: describe_server
-- Version, clock, limits and durability of the server, as `gptutor doctor` looks at them. `connections` are those of all clients.
-- One row.
WITH client AS (
    SELECT count(*) AS connections
    FROM pg_stat_activity
    WHERE backend_type = 'client backend'
)

SELECT
    client.connections,
    roles.rolsuper AS is_superuser,
    current_setting('server_version_num')::integer AS version_number,
    current_setting('server_version') AS version,
    current_setting('server_encoding') AS encoding,
    current_setting('fsync')::boolean AS has_fsync,
    current_setting('full_page_writes')::boolean AS has_full_page_writes,
    current_setting('synchronous_commit') AS synchronous_commit,
    current_setting('transaction_read_only')::boolean AS is_read_only,
    current_setting('max_connections')::integer - current_setting('superuser_reserved_connections')::integer AS connections_max,
    least(nullif(roles.rolconnlimit, -1), nullif(databases.datconnlimit, -1)) AS connections_max_of_role,
    clock_timestamp() AS now,
    pg_database_size(databases.oid) AS bytes,
    coalesce(archiver.last_failed_time > coalesce(archiver.last_archived_time, '-infinity'), FALSE) AS is_archiving_failing
FROM client
CROSS JOIN pg_stat_archiver AS archiver
INNER JOIN pg_roles AS roles ON roles.rolname = current_user
INNER JOIN pg_database AS databases ON databases.datname = current_database();

-- name: list_missing_privileges
-- Of the privileges $2, each on the table of $1 at the same place, those that the current role lacks.
SELECT
    needed.table_name,
    needed.privilege
FROM unnest($1::text[], $2::text[]) AS needed (table_name, privilege)
WHERE
    to_regclass(needed.table_name) IS NOT NULL
    AND NOT has_table_privilege(to_regclass(needed.table_name), needed.privilege);

-- name: sample_key_copies
-- The latest live key of each secret that copies of keys are encrypted with. Reads all live keys.
SELECT DISTINCT ON (secret_id)
    account_id,
    key_hash,
    encrypted_key,
    secret_id
FROM api_keys
WHERE revoked_at IS NULL AND secret_id IS NOT NULL
ORDER BY secret_id ASC, key_id DESC;
