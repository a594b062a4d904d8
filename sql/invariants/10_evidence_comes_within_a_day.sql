-- No hold waits for evidence longer than a day, unless it has a generation id that recovery has hardly looked up yet.
SELECT
    account_id,
    hold_id,
    amount_nano,
    generation_id,
    created_at
FROM holds
WHERE
    state = 'open' AND created_at < now() - interval '24 hours'
    AND (generation_id IS NULL OR recovery_attempts > 10);
