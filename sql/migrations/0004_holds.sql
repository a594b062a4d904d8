CREATE TYPE hold_state AS ENUM (
    'open',     -- the request runs, or recovery looks for evidence of its cost
    'settled',  -- open or released -> settled: the charge is known and booked
    'released'  -- open -> released: nothing was bought, or nothing was ever learnt (is_unresolved)
);

CREATE TABLE holds (
    account_id bigint NOT NULL REFERENCES accounts,
    hold_id uuid NOT NULL,
    state hold_state NOT NULL DEFAULT 'open',
    is_handed_over boolean NOT NULL DEFAULT FALSE,
    is_unresolved boolean NOT NULL DEFAULT FALSE,
    is_late boolean NOT NULL DEFAULT FALSE,
    owner uuid NOT NULL,
    key_id bigint NOT NULL,
    counts_against_key_limit boolean NOT NULL DEFAULT FALSE,
    amount_nano bigint NOT NULL,
    rub_per_usd numeric NOT NULL,
    model text NOT NULL,
    request_id text NOT NULL,
    idempotency_key text,
    body_hash bytea,
    generation_id text,
    cost_usd numeric,
    charge_nano bigint,
    created_at timestamptz NOT NULL DEFAULT now(),
    closed_at timestamptz,
    due_at timestamptz NOT NULL,
    recovery_attempts integer NOT NULL DEFAULT 0,
    PRIMARY KEY (hold_id, account_id), -- the id begins with its time, so new rows of all accounts share the last page
    CONSTRAINT hold_is_not_negative CHECK (amount_nano >= 0),
    CONSTRAINT rate_is_positive CHECK (rub_per_usd > 0 AND rub_per_usd < 1000000),
    CONSTRAINT cost_is_a_price CHECK (cost_usd >= 0 AND cost_usd < 100000), -- NaN is greater than every number
    CONSTRAINT charge_is_not_negative CHECK (charge_nano >= 0),
    CONSTRAINT idempotency_key_is_short CHECK (length(idempotency_key) <= 255),
    CONSTRAINT idempotency_key_has_its_body_hash CHECK (idempotency_key IS NULL OR length(body_hash) = 32),
    CONSTRAINT only_released_holds_are_unresolved CHECK (NOT is_unresolved OR state = 'released'),
    CONSTRAINT closed_holds_have_a_time CHECK ((state = 'open') = (closed_at IS NULL)),
    CONSTRAINT settled_holds_have_a_charge CHECK ((state = 'settled') = (charge_nano IS NOT NULL AND cost_usd IS NOT NULL))
);

-- For claim_due_holds, and for all questions about open holds: there are few at any time.
CREATE INDEX holds_open_by_due_at ON holds (due_at) WHERE state = 'open';
-- For list_waiting_holds; sum_waiting_holds reads the index alone.
CREATE INDEX holds_unresolved ON holds (created_at, hold_id) INCLUDE (amount_nano) WHERE is_unresolved;
-- For set_key_limits: the holds that stop counting when a limit starts to count from zero again.
CREATE INDEX holds_counted_by_key ON holds (account_id, key_id) WHERE counts_against_key_limit AND state <> 'settled';
-- For find_request. The account comes second: request ids are nearly unique, and new ones share a page.
CREATE INDEX holds_by_request_id ON holds (request_id, account_id, created_at);
CREATE INDEX holds_by_generation_id ON holds (generation_id, account_id) WHERE generation_id IS NOT NULL;
CREATE UNIQUE INDEX holds_idempotency_key_is_used_once ON holds (account_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
-- For clear_idempotency_keys.
CREATE INDEX holds_idempotency_key_by_time ON holds (created_at) WHERE idempotency_key IS NOT NULL;

COMMENT ON TABLE holds IS
'Money set aside for one request, committed before the request goes upstream. Lock order: accounts by id, then holds.';
COMMENT ON COLUMN holds.state IS 'The state of the money. The view requests has the state of the request in one word.';
COMMENT ON COLUMN holds.is_handed_over IS 'The request has ended here after it went upstream: recovery looks for its cost.';
COMMENT ON COLUMN holds.is_unresolved IS 'Released after a day without evidence: the operator''s loss, if anything was bought.';
COMMENT ON COLUMN holds.is_late IS 'Settled after a release: the money was not held any more.';
COMMENT ON COLUMN holds.owner IS 'The run of the process that placed the hold; its journal knows what was sent.';
COMMENT ON COLUMN holds.key_id IS 'The key of the request. No foreign key: it would lock the key''s row for every hold.';
COMMENT ON COLUMN holds.counts_against_key_limit IS 'The hold is in its key''s held_nano, and its charge will be in spent_nano.';
COMMENT ON COLUMN holds.amount_nano IS 'The ceiling: the most that the request can cost, or all that was available.';
COMMENT ON COLUMN holds.rub_per_usd IS 'The rate when the request began; the charge uses it.';
COMMENT ON COLUMN holds.request_id IS 'X-Request-ID: ours, or the client''s own.';
COMMENT ON COLUMN holds.idempotency_key IS 'Idempotency-Key of the request; cleared after 24 hours.';
COMMENT ON COLUMN holds.body_hash IS 'SHA-256 of the request''s body; kept with idempotency_key, and cleared with it.';
COMMENT ON COLUMN holds.generation_id IS 'OpenRouter''s id of what was bought.';
COMMENT ON COLUMN holds.due_at IS 'When recovery looks for evidence (again). An open hold is never dropped.';
COMMENT ON COLUMN holds.recovery_attempts IS 'How often recovery has looked.';

CREATE VIEW requests AS
SELECT
    account_id,
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
        WHEN state = 'open' AND is_handed_over THEN 'awaiting_evidence'
        WHEN is_unresolved THEN 'unresolved'
        ELSE state::text
    END AS state,
    CASE state WHEN 'open' THEN amount_nano ELSE 0 END AS held_nano
FROM holds;

COMMENT ON VIEW requests IS 'Requests that may have bought something, each with its state in one word.';
COMMENT ON COLUMN requests.state IS
'open: it runs; awaiting_evidence: recovery looks for its cost; settled: it is charged; released: it bought nothing; '
'unresolved: nobody learnt whether it bought anything, and it is not charged.';
COMMENT ON COLUMN requests.held_nano IS 'What is held for it now.';
