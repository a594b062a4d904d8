-- Books an entry that is not a charge, and changes the balance with it. No row: there is no such account. Outcomes:
--   booked          the entry is made
--   already_booked  the reference, or this very entry, was booked before: the row is that entry
--   insufficient    must_be_available, and less is available than would be taken
-- A reference names one payment, whichever account it is booked on, and however many book it at once: hence the lock.
-- The entry's own id is looked up before the balance: when the reply to a booking was lost, the repeated booking must not be
-- measured against the balance that the first one has lowered.
CREATE OR REPLACE FUNCTION book_entry(
    new_account_id bigint, new_entry_id uuid, new_kind entry_kind, new_amount_nano bigint, new_contra text,
    new_reason text, new_reference text, new_booked_by text, must_be_available boolean
) RETURNS TABLE (
    outcome text, account_id bigint, entry_id uuid, kind text, amount_nano bigint, created_at timestamptz
)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    available bigint;
BEGIN
    IF new_reference IS NOT NULL THEN
        PERFORM pg_advisory_xact_lock(hashtextextended('reference:' || new_reference, 0));
        RETURN QUERY
        SELECT 'already_booked', account_id, entry_id, kind::text, amount_nano, created_at FROM ledger
        WHERE reference = new_reference ORDER BY created_at LIMIT 1;
        IF FOUND THEN
            RETURN;
        END IF;
    END IF;

    SELECT balance_nano - held_nano INTO available FROM accounts WHERE account_id = new_account_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    RETURN QUERY
    SELECT 'already_booked', account_id, entry_id, kind::text, amount_nano, created_at FROM ledger
    WHERE entry_id = new_entry_id AND account_id = new_account_id;
    IF FOUND THEN
        RETURN;
    END IF;
    IF must_be_available AND available + new_amount_nano < 0 THEN
        RETURN QUERY SELECT 'insufficient', new_account_id, new_entry_id, new_kind::text, new_amount_nano, now();
        RETURN;
    END IF;

    UPDATE accounts SET balance_nano = balance_nano + new_amount_nano, updated_at = now() WHERE account_id = new_account_id;
    RETURN QUERY
    INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, reason, reference, booked_by)
    VALUES (new_account_id, new_entry_id, new_kind, new_amount_nano, new_contra, new_reason, new_reference, new_booked_by)
    RETURNING 'booked', account_id, entry_id, kind::text, amount_nano, created_at;
END $$;
