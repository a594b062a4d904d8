-- The whole schema, as the migrations and functions make it. Written by `make schema`; a test compares it.

CREATE TYPE public.entry_kind AS ENUM (
    'charge',
    'topup',
    'refund',
    'adjustment',
    'bonus'
);

CREATE TYPE public.hold_state AS ENUM (
    'open',
    'settled',
    'released'
);

CREATE FUNCTION public.add_to_usage_days() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION public.book_charges(locked_account_ids bigint[], account_ids bigint[], hold_ids uuid[], charges_nano bigint[], costs_usd numeric[], generation_ids text[], prompt_tokens bigint[], completion_tokens bigint[], evidence text[]) RETURNS TABLE(hold_id uuid, outcome text)
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION public.book_entry(new_account_id bigint, new_entry_id uuid, new_kind public.entry_kind, new_amount_nano bigint, new_contra text, new_reason text, new_reference text, new_booked_by text, must_be_available boolean) RETURNS TABLE(outcome text, account_id bigint, entry_id uuid, kind text, amount_nano bigint, created_at timestamp with time zone)
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
DECLARE
    available bigint;
BEGIN
    IF new_reference IS NOT NULL THEN
        PERFORM pg_advisory_xact_lock(hashtextextended('reference:' || new_reference, 0));
        RETURN QUERY
        SELECT 'already_booked', account_id, entry_id, kind::text, amount_nano, created_at FROM ledger
        WHERE reference = new_reference ORDER BY created_at LIMIT 1;
        IF FOUND THEN
            RETURN;
        END IF;
    END IF;

    SELECT balance_nano - held_nano INTO available FROM accounts WHERE account_id = new_account_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    RETURN QUERY
    SELECT 'already_booked', account_id, entry_id, kind::text, amount_nano, created_at FROM ledger
    WHERE entry_id = new_entry_id AND account_id = new_account_id;
    IF FOUND THEN
        RETURN;
    END IF;
    IF must_be_available AND available + new_amount_nano < 0 THEN
        RETURN QUERY SELECT 'insufficient', new_account_id, new_entry_id, new_kind::text, new_amount_nano, now();
        RETURN;
    END IF;

    UPDATE accounts SET balance_nano = balance_nano + new_amount_nano, updated_at = now() WHERE account_id = new_account_id;
    RETURN QUERY
    INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, reason, reference, booked_by)
    VALUES (new_account_id, new_entry_id, new_kind, new_amount_nano, new_contra, new_reason, new_reference, new_booked_by)
    RETURNING 'booked', account_id, entry_id, kind::text, amount_nano, created_at;
END $$;

CREATE TABLE public.api_keys (
    account_id bigint NOT NULL,
    key_id bigint NOT NULL,
    key_hash bytea NOT NULL,
    prefix text NOT NULL,
    name text DEFAULT ''::text NOT NULL,
    is_main boolean DEFAULT false NOT NULL,
    encrypted_key bytea,
    secret_id text,
    limit_nano bigint,
    limit_reset text,
    spent_nano bigint DEFAULT 0 NOT NULL,
    spent_on date DEFAULT '-infinity'::date NOT NULL,
    held_nano bigint DEFAULT 0 NOT NULL,
    requests_per_minute integer,
    minute timestamp with time zone DEFAULT '-infinity'::timestamp with time zone NOT NULL,
    minute_requests integer DEFAULT 0 NOT NULL,
    expires_at timestamp with time zone,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    revoked_at timestamp with time zone,
    CONSTRAINT encrypted_key_names_its_secret CHECK (((encrypted_key IS NULL) = (secret_id IS NULL))),
    CONSTRAINT key_hash_is_sha256 CHECK ((length(key_hash) = 32)),
    CONSTRAINT limit_is_not_negative CHECK ((limit_nano >= 0)),
    CONSTRAINT limit_reset_is_known CHECK ((limit_reset = 'daily'::text)),
    CONSTRAINT limit_reset_needs_a_limit CHECK (((limit_reset IS NULL) OR (limit_nano IS NOT NULL))),
    CONSTRAINT requests_per_minute_is_positive CHECK ((requests_per_minute > 0)),
    CONSTRAINT spent_and_held_are_not_negative CHECK (((spent_nano >= 0) AND (held_nano >= 0)))
);

COMMENT ON TABLE public.api_keys IS 'The keys of an account: one main key, which sign-in shows, and others with limits of their own. Revoked keys stay.';

COMMENT ON COLUMN public.api_keys.key_hash IS 'SHA-256 of the whole key.';

COMMENT ON COLUMN public.api_keys.prefix IS 'The beginning of the key, which may be displayed: sk-user-17-abcd.';

COMMENT ON COLUMN public.api_keys.is_main IS 'The key that sign-in shows.';

COMMENT ON COLUMN public.api_keys.encrypted_key IS 'The whole key by AES-GCM, to be shown again. NULL: there is no copy.';

COMMENT ON COLUMN public.api_keys.secret_id IS 'Which secret encrypted_key is encrypted with.';

COMMENT ON COLUMN public.api_keys.limit_nano IS 'The most that the key may spend in a period. NULL: no limit of its own.';

COMMENT ON COLUMN public.api_keys.limit_reset IS 'The period: daily (UTC), or NULL for everything since the limit was set.';

COMMENT ON COLUMN public.api_keys.spent_nano IS 'Charged against the limit in the period of spent_on.';

COMMENT ON COLUMN public.api_keys.spent_on IS 'The UTC day of the latest charge against the limit.';

COMMENT ON COLUMN public.api_keys.held_nano IS 'The sum of the open holds that count against the limit.';

COMMENT ON COLUMN public.api_keys.requests_per_minute IS 'The key''s own rate limit. NULL: the account''s alone.';

COMMENT ON COLUMN public.api_keys.minute IS 'The minute of the key''s latest request; counted only for keys with limits.';

COMMENT ON COLUMN public.api_keys.minute_requests IS 'How many requests the key had in that minute.';

CREATE FUNCTION public.create_key(owner_account_id bigint, never_main boolean, keys_max integer, new_key_hash bytea, new_prefix text, new_name text, new_encrypted_key bytea, new_secret_id text, new_limit_nano bigint, new_limit_reset text, new_requests_per_minute integer, new_expires_at timestamp with time zone) RETURNS SETOF public.api_keys
    LANGUAGE plpgsql
    AS $$
DECLARE
    live_keys integer;
    has_main boolean;
BEGIN
    PERFORM FROM accounts WHERE account_id = owner_account_id AND erased_at IS NULL FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT count(*), coalesce(bool_or(is_main), FALSE) INTO live_keys, has_main
    FROM api_keys WHERE account_id = owner_account_id AND revoked_at IS NULL;
    IF live_keys < keys_max AND (
        SELECT count(*) FROM api_keys WHERE account_id = owner_account_id AND created_at > now() - interval '24 hours'
    ) < 2 * keys_max THEN
        RETURN QUERY
        INSERT INTO api_keys (
            account_id, key_hash, prefix, name, is_main, encrypted_key, secret_id,
            limit_nano, limit_reset, requests_per_minute, expires_at
        )
        VALUES (
            owner_account_id, new_key_hash, new_prefix, new_name, NOT never_main AND NOT has_main, new_encrypted_key, new_secret_id,
            new_limit_nano, new_limit_reset, new_requests_per_minute, new_expires_at
        )
        RETURNING *;
    END IF;
END $$;

CREATE FUNCTION public.create_user(new_account_id bigint, new_name text, new_entry_id uuid, new_balance_nano bigint, new_contra text, new_reason text, new_booked_by text, new_key_hash bytea, new_prefix text, new_encrypted_key bytea, new_secret_id text) RETURNS bigint
    LANGUAGE plpgsql
    AS $$
DECLARE
    main_key_id bigint;
BEGIN
    INSERT INTO accounts (account_id, name, balance_nano) OVERRIDING SYSTEM VALUE
    VALUES (new_account_id, new_name, new_balance_nano)
    ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        SELECT key_id INTO STRICT main_key_id FROM api_keys WHERE account_id = new_account_id AND key_hash = new_key_hash;
        RETURN main_key_id;
    END IF;
    IF new_balance_nano <> 0 THEN
        INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, reason, booked_by)
        VALUES (new_account_id, new_entry_id, 'topup', new_balance_nano, new_contra, new_reason, new_booked_by);
    END IF;
    INSERT INTO api_keys (account_id, key_hash, prefix, is_main, encrypted_key, secret_id)
    VALUES (new_account_id, new_key_hash, new_prefix, TRUE, new_encrypted_key, new_secret_id)
    RETURNING key_id INTO main_key_id;
    RETURN main_key_id;
END $$;

CREATE FUNCTION public.erase_user(erased_account_id bigint, forfeit_balance boolean, forfeit_entry_id uuid, forfeit_reason text, forfeit_booked_by text) RETURNS TABLE(outcome text, balance_nano bigint)
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
DECLARE
    present accounts;
BEGIN
    SELECT * INTO present FROM accounts WHERE account_id = erased_account_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    balance_nano := CASE
        WHEN present.erased_at IS NULL THEN present.balance_nano
        ELSE coalesce(
            (SELECT -amount_nano FROM ledger WHERE account_id = erased_account_id AND entry_id = forfeit_entry_id), 0
        )
    END;
    outcome := CASE
        WHEN present.erased_at IS NOT NULL THEN 'already_erased'
        WHEN EXISTS (SELECT FROM holds WHERE state = 'open' AND account_id = erased_account_id) THEN 'holds_open'
        WHEN EXISTS (SELECT FROM pending_payments WHERE account_id = erased_account_id) THEN 'payments_pending'
        WHEN present.balance_nano <> 0 AND NOT forfeit_balance THEN 'balance_left'
        ELSE 'erased'
    END;
    IF outcome <> 'erased' THEN
        RETURN NEXT;
        RETURN;
    END IF;

    IF present.balance_nano <> 0 THEN
        INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, reason, booked_by)
        VALUES (
            erased_account_id, forfeit_entry_id, 'adjustment', -present.balance_nano, 'corrections', forfeit_reason, forfeit_booked_by
        );
    END IF;
    UPDATE accounts
    SET balance_nano = 0, name = '', contact = '', note = '', is_active = FALSE, erased_at = now(), updated_at = now()
    WHERE account_id = erased_account_id;
    UPDATE api_keys
    SET name = '', encrypted_key = NULL, secret_id = NULL, revoked_at = coalesce(revoked_at, now())
    WHERE account_id = erased_account_id;
    DELETE FROM identities WHERE account_id = erased_account_id;
    RETURN NEXT;
END $$;

CREATE FUNCTION public.find_or_create_account(new_provider text, new_subject text, new_name text, bonus_entry_id uuid, bonus_nano bigint) RETURNS TABLE(account_id bigint, is_new boolean)
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
BEGIN
    SELECT identities.account_id INTO account_id FROM identities WHERE provider = new_provider AND subject = new_subject;
    is_new := NOT FOUND;
    IF is_new THEN
        PERFORM pg_advisory_xact_lock(hashtextextended(new_provider || ':' || new_subject, 0));
        SELECT identities.account_id INTO account_id FROM identities WHERE provider = new_provider AND subject = new_subject;
        is_new := NOT FOUND;
    END IF;
    IF is_new THEN
        INSERT INTO accounts (name, balance_nano) VALUES (new_name, bonus_nano) RETURNING accounts.account_id INTO account_id;
        INSERT INTO identities (provider, subject, account_id) VALUES (new_provider, new_subject, account_id);
        IF bonus_nano > 0 THEN
            INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, reason, reference, booked_by)
            -- The reference does not name the person: entries stay when a user is erased.
            VALUES (
                account_id, bonus_entry_id, 'bonus', bonus_nano, 'goodwill', 'sign-up', 'sign-up:' || account_id, new_provider
            );
        END IF;
    END IF;
    RETURN NEXT;
END $$;

CREATE FUNCTION public.find_position() RETURNS TABLE(history text, wal_bytes bigint)
    LANGUAGE plpgsql
    AS $$
DECLARE
    server text;
    timeline text;
BEGIN
    BEGIN
        SELECT system_identifier::text INTO server FROM pg_control_system();
    EXCEPTION WHEN OTHERS THEN
        NULL;
    END;
    BEGIN
        timeline := substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8); -- the last checkpoint may be of the one before
        wal_bytes := pg_current_wal_lsn() - '0/0'::pg_lsn;
    EXCEPTION WHEN OTHERS THEN
        NULL;
    END;
    SELECT concat_ws('/', coalesce(server, '-'), coalesce(timeline, '-'), oid, extract(EPOCH FROM pg_postmaster_start_time()))
    INTO history FROM pg_database WHERE datname = current_database();
    RETURN NEXT;
END $$;

CREATE FUNCTION public.hand_over_holds(account_ids bigint[], hold_ids uuid[], generation_ids text[]) RETURNS TABLE(hold_id uuid)
    LANGUAGE plpgsql
    SET lock_timeout TO '100ms'
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

CREATE FUNCTION public.place_holds(locked_account_ids bigint[], owner uuid, hold_ttl_s double precision, rub_per_usd numeric, account_requests_per_minute integer, account_concurrency_limit integer, account_ids bigint[], key_hashes bytea[], hold_ids uuid[], ceilings_nano bigint[], holds_min_nano bigint[], minimums_nano bigint[], models text[], request_ids text[], idempotency_keys text[], body_hashes bytea[]) RETURNS TABLE(hold_id uuid, outcome text, amount_nano bigint, available_nano bigint, earlier_request_id text, minute_requests integer)
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION public.reject_change() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: book a correcting entry instead', tg_table_name;
END $$;

CREATE FUNCTION public.release_holds(account_ids bigint[], hold_ids uuid[], unresolved boolean[]) RETURNS TABLE(hold_id uuid)
    LANGUAGE plpgsql
    SET lock_timeout TO '100ms'
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

CREATE FUNCTION public.replace_main_key(owner_account_id bigint, revoke_all boolean, if_unchanged boolean, expected_key_hash bytea, new_key_hash bytea, new_prefix text, new_encrypted_key bytea, new_secret_id text) RETURNS boolean
    LANGUAGE plpgsql
    AS $$
BEGIN
    PERFORM FROM accounts WHERE account_id = owner_account_id FOR NO KEY UPDATE;
    IF if_unchanged AND expected_key_hash IS DISTINCT FROM (
        SELECT key_hash FROM api_keys WHERE account_id = owner_account_id AND is_main AND revoked_at IS NULL
    ) THEN
        RETURN FALSE;
    END IF;
    UPDATE api_keys SET revoked_at = now()
    WHERE account_id = owner_account_id AND (is_main OR revoke_all) AND revoked_at IS NULL;
    INSERT INTO api_keys (account_id, key_hash, prefix, name, is_main, encrypted_key, secret_id)
    VALUES (owner_account_id, new_key_hash, new_prefix, 'main', TRUE, new_encrypted_key, new_secret_id);
    RETURN TRUE;
END $$;

CREATE FUNCTION public.restore_holds(owner uuid, account_ids bigint[], hold_ids uuid[], placed_at timestamp with time zone[], amounts_nano bigint[], rates numeric[], key_hash_beginnings bytea[], models text[], request_ids text[], generation_ids text[], await_evidence boolean[]) RETURNS TABLE(hold_id uuid, outcome text)
    LANGUAGE plpgsql
    SET lock_timeout TO '100ms'
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

CREATE FUNCTION public.set_key_limits(owner_account_id bigint, changed_key_id bigint, new_limit_nano bigint, new_limit_reset text, new_requests_per_minute integer, new_expires_at timestamp with time zone, if_unchanged boolean, expected_limit_nano bigint, expected_limit_reset text, expected_requests_per_minute integer, expected_expires_at timestamp with time zone) RETURNS text
    LANGUAGE plpgsql
    AS $$
DECLARE
    present api_keys;
BEGIN
    PERFORM FROM accounts WHERE account_id = owner_account_id FOR NO KEY UPDATE;
    SELECT * INTO present FROM api_keys
    WHERE account_id = owner_account_id AND key_id = changed_key_id AND revoked_at IS NULL;
    IF NOT FOUND THEN
        RETURN 'not_found';
    END IF;
    IF if_unchanged
        AND (expected_limit_nano, expected_limit_reset, expected_requests_per_minute, expected_expires_at)
        IS DISTINCT FROM (present.limit_nano, present.limit_reset, present.requests_per_minute, present.expires_at) THEN
        RETURN 'changed';
    END IF;
    IF (new_limit_nano IS NULL, new_limit_reset) IS DISTINCT FROM (present.limit_nano IS NULL, present.limit_reset) THEN
        UPDATE holds SET counts_against_key_limit = FALSE
        WHERE account_id = owner_account_id AND key_id = changed_key_id AND counts_against_key_limit
            AND state <> 'settled'; -- a settled hold never counts again
        UPDATE api_keys SET spent_nano = 0, held_nano = 0
        WHERE account_id = owner_account_id AND key_id = changed_key_id;
    END IF;
    UPDATE api_keys
    SET limit_nano = new_limit_nano, limit_reset = new_limit_reset, requests_per_minute = new_requests_per_minute,
        expires_at = new_expires_at
    WHERE account_id = owner_account_id AND key_id = changed_key_id;
    RETURN 'done';
END $$;

CREATE FUNCTION public.settle_and_hold(wait_for_locks boolean, settled_account_ids bigint[], settled_hold_ids uuid[], charges_nano bigint[], costs_usd numeric[], generation_ids text[], prompt_tokens bigint[], completion_tokens bigint[], evidence text[], owner uuid, hold_ttl_s double precision, rub_per_usd numeric, account_requests_per_minute integer, account_concurrency_limit integer, account_ids bigint[], key_hashes bytea[], hold_ids uuid[], ceilings_nano bigint[], holds_min_nano bigint[], minimums_nano bigint[], models text[], request_ids text[], idempotency_keys text[], body_hashes bytea[]) RETURNS TABLE(hold_id uuid, outcome text, amount_nano bigint, available_nano bigint, earlier_request_id text, minute_requests integer)
    LANGUAGE plpgsql
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
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

CREATE TABLE public.accounts (
    account_id bigint NOT NULL,
    name text DEFAULT ''::text NOT NULL,
    balance_nano bigint DEFAULT 0 NOT NULL,
    held_nano bigint DEFAULT 0 NOT NULL,
    open_requests integer DEFAULT 0 NOT NULL,
    charge_count bigint DEFAULT 0 NOT NULL,
    minute timestamp with time zone DEFAULT '-infinity'::timestamp with time zone NOT NULL,
    minute_requests integer DEFAULT 0 NOT NULL,
    is_active boolean DEFAULT true NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL,
    contact text DEFAULT ''::text NOT NULL,
    note text DEFAULT ''::text NOT NULL,
    erased_at timestamp with time zone,
    CONSTRAINT balance_is_bounded CHECK (((balance_nano >= '-4000000000000000000'::bigint) AND (balance_nano <= '4000000000000000000'::bigint))),
    CONSTRAINT charge_count_is_not_negative CHECK ((charge_count >= 0)),
    CONSTRAINT contact_is_short CHECK ((length(contact) <= 200)),
    CONSTRAINT erased_accounts_are_nameless_and_inactive CHECK (((erased_at IS NULL) OR ((name = ''::text) AND (contact = ''::text) AND (note = ''::text) AND (NOT is_active)))),
    CONSTRAINT held_is_not_negative CHECK ((held_nano >= 0)),
    CONSTRAINT note_is_short CHECK ((length(note) <= 500)),
    CONSTRAINT open_requests_is_not_negative CHECK ((open_requests >= 0))
)
WITH (fillfactor='50');

COMMENT ON TABLE public.accounts IS 'The money of one user. A transaction that opens or closes holds, or books an entry, first locks the account''s row.';

COMMENT ON COLUMN public.accounts.name IS 'In the administrator''s words, or "vk" and the VK id.';

COMMENT ON COLUMN public.accounts.balance_nano IS 'The sum of the account''s ledger entries.';

COMMENT ON COLUMN public.accounts.held_nano IS 'The sum of its open holds. Available is balance_nano - held_nano.';

COMMENT ON COLUMN public.accounts.open_requests IS 'Open holds not handed over to recovery: what the concurrency limit counts.';

COMMENT ON COLUMN public.accounts.charge_count IS 'The number of its charges in the ledger: a lost or doubled update shows here.';

COMMENT ON COLUMN public.accounts.minute IS 'The minute of its latest request, for the rate limit.';

COMMENT ON COLUMN public.accounts.minute_requests IS 'How many requests it had in that minute.';

COMMENT ON COLUMN public.accounts.is_active IS 'FALSE: all its keys are rejected.';

COMMENT ON COLUMN public.accounts.contact IS 'How to reach the user: an e-mail address, a telephone number, or other words.';

COMMENT ON COLUMN public.accounts.note IS 'What administrators want to remember about the user.';

COMMENT ON COLUMN public.accounts.erased_at IS 'When all that identifies the user was removed, for good. NULL: it was not.';

ALTER TABLE public.accounts ALTER COLUMN account_id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.accounts_account_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE public.alert_events (
    name text NOT NULL,
    text text NOT NULL,
    events bigint NOT NULL,
    since timestamp with time zone DEFAULT now() NOT NULL,
    told_at timestamp with time zone,
    CONSTRAINT events_is_not_negative CHECK ((events >= 0))
);

COMMENT ON TABLE public.alert_events IS 'Events that the operator is told: the latest of each kind. No row depends on an account.';

COMMENT ON COLUMN public.alert_events.events IS 'How many have happened since `since`, and are not told.';

CREATE TABLE public.alerts (
    name text NOT NULL,
    text text NOT NULL,
    since timestamp with time zone DEFAULT now() NOT NULL,
    seen_at timestamp with time zone DEFAULT now() NOT NULL,
    may_expire boolean NOT NULL
);

COMMENT ON TABLE public.alerts IS 'Conditions that are on, as gptutor alerts lists them. No row depends on an account.';

COMMENT ON COLUMN public.alerts.seen_at IS 'When a process has last found the condition on.';

COMMENT ON COLUMN public.alerts.may_expire IS 'Whether the condition is over as soon as no process finds it on; otherwise a process must have seen its end, too.';

ALTER TABLE public.api_keys ALTER COLUMN key_id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.api_keys_key_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE public.holds (
    account_id bigint NOT NULL,
    hold_id uuid NOT NULL,
    state public.hold_state DEFAULT 'open'::public.hold_state NOT NULL,
    is_handed_over boolean DEFAULT false NOT NULL,
    is_unresolved boolean DEFAULT false NOT NULL,
    is_late boolean DEFAULT false NOT NULL,
    owner uuid NOT NULL,
    key_id bigint NOT NULL,
    counts_against_key_limit boolean DEFAULT false NOT NULL,
    amount_nano bigint NOT NULL,
    rub_per_usd numeric NOT NULL,
    model text NOT NULL,
    request_id text NOT NULL,
    idempotency_key text,
    body_hash bytea,
    generation_id text,
    cost_usd numeric,
    charge_nano bigint,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    closed_at timestamp with time zone,
    due_at timestamp with time zone NOT NULL,
    recovery_attempts integer DEFAULT 0 NOT NULL,
    repeats_rejected_until timestamp with time zone,
    CONSTRAINT charge_is_not_negative CHECK ((charge_nano >= 0)),
    CONSTRAINT closed_holds_have_a_time CHECK (((state = 'open'::public.hold_state) = (closed_at IS NULL))),
    CONSTRAINT cost_is_a_price CHECK (((cost_usd >= (0)::numeric) AND (cost_usd < (100000)::numeric))),
    CONSTRAINT hold_is_not_negative CHECK ((amount_nano >= 0)),
    CONSTRAINT idempotency_key_has_its_body_hash CHECK (((idempotency_key IS NULL) OR (length(body_hash) = 32))),
    CONSTRAINT idempotency_key_is_short CHECK ((length(idempotency_key) <= 255)),
    CONSTRAINT only_released_holds_are_unresolved CHECK (((NOT is_unresolved) OR (state = 'released'::public.hold_state))),
    CONSTRAINT rate_is_positive CHECK (((rub_per_usd > (0)::numeric) AND (rub_per_usd < (1000000)::numeric))),
    CONSTRAINT settled_holds_have_a_charge CHECK (((state = 'settled'::public.hold_state) = ((charge_nano IS NOT NULL) AND (cost_usd IS NOT NULL))))
);

COMMENT ON TABLE public.holds IS 'Money set aside for one request, committed before the request goes upstream. Lock order: accounts by id, then holds.';

COMMENT ON COLUMN public.holds.state IS 'The state of the money. The view requests has the state of the request in one word.';

COMMENT ON COLUMN public.holds.is_handed_over IS 'The request has ended here after it went upstream: recovery looks for its cost.';

COMMENT ON COLUMN public.holds.is_unresolved IS 'Released after a day without evidence: the operator''s loss, if anything was bought.';

COMMENT ON COLUMN public.holds.is_late IS 'Settled after a release: the money was not held any more.';

COMMENT ON COLUMN public.holds.owner IS 'The run of the process that placed the hold; its journal knows what was sent.';

COMMENT ON COLUMN public.holds.key_id IS 'The key of the request. No foreign key: it would lock the key''s row for every hold.';

COMMENT ON COLUMN public.holds.counts_against_key_limit IS 'The hold is in its key''s held_nano, and its charge will be in spent_nano.';

COMMENT ON COLUMN public.holds.amount_nano IS 'The ceiling: the most that the request can cost, or all that was available.';

COMMENT ON COLUMN public.holds.rub_per_usd IS 'The rate when the request began; the charge uses it.';

COMMENT ON COLUMN public.holds.request_id IS 'X-Request-ID: ours, or the client''s own.';

COMMENT ON COLUMN public.holds.idempotency_key IS 'Idempotency-Key of the request; cleared after 24 hours.';

COMMENT ON COLUMN public.holds.body_hash IS 'SHA-256 of the request''s body; kept with idempotency_key and repeats_rejected_until, and cleared with them.';

COMMENT ON COLUMN public.holds.generation_id IS 'OpenRouter''s id of what was bought.';

COMMENT ON COLUMN public.holds.due_at IS 'When recovery looks for evidence (again). An open hold is never dropped.';

COMMENT ON COLUMN public.holds.recovery_attempts IS 'How often recovery has looked.';

COMMENT ON COLUMN public.holds.repeats_rejected_until IS 'The request may have bought something that the client did not get: until then, one with the same body is rejected.';

CREATE TABLE public.identities (
    provider text NOT NULL,
    subject text NOT NULL,
    account_id bigint NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT identity_is_short CHECK (((length(provider) <= 20) AND ((length(subject) >= 1) AND (length(subject) <= 64))))
);

COMMENT ON TABLE public.identities IS 'Which account a user of an identity provider has.';

COMMENT ON COLUMN public.identities.provider IS 'The identity provider: vk.';

COMMENT ON COLUMN public.identities.subject IS 'The user''s id at the provider.';

CREATE TABLE public.ledger (
    account_id bigint NOT NULL,
    entry_id uuid NOT NULL,
    kind public.entry_kind NOT NULL,
    amount_nano bigint NOT NULL,
    contra text NOT NULL,
    reason text DEFAULT ''::text NOT NULL,
    reference text,
    model text,
    generation_id text,
    cost_usd numeric,
    rub_per_usd numeric,
    prompt_tokens bigint,
    completion_tokens bigint,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    booked_by text,
    evidence text,
    CONSTRAINT amount_is_bounded CHECK (((amount_nano >= '-1000000000000000000'::bigint) AND (amount_nano <= '1000000000000000000'::bigint))),
    CONSTRAINT charges_take_and_have_their_cost CHECK (((kind <> 'charge'::public.entry_kind) OR ((amount_nano <= 0) AND (cost_usd IS NOT NULL) AND (rub_per_usd IS NOT NULL)))),
    CONSTRAINT contra_is_the_counter_account_of_the_kind CHECK ((contra =
CASE kind
    WHEN 'charge'::public.entry_kind THEN 'revenue'::text
    WHEN 'topup'::public.entry_kind THEN 'payments'::text
    WHEN 'refund'::public.entry_kind THEN 'payments'::text
    WHEN 'adjustment'::public.entry_kind THEN 'corrections'::text
    WHEN 'bonus'::public.entry_kind THEN 'goodwill'::text
    ELSE NULL::text
END)),
    CONSTRAINT tokens_are_not_negative CHECK (((prompt_tokens >= 0) AND (completion_tokens >= 0))),
    CONSTRAINT topups_and_bonuses_give CHECK (((kind <> ALL (ARRAY['topup'::public.entry_kind, 'bonus'::public.entry_kind])) OR (amount_nano > 0)))
);

COMMENT ON TABLE public.ledger IS 'Every change of a balance. Append-only. Double entry: amount_nano on the account, its opposite on the counter-account contra.';

COMMENT ON COLUMN public.ledger.entry_id IS 'Of a charge: the id of its hold, so that one hold is charged once.';

COMMENT ON COLUMN public.ledger.amount_nano IS 'What is added to the account''s balance; negative: taken.';

COMMENT ON COLUMN public.ledger.contra IS 'The counter-account: revenue, payments, corrections or goodwill, by kind.';

COMMENT ON COLUMN public.ledger.reason IS 'Why, in the administrator''s words.';

COMMENT ON COLUMN public.ledger.reference IS 'A payment''s id at its provider, which makes the booking idempotent.';

COMMENT ON COLUMN public.ledger.generation_id IS 'OpenRouter''s id of what was bought.';

COMMENT ON COLUMN public.ledger.prompt_tokens IS 'Of a charge, where OpenRouter''s usage tells them.';

COMMENT ON COLUMN public.ledger.completion_tokens IS 'Of a charge, where OpenRouter''s usage tells them.';

COMMENT ON COLUMN public.ledger.booked_by IS 'Who booked the entry: cli:<user of the system>, admin:<name of the token>, yookassa, vk (the bonus at sign-in), demo. NULL: a charge, or an entry from before this column.';

COMMENT ON COLUMN public.ledger.evidence IS 'What proved the cost of a charge: response (OpenRouter''s response stated it), generation (it was looked up at /generation), journal (the response stated it to a process that died or was cut off). NULL: not a charge, or one from before this column.';

CREATE TABLE public.pending_payments (
    payment_id text NOT NULL,
    account_id bigint NOT NULL,
    lookups integer DEFAULT 0 NOT NULL,
    next_lookup_at timestamp with time zone NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT lookups_is_not_negative CHECK ((lookups >= 0)),
    CONSTRAINT payment_id_is_short CHECK (((length(payment_id) >= 1) AND (length(payment_id) <= 64)))
);

COMMENT ON TABLE public.pending_payments IS 'Payments at the provider whose end is not known yet: a job asks about each until it is booked or will never be.';

COMMENT ON COLUMN public.pending_payments.payment_id IS 'The provider''s id of the payment.';

COMMENT ON COLUMN public.pending_payments.lookups IS 'How often the job has asked the provider.';

COMMENT ON COLUMN public.pending_payments.next_lookup_at IS 'When the job asks next.';

CREATE VIEW public.requests AS
 SELECT account_id,
    hold_id,
    request_id,
    generation_id,
    key_id,
    model,
    cost_usd,
    rub_per_usd,
    charge_nano,
    amount_nano,
    recovery_attempts,
    due_at,
    created_at,
    closed_at,
        CASE
            WHEN ((state = 'open'::public.hold_state) AND is_handed_over) THEN 'awaiting_evidence'::text
            WHEN is_unresolved THEN 'unresolved'::text
            ELSE (state)::text
        END AS state,
        CASE state
            WHEN 'open'::public.hold_state THEN amount_nano
            ELSE (0)::bigint
        END AS held_nano
   FROM public.holds;

COMMENT ON VIEW public.requests IS 'Requests that may have bought something, each with its state in one word.';

COMMENT ON COLUMN public.requests.state IS 'open: it runs; awaiting_evidence: recovery looks for its cost; settled: it is charged; released: it bought nothing; unresolved: nobody learnt whether it bought anything, and it is not charged.';

COMMENT ON COLUMN public.requests.held_nano IS 'What is held for it now.';

CREATE TABLE public.schema_functions (
    name text NOT NULL,
    checksum text NOT NULL,
    version text NOT NULL,
    applied_at timestamp with time zone DEFAULT now() NOT NULL
);

CREATE TABLE public.schema_migrations (
    name text NOT NULL,
    checksum text NOT NULL,
    applied_at timestamp with time zone DEFAULT now() NOT NULL,
    version text
);

CREATE TABLE public.usage_days (
    account_id bigint NOT NULL,
    day date NOT NULL,
    model text NOT NULL,
    requests bigint NOT NULL,
    prompt_tokens numeric,
    completion_tokens numeric,
    cost_usd numeric NOT NULL,
    charge_nano bigint NOT NULL
)
WITH (fillfactor='70');

COMMENT ON TABLE public.usage_days IS 'The charges of each account by UTC day and model, added up by a trigger on the ledger: totals do not read the ledger.';

COMMENT ON COLUMN public.usage_days.model IS 'Empty where the charge has no model.';

COMMENT ON COLUMN public.usage_days.requests IS 'The number of charges.';

COMMENT ON COLUMN public.usage_days.prompt_tokens IS 'Of the charges whose tokens are known. NULL: of none.';

COMMENT ON COLUMN public.usage_days.completion_tokens IS 'Of the charges whose tokens are known. NULL: of none.';

ALTER TABLE ONLY public.accounts
    ADD CONSTRAINT accounts_pkey PRIMARY KEY (account_id);

ALTER TABLE ONLY public.alert_events
    ADD CONSTRAINT alert_events_pkey PRIMARY KEY (name);

ALTER TABLE ONLY public.alerts
    ADD CONSTRAINT alerts_pkey PRIMARY KEY (name);

ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT api_keys_pkey PRIMARY KEY (account_id, key_hash);

ALTER TABLE public.ledger
    ADD CONSTRAINT booked_by_is_short CHECK ((length(booked_by) <= 200)) NOT VALID;

ALTER TABLE public.ledger
    ADD CONSTRAINT evidence_is_of_a_charge CHECK (((evidence IS NULL) OR ((kind = 'charge'::public.entry_kind) AND (evidence = ANY (ARRAY['response'::text, 'generation'::text, 'journal'::text]))))) NOT VALID;

ALTER TABLE ONLY public.holds
    ADD CONSTRAINT holds_pkey PRIMARY KEY (hold_id, account_id);

ALTER TABLE ONLY public.identities
    ADD CONSTRAINT identities_pkey PRIMARY KEY (provider, subject);

ALTER TABLE ONLY public.ledger
    ADD CONSTRAINT ledger_pkey PRIMARY KEY (entry_id, account_id);

ALTER TABLE ONLY public.pending_payments
    ADD CONSTRAINT pending_payments_pkey PRIMARY KEY (payment_id, account_id);

ALTER TABLE ONLY public.schema_functions
    ADD CONSTRAINT schema_functions_pkey PRIMARY KEY (name);

ALTER TABLE ONLY public.schema_migrations
    ADD CONSTRAINT schema_migrations_pkey PRIMARY KEY (name);

ALTER TABLE ONLY public.usage_days
    ADD CONSTRAINT usage_days_pkey PRIMARY KEY (account_id, day, model);

CREATE INDEX accounts_by_words ON public.accounts USING gin (array_to_tsvector(array_remove(string_to_array(translate(lower((("left"(name, 200) || ' '::text) || contact)), 'АБВГДЕЁЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯё!"#$%&''()*+,-./:;<=>?@[\]^_`{|}~'::text, 'абвгдеежзийклмнопрстуфхцчшщъыьэюяе                                '::text), ' '::text), ''::text)));

CREATE INDEX api_keys_by_prefix ON public.api_keys USING btree (prefix text_pattern_ops);

CREATE UNIQUE INDEX api_keys_key_id_is_unique ON public.api_keys USING btree (account_id, key_id);

CREATE UNIQUE INDEX api_keys_one_main_key_is_live ON public.api_keys USING btree (account_id) WHERE (is_main AND (revoked_at IS NULL));

CREATE INDEX holds_by_generation_id ON public.holds USING btree (generation_id, account_id) WHERE (generation_id IS NOT NULL);

CREATE INDEX holds_by_request_id ON public.holds USING btree (request_id, account_id, created_at);

CREATE INDEX holds_counted_by_key ON public.holds USING btree (account_id, key_id) WHERE (counts_against_key_limit AND (state <> 'settled'::public.hold_state));

CREATE INDEX holds_idempotency_key_by_time ON public.holds USING btree (created_at) WHERE (idempotency_key IS NOT NULL);

CREATE UNIQUE INDEX holds_idempotency_key_is_used_once ON public.holds USING btree (account_id, idempotency_key) WHERE (idempotency_key IS NOT NULL);

CREATE INDEX holds_marked ON public.holds USING btree (account_id, body_hash) WHERE (repeats_rejected_until IS NOT NULL);

CREATE INDEX holds_open_by_due_at ON public.holds USING btree (due_at) WHERE (state = 'open'::public.hold_state);

CREATE INDEX holds_unresolved ON public.holds USING btree (created_at, hold_id) INCLUDE (amount_nano) WHERE is_unresolved;

CREATE INDEX identities_by_account ON public.identities USING btree (account_id);

CREATE INDEX ledger_by_model ON public.ledger USING btree (account_id, model, created_at DESC, entry_id DESC) WHERE (model IS NOT NULL);

CREATE INDEX ledger_by_reference ON public.ledger USING btree (reference) WHERE (reference IS NOT NULL);

CREATE INDEX ledger_by_time ON public.ledger USING btree (account_id, created_at DESC, entry_id DESC);

CREATE UNIQUE INDEX ledger_reference_is_booked_once ON public.ledger USING btree (account_id, reference) WHERE (reference IS NOT NULL);

CREATE INDEX ledger_without_charges ON public.ledger USING btree (account_id) INCLUDE (amount_nano) WHERE (kind <> 'charge'::public.entry_kind);

CREATE INDEX pending_payments_by_account ON public.pending_payments USING btree (account_id);

CREATE INDEX pending_payments_by_next_lookup ON public.pending_payments USING btree (next_lookup_at);

CREATE INDEX usage_days_by_day ON public.usage_days USING btree (day);

CREATE TRIGGER ledger_adds_to_usage_days AFTER INSERT ON public.ledger REFERENCING NEW TABLE AS booked FOR EACH STATEMENT EXECUTE FUNCTION public.add_to_usage_days();

CREATE TRIGGER ledger_is_append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON public.ledger FOR EACH STATEMENT EXECUTE FUNCTION public.reject_change();

ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT api_keys_account_id_fkey FOREIGN KEY (account_id) REFERENCES public.accounts(account_id);

ALTER TABLE ONLY public.holds
    ADD CONSTRAINT holds_account_id_fkey FOREIGN KEY (account_id) REFERENCES public.accounts(account_id);

ALTER TABLE ONLY public.identities
    ADD CONSTRAINT identities_account_id_fkey FOREIGN KEY (account_id) REFERENCES public.accounts(account_id);

ALTER TABLE ONLY public.ledger
    ADD CONSTRAINT ledger_account_id_fkey FOREIGN KEY (account_id) REFERENCES public.accounts(account_id);

ALTER TABLE ONLY public.pending_payments
    ADD CONSTRAINT pending_payments_account_id_fkey FOREIGN KEY (account_id) REFERENCES public.accounts(account_id);

ALTER TABLE ONLY public.usage_days
    ADD CONSTRAINT usage_days_account_id_fkey FOREIGN KEY (account_id) REFERENCES public.accounts(account_id);
