-- A trigger, and not a part of book_charges: whatever books a charge, the totals have it when the transaction ends. Charges are
-- booked under the lock of their account's row, so two transactions never wait for each other here.
CREATE OR REPLACE FUNCTION add_to_usage_days() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO usage_days AS existing (
        account_id, day, model, requests, prompt_tokens, completion_tokens, cost_usd, charge_nano
    )
    SELECT account_id, (created_at AT TIME ZONE 'UTC')::date, coalesce(model, ''), count(*),
        sum(prompt_tokens), sum(completion_tokens), sum(cost_usd), -sum(amount_nano)::bigint
    FROM booked WHERE kind = 'charge' GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
    ON CONFLICT (account_id, day, model) DO UPDATE
    SET requests = existing.requests + excluded.requests,
        prompt_tokens = coalesce(
            existing.prompt_tokens + excluded.prompt_tokens, existing.prompt_tokens, excluded.prompt_tokens
        ),
        completion_tokens = coalesce(
            existing.completion_tokens + excluded.completion_tokens, existing.completion_tokens, excluded.completion_tokens
        ),
        cost_usd = existing.cost_usd + excluded.cost_usd,
        charge_nano = existing.charge_nano + excluded.charge_nano;
    RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER ledger_adds_to_usage_days AFTER INSERT ON ledger
REFERENCING NEW TABLE AS booked FOR EACH STATEMENT EXECUTE FUNCTION add_to_usage_days();
