-- The life of a hold needs two looks: lock the account, then see its rows as they are now. One statement has one snapshot, taken
-- before it waited for the lock, so these are functions: each statement inside them sees what was committed before it began.
-- The lock order everywhere is accounts by id, then holds: whoever closes or opens an account's holds owns the account's row.
-- All take arrays, so that many requests share one round trip and one commit; no item is ever the reason for another's failure.

-- Authenticates and reserves, in the order of arrival. Outcomes:
--   granted       amount_nano is held; available_nano is what was available before it
--   unknown_key   unknown, revoked or foreign key, or inactive account: not told apart
--   rate_limited  the account has used up its requests of this minute (per_minute; 0 is no limit)
--   insufficient  less than least_nano is available
--   repeated      the idempotency key was used within a day, with the same body: earlier_request_id
--   mismatched    … with another body
CREATE FUNCTION hold_funds(
    owner uuid, ttl_s double precision, rub_per_usd numeric, per_minute integer,
    account_ids bigint[], key_hashes bytea[], hold_ids uuid[], most_nano bigint[], least_nano bigint[],
    models text[], request_ids text[], idempotency_keys text[], body_hashes bytea[]
) RETURNS TABLE (hold_id uuid, outcome text, amount_nano bigint, available_nano bigint, earlier_request_id text)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    item record;
    earlier record;
    account bigint;
    available bigint; -- of this account, as this batch goes on
    reserved bigint := 0;
    this_minute timestamptz := date_trunc('minute', now());
    requests integer; -- of this account, in this minute
    granted integer := 0;
BEGIN
    PERFORM FROM accounts WHERE account_id = ANY(account_ids) ORDER BY account_id FOR NO KEY UPDATE;

    FOR item IN
        SELECT i.*, accounts.balance_nano - accounts.held_nano AS available_nano,
            CASE WHEN accounts.minute = this_minute THEN accounts.minute_requests ELSE 0 END AS requests,
            accounts.is_active AND api_keys.account_id IS NOT NULL AS is_known
        FROM unnest(account_ids, key_hashes, hold_ids, most_nano, least_nano, models, request_ids, idempotency_keys, body_hashes)
            WITH ORDINALITY AS i (
                account_id, key_hash, hold_id, most_nano, least_nano, model, request_id, idempotency_key, body_hash, place
            )
        LEFT JOIN accounts ON i.account_id = accounts.account_id
        LEFT JOIN api_keys
            ON i.account_id = api_keys.account_id AND i.key_hash = api_keys.key_hash AND api_keys.revoked_at IS NULL
        ORDER BY i.account_id, i.place
    LOOP
        IF account IS DISTINCT FROM item.account_id THEN
            IF granted > 0 THEN
                UPDATE accounts SET held_nano = held_nano + reserved, minute = this_minute, minute_requests = requests
                WHERE account_id = account;
            END IF;
            account := item.account_id;
            available := item.available_nano;
            requests := item.requests;
            reserved := 0;
            granted := 0;
        END IF;

        hold_id := item.hold_id;
        amount_nano := NULL;
        available_nano := available;
        earlier_request_id := NULL;
        IF item.is_known IS NOT TRUE THEN
            outcome := 'unknown_key';
            RETURN NEXT;
            CONTINUE;
        END IF;

        IF item.idempotency_key IS NOT NULL THEN
            UPDATE holds SET idempotency_key = NULL, body_hash = NULL
            WHERE account_id = account AND idempotency_key = item.idempotency_key AND created_at < now() - interval '24 hours';

            SELECT request_id, body_hash INTO earlier FROM holds
            WHERE account_id = account AND idempotency_key = item.idempotency_key;
            IF FOUND THEN
                outcome := CASE WHEN earlier.body_hash = item.body_hash THEN 'repeated' ELSE 'mismatched' END;
                earlier_request_id := earlier.request_id;
                RETURN NEXT;
                CONTINUE;
            END IF;
        END IF;

        IF per_minute > 0 AND requests >= per_minute THEN
            outcome := 'rate_limited';
            RETURN NEXT;
            CONTINUE;
        END IF;

        IF available < item.least_nano THEN
            outcome := 'insufficient';
            RETURN NEXT;
            CONTINUE;
        END IF;

        outcome := 'granted';
        amount_nano := least(item.most_nano, available);
        INSERT INTO holds (
            account_id, hold_id, owner, amount_nano, rub_per_usd, model, request_id, due_at, idempotency_key, body_hash
        )
        VALUES (
            account, item.hold_id, owner, amount_nano, rub_per_usd, item.model, item.request_id,
            now() + make_interval(secs => ttl_s), item.idempotency_key, item.body_hash
        );
        available := available - amount_nano;
        reserved := reserved + amount_nano;
        requests := requests + 1;
        granted := granted + 1;
        RETURN NEXT;
    END LOOP;
    IF granted > 0 THEN
        UPDATE accounts SET held_nano = held_nano + reserved, minute = this_minute, minute_requests = requests
        WHERE account_id = account;
    END IF;
END $$;

-- Books charges. Outcome of each hold: settled, settled_late (it had been released), already (booked before), no_hold.
CREATE FUNCTION settle_holds(
    account_ids bigint[], hold_ids uuid[], charges_nano bigint[], costs_usd numeric[], generation_ids text[]
) RETURNS TABLE (hold_id uuid, outcome text) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    PERFORM FROM accounts WHERE account_id = ANY(account_ids) ORDER BY account_id FOR NO KEY UPDATE;

    RETURN QUERY
    WITH item AS MATERIALIZED (
        SELECT DISTINCT ON (account_id, hold_id) *
        FROM unnest(account_ids, hold_ids, charges_nano, costs_usd, generation_ids)
            AS i (account_id, hold_id, charge_nano, cost_usd, generation_id)
    ),
    before AS MATERIALIZED (
        SELECT account_id, hold_id, state, CASE state WHEN 'open' THEN amount_nano ELSE 0 END AS freed_nano
        FROM holds JOIN item USING (account_id, hold_id)
    ),
    settled AS (
        UPDATE holds
        SET state = 'settled', charge_nano = item.charge_nano, cost_usd = item.cost_usd, closed_at = clock_timestamp(),
            generation_id = coalesce(item.generation_id, holds.generation_id), is_unresolved = FALSE,
            is_late = before.state = 'released'
        FROM item JOIN before USING (account_id, hold_id)
        WHERE holds.account_id = item.account_id AND holds.hold_id = item.hold_id AND before.state <> 'settled'
        RETURNING holds.*, before.freed_nano, before.state AS state_before
    ),
    booked AS (
        INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, model, generation_id, cost_usd, rub_per_usd)
        SELECT account_id, hold_id, 'charge', -charge_nano, 'revenue', model, generation_id, cost_usd, rub_per_usd FROM settled
    ),
    total AS (
        SELECT account_id, sum(charge_nano)::bigint AS charge_nano, sum(freed_nano)::bigint AS freed_nano, count(*) AS charges
        FROM settled GROUP BY account_id
    ),
    balanced AS (
        UPDATE accounts
        SET balance_nano = balance_nano - total.charge_nano, held_nano = held_nano - total.freed_nano,
            charges = accounts.charges + total.charges, updated_at = clock_timestamp()
        FROM total WHERE accounts.account_id = total.account_id
    )
    SELECT item.hold_id, CASE
        WHEN settled.state_before = 'open' THEN 'settled'
        WHEN settled.state_before = 'released' THEN 'settled_late'
        WHEN before.state IS NOT NULL THEN 'already'
        ELSE 'no_hold'
    END
    FROM item LEFT JOIN before USING (account_id, hold_id) LEFT JOIN settled USING (account_id, hold_id);
END $$;

-- Frees holds that bought nothing, or (unresolved) of which nothing was ever learnt. Returns those that were open.
CREATE FUNCTION release_holds(account_ids bigint[], hold_ids uuid[], unresolved boolean[])
RETURNS TABLE (hold_id uuid) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    PERFORM FROM accounts WHERE account_id = ANY(account_ids) ORDER BY account_id FOR NO KEY UPDATE;

    RETURN QUERY
    WITH released AS (
        UPDATE holds SET state = 'released', closed_at = clock_timestamp(), is_unresolved = item.unresolved
        FROM unnest(account_ids, hold_ids, unresolved) AS item (account_id, hold_id, unresolved)
        WHERE holds.account_id = item.account_id AND holds.hold_id = item.hold_id AND holds.state = 'open'
            AND (item.unresolved OR NOT holds.is_sent) -- one that was handed over meanwhile may have bought something
        RETURNING holds.account_id, holds.hold_id, holds.amount_nano
    ),
    total AS (
        SELECT account_id, sum(amount_nano)::bigint AS freed_nano FROM released GROUP BY account_id
    ),
    balanced AS (
        UPDATE accounts SET held_nano = held_nano - total.freed_nano, updated_at = clock_timestamp()
        FROM total WHERE accounts.account_id = total.account_id
    )
    SELECT hold_id FROM released;
END $$;
