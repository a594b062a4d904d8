-- Rotating a key is two steps under the account's lock: of two rotations at once one comes after the other, and one key lives.

CREATE FUNCTION replace_keys(account bigint, new_key_hash bytea, new_shown text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM accounts WHERE account_id = account FOR NO KEY UPDATE;
    UPDATE api_keys SET revoked_at = now() WHERE account_id = account AND revoked_at IS NULL;
    INSERT INTO api_keys (account_id, key_hash, shown) VALUES (account, new_key_hash, new_shown);
END $$;
