-- Hands open holds over to recovery, due at once; their requests do not run any more. One row for each hold that was open.
-- lock_timeout: as in release_holds.
CREATE OR REPLACE FUNCTION hand_over_holds(account_ids bigint[], hold_ids uuid[], generation_ids text[])
RETURNS TABLE (hold_id uuid)
LANGUAGE plpgsql
SET lock_timeout = '100ms'
AS $$
#variable_conflict use_column
BEGIN
    PERFORM FROM accounts WHERE account_id = ANY(account_ids) ORDER BY account_id FOR NO KEY UPDATE;

    RETURN QUERY
    WITH before AS MATERIALIZED (
        SELECT account_id, hold_id, is_handed_over, item.generation_id
        FROM holds JOIN unnest(account_ids, hold_ids, generation_ids) AS item (account_id, hold_id, generation_id)
            USING (account_id, hold_id)
        WHERE holds.state = 'open'
    ),
    handed_over AS (
        UPDATE holds
        SET is_handed_over = TRUE, due_at = now(), generation_id = coalesce(before.generation_id, holds.generation_id)
        FROM before WHERE holds.account_id = before.account_id AND holds.hold_id = before.hold_id
        RETURNING holds.account_id, holds.hold_id, before.is_handed_over AS was_handed_over
    ),
    account_total AS (
        SELECT account_id, count(*) FILTER (WHERE NOT was_handed_over)::integer AS ended_requests
        FROM handed_over GROUP BY account_id
    ),
    account_updated AS (
        UPDATE accounts SET open_requests = open_requests - account_total.ended_requests
        FROM account_total
        WHERE accounts.account_id = account_total.account_id AND account_total.ended_requests > 0
    )
    SELECT hold_id FROM handed_over;
END $$;
