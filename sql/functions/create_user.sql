-- A new account with its main key and its first entry, or none of them. The key contains the account's number and was encrypted
-- before, so the number comes from next_account_id. new_balance_nano: 0 is no entry. Repeated with the same key it changes
-- nothing: the reply to the first call was lost. Returns the key's id.
CREATE OR REPLACE FUNCTION create_user(
    new_account_id bigint, new_name text, new_entry_id uuid, new_balance_nano bigint, new_contra text, new_reason text,
    new_booked_by text, new_key_hash bytea, new_prefix text, new_encrypted_key bytea, new_secret_id text
) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    main_key_id bigint;
BEGIN
    INSERT INTO accounts (account_id, name, balance_nano) OVERRIDING SYSTEM VALUE
    VALUES (new_account_id, new_name, new_balance_nano)
    ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        SELECT key_id INTO STRICT main_key_id FROM api_keys WHERE account_id = new_account_id AND key_hash = new_key_hash;
        RETURN main_key_id;
    END IF;
    IF new_balance_nano <> 0 THEN
        INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, reason, booked_by)
        VALUES (new_account_id, new_entry_id, 'topup', new_balance_nano, new_contra, new_reason, new_booked_by);
    END IF;
    INSERT INTO api_keys (account_id, key_hash, prefix, is_main, encrypted_key, secret_id)
    VALUES (new_account_id, new_key_hash, new_prefix, TRUE, new_encrypted_key, new_secret_id)
    RETURNING key_id INTO main_key_id;
    RETURN main_key_id;
END $$;
