-- A booking that is asked for again under its own id, because the reply to it was lost, is told that it was made before anything
-- else is looked at: a refund would otherwise be measured against the balance that it has lowered itself. Else as before.
CREATE OR REPLACE FUNCTION book_entry(
    account bigint, new_entry uuid, new_kind entry_kind, nano bigint, other_leg text, why text, outside_name text, covered boolean
) RETURNS TABLE (
    outcome text, account_id bigint, entry_id uuid, kind text, amount_nano bigint, created_at timestamptz
)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    available bigint;
BEGIN
    IF outside_name IS NOT NULL THEN
        PERFORM pg_advisory_xact_lock(hashtextextended('reference:' || outside_name, 0));
        RETURN QUERY
        SELECT 'already', account_id, entry_id, kind::text, amount_nano, created_at FROM ledger
        WHERE reference = outside_name ORDER BY created_at LIMIT 1;
        IF FOUND THEN
            RETURN;
        END IF;
    END IF;

    SELECT balance_nano - held_nano INTO available FROM accounts WHERE account_id = account FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    RETURN QUERY
    SELECT 'already', account_id, entry_id, kind::text, amount_nano, created_at FROM ledger
    WHERE entry_id = new_entry AND account_id = account;
    IF FOUND THEN
        RETURN;
    END IF;
    IF covered AND available + nano < 0 THEN
        RETURN QUERY SELECT 'uncovered', account, new_entry, new_kind::text, nano, now();
        RETURN;
    END IF;

    UPDATE accounts SET balance_nano = balance_nano + nano, updated_at = now() WHERE account_id = account;
    RETURN QUERY
    INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, reason, reference)
    VALUES (account, new_entry, new_kind, nano, other_leg, why, outside_name)
    RETURNING 'booked', account_id, entry_id, kind::text, amount_nano, created_at;
END $$;
