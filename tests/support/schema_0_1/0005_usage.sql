-- Every account sees what it spent, to the last digit: tokens beside each charge, totals by day and model, and indexes by which
-- each question takes the same time at any age of the ledger. Only additions: a process of the version before goes on working.

-- Whoever settles takes accounts first, then the ledger: so does this, and finds nobody in between.
LOCK TABLE accounts IN EXCLUSIVE MODE;

ALTER TABLE ledger
ADD COLUMN prompt_tokens bigint, -- of a charge, where OpenRouter's bill counted them
ADD COLUMN completion_tokens bigint,
ADD CONSTRAINT tokens_are_counts CHECK (prompt_tokens >= 0 AND completion_tokens >= 0);

CREATE INDEX ledger_by_model ON ledger (account_id, model, created_at DESC, entry_id DESC) WHERE model IS NOT NULL;
-- What an account spent is what it was given less its balance: the few entries that are no charges say so, at any age.
CREATE INDEX ledger_given ON ledger (account_id) INCLUDE (amount_nano) WHERE kind <> 'charge';

-- The charges of each account, added up by UTC day and model: totals that take the same time however long the ledger is.
CREATE TABLE usage_days (
    account_id bigint NOT NULL,
    day date NOT NULL,
    model text NOT NULL,
    requests bigint NOT NULL,
    prompt_tokens numeric,     -- of the requests whose tokens are known; NULL: of none
    completion_tokens numeric,
    cost_usd numeric NOT NULL,
    charge_nano bigint NOT NULL
) WITH (fillfactor = 70); -- today's rows are rewritten in place

-- A trigger, and not a part of settle_holds: whoever books a charge, it is in the totals when the transaction ends. Charges are
-- booked under the lock on their account's row, so two transactions never wait for each other here.
CREATE FUNCTION add_to_usage_days() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO usage_days AS known (
        account_id, day, model, requests, prompt_tokens, completion_tokens, cost_usd, charge_nano
    )
    SELECT account_id, (created_at AT TIME ZONE 'UTC')::date, coalesce(model, ''), count(*),
        sum(prompt_tokens), sum(completion_tokens), sum(cost_usd), -sum(amount_nano)::bigint
    FROM booked WHERE kind = 'charge' GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
    ON CONFLICT (account_id, day, model) DO UPDATE
    SET requests = known.requests + excluded.requests,
        prompt_tokens = coalesce(known.prompt_tokens + excluded.prompt_tokens, known.prompt_tokens, excluded.prompt_tokens),
        completion_tokens = coalesce(
            known.completion_tokens + excluded.completion_tokens, known.completion_tokens, excluded.completion_tokens
        ),
        cost_usd = known.cost_usd + excluded.cost_usd,
        charge_nano = known.charge_nano + excluded.charge_nano;
    RETURN NULL;
END $$;

CREATE TRIGGER ledger_adds_to_usage_days AFTER INSERT ON ledger
REFERENCING NEW TABLE AS booked FOR EACH STATEMENT EXECUTE FUNCTION add_to_usage_days();

-- What was booked before. Nobody else books until this is committed. The keys come after the rows: that is much quicker.
INSERT INTO usage_days (account_id, day, model, requests, cost_usd, charge_nano)
SELECT
    account_id,
    (created_at AT TIME ZONE 'UTC')::date AS day,
    coalesce(model, '') AS model,
    count(*) AS requests,
    sum(cost_usd) AS cost_usd,
    -sum(amount_nano)::bigint AS charge_nano
FROM ledger
WHERE kind = 'charge'
GROUP BY 1, 2, 3;

ALTER TABLE usage_days
ADD PRIMARY KEY (account_id, day, model),
ADD FOREIGN KEY (account_id) REFERENCES accounts;

-- As before, with the tokens of each request or NULL; a hold that counted against its key's cap is charged to it, and one that
-- recovery did not have ends a request that was open.
CREATE FUNCTION settle_holds(
    account_ids bigint[], hold_ids uuid[], charges_nano bigint[], costs_usd numeric[], generation_ids text[],
    prompt_tokens bigint[], completion_tokens bigint[]
) RETURNS TABLE (hold_id uuid, outcome text) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    today date := (now() AT TIME ZONE 'UTC')::date;
BEGIN
    PERFORM FROM accounts WHERE account_id = ANY(account_ids) ORDER BY account_id FOR NO KEY UPDATE;

    RETURN QUERY
    WITH item AS MATERIALIZED (
        SELECT DISTINCT ON (account_id, hold_id) *
        FROM unnest(account_ids, hold_ids, charges_nano, costs_usd, generation_ids, prompt_tokens, completion_tokens)
            AS i (account_id, hold_id, charge_nano, cost_usd, generation_id, prompt_tokens, completion_tokens)
    ),
    before AS MATERIALIZED (
        SELECT account_id, hold_id, state, CASE state WHEN 'open' THEN amount_nano ELSE 0 END AS freed_nano,
            (state = 'open' AND NOT is_sent AND key_id IS NOT NULL)::integer AS ended
        FROM holds JOIN item USING (account_id, hold_id)
    ),
    settled AS (
        UPDATE holds
        SET state = 'settled', charge_nano = item.charge_nano, cost_usd = item.cost_usd, closed_at = clock_timestamp(),
            generation_id = coalesce(item.generation_id, holds.generation_id), is_unresolved = FALSE,
            is_late = before.state = 'released'
        FROM item JOIN before USING (account_id, hold_id)
        WHERE holds.account_id = item.account_id AND holds.hold_id = item.hold_id AND before.state <> 'settled'
        RETURNING holds.*, before.freed_nano, before.ended, before.state AS state_before,
            item.prompt_tokens, item.completion_tokens
    ),
    booked AS (
        INSERT INTO ledger (
            account_id, entry_id, kind, amount_nano, contra, model, generation_id, cost_usd, rub_per_usd,
            prompt_tokens, completion_tokens
        )
        SELECT account_id, hold_id, 'charge', -charge_nano, 'revenue', model, generation_id, cost_usd, rub_per_usd,
            settled.prompt_tokens, settled.completion_tokens
        FROM settled
    ),
    total AS (
        SELECT account_id, sum(charge_nano)::bigint AS charge_nano, sum(freed_nano)::bigint AS freed_nano, count(*) AS charges,
            sum(ended)::integer AS ended
        FROM settled GROUP BY account_id
    ),
    balanced AS (
        UPDATE accounts
        SET balance_nano = balance_nano - total.charge_nano, held_nano = held_nano - total.freed_nano,
            charges = accounts.charges + total.charges, open_requests = open_requests - total.ended,
            updated_at = clock_timestamp()
        FROM total WHERE accounts.account_id = total.account_id
    ),
    of_key AS (
        SELECT account_id, key_id, sum(charge_nano)::bigint AS charge_nano, sum(freed_nano)::bigint AS freed_nano
        FROM settled WHERE key_counts GROUP BY account_id, key_id
    ),
    counted AS (
        UPDATE api_keys
        SET spent_nano = CASE WHEN cap_period = 'day' AND spent_on < today THEN 0 ELSE spent_nano END + of_key.charge_nano,
            spent_on = greatest(spent_on, today), held_nano = held_nano - of_key.freed_nano
        FROM of_key WHERE api_keys.account_id = of_key.account_id AND api_keys.key_id = of_key.key_id
    )
    SELECT item.hold_id, CASE
        WHEN settled.state_before = 'open' THEN 'settled'
        WHEN settled.state_before = 'released' THEN 'settled_late'
        WHEN before.state IS NOT NULL THEN 'already'
        ELSE 'no_hold'
    END
    FROM item LEFT JOIN before USING (account_id, hold_id) LEFT JOIN settled USING (account_id, hold_id);
END $$;

-- For a process of the version before.
CREATE OR REPLACE FUNCTION settle_holds(
    account_ids bigint[], hold_ids uuid[], charges_nano bigint[], costs_usd numeric[], generation_ids text[]
) RETURNS TABLE (hold_id uuid, outcome text) LANGUAGE sql AS $$
    SELECT * FROM settle_holds(
        account_ids, hold_ids, charges_nano, costs_usd, generation_ids, NULL::bigint[], NULL::bigint[]
    );
$$;
