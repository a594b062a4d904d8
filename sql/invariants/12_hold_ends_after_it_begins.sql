-- A hold ends after it begins, and holds no more than a billion roubles.
SELECT
    account_id,
    hold_id,
    created_at,
    closed_at,
    amount_nano
FROM holds
WHERE closed_at < created_at OR amount_nano > 1000000000000000000;
