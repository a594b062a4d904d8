-- name: create_key
-- $1 account, $2 whether it must not become the main key, $3 how many live keys an account may have, $4 SHA-256 of the key, $5
-- prefix, $6 name, $7 the key, encrypted, $8 with which secret, $9 limit in nano-roubles, $10 its reset, $11 requests per minute,
-- $12 expiry; NULL: no limit. No row: the account has as many keys as it may have.
SELECT
    key_id,
    prefix,
    name,
    is_main,
    limit_nano,
    limit_reset,
    requests_per_minute,
    expires_at,
    spent_nano,
    held_nano,
    created_at,
    revoked_at
FROM create_key(
    owner_account_id => $1::bigint,
    never_main => $2::boolean,
    keys_max => $3::integer,
    new_key_hash => $4::bytea,
    new_prefix => $5::text,
    new_name => $6::text,
    new_encrypted_key => $7::bytea,
    new_secret_id => $8::text,
    new_limit_nano => $9::bigint,
    new_limit_reset => $10::text,
    new_requests_per_minute => $11::integer,
    new_expires_at => $12::timestamptz
);

-- name: replace_main_key
-- A new main key in place of the present one, or ($2) of all keys, of account $1. With $3, only while the main key is that of the
-- SHA-256 $4 (NULL: while there is none). Of the new key: $5 SHA-256, $6 prefix, $7 the key, encrypted, $8 with which secret.
-- One row: whether it was done.
SELECT
    replace_main_key(
        owner_account_id => $1::bigint,
        revoke_all => $2::boolean,
        if_unchanged => $3::boolean,
        expected_key_hash => $4::bytea,
        new_key_hash => $5::bytea,
        new_prefix => $6::text,
        new_encrypted_key => $7::bytea,
        new_secret_id => $8::text
    ) AS is_new;

-- name: find_main_key
-- The live main key of account $1, encrypted. No row: there is none.
SELECT
    key_hash,
    encrypted_key,
    secret_id,
    expires_at <= now() AS is_expired
FROM api_keys
WHERE account_id = $1::bigint AND is_main AND revoked_at IS NULL;

-- name: list_keys
-- The keys of account $1, revoked ones included, newest first.
SELECT
    key_id,
    prefix,
    name,
    is_main,
    limit_nano,
    limit_reset,
    requests_per_minute,
    expires_at,
    held_nano,
    created_at,
    revoked_at,
    CASE WHEN limit_reset = 'daily' AND spent_on < (now() AT TIME ZONE 'UTC')::date THEN 0 ELSE spent_nano END AS spent_nano
FROM api_keys
WHERE account_id = $1::bigint
ORDER BY created_at DESC, key_id DESC;

-- name: find_key
-- Key $2 of account $1, revoked or not. No row: there is no such key.
SELECT
    key_id,
    prefix,
    name,
    is_main,
    limit_nano,
    limit_reset,
    requests_per_minute,
    expires_at,
    held_nano,
    created_at,
    revoked_at,
    CASE WHEN limit_reset = 'daily' AND spent_on < (now() AT TIME ZONE 'UTC')::date THEN 0 ELSE spent_nano END AS spent_nano
FROM api_keys
WHERE account_id = $1::bigint AND key_id = $2::bigint;

-- name: set_key_limits
-- Sets the limits of key $2 of account $1: $3 limit in nano-roubles, $4 its reset, $5 requests per minute, $6 expiry; NULL lifts
-- one. With $7, only while they are those of $8 to $11, in the same order. One row: done, changed, not_found.
SELECT
    set_key_limits(
        owner_account_id => $1::bigint,
        changed_key_id => $2::bigint,
        new_limit_nano => $3::bigint,
        new_limit_reset => $4::text,
        new_requests_per_minute => $5::integer,
        new_expires_at => $6::timestamptz,
        if_unchanged => $7::boolean,
        expected_limit_nano => $8::bigint,
        expected_limit_reset => $9::text,
        expected_requests_per_minute => $10::integer,
        expected_expires_at => $11::timestamptz
    ) AS outcome;

-- name: revoke_key
-- Key $2 of account $1 is rejected from the next request on. No row: there is no such live key.
UPDATE api_keys
SET revoked_at = now()
WHERE account_id = $1::bigint AND key_id = $2::bigint AND revoked_at IS NULL
RETURNING key_id;

-- name: find_live_key
-- $1 account, $2 SHA-256 of the key. No row: the key is unknown, revoked or expired, or its account is inactive.
SELECT
    api_keys.key_id,
    api_keys.is_main,
    accounts.balance_nano - accounts.held_nano AS available_nano
FROM api_keys
INNER JOIN accounts ON api_keys.account_id = accounts.account_id
WHERE
    api_keys.account_id = $1::bigint
    AND api_keys.key_hash = $2::bytea
    AND api_keys.revoked_at IS NULL
    AND (api_keys.expires_at IS NULL OR api_keys.expires_at > now())
    AND accounts.is_active;

-- name: list_keys_to_rekey
-- A page of the live keys that are encrypted with another secret than $1. $2 and $3 the last account and key of the previous
-- page, $4 how many.
SELECT
    account_id,
    key_id,
    key_hash,
    encrypted_key,
    secret_id
FROM api_keys
WHERE secret_id <> $1::text AND revoked_at IS NULL AND (account_id, key_id) > ($2::bigint, $3::bigint)
ORDER BY account_id, key_id
LIMIT $4::integer;

-- name: count_keys_to_rekey
-- How many live keys are encrypted with another secret than $1. One row.
SELECT count(*) AS keys
FROM api_keys
WHERE secret_id <> $1::text AND revoked_at IS NULL;

-- name: set_encrypted_key
-- Of key $2 of account $1, while its secret is $3: $4 the key, encrypted, $5 with which secret.
UPDATE api_keys
SET
    encrypted_key = $4::bytea,
    secret_id = $5::text
WHERE account_id = $1::bigint AND key_id = $2::bigint AND secret_id = $3::text;
