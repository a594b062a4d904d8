-- Places holds again that the database has lost, by what the journal of their process knows: the database was restored from a
-- backup, or a server that lagged behind was promoted. Idempotent. One row for each:
--   restored    the hold is there. If it awaits evidence, it is open and handed over; otherwise it is released, as nothing is
--               held for it any more, and its charge is booked late
--   exists      it was not lost
--   impossible  its account was lost too, or another one has its number now, or the journal has no amount of it
-- An account with the number is another one if it does not have the key, and is younger than the hold.
-- What an open hold takes is limited to what is available now. lock_timeout: as in release_holds.
CREATE OR REPLACE FUNCTION restore_holds(
    owner uuid, account_ids bigint[], hold_ids uuid[], placed_at timestamptz[], amounts_nano bigint[], rates numeric[],
    key_hash_beginnings bytea[], models text[], request_ids text[], generation_ids text[], await_evidence boolean[]
) RETURNS TABLE (hold_id uuid, outcome text)
LANGUAGE plpgsql
SET lock_timeout = '100ms'
AS $$
#variable_conflict use_column
DECLARE
    item record;
    account record;
    key record;
BEGIN
    PERFORM FROM accounts WHERE account_id = ANY(account_ids) ORDER BY account_id FOR NO KEY UPDATE;

    FOR item IN
        SELECT *
        FROM unnest(
            account_ids, hold_ids, placed_at, amounts_nano, rates, key_hash_beginnings, models, request_ids, generation_ids,
            await_evidence
        ) AS i (
            account_id, hold_id, placed_at, amount_nano, rub_per_usd, key_hash_beginning, model, request_id, generation_id,
            awaits_evidence
        )
    LOOP
        hold_id := item.hold_id;
        IF EXISTS (SELECT FROM holds WHERE hold_id = item.hold_id AND account_id = item.account_id) THEN
            outcome := 'exists';
            RETURN NEXT;
            CONTINUE;
        END IF;

        SELECT created_at, greatest(balance_nano - held_nano, 0) AS available_nano INTO account
        FROM accounts WHERE account_id = item.account_id;
        SELECT key_id, limit_nano IS NOT NULL AS has_limit INTO key
        FROM api_keys WHERE account_id = item.account_id AND substr(key_hash, 1, 8) = item.key_hash_beginning;
        IF item.amount_nano IS NULL OR account.created_at IS NULL
            OR (key.key_id IS NULL AND account.created_at > item.placed_at) THEN
            outcome := 'impossible';
            RETURN NEXT;
            CONTINUE;
        END IF;

        IF item.awaits_evidence THEN
            item.amount_nano := least(item.amount_nano, account.available_nano);
            UPDATE accounts SET held_nano = held_nano + item.amount_nano WHERE account_id = item.account_id;
            UPDATE api_keys SET held_nano = held_nano + item.amount_nano
            WHERE account_id = item.account_id AND key_id = key.key_id AND key.has_limit;
        END IF;
        INSERT INTO holds (
            account_id, hold_id, state, is_handed_over, owner, key_id, counts_against_key_limit, amount_nano, rub_per_usd, model,
            request_id, generation_id, created_at, closed_at, due_at
        ) VALUES (
            item.account_id, item.hold_id, CASE WHEN item.awaits_evidence THEN 'open' ELSE 'released' END::hold_state,
            item.awaits_evidence, owner, coalesce(key.key_id, 0), coalesce(key.has_limit, FALSE), item.amount_nano,
            item.rub_per_usd, item.model, item.request_id, item.generation_id, least(item.placed_at, now()),
            CASE WHEN NOT item.awaits_evidence THEN now() END, now()
        );
        outcome := 'restored';
        RETURN NEXT;
    END LOOP;
END $$;
