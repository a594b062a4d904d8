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

-- name: create_key
-- $1 account, $2 SHA-256 of the key, $3 the part that may be shown, $4 name.
INSERT INTO api_keys (account_id, key_hash, shown, name)
VALUES ($1::bigint, $2::bytea, $3::text, $4::text);

-- name: replace_keys
-- A new key in place of all others of account $1, at once and everywhere: the hold reads them.
-- $2 SHA-256 of the new key, $3 the part that may be shown.
SELECT replace_keys($1::bigint, $2::bytea, $3::text);

-- name: list_keys
-- The keys of account $1, newest first.
SELECT
    shown,
    name,
    created_at,
    revoked_at
FROM api_keys
WHERE account_id = $1::bigint
ORDER BY created_at DESC;

-- name: find_live_key
-- $1 account, $2 SHA-256 of the key. No row: unknown or revoked, or its account is inactive.
SELECT api_keys.shown
FROM api_keys
INNER JOIN accounts ON api_keys.account_id = accounts.account_id
WHERE
    api_keys.account_id = $1::bigint
    AND api_keys.key_hash = $2::bytea
    AND api_keys.revoked_at IS NULL
    AND accounts.is_active;
