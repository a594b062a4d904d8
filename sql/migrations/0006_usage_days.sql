CREATE TABLE usage_days (
    account_id bigint NOT NULL REFERENCES accounts,
    day date NOT NULL,
    model text NOT NULL,
    requests bigint NOT NULL,
    prompt_tokens numeric,
    completion_tokens numeric,
    cost_usd numeric NOT NULL,
    charge_nano bigint NOT NULL,
    PRIMARY KEY (account_id, day, model)
) WITH (fillfactor = 70); -- Today's rows are updated within their page (HOT). Never index a total.

-- For cost_by_day.
CREATE INDEX usage_days_by_day ON usage_days (day);

COMMENT ON TABLE usage_days IS
'The charges of each account by UTC day and model, added up by a trigger on the ledger: totals do not read the ledger.';
COMMENT ON COLUMN usage_days.model IS 'Empty where the charge has no model.';
COMMENT ON COLUMN usage_days.requests IS 'The number of charges.';
COMMENT ON COLUMN usage_days.prompt_tokens IS 'Of the charges whose tokens are known. NULL: of none.';
COMMENT ON COLUMN usage_days.completion_tokens IS 'Of the charges whose tokens are known. NULL: of none.';
