-- name: create_key
-- $1 account, $2 whether it only stands beside the main key, even where there is none, $3 how many living keys an account may
-- have, $4 SHA-256 of the key, $5 the part that may be shown, $6 name, $7 encrypted copy, $8 which secret opens it, $9 end, $10
-- cap in nano-roubles, $11 its period, $12 requests per minute. No row: the account has as many keys as it may have.
SELECT
    key_id,
    shown,
    name,
    is_main,
    expires_at,
    cap_nano,
    cap_period,
    per_minute,
    spent_nano,
    held_nano,
    created_at,
    revoked_at
FROM create_key(
    $1::bigint, $2::boolean, $3::integer, $4::bytea, $5::text, $6::text, $7::bytea, $8::text, $9::timestamptz, $10::bigint,
    $11::text, $12::integer
);

-- name: renew_key
-- A new main key in place of the one before ($2: of all keys) of account $1; if $3, only while that is the one with the SHA-256
-- $4 (NULL: while there is none). $5 SHA-256 of the new key, $6 the part that may be shown, $7 encrypted copy, $8 which secret
-- opens it. One row: whether it was done.
SELECT renew_key($1::bigint, $2::boolean, $3::boolean, $4::bytea, $5::bytea, $6::text, $7::bytea, $8::text) AS is_new;

-- name: find_main_key
-- The main key of account $1, encrypted. No row: it has none that lives.
SELECT
    key_hash,
    encrypted,
    secret_id,
    expires_at <= now() AS has_ended
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
    held_nano,
    created_at,
    revoked_at,
    CASE WHEN cap_period = 'day' AND spent_on < (now() AT TIME ZONE 'UTC')::date THEN 0 ELSE spent_nano END AS spent_nano
FROM api_keys
WHERE account_id = $1::bigint
ORDER BY created_at DESC, key_id DESC;

-- name: limit_key
-- Sets the limits of key $2 of account $1: $3 cap in nano-roubles, $4 its period, $5 requests per minute, $6 end; NULL lifts one.
-- With $7 only while they are those of $8 to $11, in the same order. One row: done, changed, none.
SELECT limit_key(
    $1::bigint, $2::bigint, $3::bigint, $4::text, $5::integer, $6::timestamptz,
    $7::boolean, $8::bigint, $9::text, $10::integer, $11::timestamptz
) AS outcome;

-- name: revoke_key
-- Key $2 of account $1 is dead from the next request on. No row: there was none that lived.
UPDATE api_keys
SET revoked_at = now()
WHERE account_id = $1::bigint AND key_id = $2::bigint AND revoked_at IS NULL
RETURNING key_id;

-- name: find_live_key
-- $1 account, $2 SHA-256 of the key. No row: unknown, revoked or ended, or its account is inactive.
SELECT
    api_keys.key_id,
    api_keys.is_main
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
