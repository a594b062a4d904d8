-- The held amount of a key is the sum of its open holds that count against its limit; without a limit, it is zero.
WITH counting AS (
    SELECT
        account_id,
        key_id,
        sum(amount_nano) AS amount_nano
    FROM holds
    WHERE state = 'open' AND counts_against_key_limit
    GROUP BY account_id, key_id
)

SELECT
    api_keys.account_id,
    api_keys.key_id,
    api_keys.limit_nano,
    api_keys.held_nano,
    coalesce(counting.amount_nano, 0) AS open_holds_nano
FROM api_keys
LEFT JOIN counting ON api_keys.account_id = counting.account_id AND api_keys.key_id = counting.key_id
WHERE
    api_keys.held_nano <> coalesce(counting.amount_nano, 0)
    OR (api_keys.limit_nano IS NULL AND api_keys.held_nano <> 0);
