-- People come from outside (VK), keys can be several, each with an end, a cap and a pace of its own, and nobody runs too many
-- requests at once. Only additions: a process of the version before goes on working beside this one.

LOCK TABLE accounts IN ACCESS EXCLUSIVE MODE; -- at once, and not by steps: whoever stands on the first would wait for the second

-- Who an account is outside. A directory over all accounts: its key is the one that has no account in it.
CREATE TABLE identities (
    provider text NOT NULL, -- vk
    subject text NOT NULL,  -- the person's id there
    account_id bigint NOT NULL REFERENCES accounts,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (provider, subject),
    CONSTRAINT identity_is_short CHECK (length(provider) <= 20 AND length(subject) BETWEEN 1 AND 64)
);

CREATE INDEX identities_of_account ON identities (account_id);

ALTER TABLE accounts
ADD COLUMN open_requests integer NOT NULL DEFAULT 0, -- holds that are open and not left to recovery
ADD CONSTRAINT open_requests_is_not_negative CHECK (open_requests >= 0);

ALTER TABLE api_keys
ADD COLUMN key_id bigint GENERATED ALWAYS AS IDENTITY,
ADD COLUMN is_main boolean NOT NULL DEFAULT FALSE, -- the key that VK sign-in shows
ADD COLUMN encrypted bytea,   -- the key itself, by AES-GCM; NULL: it was made before there were copies
ADD COLUMN secret_id text,    -- which secret it is encrypted by
ADD COLUMN expires_at timestamptz,
ADD COLUMN cap_nano bigint,   -- the most that it may spend …
ADD COLUMN cap_period text,   -- … in a day (UTC), or in all since the cap was set
ADD COLUMN spent_nano bigint NOT NULL DEFAULT 0, -- of a capped key: charged in the period …
ADD COLUMN spent_on date NOT NULL DEFAULT '-infinity', -- … the last of it on this day
ADD COLUMN held_nano bigint NOT NULL DEFAULT 0,  -- of a capped key: its open holds since the cap was set
ADD COLUMN per_minute integer, -- requests; NULL: only the account's limit counts
ADD COLUMN minute timestamptz NOT NULL DEFAULT '-infinity',
ADD COLUMN minute_requests integer NOT NULL DEFAULT 0,
ADD CONSTRAINT cap_has_its_period CHECK ((cap_nano IS NULL) = (cap_period IS NULL)),
ADD CONSTRAINT cap_is_an_amount CHECK (cap_nano >= 0),
ADD CONSTRAINT cap_period_is_known CHECK (cap_period IN ('day', 'total')),
ADD CONSTRAINT pace_is_positive CHECK (per_minute > 0),
ADD CONSTRAINT spent_is_not_negative CHECK (spent_nano >= 0 AND held_nano >= 0),
ADD CONSTRAINT copy_names_its_secret CHECK ((encrypted IS NULL) = (secret_id IS NULL));

CREATE UNIQUE INDEX api_keys_by_id ON api_keys (account_id, key_id);
CREATE UNIQUE INDEX api_keys_one_is_main ON api_keys (account_id) WHERE is_main AND revoked_at IS NULL;
CREATE INDEX api_keys_by_shown ON api_keys (shown text_pattern_ops);

UPDATE api_keys SET is_main = TRUE
WHERE (account_id, key_hash) IN (
    SELECT DISTINCT ON (account_id)
        account_id,
        key_hash
    FROM api_keys
    WHERE revoked_at IS NULL
    ORDER BY account_id ASC, created_at DESC
);

ALTER TABLE holds
ADD COLUMN key_id bigint,                          -- NULL: taken by the version before
ADD COLUMN key_counts boolean NOT NULL DEFAULT FALSE; -- whether it is in its key's held_nano

CREATE INDEX holds_counted ON holds (account_id, key_id) WHERE key_counts AND state <> 'settled';
CREATE INDEX holds_by_generation ON holds (account_id, generation_id) WHERE generation_id IS NOT NULL;
CREATE INDEX holds_by_request ON holds (account_id, request_id, created_at); -- a caller may give many requests one name

-- As before, with the limits of keys, and of requests at once. New outcomes:
--   too_many      the account has as many requests open as it may (at_once; 0 is no limit)
--   capped        less than least_nano is left of what the key may spend
-- available_nano is what was available to this key; minute_requests is how many the account has had in this minute.
CREATE FUNCTION hold_funds(
    owner uuid, ttl_s double precision, rub_per_usd numeric, per_minute integer, at_once integer,
    account_ids bigint[], key_hashes bytea[], hold_ids uuid[], most_nano bigint[], least_nano bigint[],
    models text[], request_ids text[], idempotency_keys text[], body_hashes bytea[]
) RETURNS TABLE (
    hold_id uuid, outcome text, amount_nano bigint, available_nano bigint, earlier_request_id text, minute_requests integer
)
LANGUAGE plpgsql AS $$
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
    reserved bigint := 0;
    this_minute timestamptz := date_trunc('minute', now());
    today date := (now() AT TIME ZONE 'UTC')::date;
    requests integer; -- of this account, in this minute
    running integer;  -- of this account, at once
    granted integer := 0;
BEGIN
    PERFORM FROM accounts WHERE account_id = ANY(account_ids) ORDER BY account_id FOR NO KEY UPDATE;

    FOR item IN
        SELECT i.*, accounts.balance_nano - accounts.held_nano AS available_nano, accounts.open_requests,
            CASE WHEN accounts.minute = this_minute THEN accounts.minute_requests ELSE 0 END AS requests,
            accounts.is_active AND api_keys.account_id IS NOT NULL AS is_known,
            api_keys.key_id, api_keys.cap_nano IS NOT NULL OR api_keys.per_minute IS NOT NULL AS is_limited
        FROM unnest(account_ids, key_hashes, hold_ids, most_nano, least_nano, models, request_ids, idempotency_keys, body_hashes)
            WITH ORDINALITY AS i (
                account_id, key_hash, hold_id, most_nano, least_nano, model, request_id, idempotency_key, body_hash, place
            )
        LEFT JOIN accounts ON i.account_id = accounts.account_id
        LEFT JOIN api_keys
            ON i.account_id = api_keys.account_id AND i.key_hash = api_keys.key_hash AND api_keys.revoked_at IS NULL
            AND (api_keys.expires_at IS NULL OR api_keys.expires_at > now())
        ORDER BY i.account_id, i.place
    LOOP
        IF account IS DISTINCT FROM item.account_id THEN
            IF granted > 0 THEN
                UPDATE accounts SET held_nano = held_nano + reserved, open_requests = running, minute = this_minute,
                    minute_requests = requests
                WHERE account_id = account;
            END IF;
            account := item.account_id;
            available := item.available_nano;
            requests := item.requests;
            running := item.open_requests;
            reserved := 0;
            granted := 0;
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
            WHERE account_id = account AND idempotency_key = item.idempotency_key;
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
        INSERT INTO holds (
            account_id, hold_id, owner, amount_nano, rub_per_usd, model, request_id, due_at, idempotency_key, body_hash,
            key_id, key_counts
        )
        VALUES (
            account, item.hold_id, owner, amount_nano, rub_per_usd, item.model, item.request_id,
            now() + make_interval(secs => ttl_s), item.idempotency_key, item.body_hash,
            item.key_id, item.is_limited AND is_capped
        );
        available := available - amount_nano;
        reserved := reserved + amount_nano;
        requests := requests + 1;
        running := running + 1;
        granted := granted + 1;
        minute_requests := requests;
        RETURN NEXT;
    END LOOP;
    IF granted > 0 THEN
        UPDATE accounts SET held_nano = held_nano + reserved, open_requests = running, minute = this_minute,
            minute_requests = requests
        WHERE account_id = account;
    END IF;
END $$;

-- A process of the version before takes its holds by the same rules; a key's cap is for it a lack of funds.
CREATE OR REPLACE FUNCTION hold_funds(
    owner uuid, ttl_s double precision, rub_per_usd numeric, per_minute integer,
    account_ids bigint[], key_hashes bytea[], hold_ids uuid[], most_nano bigint[], least_nano bigint[],
    models text[], request_ids text[], idempotency_keys text[], body_hashes bytea[]
) RETURNS TABLE (hold_id uuid, outcome text, amount_nano bigint, available_nano bigint, earlier_request_id text)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT held.hold_id, CASE held.outcome WHEN 'capped' THEN 'insufficient' ELSE held.outcome END, held.amount_nano,
        held.available_nano, held.earlier_request_id
    FROM hold_funds(
        owner, ttl_s, rub_per_usd, per_minute, 0, account_ids, key_hashes, hold_ids, most_nano, least_nano, models, request_ids,
        idempotency_keys, body_hashes
    ) AS held;
END $$;

CREATE OR REPLACE FUNCTION replace_keys(account bigint, new_key_hash bytea, new_shown text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM accounts WHERE account_id = account FOR NO KEY UPDATE;
    UPDATE api_keys SET revoked_at = now() WHERE account_id = account AND revoked_at IS NULL;
    INSERT INTO api_keys (account_id, key_hash, shown, is_main) VALUES (account, new_key_hash, new_shown, TRUE);
END $$;

-- As before, with what keys hold and how many requests are open.
CREATE OR REPLACE FUNCTION release_holds(account_ids bigint[], hold_ids uuid[], unresolved boolean[])
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
        RETURNING holds.*
    ),
    total AS (
        SELECT account_id, sum(amount_nano)::bigint AS freed_nano,
            sum((NOT is_sent AND key_id IS NOT NULL)::integer)::integer AS ended
        FROM released GROUP BY account_id
    ),
    balanced AS (
        UPDATE accounts
        SET held_nano = held_nano - total.freed_nano, open_requests = open_requests - total.ended, updated_at = clock_timestamp()
        FROM total WHERE accounts.account_id = total.account_id
    ),
    of_key AS (
        SELECT account_id, key_id, sum(amount_nano)::bigint AS freed_nano FROM released WHERE key_counts GROUP BY account_id, key_id
    ),
    counted AS (
        UPDATE api_keys SET held_nano = api_keys.held_nano - of_key.freed_nano
        FROM of_key WHERE api_keys.account_id = of_key.account_id AND api_keys.key_id = of_key.key_id
    )
    SELECT hold_id FROM released;
END $$;

-- Leaves open holds to recovery, due at once; their requests do not run any more. Returns those that were open.
CREATE FUNCTION hand_over_holds(account_ids bigint[], hold_ids uuid[], generation_ids text[])
RETURNS TABLE (hold_id uuid) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    PERFORM FROM accounts WHERE account_id = ANY(account_ids) ORDER BY account_id FOR NO KEY UPDATE;

    RETURN QUERY
    WITH before AS MATERIALIZED (
        SELECT account_id, hold_id, is_sent, item.generation_id
        FROM holds JOIN unnest(account_ids, hold_ids, generation_ids) AS item (account_id, hold_id, generation_id)
            USING (account_id, hold_id)
        WHERE holds.state = 'open'
    ),
    handed AS (
        UPDATE holds SET is_sent = TRUE, due_at = now(), generation_id = coalesce(before.generation_id, holds.generation_id)
        FROM before WHERE holds.account_id = before.account_id AND holds.hold_id = before.hold_id
        RETURNING holds.account_id, holds.hold_id, (NOT before.is_sent AND holds.key_id IS NOT NULL)::integer AS ended
    ),
    total AS (
        SELECT account_id, sum(ended)::integer AS ended FROM handed GROUP BY account_id
    ),
    balanced AS (
        UPDATE accounts SET open_requests = open_requests - total.ended
        FROM total WHERE accounts.account_id = total.account_id AND total.ended > 0
    )
    SELECT hold_id FROM handed;
END $$;

-- A cap set or lifted counts from then on: what was spent and held before is not in it.
-- With only_seen it is done only while the limits are those seen. Tells what became of it: done, changed (by another), none.
CREATE FUNCTION limit_key(
    account bigint, id bigint, new_cap_nano bigint, new_cap_period text, new_per_minute integer, new_end timestamptz,
    only_seen boolean, seen_cap_nano bigint, seen_cap_period text, seen_per_minute integer, seen_end timestamptz
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    so_far api_keys;
BEGIN
    PERFORM FROM accounts WHERE account_id = account FOR NO KEY UPDATE;
    SELECT * INTO so_far FROM api_keys WHERE account_id = account AND key_id = id AND revoked_at IS NULL;
    IF NOT FOUND THEN
        RETURN 'none';
    END IF;
    IF only_seen AND (seen_cap_nano, seen_cap_period, seen_per_minute, seen_end)
        IS DISTINCT FROM (so_far.cap_nano, so_far.cap_period, so_far.per_minute, so_far.expires_at) THEN
        RETURN 'changed';
    END IF;
    IF new_cap_period IS DISTINCT FROM so_far.cap_period THEN
        UPDATE holds SET key_counts = FALSE
        WHERE account_id = account AND key_id = id AND key_counts AND state <> 'settled'; -- a settled one never counts again
        UPDATE api_keys SET spent_nano = 0, held_nano = 0 WHERE account_id = account AND key_id = id;
    END IF;
    UPDATE api_keys
    SET cap_nano = new_cap_nano, cap_period = new_cap_period, per_minute = new_per_minute, expires_at = new_end
    WHERE account_id = account AND key_id = id;
    RETURN 'done';
END $$;

-- The account of a person from outside, made at the first sight of him; of many first sights at once one makes it.
CREATE FUNCTION account_of(outside text, person text, first_name text, bonus_entry uuid, bonus_nano bigint)
RETURNS TABLE (account_id bigint, is_new boolean) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    SELECT identities.account_id INTO account_id FROM identities WHERE provider = outside AND subject = person;
    is_new := NOT FOUND;
    IF is_new THEN
        PERFORM pg_advisory_xact_lock(hashtextextended(outside || ':' || person, 0));
        SELECT identities.account_id INTO account_id FROM identities WHERE provider = outside AND subject = person;
        is_new := NOT FOUND;
    END IF;
    IF is_new THEN
        INSERT INTO accounts (name, balance_nano) VALUES (first_name, bonus_nano) RETURNING accounts.account_id INTO account_id;
        INSERT INTO identities (provider, subject, account_id) VALUES (outside, person, account_id);
        IF bonus_nano > 0 THEN
            INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, reason, reference)
            VALUES (account_id, bonus_entry, 'bonus', bonus_nano, 'goodwill', 'sign-up', 'sign-up:' || outside || ':' || person);
        END IF;
    END IF;
    RETURN NEXT;
END $$;

-- A new key; without a main one it becomes that, unless it only stands beside. No row: the account has keys_max living keys.
CREATE FUNCTION create_key(
    account bigint, beside boolean, keys_max integer, new_key_hash bytea, new_shown text, new_name text, new_encrypted bytea,
    new_secret_id text, new_end timestamptz, new_cap_nano bigint, new_cap_period text, new_per_minute integer
) RETURNS SETOF api_keys LANGUAGE plpgsql AS $$
DECLARE
    living integer;
    has_main boolean;
BEGIN
    PERFORM FROM accounts WHERE account_id = account FOR NO KEY UPDATE;
    SELECT count(*), coalesce(bool_or(is_main), FALSE) INTO living, has_main
    FROM api_keys WHERE account_id = account AND revoked_at IS NULL;
    IF living < keys_max AND (
        SELECT count(*) FROM api_keys WHERE account_id = account AND created_at > now() - interval '24 hours'
    ) < 2 * keys_max THEN
        RETURN QUERY
        INSERT INTO api_keys (
            account_id, key_hash, shown, name, is_main, encrypted, secret_id, expires_at, cap_nano, cap_period, per_minute
        )
        VALUES (
            account, new_key_hash, new_shown, new_name, NOT beside AND NOT has_main, new_encrypted, new_secret_id, new_end,
            new_cap_nano, new_cap_period, new_per_minute
        )
        RETURNING *;
    END IF;
END $$;

-- A new main key in place of the one before, or of all, at once and everywhere: the hold reads them.
-- With only_seen it is done only while the main key is the one seen (NULL: while there is none); tells whether it was.
CREATE FUNCTION renew_key(
    account bigint, others_too boolean, only_seen boolean, seen bytea,
    new_key_hash bytea, new_shown text, new_encrypted bytea, new_secret_id text
) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM accounts WHERE account_id = account FOR NO KEY UPDATE;
    IF only_seen AND seen IS DISTINCT FROM (
        SELECT key_hash FROM api_keys WHERE account_id = account AND is_main AND revoked_at IS NULL
    ) THEN
        RETURN FALSE;
    END IF;
    UPDATE api_keys SET revoked_at = now() WHERE account_id = account AND (is_main OR others_too) AND revoked_at IS NULL;
    INSERT INTO api_keys (account_id, key_hash, shown, name, is_main, encrypted, secret_id)
    VALUES (account, new_key_hash, new_shown, 'main', TRUE, new_encrypted, new_secret_id);
    RETURN TRUE;
END $$;
