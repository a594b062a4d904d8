-- name: book_entry
-- Changes a balance, by an entry. $1 account, $2 entry, $3 kind, $4 amount in nano-roubles, $5 counter-account, $6 reason,
-- $7 reference or NULL, $8 whether what is taken must be available. No row: no such account; else see the function for its
-- outcomes.
SELECT
    outcome,
    account_id,
    entry_id,
    kind,
    amount_nano,
    created_at
FROM book_entry($1::bigint, $2::uuid, $3::entry_kind, $4::bigint, $5::text, $6::text, $7::text, $8::boolean);

-- name: find_reference
-- The entry that has the reference $1. No row: none has.
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
-- The newest entries of account $1, at most $2; of those before the entry $3, unless it is NULL.
SELECT
    entry_id,
    kind::text AS kind,
    amount_nano,
    contra,
    reason,
    reference,
    model,
    generation_id,
    cost_usd,
    rub_per_usd,
    created_at
FROM ledger
WHERE
    account_id = $1::bigint
    AND (
        $3::uuid IS NULL
        OR (created_at, entry_id) < (
            SELECT
                last.created_at,
                last.entry_id
            FROM ledger AS last
            WHERE last.account_id = $1::bigint AND last.entry_id = $3::uuid
        )
    )
ORDER BY created_at DESC, entry_id DESC
LIMIT $2::integer;

-- name: export_entries
-- The entries of the UTC days $1 to $2, both included, each NULL for no limit; of account $3, or NULL for all.
SELECT
    account_id,
    entry_id,
    kind::text AS kind,
    amount_nano,
    contra,
    reason,
    reference,
    model,
    generation_id,
    cost_usd,
    rub_per_usd,
    created_at
FROM ledger
WHERE
    ($1::date IS NULL OR created_at >= $1::date::timestamp AT TIME ZONE 'UTC')
    AND ($2::date IS NULL OR created_at < ($2::date + 1)::timestamp AT TIME ZONE 'UTC')
    AND ($3::bigint IS NULL OR account_id = $3::bigint)
ORDER BY account_id, created_at, entry_id;

-- name: cost_of_day
-- What OpenRouter charged us on the UTC day $1, by our books, in dollars. One row.
SELECT coalesce(sum(cost_usd), 0) AS cost_usd
FROM ledger
WHERE
    kind = 'charge'
    AND created_at >= $1::date::timestamp AT TIME ZONE 'UTC'
    AND created_at < ($1::date + 1)::timestamp AT TIME ZONE 'UTC';
