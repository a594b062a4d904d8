-- name: ping
-- Whether the server can be written to. Fails if the tables are missing.
SELECT
    1 AS alive,
    current_setting('transaction_read_only')::boolean AS is_read_only,
    EXISTS (SELECT FROM accounts) AS has_accounts;
