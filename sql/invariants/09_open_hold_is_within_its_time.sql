-- No hold stays open past its time: one that does waits for evidence of what it bought.
SELECT
    account_id,
    hold_id,
    amount_nano,
    generation_id,
    created_at
FROM holds
WHERE state = 'open' AND due_at < now() - interval '2 minutes';
