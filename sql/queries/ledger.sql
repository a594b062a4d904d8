-- name: book_entry
-- Changes a balance by an entry. $1 account, $2 entry, $3 kind, $4 amount in nano-roubles, $5 counter-account, $6 reason, $7
-- reference or NULL, $8 who books it, $9 whether what is taken must be available. No row: there is no such account. Outcomes: see
-- the function.
SELECT
    outcome,
    account_id,
    entry_id,
    kind,
    amount_nano,
    created_at
FROM book_entry(
    new_account_id => $1::bigint,
    new_entry_id => $2::uuid,
    new_kind => $3::text::entry_kind,
    new_amount_nano => $4::bigint,
    new_contra => $5::text,
    new_reason => $6::text,
    new_reference => $7::text,
    new_booked_by => $8::text,
    must_be_available => $9::boolean
);

-- name: find_reference
-- The entry with the reference $1. No row: there is none.
SELECT
    account_id,
    entry_id,
    kind::text AS kind,
    amount_nano,
    created_at
FROM ledger
WHERE reference = $1::text
ORDER BY created_at
LIMIT 1;

-- name: list_entries
-- A page of the entries of account $1, newest first: those before the position $2 (time) and $3 (entry); at most $4.
SELECT
    ledger.entry_id,
    ledger.kind::text AS kind,
    ledger.amount_nano,
    ledger.contra,
    ledger.reason,
    ledger.reference,
    ledger.booked_by,
    ledger.model,
    ledger.generation_id,
    ledger.cost_usd,
    ledger.rub_per_usd,
    ledger.prompt_tokens,
    ledger.completion_tokens,
    ledger.evidence,
    ledger.created_at,
    holds.request_id,
    api_keys.prefix AS key_prefix
FROM ledger
LEFT JOIN holds ON ledger.account_id = holds.account_id AND ledger.entry_id = holds.hold_id
LEFT JOIN api_keys ON holds.account_id = api_keys.account_id AND holds.key_id = api_keys.key_id
WHERE ledger.account_id = $1::bigint AND (ledger.created_at, ledger.entry_id) < ($2::timestamptz, $3::uuid)
ORDER BY ledger.created_at DESC, ledger.entry_id DESC
LIMIT $4::integer;

-- name: export_entries
-- The entries of the UTC days $1 to $2, both included, each NULL for no limit; of account $3, or NULL for all.
SELECT
    ledger.account_id,
    ledger.entry_id,
    ledger.kind::text AS kind,
    ledger.amount_nano,
    ledger.contra,
    ledger.reason,
    ledger.reference,
    ledger.booked_by,
    ledger.model,
    ledger.generation_id,
    ledger.cost_usd,
    ledger.rub_per_usd,
    ledger.prompt_tokens,
    ledger.completion_tokens,
    ledger.evidence,
    ledger.created_at,
    holds.request_id,
    api_keys.prefix AS key_prefix
FROM ledger
LEFT JOIN holds ON ledger.account_id = holds.account_id AND ledger.entry_id = holds.hold_id
LEFT JOIN api_keys ON holds.account_id = api_keys.account_id AND holds.key_id = api_keys.key_id
WHERE
    ($1::date IS NULL OR ledger.created_at >= $1::date::timestamp AT TIME ZONE 'UTC')
    AND ($2::date IS NULL OR ledger.created_at < ($2::date + 1)::timestamp AT TIME ZONE 'UTC')
    AND ($3::bigint IS NULL OR ledger.account_id = $3::bigint)
ORDER BY ledger.account_id, ledger.created_at, ledger.entry_id;
