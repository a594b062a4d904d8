-- A new key. It becomes the main key if there is none, unless never_main. No row: the account has keys_max live keys, has made
-- twice as many within 24 hours, or was erased at this moment.
CREATE OR REPLACE FUNCTION create_key(
    owner_account_id bigint, never_main boolean, keys_max integer, new_key_hash bytea, new_prefix text, new_name text,
    new_encrypted_key bytea, new_secret_id text,
    new_limit_nano bigint, new_limit_reset text, new_requests_per_minute integer, new_expires_at timestamptz
) RETURNS SETOF api_keys
LANGUAGE plpgsql AS $$
DECLARE
    live_keys integer;
    has_main boolean;
BEGIN
    PERFORM FROM accounts WHERE account_id = owner_account_id AND erased_at IS NULL FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT count(*), coalesce(bool_or(is_main), FALSE) INTO live_keys, has_main
    FROM api_keys WHERE account_id = owner_account_id AND revoked_at IS NULL;
    IF live_keys < keys_max AND (
        SELECT count(*) FROM api_keys WHERE account_id = owner_account_id AND created_at > now() - interval '24 hours'
    ) < 2 * keys_max THEN
        RETURN QUERY
        INSERT INTO api_keys (
            account_id, key_hash, prefix, name, is_main, encrypted_key, secret_id,
            limit_nano, limit_reset, requests_per_minute, expires_at
        )
        VALUES (
            owner_account_id, new_key_hash, new_prefix, new_name, NOT never_main AND NOT has_main, new_encrypted_key, new_secret_id,
            new_limit_nano, new_limit_reset, new_requests_per_minute, new_expires_at
        )
        RETURNING *;
    END IF;
END $$;
