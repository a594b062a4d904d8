-- Every settled hold has one charge in the ledger, of the same amount.
SELECT
    holds.account_id,
    holds.hold_id,
    holds.charge_nano
FROM holds
LEFT JOIN ledger
    ON
        holds.account_id = ledger.account_id
        AND holds.hold_id = ledger.entry_id
        AND ledger.kind = 'charge'
        AND ledger.amount_nano = -holds.charge_nano
WHERE holds.state = 'settled' AND ledger.entry_id IS NULL;
