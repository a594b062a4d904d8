-- The charge count of an account is the number of its charges in the ledger: no update was lost or doubled.
WITH entries AS (
    SELECT
        account_id,
        count(*) AS charges
    FROM ledger
    WHERE kind = 'charge'
    GROUP BY account_id
)

SELECT
    accounts.account_id,
    accounts.charge_count,
    coalesce(entries.charges, 0) AS entries
FROM accounts
LEFT JOIN entries ON accounts.account_id = entries.account_id
WHERE accounts.charge_count <> coalesce(entries.charges, 0);
