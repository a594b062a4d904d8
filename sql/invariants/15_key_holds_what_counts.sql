-- What a key has reserved under its cap is the sum of its open holds since the cap was set; without a cap it is nothing.
WITH counted AS (
    SELECT
        account_id,
        key_id,
        sum(amount_nano) AS amount_nano
    FROM holds
    WHERE state = 'open' AND key_counts
    GROUP BY account_id, key_id
)

SELECT
    api_keys.account_id,
    api_keys.key_id,
    api_keys.cap_nano,
    api_keys.held_nano,
    coalesce(counted.amount_nano, 0) AS open_holds_nano
FROM api_keys
LEFT JOIN counted ON api_keys.account_id = counted.account_id AND api_keys.key_id = counted.key_id
WHERE
    api_keys.held_nano <> coalesce(counted.amount_nano, 0)
    OR (api_keys.cap_nano IS NULL AND api_keys.held_nano <> 0);
