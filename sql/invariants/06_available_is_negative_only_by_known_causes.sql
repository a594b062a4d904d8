-- An account is overdrawn by no more than charges above their holds, charges after a release, and corrections took.
WITH holds_exceeded AS (
    SELECT
        account_id,
        sum(CASE WHEN is_late THEN charge_nano ELSE greatest(charge_nano - amount_nano, 0) END) AS nano
    FROM holds
    WHERE state = 'settled'
    GROUP BY account_id
),

corrections AS (
    SELECT
        account_id,
        sum(-amount_nano) AS nano
    FROM ledger
    WHERE kind <> 'charge' AND amount_nano < 0
    GROUP BY account_id
)

SELECT
    accounts.account_id,
    accounts.balance_nano,
    accounts.held_nano
FROM accounts
LEFT JOIN holds_exceeded ON accounts.account_id = holds_exceeded.account_id
LEFT JOIN corrections ON accounts.account_id = corrections.account_id
WHERE accounts.balance_nano - accounts.held_nano < -(coalesce(holds_exceeded.nano, 0) + coalesce(corrections.nano, 0));
