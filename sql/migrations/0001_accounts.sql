-- Amounts are nano-roubles everywhere: one rouble is 1 000 000 000. BIGINT has no NaN and raises on overflow; dollars are exact
-- NUMERIC. Every primary key and unique constraint contains the account, so that the tables can be split by it.

CREATE TABLE accounts (
    account_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL DEFAULT '',
    balance_nano bigint NOT NULL DEFAULT 0,
    held_nano bigint NOT NULL DEFAULT 0,
    open_requests integer NOT NULL DEFAULT 0,
    charge_count bigint NOT NULL DEFAULT 0,
    minute timestamptz NOT NULL DEFAULT '-infinity',
    minute_requests integer NOT NULL DEFAULT 0,
    is_active boolean NOT NULL DEFAULT TRUE,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT balance_is_bounded CHECK (balance_nano BETWEEN -4000000000000000000 AND 4000000000000000000),
    CONSTRAINT held_is_not_negative CHECK (held_nano >= 0),
    CONSTRAINT open_requests_is_not_negative CHECK (open_requests >= 0),
    CONSTRAINT charge_count_is_not_negative CHECK (charge_count >= 0)
) WITH (fillfactor = 50); -- A busy row is updated within its page (HOT). Never index balance_nano, held_nano or a counter.

COMMENT ON TABLE accounts IS
'The money of one user. A transaction that opens or closes holds, or books an entry, first locks the account''s row.';
COMMENT ON COLUMN accounts.balance_nano IS 'The sum of the account''s ledger entries.';
COMMENT ON COLUMN accounts.held_nano IS 'The sum of its open holds. Available is balance_nano - held_nano.';
COMMENT ON COLUMN accounts.open_requests IS 'Open holds not handed over to recovery: what the concurrency limit counts.';
COMMENT ON COLUMN accounts.charge_count IS 'The number of its charges in the ledger: a lost or doubled update shows here.';
COMMENT ON COLUMN accounts.minute IS 'The minute of its latest request, for the rate limit.';
COMMENT ON COLUMN accounts.minute_requests IS 'How many requests it had in that minute.';
COMMENT ON COLUMN accounts.is_active IS 'FALSE: all its keys are rejected.';
