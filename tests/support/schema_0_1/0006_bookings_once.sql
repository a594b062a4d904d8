-- A reference names one payment, whoever's account it is booked on, and however many ask for it at once. Only additions: the
-- version before books by a statement of its own, and goes on doing so.

ALTER TABLE accounts
ADD CONSTRAINT balance_is_bounded CHECK (balance_nano BETWEEN -4000000000000000000 AND 4000000000000000000);

-- Books an entry, and changes the balance with it. Without a row there is no such account. Outcomes:
--   booked     the entry is made
--   already    the reference was booked before: the row tells of that entry
--   uncovered  `covered` was asked for, and less is available than would be taken
CREATE FUNCTION book_entry(
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
