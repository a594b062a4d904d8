-- A hold ends after it began, and reserves no more than a person could own.
SELECT
    account_id,
    hold_id,
    created_at,
    closed_at,
    amount_nano
FROM holds
WHERE closed_at < created_at OR amount_nano > 1000000000000000000;
