-- name: create_account
-- $1 name. One row.
INSERT INTO accounts (name)
VALUES ($1::text)
RETURNING account_id, name, balance_nano, held_nano, is_active, created_at, updated_at;

-- name: find_account
-- $1 account. No row: there is none.
SELECT
    account_id,
    name,
    balance_nano,
    held_nano,
    is_active,
    created_at,
    updated_at
FROM accounts
WHERE account_id = $1::bigint;

-- name: list_accounts
-- A page by id. $1 the last id of the page before (0 for the first), $2 how many.
SELECT
    account_id,
    name,
    balance_nano,
    held_nano,
    is_active,
    created_at,
    updated_at
FROM accounts
WHERE account_id > $1::bigint
ORDER BY account_id
LIMIT $2::integer;

-- name: set_account_active
-- $1 account, $2 whether it may call. No row: there is none.
UPDATE accounts
SET
    is_active = $2::boolean,
    updated_at = now()
WHERE account_id = $1::bigint
RETURNING account_id, name, balance_nano, held_nano, is_active, created_at, updated_at;
