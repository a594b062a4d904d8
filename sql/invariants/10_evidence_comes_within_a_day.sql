-- Nothing waits for evidence longer than a day.
SELECT
    account_id,
    hold_id,
    amount_nano,
    generation_id,
    created_at
FROM holds
WHERE state = 'open' AND created_at < now() - interval '24 hours';
