-- The account of a user of an identity provider; created at the first sign-in, by one of many at once. bonus_nano: 0 is none.
CREATE OR REPLACE FUNCTION find_or_create_account(
    new_provider text, new_subject text, new_name text, bonus_entry_id uuid, bonus_nano bigint
) RETURNS TABLE (account_id bigint, is_new boolean)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    SELECT identities.account_id INTO account_id FROM identities WHERE provider = new_provider AND subject = new_subject;
    is_new := NOT FOUND;
    IF is_new THEN
        PERFORM pg_advisory_xact_lock(hashtextextended(new_provider || ':' || new_subject, 0));
        SELECT identities.account_id INTO account_id FROM identities WHERE provider = new_provider AND subject = new_subject;
        is_new := NOT FOUND;
    END IF;
    IF is_new THEN
        INSERT INTO accounts (name, balance_nano) VALUES (new_name, bonus_nano) RETURNING accounts.account_id INTO account_id;
        INSERT INTO identities (provider, subject, account_id) VALUES (new_provider, new_subject, account_id);
        IF bonus_nano > 0 THEN
            INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, reason, reference, booked_by)
            -- The reference does not name the person: entries stay when a user is erased.
            VALUES (
                account_id, bonus_entry_id, 'bonus', bonus_nano, 'goodwill', 'sign-up', 'sign-up:' || account_id, new_provider
            );
        END IF;
    END IF;
    RETURN NEXT;
END $$;
