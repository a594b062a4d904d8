-- name: remember_payment
-- The payment $2 of account $1 has not ended; the first look-up is in $3 seconds. No row: it is remembered already, or there is
-- no such account.
INSERT INTO pending_payments (account_id, payment_id, next_lookup_at)
SELECT
    account_id,
    $2::text AS payment_id,
    now() + make_interval(secs => $3::double precision) AS next_lookup_at
FROM accounts
WHERE account_id = $1::bigint
ON CONFLICT DO NOTHING
RETURNING payment_id;

-- name: count_pending_payments
-- How many payments of account $1 have not ended. One row.
SELECT count(*) AS payments
FROM pending_payments
WHERE account_id = $1::bigint;

-- name: find_pending_payment
-- The payment $1. No row: it is not remembered.
SELECT account_id
FROM pending_payments
WHERE payment_id = $1::text;

-- name: claim_due_payment
-- One payment whose look-up is due, for one claimant: the next one comes after $1 seconds, doubled at each look-up, at most $2.
-- Payments older than $3 seconds are looked up for the last time. No row: none is due.
UPDATE pending_payments
SET
    lookups = lookups + 1,
    next_lookup_at = now() + make_interval(
        secs => least($1::double precision * power(2, least(lookups, 20)), $2::double precision)
    )
WHERE (payment_id, account_id) IN (
    SELECT
        due.payment_id,
        due.account_id
    FROM pending_payments AS due
    WHERE due.next_lookup_at <= now()
    ORDER BY due.next_lookup_at
    LIMIT 1
    FOR UPDATE SKIP LOCKED
)
RETURNING
    payment_id,
    account_id,
    created_at < now() - make_interval(secs => $3::double precision) AS is_last_lookup;

-- name: forget_payment
-- The payment $1 has ended. One row if it was remembered.
DELETE FROM pending_payments
WHERE payment_id = $1::text
RETURNING payment_id;
