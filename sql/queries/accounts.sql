-- name: create_account
-- $1 name. One row.
INSERT INTO accounts (name)
VALUES ($1::text)
RETURNING account_id, name, balance_nano, held_nano, is_active, created_at, updated_at;

-- name: find_account
-- $1 account. No row: there is no such account.
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
-- A page by id. $1 the last id of the previous page (0 for the first), $2 how many.
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
-- $1 account, $2 whether its keys are accepted. No row: there is no such account.
UPDATE accounts
SET
    is_active = $2::boolean,
    updated_at = now()
WHERE account_id = $1::bigint
RETURNING account_id, name, balance_nano, held_nano, is_active, created_at, updated_at;

-- name: find_accounts
-- Accounts by the id $1, by VK's id $2, by the prefix of a key $3 (a LIKE pattern); each NULL if it is not given. At most 100.
WITH matching AS (
    SELECT $1::bigint AS account_id
    UNION
    SELECT identities.account_id
    FROM identities
    WHERE identities.provider = 'vk' AND identities.subject = $2::text
    UNION
    SELECT api_keys.account_id
    FROM api_keys
    WHERE api_keys.prefix LIKE $3::text
)

SELECT
    accounts.account_id,
    accounts.name,
    accounts.balance_nano,
    accounts.held_nano,
    accounts.is_active,
    accounts.created_at,
    accounts.updated_at
FROM accounts
INNER JOIN matching ON accounts.account_id = matching.account_id
ORDER BY accounts.account_id
LIMIT 100;

-- name: next_account_id
-- A number that no other account gets, for create_user. One row.
SELECT nextval(pg_get_serial_sequence('accounts', 'account_id')) AS account_id;

-- name: create_user
-- Creates account $1 with the name $2, its top-up ($3 the entry, $4 nano-roubles or 0 for none, $5 counter-account, $6 reason,
-- $7 who books it) and its main key ($8 SHA-256, $9 prefix, $10 the key, encrypted, $11 with which secret). One row.
SELECT
    create_user(
        new_account_id => $1::bigint,
        new_name => $2::text,
        new_entry_id => $3::uuid,
        new_balance_nano => $4::bigint,
        new_contra => $5::text,
        new_reason => $6::text,
        new_booked_by => $7::text,
        new_key_hash => $8::bytea,
        new_prefix => $9::text,
        new_encrypted_key => $10::bytea,
        new_secret_id => $11::text
    ) AS key_id;
