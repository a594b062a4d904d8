-- Every charge belongs to a settled hold: nothing is charged that was not held.
SELECT
    ledger.account_id,
    ledger.entry_id,
    ledger.amount_nano
FROM ledger
LEFT JOIN holds
    ON ledger.account_id = holds.account_id AND ledger.entry_id = holds.hold_id AND holds.state = 'settled'
WHERE ledger.kind = 'charge' AND holds.hold_id IS NULL;
