-- Converts a database of GPTutor 0.1 to the schema of 0.2, in one transaction. Stop the service, make a backup, then `make
-- convert-0.1`, which finds the database of the service; or, as the owner of the tables:
--   psql -v ON_ERROR_STOP=1 -d gptutor -f deploy/convert-0.1.sql
--   gptutor migrate        (it creates the functions)
-- Nothing is copied: tables are altered in place, and two indexes of holds and one of usage_days are built.

BEGIN;

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM schema_migrations WHERE name = '0009_told_once') THEN
        RAISE EXCEPTION 'This is not a database of GPTutor 0.1, or not one with its last migration, 0009_told_once';
    END IF;
END $$;

LOCK TABLE accounts, identities, api_keys, holds, ledger, usage_days IN ACCESS EXCLUSIVE MODE;

-- Functions: `gptutor migrate` creates today's.
DROP TRIGGER ledger_is_append_only ON ledger;
DROP TRIGGER ledger_adds_to_usage_days ON ledger;
DO $$
DECLARE
    old_function regprocedure;
BEGIN
    FOR old_function IN
        SELECT pg_proc.oid::regprocedure FROM pg_proc
        WHERE pronamespace = 'public'::regnamespace AND proname IN (
            'refuse_change', 'add_to_usage_days', 'hold_funds', 'settle_holds', 'take_holds', 'book_charges', 'settle_and_hold',
            'release_holds', 'hand_over_holds', 'replace_keys', 'create_key', 'renew_key', 'limit_key', 'account_of', 'book_entry'
        )
    LOOP
        EXECUTE format('DROP FUNCTION %s', old_function);
    END LOOP;
END $$;

-- accounts
ALTER TABLE accounts RENAME COLUMN charges TO charge_count;
ALTER TABLE accounts RENAME CONSTRAINT charges_are_counted_from_zero TO charge_count_is_not_negative;

-- identities
ALTER INDEX identities_of_account RENAME TO identities_by_account;

-- api_keys: the period 'day' becomes the reset 'daily', 'total' becomes NULL.
ALTER TABLE api_keys DROP CONSTRAINT cap_has_its_period, DROP CONSTRAINT cap_period_is_known;
ALTER TABLE api_keys RENAME COLUMN shown TO prefix;
ALTER TABLE api_keys RENAME COLUMN encrypted TO encrypted_key;
ALTER TABLE api_keys RENAME COLUMN cap_nano TO limit_nano;
ALTER TABLE api_keys RENAME COLUMN cap_period TO limit_reset;
ALTER TABLE api_keys RENAME COLUMN per_minute TO requests_per_minute;
UPDATE api_keys SET limit_reset = CASE limit_reset WHEN 'day' THEN 'daily' END WHERE limit_reset IS NOT NULL;
ALTER TABLE api_keys RENAME CONSTRAINT cap_is_an_amount TO limit_is_not_negative;
ALTER TABLE api_keys RENAME CONSTRAINT pace_is_positive TO requests_per_minute_is_positive;
ALTER TABLE api_keys RENAME CONSTRAINT spent_is_not_negative TO spent_and_held_are_not_negative;
ALTER TABLE api_keys RENAME CONSTRAINT copy_names_its_secret TO encrypted_key_names_its_secret;
ALTER TABLE api_keys
ADD CONSTRAINT limit_reset_is_known CHECK (limit_reset = 'daily'),
ADD CONSTRAINT limit_reset_needs_a_limit CHECK (limit_reset IS NULL OR limit_nano IS NOT NULL);
ALTER INDEX api_keys_by_id RENAME TO api_keys_key_id_is_unique;
ALTER INDEX api_keys_one_is_main RENAME TO api_keys_one_main_key_is_live;
ALTER INDEX api_keys_by_shown RENAME TO api_keys_by_prefix;

-- holds: those from before keys had ids get the id 0, and count as requests of their accounts like all others.
ALTER TABLE holds RENAME COLUMN is_sent TO is_handed_over;
ALTER TABLE holds RENAME COLUMN looks TO recovery_attempts;
ALTER TABLE holds RENAME COLUMN key_counts TO counts_against_key_limit;
ALTER TABLE holds RENAME CONSTRAINT idempotency_key_has_its_body TO idempotency_key_has_its_body_hash;
UPDATE holds SET key_id = 0 WHERE key_id IS NULL;
UPDATE accounts SET open_requests = counted.open_requests
FROM (
    SELECT account_id, count(*) AS open_requests FROM holds WHERE state = 'open' AND NOT is_handed_over GROUP BY account_id
) AS counted
WHERE accounts.account_id = counted.account_id AND accounts.open_requests <> counted.open_requests;
ALTER TABLE holds ALTER COLUMN key_id SET NOT NULL;
ALTER INDEX holds_open RENAME TO holds_open_by_due_at;
ALTER INDEX holds_counted RENAME TO holds_counted_by_key;
CREATE INDEX holds_unresolved ON holds (created_at, hold_id) INCLUDE (amount_nano) WHERE is_unresolved;
CREATE INDEX holds_idempotency_key_by_time ON holds (created_at) WHERE idempotency_key IS NOT NULL;

-- ledger
ALTER TABLE ledger RENAME CONSTRAINT charges_take_and_name_their_cost TO charges_take_and_have_their_cost;
ALTER TABLE ledger RENAME CONSTRAINT tokens_are_counts TO tokens_are_not_negative;
ALTER INDEX ledger_given RENAME TO ledger_without_charges;

-- usage_days
CREATE INDEX usage_days_by_day ON usage_days (day);

-- PostgreSQL 18 names NOT NULL constraints after the column's first name.
DO $$
DECLARE
    item record;
BEGIN
    FOR item IN
        SELECT conrelid::regclass AS relation, conname, format('%s_%s_not_null', relname, attname) AS new_name
        FROM pg_constraint
        INNER JOIN pg_class ON pg_constraint.conrelid = pg_class.oid
        INNER JOIN pg_attribute ON pg_constraint.conrelid = pg_attribute.attrelid AND pg_constraint.conkey[1] = pg_attribute.attnum
        WHERE contype = 'n' AND connamespace = 'public'::regnamespace
            AND conname <> format('%s_%s_not_null', relname, attname)
    LOOP
        EXECUTE format('ALTER TABLE %s RENAME CONSTRAINT %I TO %I', item.relation, item.conname, item.new_name);
    END LOOP;
END $$;

-- The rest of the new migrations: what they add word for word, and that they need not be applied.
COMMENT ON TABLE accounts IS
'The money of one user. A transaction that opens or closes holds, or books an entry, first locks the account''s row.';
COMMENT ON COLUMN accounts.balance_nano IS 'The sum of the account''s ledger entries.';
COMMENT ON COLUMN accounts.held_nano IS 'The sum of its open holds. Available is balance_nano - held_nano.';
COMMENT ON COLUMN accounts.open_requests IS 'Open holds not handed over to recovery: what the concurrency limit counts.';
COMMENT ON COLUMN accounts.charge_count IS 'The number of its charges in the ledger: a lost or doubled update shows here.';
COMMENT ON COLUMN accounts.minute IS 'The minute of its latest request, for the rate limit.';
COMMENT ON COLUMN accounts.minute_requests IS 'How many requests it had in that minute.';
COMMENT ON COLUMN accounts.is_active IS 'FALSE: all its keys are rejected.';
COMMENT ON TABLE identities IS 'Which account a user of an identity provider has.';
COMMENT ON COLUMN identities.provider IS 'The identity provider: vk.';
COMMENT ON COLUMN identities.subject IS 'The user''s id at the provider.';
COMMENT ON TABLE api_keys IS
'The keys of an account: one main key, which sign-in shows, and others with limits of their own. Revoked keys stay.';
COMMENT ON COLUMN api_keys.key_hash IS 'SHA-256 of the whole key.';
COMMENT ON COLUMN api_keys.prefix IS 'The beginning of the key, which may be displayed: sk-user-17-abcd.';
COMMENT ON COLUMN api_keys.is_main IS 'The key that sign-in shows.';
COMMENT ON COLUMN api_keys.encrypted_key IS 'The whole key by AES-GCM, to be shown again. NULL: there is no copy.';
COMMENT ON COLUMN api_keys.secret_id IS 'Which secret encrypted_key is encrypted with.';
COMMENT ON COLUMN api_keys.limit_nano IS 'The most that the key may spend in a period. NULL: no limit of its own.';
COMMENT ON COLUMN api_keys.limit_reset IS 'The period: daily (UTC), or NULL for everything since the limit was set.';
COMMENT ON COLUMN api_keys.spent_nano IS 'Charged against the limit in the period of spent_on.';
COMMENT ON COLUMN api_keys.spent_on IS 'The UTC day of the latest charge against the limit.';
COMMENT ON COLUMN api_keys.held_nano IS 'The sum of the open holds that count against the limit.';
COMMENT ON COLUMN api_keys.requests_per_minute IS 'The key''s own rate limit. NULL: the account''s alone.';
COMMENT ON COLUMN api_keys.minute IS 'The minute of the key''s latest request; counted only for keys with limits.';
COMMENT ON COLUMN api_keys.minute_requests IS 'How many requests the key had in that minute.';
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
ALTER TABLE ledger ADD CONSTRAINT contra_is_the_counter_account_of_the_kind CHECK (
    contra = CASE kind
        WHEN 'charge' THEN 'revenue'
        WHEN 'topup' THEN 'payments'
        WHEN 'refund' THEN 'payments'
        WHEN 'adjustment' THEN 'corrections'
        WHEN 'bonus' THEN 'goodwill'
    END
);
COMMENT ON TABLE usage_days IS
'The charges of each account by UTC day and model, added up by a trigger on the ledger: totals do not read the ledger.';
COMMENT ON COLUMN usage_days.model IS 'Empty where the charge has no model.';
COMMENT ON COLUMN usage_days.requests IS 'The number of charges.';
COMMENT ON COLUMN usage_days.prompt_tokens IS 'Of the charges whose tokens are known. NULL: of none.';
COMMENT ON COLUMN usage_days.completion_tokens IS 'Of the charges whose tokens are known. NULL: of none.';

DELETE FROM schema_migrations;
INSERT INTO schema_migrations (name, checksum) VALUES
('0001_accounts', '240063628b882befc41564219c1f8cfbf43c47391670e126af0d73d4c7a6d6ee'),
('0002_identities', '4048ec871dc5082f43a7f491b338c4bebe669e5b8bfa777e3987730fa2192280'),
('0003_api_keys', 'f4657e6d2d9ff0d3e63000bb75c08e0d647089bb35016a1cb5b0bdfb88725151'),
('0004_holds', 'acd4af62119056871faa054e077b37451fc7be804a8a2734bc424aaca7ee8e5f'),
('0005_ledger', '918d4ac8b32e559e8fbb66516212e44e63671d5989333fa53aaeaf0fa420594d'),
('0006_usage_days', 'd8cf0a3082f3c67291b974be78223ad65c559c5272bd88df700d53bb0816d3ad'),
('0007_smaller_holds', '44b4cef36239e0746f51370b84918131e3fd9a2bf49409ed1b769961bca4a9a3');

COMMIT;
