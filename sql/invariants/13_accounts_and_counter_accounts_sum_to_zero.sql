-- Double entry: each counter-account has the opposite of the entries of its kinds, and all together that of the balances.
WITH kinds (kind, contra) AS (
    VALUES
    ('charge'::entry_kind, 'revenue'),
    ('topup', 'payments'),
    ('refund', 'payments'),
    ('adjustment', 'corrections'),
    ('bonus', 'goodwill')
),

counter_accounts AS (
    SELECT
        contra,
        -sum(amount_nano) AS amount_nano
    FROM ledger
    GROUP BY contra
),

expected AS (
    SELECT
        kinds.contra,
        -sum(ledger.amount_nano) AS amount_nano
    FROM ledger
    INNER JOIN kinds ON ledger.kind = kinds.kind
    GROUP BY kinds.contra
),

balances AS (
    SELECT coalesce(sum(balance_nano), 0) AS amount_nano
    FROM accounts
)

SELECT
    coalesce(counter_accounts.contra, expected.contra) AS counter_account,
    counter_accounts.amount_nano,
    expected.amount_nano AS expected_nano
FROM counter_accounts
FULL JOIN expected ON counter_accounts.contra = expected.contra
WHERE counter_accounts.amount_nano IS DISTINCT FROM expected.amount_nano
UNION ALL
SELECT
    'all' AS counter_account,
    coalesce(sum(counter_accounts.amount_nano), 0) AS amount_nano,
    -balances.amount_nano AS expected_nano
FROM balances
LEFT JOIN counter_accounts ON TRUE
GROUP BY balances.amount_nano
HAVING coalesce(sum(counter_accounts.amount_nano), 0) <> -balances.amount_nano;
