-- The totals of each account, day and model are the sums of its charges in the ledger, and there are no others.
WITH entries AS (
    SELECT
        account_id,
        (created_at AT TIME ZONE 'UTC')::date AS day,
        coalesce(model, '') AS model,
        count(*) AS requests,
        sum(prompt_tokens) AS prompt_tokens,
        sum(completion_tokens) AS completion_tokens,
        sum(cost_usd) AS cost_usd,
        -sum(amount_nano) AS charge_nano
    FROM ledger
    WHERE kind = 'charge'
    GROUP BY 1, 2, 3
)

SELECT
    account_id,
    day,
    model,
    usage_days.requests,
    entries.requests AS entries,
    usage_days.charge_nano,
    entries.charge_nano AS entries_nano
FROM usage_days
FULL JOIN entries USING (account_id, day, model)
WHERE
    (usage_days.requests, usage_days.cost_usd, usage_days.charge_nano)
    IS DISTINCT FROM (entries.requests, entries.cost_usd, entries.charge_nano)
    OR (usage_days.prompt_tokens, usage_days.completion_tokens)
    IS DISTINCT FROM (entries.prompt_tokens, entries.completion_tokens);
