-- name: create_key
-- A key beside the others; the first living one is the main key. $1 account, $2 SHA-256 of the key, $3 the part that may be
-- shown, $4 name, $5 encrypted copy, $6 which secret opens it, $7 end, $8 cap in nano-roubles, $9 its period, $10 requests per
-- minute, $11 how many living keys an account may have. No row: it has as many.
INSERT INTO api_keys (
    account_id, key_hash, shown, name, is_main, encrypted, secret_id, expires_at, cap_nano, cap_period, per_minute
)
SELECT
    $1::bigint,
    $2::bytea,
    $3::text,
    $4::text,
    coalesce(bool_and(NOT living.is_main), TRUE),
    $5::bytea,
    $6::text,
    $7::timestamptz,
    $8::bigint,
    $9::text,
    $10::integer
FROM api_keys AS living
WHERE living.account_id = $1::bigint AND living.revoked_at IS NULL
HAVING count(*) < $11::integer
RETURNING
    key_id, shown, name, is_main, expires_at, cap_nano, cap_period, per_minute, spent_nano, held_nano, created_at, revoked_at;

-- name: renew_key
-- A new main key in place of the one before ($2: of all keys) of account $1. $3 SHA-256 of the new key, $4 the part that may be
-- shown, $5 encrypted copy, $6 which secret opens it.
SELECT renew_key($1::bigint, $2::boolean, $3::bytea, $4::text, $5::bytea, $6::text);

-- name: find_main_key
-- The main key of account $1, encrypted. No row: it has none that lives.
SELECT
    key_hash,
    encrypted,
    secret_id
FROM api_keys
WHERE account_id = $1::bigint AND is_main AND revoked_at IS NULL;

-- name: list_keys
-- The keys of account $1, newest first.
SELECT
    key_id,
    shown,
    name,
    is_main,
    expires_at,
    cap_nano,
    cap_period,
    per_minute,
    CASE WHEN cap_period = 'day' AND spent_on < (now() AT TIME ZONE 'UTC')::date THEN 0 ELSE spent_nano END AS spent_nano,
    held_nano,
    created_at,
    revoked_at
FROM api_keys
WHERE account_id = $1::bigint
ORDER BY created_at DESC, key_id DESC;

-- name: limit_key
-- Sets the limits of key $2 of account $1: $3 cap in nano-roubles, $4 its period, $5 requests per minute, $6 end; NULL lifts one.
SELECT limit_key($1::bigint, $2::bigint, $3::bigint, $4::text, $5::integer, $6::timestamptz) AS found;

-- name: revoke_key
-- Key $2 of account $1 is dead from the next request on. No row: there was none that lived.
UPDATE api_keys
SET revoked_at = now()
WHERE account_id = $1::bigint AND key_id = $2::bigint AND revoked_at IS NULL
RETURNING key_id;

-- name: find_live_key
-- $1 account, $2 SHA-256 of the key. No row: unknown, revoked or ended, or its account is inactive.
SELECT api_keys.key_id
FROM api_keys
INNER JOIN accounts ON api_keys.account_id = accounts.account_id
WHERE
    api_keys.account_id = $1::bigint
    AND api_keys.key_hash = $2::bytea
    AND api_keys.revoked_at IS NULL
    AND (api_keys.expires_at IS NULL OR api_keys.expires_at > now())
    AND accounts.is_active;

-- name: list_copies
-- A page of the encrypted copies that another secret than $1 opens. $2 and $3 the last account and key of the page before, $4 how
-- many.
SELECT
    account_id,
    key_id,
    key_hash,
    encrypted,
    secret_id
FROM api_keys
WHERE secret_id <> $1::text AND revoked_at IS NULL AND (account_id, key_id) > ($2::bigint, $3::bigint)
ORDER BY account_id, key_id
LIMIT $4::integer;

-- name: count_copies
-- How many living keys have a copy that another secret than $1 opens. One row.
SELECT count(*) AS copies
FROM api_keys
WHERE secret_id <> $1::text AND revoked_at IS NULL;

-- name: replace_copy
-- $1 account, $2 key, $3 the secret that opens the copy now; $4 the new copy, $5 the secret that opens it.
UPDATE api_keys
SET
    encrypted = $4::bytea,
    secret_id = $5::text
WHERE account_id = $1::bigint AND key_id = $2::bigint AND secret_id = $3::text;
