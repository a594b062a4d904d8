-- A balance is the sum of its ledger entries, and nothing else.
WITH entries AS (
    SELECT
        account_id,
        sum(amount_nano) AS amount_nano
    FROM ledger
    GROUP BY account_id
)

SELECT
    accounts.account_id,
    accounts.balance_nano,
    coalesce(entries.amount_nano, 0) AS entries_nano
FROM accounts
LEFT JOIN entries ON accounts.account_id = entries.account_id
WHERE accounts.balance_nano <> coalesce(entries.amount_nano, 0);
