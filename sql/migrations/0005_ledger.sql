CREATE TYPE entry_kind AS ENUM ('charge', 'topup', 'refund', 'adjustment', 'bonus');

CREATE TABLE ledger (
    account_id bigint NOT NULL REFERENCES accounts,
    entry_id uuid NOT NULL,
    kind entry_kind NOT NULL,
    amount_nano bigint NOT NULL,
    contra text NOT NULL,
    reason text NOT NULL DEFAULT '',
    reference text,
    model text,
    generation_id text,
    cost_usd numeric,
    rub_per_usd numeric,
    prompt_tokens bigint,
    completion_tokens bigint,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (entry_id, account_id), -- the id begins with its time, so new rows of all accounts share the last page
    CONSTRAINT amount_is_bounded CHECK (amount_nano BETWEEN -1000000000000000000 AND 1000000000000000000),
    CONSTRAINT contra_is_the_counter_account_of_the_kind CHECK (
        contra = CASE kind
            WHEN 'charge' THEN 'revenue'
            WHEN 'topup' THEN 'payments'
            WHEN 'refund' THEN 'payments'
            WHEN 'adjustment' THEN 'corrections'
            WHEN 'bonus' THEN 'goodwill'
        END
    ),
    CONSTRAINT charges_take_and_have_their_cost CHECK (
        kind <> 'charge' OR (amount_nano <= 0 AND cost_usd IS NOT NULL AND rub_per_usd IS NOT NULL)
    ),
    CONSTRAINT topups_and_bonuses_give CHECK (kind NOT IN ('topup', 'bonus') OR amount_nano > 0),
    CONSTRAINT tokens_are_not_negative CHECK (prompt_tokens >= 0 AND completion_tokens >= 0)
);

-- For list_usage and list_entries: pages by time.
CREATE INDEX ledger_by_time ON ledger (account_id, created_at DESC, entry_id DESC);
-- For list_usage_of_model.
CREATE INDEX ledger_by_model ON ledger (account_id, model, created_at DESC, entry_id DESC) WHERE model IS NOT NULL;
-- For find_credits and check_accounts: the few entries that are not charges, read from the index alone.
CREATE INDEX ledger_without_charges ON ledger (account_id) INCLUDE (amount_nano) WHERE kind <> 'charge';
CREATE UNIQUE INDEX ledger_reference_is_booked_once ON ledger (account_id, reference) WHERE reference IS NOT NULL;
-- For find_reference and book_entry: a reference is unique over all accounts, by a lock in book_entry.
CREATE INDEX ledger_by_reference ON ledger (reference) WHERE reference IS NOT NULL;

COMMENT ON TABLE ledger IS
'Every change of a balance. Append-only. Double entry: amount_nano on the account, its opposite on the counter-account contra.';
COMMENT ON COLUMN ledger.entry_id IS 'Of a charge: the id of its hold, so that one hold is charged once.';
COMMENT ON COLUMN ledger.amount_nano IS 'What is added to the account''s balance; negative: taken.';
COMMENT ON COLUMN ledger.contra IS 'The counter-account: revenue, payments, corrections or goodwill, by kind.';
COMMENT ON COLUMN ledger.reason IS 'Why, in the administrator''s words.';
COMMENT ON COLUMN ledger.reference IS 'A payment''s id at its provider, which makes the booking idempotent.';
COMMENT ON COLUMN ledger.generation_id IS 'OpenRouter''s id of what was bought.';
COMMENT ON COLUMN ledger.prompt_tokens IS 'Of a charge, where OpenRouter''s usage tells them.';
COMMENT ON COLUMN ledger.completion_tokens IS 'Of a charge, where OpenRouter''s usage tells them.';
