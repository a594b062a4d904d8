-- A part of settle_and_hold, which has the locks: settles holds and books their charges, each once. One row for each hold:
--   settled          its charge is booked, and what it held is free
--   settled_late     it had been released: its charge is booked
--   already_settled  its charge was booked before
--   no_hold          there is no such hold
--   locked           another transaction has locked its account's row
CREATE OR REPLACE FUNCTION book_charges(
    locked_account_ids bigint[],
    account_ids bigint[], hold_ids uuid[], charges_nano bigint[], costs_usd numeric[], generation_ids text[],
    prompt_tokens bigint[], completion_tokens bigint[], evidence text[]
) RETURNS TABLE (hold_id uuid, outcome text)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    today date := (now() AT TIME ZONE 'UTC')::date;
    settled_hold_ids uuid[] := '{}';
BEGIN
    FOR hold_id, outcome IN
        WITH item AS MATERIALIZED (
            SELECT DISTINCT ON (account_id, hold_id) *
            FROM unnest(
                account_ids, hold_ids, charges_nano, costs_usd, generation_ids, prompt_tokens, completion_tokens, evidence
            ) AS i (account_id, hold_id, charge_nano, cost_usd, generation_id, prompt_tokens, completion_tokens, evidence)
            WHERE account_id <> ALL(locked_account_ids)
        ),
        settled AS (
            UPDATE holds
            SET state = 'settled', charge_nano = item.charge_nano, cost_usd = item.cost_usd,
                closed_at = greatest(clock_timestamp(), created_at), -- the server's clock may have been set back
                generation_id = coalesce(item.generation_id, holds.generation_id), is_unresolved = FALSE,
                is_late = holds.state = 'released'
            FROM item
            WHERE holds.hold_id = item.hold_id AND holds.account_id = item.account_id AND holds.state <> 'settled'
            RETURNING holds.*, item.prompt_tokens, item.completion_tokens, item.evidence
        ),
        booked AS (
            INSERT INTO ledger (
                account_id, entry_id, kind, amount_nano, contra, model, generation_id, cost_usd, rub_per_usd,
                prompt_tokens, completion_tokens, evidence
            )
            SELECT account_id, hold_id, 'charge', -charge_nano, 'revenue', model, generation_id, cost_usd, rub_per_usd,
                settled.prompt_tokens, settled.completion_tokens, settled.evidence
            FROM settled
        ),
        account_total AS (
            SELECT account_id, sum(charge_nano)::bigint AS charge_nano, count(*) AS charge_count,
                coalesce(sum(amount_nano) FILTER (WHERE NOT is_late), 0)::bigint AS freed_nano,
                count(*) FILTER (WHERE NOT is_late AND NOT is_handed_over)::integer AS ended_requests
            FROM settled GROUP BY account_id
        ),
        account_updated AS (
            UPDATE accounts
            SET balance_nano = balance_nano - account_total.charge_nano, held_nano = held_nano - account_total.freed_nano,
                charge_count = accounts.charge_count + account_total.charge_count,
                open_requests = open_requests - account_total.ended_requests, updated_at = clock_timestamp()
            FROM account_total WHERE accounts.account_id = account_total.account_id
        ),
        key_total AS (
            SELECT account_id, key_id, sum(charge_nano)::bigint AS charge_nano,
                coalesce(sum(amount_nano) FILTER (WHERE NOT is_late), 0)::bigint AS freed_nano
            FROM settled WHERE counts_against_key_limit GROUP BY account_id, key_id
        ),
        key_updated AS (
            UPDATE api_keys
            SET spent_nano = CASE WHEN limit_reset = 'daily' AND spent_on < today THEN 0 ELSE spent_nano END
                    + key_total.charge_nano,
                spent_on = greatest(spent_on, today), held_nano = held_nano - key_total.freed_nano
            FROM key_total WHERE api_keys.account_id = key_total.account_id AND api_keys.key_id = key_total.key_id
        )
        SELECT hold_id, CASE WHEN is_late THEN 'settled_late' ELSE 'settled' END FROM settled
    LOOP
        settled_hold_ids := settled_hold_ids || hold_id;
        RETURN NEXT;
    END LOOP;

    IF cardinality(settled_hold_ids) < cardinality(hold_ids) THEN
        RETURN QUERY
        SELECT DISTINCT i.hold_id, CASE
            WHEN i.account_id = ANY(locked_account_ids) THEN 'locked'
            WHEN holds.hold_id IS NULL THEN 'no_hold'
            ELSE 'already_settled'
        END
        FROM unnest(account_ids, hold_ids) AS i (account_id, hold_id)
        LEFT JOIN holds ON i.hold_id = holds.hold_id AND i.account_id = holds.account_id
        WHERE i.hold_id <> ALL(settled_hold_ids);
    END IF;
END $$;
