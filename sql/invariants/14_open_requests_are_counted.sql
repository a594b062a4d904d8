-- How many requests an account has under way is the number of its open holds that are not left to recovery.
WITH under_way AS (
    SELECT
        account_id,
        count(*) AS requests
    FROM holds
    WHERE state = 'open' AND key_id IS NOT NULL AND NOT is_sent
    GROUP BY account_id
)

SELECT
    accounts.account_id,
    accounts.open_requests,
    coalesce(under_way.requests, 0) AS requests
FROM accounts
LEFT JOIN under_way ON accounts.account_id = under_way.account_id
WHERE accounts.open_requests <> coalesce(under_way.requests, 0);
