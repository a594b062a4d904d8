-- name: ping
-- Whether the server can be written to. Fails if the tables are missing.
SELECT
    1 AS alive,
    current_setting('transaction_read_only')::boolean AS is_read_only,
    (
        SELECT count(*)
        FROM accounts
        WHERE account_id = 0
    ) AS accounts_found;
