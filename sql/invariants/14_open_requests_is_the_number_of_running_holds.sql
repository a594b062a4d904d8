-- The open requests of an account are its open holds that were not handed over to recovery.
WITH running AS (
    SELECT
        account_id,
        count(*) AS requests
    FROM holds
    WHERE state = 'open' AND NOT is_handed_over
    GROUP BY account_id
)

SELECT
    accounts.account_id,
    accounts.open_requests,
    coalesce(running.requests, 0) AS requests
FROM accounts
LEFT JOIN running ON accounts.account_id = running.account_id
WHERE accounts.open_requests <> coalesce(running.requests, 0);
