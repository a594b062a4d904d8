-- A hold and its settlement cost PostgreSQL about half: what they do is done for a whole batch at once, and planned once for each
-- connection. The plans of these functions are known: few rows, each by its key, in a table of any size. So the planner is told,
-- or it would take whatever looks cheap while a table is small, and keep it when it has grown. Only additions, and functions of
-- the same outcomes: a process of the version before goes on working.

-- In the order of all who settle, and at once: whoever has a look at holds may want to change them next.
LOCK TABLE accounts IN EXCLUSIVE MODE;
LOCK TABLE holds IN ACCESS EXCLUSIVE MODE;

-- Account first, an index invites the planner to look for one hold among all of its account's. Nobody names two requests alike.
CREATE INDEX holds_by_request_id ON holds (request_id, account_id, created_at);
DROP INDEX holds_by_request;

-- As before; the holds that are granted are inserted at the end, all of them at once.
CREATE OR REPLACE FUNCTION hold_funds(
    owner uuid, ttl_s double precision, rub_per_usd numeric, per_minute integer, at_once integer,
    account_ids bigint[], key_hashes bytea[], hold_ids uuid[], most_nano bigint[], least_nano bigint[],
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
    item record;
    earlier record;
    is_capped boolean; -- of the key, if it has a cap or a pace of its own …
    key_left bigint;
    key_pace integer;
    key_requests integer; -- … in this minute
    account bigint;
    available bigint; -- of this account, as this batch goes on
    room bigint;      -- of it, for this key
    this_minute timestamptz := date_trunc('minute', now());
    today date := (now() AT TIME ZONE 'UTC')::date;
    requests integer; -- of this account, in this minute
    running integer;  -- of this account, at once
    places integer[] := '{}'; -- of the granted, in the arrays that were given …
    amounts bigint[];
    key_ids bigint[];
    counting boolean[]; -- … and whether they count against their keys' caps
BEGIN
    PERFORM FROM accounts WHERE account_id = ANY(account_ids) ORDER BY account_id FOR NO KEY UPDATE;

    FOR item IN
        SELECT i.*, accounts.balance_nano - accounts.held_nano AS available_nano, accounts.open_requests,
            CASE WHEN accounts.minute = this_minute THEN accounts.minute_requests ELSE 0 END AS requests,
            accounts.is_active AND api_keys.account_id IS NOT NULL AS is_known,
            api_keys.key_id, api_keys.cap_nano IS NOT NULL OR api_keys.per_minute IS NOT NULL AS is_limited
        FROM unnest(account_ids, key_hashes, hold_ids, most_nano, least_nano, idempotency_keys, body_hashes)
            WITH ORDINALITY AS i (account_id, key_hash, hold_id, most_nano, least_nano, idempotency_key, body_hash, place)
        LEFT JOIN accounts ON i.account_id = accounts.account_id
        LEFT JOIN api_keys
            ON i.account_id = api_keys.account_id AND i.key_hash = api_keys.key_hash AND api_keys.revoked_at IS NULL
            AND (api_keys.expires_at IS NULL OR api_keys.expires_at > now())
        ORDER BY i.account_id, i.place
    LOOP
        IF account IS DISTINCT FROM item.account_id THEN
            account := item.account_id;
            available := item.available_nano;
            requests := item.requests;
            running := item.open_requests;
        END IF;

        hold_id := item.hold_id;
        amount_nano := NULL;
        available_nano := available;
        earlier_request_id := NULL;
        minute_requests := requests;
        room := available;
        IF item.is_known IS NOT TRUE THEN
            outcome := 'unknown_key';
            RETURN NEXT;
            CONTINUE;
        END IF;

        IF item.idempotency_key IS NOT NULL THEN
            UPDATE holds SET idempotency_key = NULL, body_hash = NULL
            WHERE account_id = account AND idempotency_key = item.idempotency_key AND created_at < now() - interval '24 hours';

            SELECT request_id, body_hash INTO earlier FROM holds
            WHERE account_id = account AND idempotency_key = item.idempotency_key
            UNION ALL
            SELECT request_ids[place], body_hashes[place] FROM unnest(places) AS granted (place)
            WHERE account_ids[place] = account AND idempotency_keys[place] = item.idempotency_key;
            IF FOUND THEN
                outcome := CASE WHEN earlier.body_hash = item.body_hash THEN 'repeated' ELSE 'mismatched' END;
                earlier_request_id := earlier.request_id;
                RETURN NEXT;
                CONTINUE;
            END IF;
        END IF;

        IF item.is_limited THEN -- read anew for each item: the one before may have been the same key's
            SELECT cap_nano IS NOT NULL, per_minute, CASE WHEN minute = this_minute THEN minute_requests ELSE 0 END,
                cap_nano - held_nano - CASE WHEN cap_period = 'day' AND spent_on < today THEN 0 ELSE spent_nano END
            INTO is_capped, key_pace, key_requests, key_left FROM api_keys WHERE account_id = account AND key_id = item.key_id;
            room := least(available, key_left);
            available_nano := room;
        END IF;

        outcome := CASE
            WHEN per_minute > 0 AND requests >= per_minute THEN 'rate_limited'
            WHEN item.is_limited AND key_requests >= key_pace THEN 'rate_limited'
            WHEN at_once > 0 AND running >= at_once THEN 'too_many'
            WHEN available < item.least_nano THEN 'insufficient'
            WHEN room < item.least_nano THEN 'capped'
            ELSE 'granted'
        END;
        IF outcome <> 'granted' THEN
            RETURN NEXT;
            CONTINUE;
        END IF;

        amount_nano := least(item.most_nano, room);
        IF item.is_limited THEN
            UPDATE api_keys SET held_nano = held_nano + CASE WHEN is_capped THEN amount_nano ELSE 0 END,
                minute = this_minute, minute_requests = key_requests + 1
            WHERE account_id = account AND key_id = item.key_id;
        END IF;
        places := places || item.place::integer;
        amounts := amounts || amount_nano;
        key_ids := key_ids || item.key_id;
        counting := counting || (item.is_limited AND is_capped);
        available := available - amount_nano;
        requests := requests + 1;
        running := running + 1;
        minute_requests := requests;
        RETURN NEXT;
    END LOOP;

    IF cardinality(places) > 0 THEN
        WITH granted AS MATERIALIZED (
            SELECT account_ids[place] AS account_id, place, amount_nano, key_id, key_counts
            FROM unnest(places, amounts, key_ids, counting) AS i (place, amount_nano, key_id, key_counts)
        ),
        held AS (
            INSERT INTO holds (
                account_id, hold_id, owner, amount_nano, rub_per_usd, model, request_id, due_at, idempotency_key, body_hash,
                key_id, key_counts
            )
            SELECT account_id, hold_ids[place], owner, amount_nano, rub_per_usd, models[place], request_ids[place],
                now() + make_interval(secs => ttl_s), idempotency_keys[place], body_hashes[place], key_id, key_counts
            FROM granted
        )
        UPDATE accounts
        SET held_nano = held_nano + total.amount_nano, open_requests = open_requests + total.requests, minute = this_minute,
            minute_requests = CASE WHEN minute = this_minute THEN minute_requests ELSE 0 END + total.requests
        FROM (
            SELECT account_id, sum(amount_nano)::bigint AS amount_nano, count(*)::integer AS requests
            FROM granted GROUP BY account_id
        ) AS total
        WHERE accounts.account_id = total.account_id;
    END IF;
END $$;

-- As before; each hold is looked up once for what it was, and once to be changed.
CREATE OR REPLACE FUNCTION settle_holds(
    account_ids bigint[], hold_ids uuid[], charges_nano bigint[], costs_usd numeric[], generation_ids text[],
    prompt_tokens bigint[], completion_tokens bigint[]
) RETURNS TABLE (hold_id uuid, outcome text)
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    today date := (now() AT TIME ZONE 'UTC')::date;
BEGIN
    PERFORM FROM accounts WHERE account_id = ANY(account_ids) ORDER BY account_id FOR NO KEY UPDATE;

    RETURN QUERY
    WITH item AS MATERIALIZED (
        SELECT DISTINCT ON (i.account_id, i.hold_id) i.*, holds.state AS state_before
        FROM unnest(account_ids, hold_ids, charges_nano, costs_usd, generation_ids, prompt_tokens, completion_tokens)
            AS i (account_id, hold_id, charge_nano, cost_usd, generation_id, prompt_tokens, completion_tokens)
        LEFT JOIN holds ON i.account_id = holds.account_id AND i.hold_id = holds.hold_id
    ),
    settled AS (
        UPDATE holds
        SET state = 'settled', charge_nano = item.charge_nano, cost_usd = item.cost_usd, closed_at = clock_timestamp(),
            generation_id = coalesce(item.generation_id, holds.generation_id), is_unresolved = FALSE,
            is_late = item.state_before = 'released'
        FROM item
        WHERE holds.account_id = item.account_id AND holds.hold_id = item.hold_id AND item.state_before <> 'settled'
        RETURNING holds.*, item.state_before = 'open' AS was_open, item.prompt_tokens, item.completion_tokens
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
        SELECT account_id, sum(charge_nano)::bigint AS charge_nano, count(*) AS charges,
            coalesce(sum(amount_nano) FILTER (WHERE was_open), 0)::bigint AS freed_nano,
            count(*) FILTER (WHERE was_open AND NOT is_sent AND key_id IS NOT NULL)::integer AS ended
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
        SELECT account_id, key_id, sum(charge_nano)::bigint AS charge_nano,
            coalesce(sum(amount_nano) FILTER (WHERE was_open), 0)::bigint AS freed_nano
        FROM settled WHERE key_counts GROUP BY account_id, key_id
    ),
    counted AS (
        UPDATE api_keys
        SET spent_nano = CASE WHEN cap_period = 'day' AND spent_on < today THEN 0 ELSE spent_nano END + of_key.charge_nano,
            spent_on = greatest(spent_on, today), held_nano = held_nano - of_key.freed_nano
        FROM of_key WHERE api_keys.account_id = of_key.account_id AND api_keys.key_id = of_key.key_id
    )
    SELECT hold_id, CASE state_before
        WHEN 'open' THEN 'settled'
        WHEN 'released' THEN 'settled_late'
        WHEN 'settled' THEN 'already'
        ELSE 'no_hold'
    END
    FROM item;
END $$;
