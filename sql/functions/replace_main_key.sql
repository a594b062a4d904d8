-- A new main key in place of the present one, or (revoke_all) of all keys, at once in every process: place_holds reads them.
-- With if_unchanged, only while the main key is the one with expected_key_hash (NULL: while there is none). Whether it was done.
CREATE OR REPLACE FUNCTION replace_main_key(
    owner_account_id bigint, revoke_all boolean, if_unchanged boolean, expected_key_hash bytea,
    new_key_hash bytea, new_prefix text, new_encrypted_key bytea, new_secret_id text
) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM accounts WHERE account_id = owner_account_id FOR NO KEY UPDATE;
    IF if_unchanged AND expected_key_hash IS DISTINCT FROM (
        SELECT key_hash FROM api_keys WHERE account_id = owner_account_id AND is_main AND revoked_at IS NULL
    ) THEN
        RETURN FALSE;
    END IF;
    UPDATE api_keys SET revoked_at = now()
    WHERE account_id = owner_account_id AND (is_main OR revoke_all) AND revoked_at IS NULL;
    INSERT INTO api_keys (account_id, key_hash, prefix, name, is_main, encrypted_key, secret_id)
    VALUES (owner_account_id, new_key_hash, new_prefix, 'main', TRUE, new_encrypted_key, new_secret_id);
    RETURN TRUE;
END $$;
