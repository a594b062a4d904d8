-- Available funds go below zero only by a charge above its hold, or by a correction that took money.
SELECT
    account_id,
    balance_nano,
    held_nano
FROM accounts
WHERE
    balance_nano < held_nano
    AND NOT EXISTS (
        SELECT 1 FROM holds
        WHERE holds.account_id = accounts.account_id AND holds.charge_nano > holds.amount_nano
    )
    AND NOT EXISTS (
        SELECT 1 FROM ledger
        WHERE ledger.account_id = accounts.account_id AND ledger.kind <> 'charge' AND ledger.amount_nano < 0
    );
