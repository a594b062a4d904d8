-- The whole of the money, from the first day: accounts with their keys, holds for requests under way, and the ledger.
-- Amounts are nano-roubles: one rouble is 1 000 000 000. BIGINT has no NaN and raises on overflow; dollars are NUMERIC, exact.
-- The account id stands first in every key and unique constraint, so that the tables can be split by account.

CREATE TABLE accounts (
    account_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL DEFAULT '',
    balance_nano bigint NOT NULL DEFAULT 0, -- the sum of the account's ledger entries
    held_nano bigint NOT NULL DEFAULT 0,    -- the sum of its open holds
    charges bigint NOT NULL DEFAULT 0,      -- the number of its charges: a lost or doubled update shows here
    is_active boolean NOT NULL DEFAULT TRUE,
    minute timestamptz NOT NULL DEFAULT '-infinity', -- the minute in which its last request was let in …
    minute_requests integer NOT NULL DEFAULT 0,      -- … and how many were, in that minute
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT held_is_not_negative CHECK (held_nano >= 0),
    CONSTRAINT charges_are_counted_from_zero CHECK (charges >= 0)
) WITH (fillfactor = 50); -- a hot account is rewritten in place; never index balance_nano, held_nano or charges

CREATE TABLE api_keys (
    account_id bigint NOT NULL REFERENCES accounts,
    key_hash bytea NOT NULL, -- SHA-256 of the whole key
    shown text NOT NULL,     -- the part that may be shown: sk-user-17-abcd
    name text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz,
    PRIMARY KEY (account_id, key_hash),
    CONSTRAINT key_hash_is_sha256 CHECK (length(key_hash) = 32)
);

-- One row for each request that may buy something. Its life:  open -> settled   the charge is known and booked
--                                                             open -> released  nothing was bought
--                                                         released -> settled   evidence of a charge came late
CREATE TYPE hold_state AS ENUM ('open', 'settled', 'released');

CREATE TABLE holds (
    account_id bigint NOT NULL REFERENCES accounts,
    hold_id uuid NOT NULL,
    state hold_state NOT NULL DEFAULT 'open',
    owner uuid NOT NULL,          -- the life of the process that took it: what that process's journal knows, it knows of this
    amount_nano bigint NOT NULL,
    rub_per_usd numeric NOT NULL, -- the rate that was promised when the request began
    model text NOT NULL,
    request_id text NOT NULL,
    is_sent boolean NOT NULL DEFAULT FALSE, -- handed over to recovery: the request went upstream, what it bought is not known yet
    generation_id text,           -- OpenRouter's name for what was bought
    cost_usd numeric,
    charge_nano bigint,
    created_at timestamptz NOT NULL DEFAULT now(),
    due_at timestamptz NOT NULL,  -- when recovery looks for evidence of it (again); an open hold is never simply dropped
    looks integer NOT NULL DEFAULT 0, -- how often recovery has looked
    closed_at timestamptz,
    is_unresolved boolean NOT NULL DEFAULT FALSE, -- released after a day without evidence: the operator's loss, if there was one
    is_late boolean NOT NULL DEFAULT FALSE, -- settled after a release: the money was not reserved any more
    idempotency_key text,         -- the caller's own name for the request, kept for a day
    body_hash bytea,              -- SHA-256 of the body, beside that name
    PRIMARY KEY (account_id, hold_id),
    CONSTRAINT hold_is_not_negative CHECK (amount_nano >= 0),
    CONSTRAINT rate_is_positive CHECK (rub_per_usd > 0 AND rub_per_usd < 1000000),
    CONSTRAINT cost_is_a_price CHECK (cost_usd >= 0 AND cost_usd < 100000), -- NaN is greater than every number
    CONSTRAINT charge_is_not_negative CHECK (charge_nano >= 0),
    CONSTRAINT idempotency_key_is_short CHECK (length(idempotency_key) <= 255),
    CONSTRAINT idempotency_key_has_its_body CHECK ((idempotency_key IS NULL) OR (length(body_hash) = 32)),
    CONSTRAINT only_released_holds_are_unresolved CHECK (NOT is_unresolved OR state = 'released'),
    CONSTRAINT closed_holds_have_a_time CHECK ((state = 'open') = (closed_at IS NULL)),
    CONSTRAINT settled_holds_have_a_charge CHECK ((state = 'settled') = (charge_nano IS NOT NULL AND cost_usd IS NOT NULL))
);

CREATE INDEX holds_open ON holds (due_at) WHERE state = 'open';
CREATE UNIQUE INDEX holds_idempotency_key_is_used_once ON holds (account_id, idempotency_key) WHERE idempotency_key IS NOT NULL;

-- Append-only. An entry says what changed the balance, by how much, and from which counter-account:
-- together with `contra` each row is a complete double entry.
CREATE TYPE entry_kind AS ENUM ('charge', 'topup', 'refund', 'adjustment', 'bonus');

CREATE TABLE ledger (
    account_id bigint NOT NULL REFERENCES accounts,
    entry_id uuid NOT NULL, -- of a charge: the hold's id, so that one hold can be charged once
    kind entry_kind NOT NULL,
    amount_nano bigint NOT NULL,
    contra text NOT NULL,   -- the other leg: revenue, payments, goodwill, corrections
    reason text NOT NULL DEFAULT '',
    reference text,         -- an outside name that makes a booking idempotent, such as a payment's number
    model text,
    generation_id text,
    cost_usd numeric,
    rub_per_usd numeric,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (account_id, entry_id),
    CONSTRAINT charges_take_and_name_their_cost CHECK (
        kind <> 'charge' OR (amount_nano <= 0 AND cost_usd IS NOT NULL AND rub_per_usd IS NOT NULL)
    ),
    CONSTRAINT topups_and_bonuses_give CHECK (kind NOT IN ('topup', 'bonus') OR amount_nano > 0),
    CONSTRAINT amount_is_bounded CHECK (amount_nano BETWEEN -1000000000000000000 AND 1000000000000000000)
);

CREATE UNIQUE INDEX ledger_reference_is_booked_once ON ledger (account_id, reference) WHERE reference IS NOT NULL;
CREATE INDEX ledger_by_reference ON ledger (reference) WHERE reference IS NOT NULL;
CREATE INDEX ledger_by_time ON ledger (account_id, created_at DESC, entry_id DESC);

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: book a correcting entry instead', tg_table_name;
END $$;

CREATE TRIGGER ledger_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
