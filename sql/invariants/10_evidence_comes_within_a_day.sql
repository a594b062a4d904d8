-- Nothing waits for evidence longer than a day, unless OpenRouter can be asked for it, and has hardly been.
SELECT
    account_id,
    hold_id,
    amount_nano,
    generation_id,
    created_at
FROM holds
WHERE
    state = 'open' AND created_at < now() - interval '24 hours'
    AND (generation_id IS NULL OR looks > 10);
