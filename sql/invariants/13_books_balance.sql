-- Double entry: what all accounts own is what the counter-accounts gave.
WITH owned AS (
    SELECT coalesce(sum(balance_nano), 0) AS nano
    FROM accounts
),

given AS (
    SELECT coalesce(sum(amount_nano), 0) AS nano
    FROM ledger
)

SELECT
    given.nano AS entries_nano,
    owned.nano AS balances_nano
FROM given
CROSS JOIN owned
WHERE given.nano <> owned.nano;
