-- name: book_entry
-- Changes a balance, by an entry. $1 account, $2 entry, $3 kind, $4 amount in nano-roubles, $5 counter-account, $6 reason,
-- $7 reference or NULL. No row: no such account. A reference used before raises ledger_reference_is_booked_once.
WITH account AS (
    UPDATE accounts
    SET
        balance_nano = balance_nano + $4::bigint,
        updated_at = now()
    WHERE account_id = $1::bigint
    RETURNING account_id, name, balance_nano, held_nano, is_active, created_at, updated_at
),

entry AS (
    INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, reason, reference)
    SELECT
        account_id,
        $2::uuid,
        $3::entry_kind,
        $4::bigint,
        $5::text,
        $6::text,
        $7::text
    FROM account
)

SELECT
    account_id,
    name,
    balance_nano,
    held_nano,
    is_active,
    created_at,
    updated_at
FROM account;

-- name: find_reference
-- Whose entry has the reference $1. No row: nobody's.
SELECT account_id
FROM ledger
WHERE reference = $1::text;

-- name: list_entries
-- The newest entries of account $1, at most $2.
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
WHERE account_id = $1::bigint
ORDER BY created_at DESC, entry_id DESC
LIMIT $2::integer;

-- name: cost_of_day
-- What OpenRouter charged us on the UTC day $1, by our books, in dollars. One row.
SELECT coalesce(sum(cost_usd), 0) AS cost_usd
FROM ledger
WHERE
    kind = 'charge'
    AND created_at >= $1::date::timestamp AT TIME ZONE 'UTC'
    AND created_at < ($1::date + 1)::timestamp AT TIME ZONE 'UTC';
