-- Removes what identifies the user of an account: name, contact, note, identities, and the names and encrypted copies of keys.
-- All its keys are revoked, and the account is deactivated for good. Its entries and holds stay. No row: no such account.
-- Outcomes:
--   erased            done; balance_nano is what the adjustment forfeit_entry_id has taken, 0 if there was nothing to take
--   already_erased    nothing was done; balance_nano as above, if the reply to this very call was lost
--   holds_open        nothing was done: requests run, or recovery looks for their cost
--   payments_pending  nothing was done: payments have not ended
--   balance_left      nothing was done: the balance, balance_nano, is not 0, and it is not to be forfeited
CREATE OR REPLACE FUNCTION erase_user(
    erased_account_id bigint, forfeit_balance boolean, forfeit_entry_id uuid, forfeit_reason text,
    forfeit_booked_by text
) RETURNS TABLE (outcome text, balance_nano bigint)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    present accounts;
BEGIN
    SELECT * INTO present FROM accounts WHERE account_id = erased_account_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    balance_nano := CASE
        WHEN present.erased_at IS NULL THEN present.balance_nano
        ELSE coalesce(
            (SELECT -amount_nano FROM ledger WHERE account_id = erased_account_id AND entry_id = forfeit_entry_id), 0
        )
    END;
    outcome := CASE
        WHEN present.erased_at IS NOT NULL THEN 'already_erased'
        WHEN EXISTS (SELECT FROM holds WHERE state = 'open' AND account_id = erased_account_id) THEN 'holds_open'
        WHEN EXISTS (SELECT FROM pending_payments WHERE account_id = erased_account_id) THEN 'payments_pending'
        WHEN present.balance_nano <> 0 AND NOT forfeit_balance THEN 'balance_left'
        ELSE 'erased'
    END;
    IF outcome <> 'erased' THEN
        RETURN NEXT;
        RETURN;
    END IF;

    IF present.balance_nano <> 0 THEN
        INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, reason, booked_by)
        VALUES (
            erased_account_id, forfeit_entry_id, 'adjustment', -present.balance_nano, 'corrections', forfeit_reason, forfeit_booked_by
        );
    END IF;
    UPDATE accounts
    SET balance_nano = 0, name = '', contact = '', note = '', is_active = FALSE, erased_at = now(), updated_at = now()
    WHERE account_id = erased_account_id;
    UPDATE api_keys
    SET name = '', encrypted_key = NULL, secret_id = NULL, revoked_at = coalesce(revoked_at, now())
    WHERE account_id = erased_account_id;
    DELETE FROM identities WHERE account_id = erased_account_id;
    RETURN NEXT;
END $$;
