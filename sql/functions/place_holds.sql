-- A part of settle_and_hold, which has the locks: authenticates keys and places holds, in the arrays' order. One row for each:
--   granted              amount_nano is held
--   unknown_key          the key is unknown, revoked, expired or another account's, or the account is inactive: not told apart
--   rate_limited         the account or the key had all its requests of this minute
--   concurrency_limited  the account has as many open requests as it may have
--   insufficient         less than the minimum is available
--   key_limit_reached    less than the minimum is left of the key's limit
--   repeated             the idempotency key was used within 24 hours, with the same body, by earlier_request_id
--   mismatched           … with another body
--   outcome_unknown      the same body was just sent with this API key, by earlier_request_id, and may have bought something
--   locked               another transaction has locked the account's row
-- available_nano: what was available to this key before the hold. minute_requests: the account's requests in this minute.
--
-- Of each hold: minimums_nano is what must be available. ceilings_nano is the most that the request can cost, and is held; or, if
-- that is less, holds_min_nano and an eighth of what is available beyond it: the request's output is then limited to what is
-- held. account_requests_per_minute and account_concurrency_limit: 0 is no limit. hold_ttl_s: when recovery looks at the hold.
-- body_hashes are compared with marked requests, unless the client says by an idempotency key that this one is new.
CREATE OR REPLACE FUNCTION place_holds(
    locked_account_ids bigint[],
    owner uuid, hold_ttl_s double precision, rub_per_usd numeric,
    account_requests_per_minute integer, account_concurrency_limit integer,
    account_ids bigint[], key_hashes bytea[], hold_ids uuid[],
    ceilings_nano bigint[], holds_min_nano bigint[], minimums_nano bigint[],
    models text[], request_ids text[], idempotency_keys text[], body_hashes bytea[]
) RETURNS TABLE (
    hold_id uuid, outcome text, amount_nano bigint, available_nano bigint, earlier_request_id text, minute_requests integer
)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    this_minute timestamptz := date_trunc('minute', now());
    today date := (now() AT TIME ZONE 'UTC')::date;
    item record;
    earlier record;
    -- The item's account, with what the items before have taken.
    current_account_id bigint;
    account_available bigint;
    account_requests integer; -- in this minute
    account_concurrency integer;
    -- The item's key, if it has a limit or a rate limit of its own.
    key_has_limit boolean;
    key_remaining bigint;
    key_rate_limit integer;
    key_requests integer; -- in this minute
    key_available bigint; -- what the account has and the key may spend
    -- The granted holds: their positions in the arrays, …
    granted_positions integer[] := '{}';
    granted_amounts bigint[];
    granted_key_ids bigint[];
    granted_count_against_key boolean[];
BEGIN
    FOR item IN
        SELECT i.*, accounts.balance_nano - accounts.held_nano AS available_nano, accounts.open_requests,
            CASE WHEN accounts.minute = this_minute THEN accounts.minute_requests ELSE 0 END AS minute_requests,
            accounts.is_active AND api_keys.account_id IS NOT NULL AS is_known,
            api_keys.key_id, api_keys.limit_nano IS NOT NULL OR api_keys.requests_per_minute IS NOT NULL AS is_limited,
            (
                SELECT marked.request_id FROM holds AS marked
                WHERE marked.account_id = i.account_id AND marked.body_hash = i.body_hash AND i.idempotency_key IS NULL
                    AND marked.repeats_rejected_until > now() AND marked.key_id = api_keys.key_id
                LIMIT 1
            ) AS unknown_request_id
        FROM unnest(
                account_ids, key_hashes, hold_ids, ceilings_nano, holds_min_nano, minimums_nano, idempotency_keys, body_hashes
            )
            WITH ORDINALITY AS i (
                account_id, key_hash, hold_id, ceiling_nano, hold_min_nano, minimum_nano, idempotency_key, body_hash, position
            )
        LEFT JOIN accounts ON i.account_id = accounts.account_id
        LEFT JOIN api_keys
            ON i.account_id = api_keys.account_id AND i.key_hash = api_keys.key_hash AND api_keys.revoked_at IS NULL
            AND (api_keys.expires_at IS NULL OR api_keys.expires_at > now())
        ORDER BY i.account_id, i.position
    LOOP
        IF current_account_id IS DISTINCT FROM item.account_id THEN
            current_account_id := item.account_id;
            account_available := item.available_nano;
            account_requests := item.minute_requests;
            account_concurrency := item.open_requests;
        END IF;

        hold_id := item.hold_id;
        amount_nano := NULL;
        available_nano := account_available;
        earlier_request_id := NULL;
        minute_requests := account_requests;
        key_available := account_available;
        IF current_account_id = ANY(locked_account_ids) THEN
            outcome := 'locked';
            RETURN NEXT;
            CONTINUE;
        END IF;
        IF item.is_known IS NOT TRUE THEN
            outcome := 'unknown_key';
            RETURN NEXT;
            CONTINUE;
        END IF;

        IF item.unknown_request_id IS NOT NULL THEN
            outcome := 'outcome_unknown';
            earlier_request_id := item.unknown_request_id;
            RETURN NEXT;
            CONTINUE;
        END IF;

        IF item.idempotency_key IS NOT NULL THEN
            -- clear_idempotency_keys does this too, but perhaps not yet.
            UPDATE holds SET idempotency_key = NULL, body_hash = NULL
            WHERE account_id = current_account_id AND idempotency_key = item.idempotency_key
                AND created_at < now() - interval '24 hours';

            SELECT request_id, body_hash INTO earlier FROM holds
            WHERE account_id = current_account_id AND idempotency_key = item.idempotency_key
            UNION ALL
            SELECT request_ids[position], body_hashes[position] FROM unnest(granted_positions) AS granted (position)
            WHERE account_ids[position] = current_account_id AND idempotency_keys[position] = item.idempotency_key;
            IF FOUND THEN
                outcome := CASE WHEN earlier.body_hash = item.body_hash THEN 'repeated' ELSE 'mismatched' END;
                earlier_request_id := earlier.request_id;
                RETURN NEXT;
                CONTINUE;
            END IF;
        END IF;

        IF item.is_limited THEN -- read again for each item: the one before may have used the same key
            SELECT limit_nano IS NOT NULL, requests_per_minute,
                CASE WHEN minute = this_minute THEN minute_requests ELSE 0 END,
                limit_nano - held_nano - CASE WHEN limit_reset = 'daily' AND spent_on < today THEN 0 ELSE spent_nano END
            INTO key_has_limit, key_rate_limit, key_requests, key_remaining
            FROM api_keys WHERE account_id = current_account_id AND key_id = item.key_id;
            key_available := least(account_available, key_remaining);
            available_nano := key_available;
        END IF;

        outcome := CASE
            WHEN account_requests_per_minute > 0 AND account_requests >= account_requests_per_minute THEN 'rate_limited'
            WHEN item.is_limited AND key_requests >= key_rate_limit THEN 'rate_limited'
            WHEN account_concurrency_limit > 0 AND account_concurrency >= account_concurrency_limit THEN 'concurrency_limited'
            WHEN account_available < item.minimum_nano THEN 'insufficient'
            WHEN key_available < item.minimum_nano THEN 'key_limit_reached'
            ELSE 'granted'
        END;
        IF outcome <> 'granted' THEN
            RETURN NEXT;
            CONTINUE;
        END IF;

        amount_nano := least(
            item.ceiling_nano, item.hold_min_nano + (key_available - item.hold_min_nano) / 8, key_available
        );
        IF item.is_limited THEN
            UPDATE api_keys SET held_nano = held_nano + CASE WHEN key_has_limit THEN amount_nano ELSE 0 END,
                minute = this_minute, minute_requests = key_requests + 1
            WHERE account_id = current_account_id AND key_id = item.key_id;
        END IF;
        granted_positions := granted_positions || item.position::integer;
        granted_amounts := granted_amounts || amount_nano;
        granted_key_ids := granted_key_ids || item.key_id;
        granted_count_against_key := granted_count_against_key || (item.is_limited AND key_has_limit);
        account_available := account_available - amount_nano;
        account_requests := account_requests + 1;
        account_concurrency := account_concurrency + 1;
        minute_requests := account_requests;
        RETURN NEXT;
    END LOOP;

    IF cardinality(granted_positions) > 0 THEN
        WITH granted AS MATERIALIZED (
            SELECT account_ids[position] AS account_id, position, amount_nano, key_id, counts_against_key_limit
            FROM unnest(granted_positions, granted_amounts, granted_key_ids, granted_count_against_key)
                AS i (position, amount_nano, key_id, counts_against_key_limit)
        ),
        placed AS (
            INSERT INTO holds (
                account_id, hold_id, owner, amount_nano, rub_per_usd, model, request_id, due_at, idempotency_key, body_hash,
                key_id, counts_against_key_limit
            )
            SELECT account_id, hold_ids[position], owner, amount_nano, rub_per_usd, models[position], request_ids[position],
                now() + make_interval(secs => hold_ttl_s), idempotency_keys[position],
                CASE WHEN idempotency_keys[position] IS NOT NULL THEN body_hashes[position] END,
                key_id, counts_against_key_limit
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
