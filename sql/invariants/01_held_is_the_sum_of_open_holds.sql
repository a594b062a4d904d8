-- The held amount of an account is the sum of its open holds.
WITH open_holds AS (
    SELECT
        account_id,
        sum(amount_nano) AS amount_nano
    FROM holds
    WHERE state = 'open'
    GROUP BY account_id
)

SELECT
    accounts.account_id,
    accounts.held_nano,
    coalesce(open_holds.amount_nano, 0) AS open_holds_nano
FROM accounts
LEFT JOIN open_holds ON accounts.account_id = open_holds.account_id
WHERE accounts.held_nano <> coalesce(open_holds.amount_nano, 0);
