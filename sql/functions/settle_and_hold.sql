-- Settles some holds and places others: what one request ends with and the next begins with share a round trip and a commit.
-- The settlements come first, so that what they free is available to the new holds. No item is the reason for another's failure.
--
-- Two steps are needed, first lock the accounts and then read them: one statement has one snapshot, taken before it waited for a
-- lock, and each statement of a function sees what was committed before it began. The lock order everywhere is accounts by id,
-- then holds.
--
-- wait_for_locks: whether to wait for accounts whose rows another transaction has locked; otherwise their items get the outcome
-- locked. For the other parameters and the outcomes see book_charges and place_holds.
--
-- The plans are the same for a table of any size: few rows, each by its key. The settings say so, because the planner would
-- choose what is cheap while a table is small, and keep that plan when the table has grown.
CREATE OR REPLACE FUNCTION settle_and_hold(
    wait_for_locks boolean,
    settled_account_ids bigint[], settled_hold_ids uuid[], charges_nano bigint[], costs_usd numeric[], generation_ids text[],
    prompt_tokens bigint[], completion_tokens bigint[], evidence text[],
    owner uuid, hold_ttl_s double precision, rub_per_usd numeric,
    account_requests_per_minute integer, account_concurrency_limit integer,
    account_ids bigint[], key_hashes bytea[], hold_ids uuid[],
    ceilings_nano bigint[], holds_min_nano bigint[], minimums_nano bigint[],
    models text[], request_ids text[], idempotency_keys text[], body_hashes bytea[]
) RETURNS TABLE (
    hold_id uuid, outcome text, amount_nano bigint, available_nano bigint, earlier_request_id text, minute_requests integer
)
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    all_account_ids bigint[] := settled_account_ids || account_ids;
    our_account_ids bigint[];
    locked_account_ids bigint[] := '{}';
BEGIN
    IF wait_for_locks THEN
        PERFORM FROM accounts WHERE account_id = ANY(all_account_ids) ORDER BY account_id FOR NO KEY UPDATE;
    ELSE
        our_account_ids := ARRAY(
            SELECT account_id FROM accounts
            WHERE account_id = ANY(all_account_ids) ORDER BY account_id FOR NO KEY UPDATE SKIP LOCKED
        );
        IF cardinality(our_account_ids) < (SELECT count(DISTINCT account_id) FROM unnest(all_account_ids) AS i (account_id)) THEN
            locked_account_ids := ARRAY(
                SELECT account_id FROM accounts
                WHERE account_id = ANY(all_account_ids) AND account_id <> ALL(our_account_ids)
            );
        END IF;
    END IF;
    IF cardinality(settled_hold_ids) > 0 THEN
        RETURN QUERY
        SELECT hold_id, outcome, NULL::bigint, NULL::bigint, NULL::text, NULL::integer FROM book_charges(
            locked_account_ids => locked_account_ids,
            account_ids => settled_account_ids,
            hold_ids => settled_hold_ids,
            charges_nano => charges_nano,
            costs_usd => costs_usd,
            generation_ids => generation_ids,
            prompt_tokens => prompt_tokens,
            completion_tokens => completion_tokens,
            evidence => evidence
        );
    END IF;
    IF cardinality(hold_ids) > 0 THEN
        RETURN QUERY
        SELECT * FROM place_holds(
            locked_account_ids => locked_account_ids,
            owner => owner,
            hold_ttl_s => hold_ttl_s,
            rub_per_usd => rub_per_usd,
            account_requests_per_minute => account_requests_per_minute,
            account_concurrency_limit => account_concurrency_limit,
            account_ids => account_ids,
            key_hashes => key_hashes,
            hold_ids => hold_ids,
            ceilings_nano => ceilings_nano,
            holds_min_nano => holds_min_nano,
            minimums_nano => minimums_nano,
            models => models,
            request_ids => request_ids,
            idempotency_keys => idempotency_keys,
            body_hashes => body_hashes
        );
    END IF;
END $$;
