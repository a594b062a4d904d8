-- Frees holds that bought nothing, or (unresolved) of which nothing was ever learnt. One row for each hold that was open.
-- A request that bought nothing may be repeated: its idempotency key is free again, and no mark rejects its repeat.
-- Waits for all its accounts at once, and has locked some while it waits for others: not for long, and the service repeats it.
CREATE OR REPLACE FUNCTION release_holds(account_ids bigint[], hold_ids uuid[], unresolved boolean[])
RETURNS TABLE (hold_id uuid)
LANGUAGE plpgsql
SET lock_timeout = '100ms'
AS $$
#variable_conflict use_column
BEGIN
    PERFORM FROM accounts WHERE account_id = ANY(account_ids) ORDER BY account_id FOR NO KEY UPDATE;

    RETURN QUERY
    WITH released AS (
        UPDATE holds
        SET state = 'released', is_unresolved = item.unresolved,
            closed_at = greatest(clock_timestamp(), created_at), -- the server's clock may have been set back
            idempotency_key = CASE WHEN item.unresolved THEN holds.idempotency_key END,
            body_hash = CASE WHEN item.unresolved THEN holds.body_hash END,
            repeats_rejected_until = CASE WHEN item.unresolved THEN holds.repeats_rejected_until END
        FROM unnest(account_ids, hold_ids, unresolved) AS item (account_id, hold_id, unresolved)
        WHERE holds.account_id = item.account_id AND holds.hold_id = item.hold_id AND holds.state = 'open'
            AND (item.unresolved OR NOT holds.is_handed_over) -- one that was handed over meanwhile may have bought something
        RETURNING holds.*
    ),
    account_total AS (
        SELECT account_id, sum(amount_nano)::bigint AS freed_nano,
            count(*) FILTER (WHERE NOT is_handed_over)::integer AS ended_requests
        FROM released GROUP BY account_id
    ),
    account_updated AS (
        UPDATE accounts
        SET held_nano = held_nano - account_total.freed_nano, open_requests = open_requests - account_total.ended_requests,
            updated_at = clock_timestamp()
        FROM account_total WHERE accounts.account_id = account_total.account_id
    ),
    key_total AS (
        SELECT account_id, key_id, sum(amount_nano)::bigint AS freed_nano
        FROM released WHERE counts_against_key_limit GROUP BY account_id, key_id
    ),
    key_updated AS (
        UPDATE api_keys SET held_nano = api_keys.held_nano - key_total.freed_nano
        FROM key_total WHERE api_keys.account_id = key_total.account_id AND api_keys.key_id = key_total.key_id
    )
    SELECT hold_id FROM released;
END $$;
