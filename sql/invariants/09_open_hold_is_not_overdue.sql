-- No open hold is overdue: recovery puts off the next look at a hold that still has no evidence of its cost.
SELECT
    account_id,
    hold_id,
    amount_nano,
    generation_id,
    created_at
FROM holds
WHERE state = 'open' AND due_at < now() - interval '2 minutes';
