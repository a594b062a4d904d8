-- name: settle_and_hold
-- Books charges, each once; then authenticates and reserves. $1 whether it waits for accounts whose rows somebody has. Of the
-- charges, arrays: $2 accounts, $3 holds, $4 charges in nano-roubles, $5 costs in dollars, $6 generation ids, $7 tokens of the
-- prompts and $8 of the outputs, or NULL. Of the holds: $9 the process, $10 seconds until recovery looks at one, $11 roubles per
-- dollar, $12 requests per minute and $13 at once of an account (0: no limit); arrays: $14 accounts, $15 SHA-256 of the keys,
-- $16 holds, $17 the most to hold, $18 the least that must be available, $19 models, $20 request ids, $21 idempotency keys or
-- NULL, $22 SHA-256 of the bodies or NULL.
-- One row for each charge: settled, settled_late, already, no_hold, locked; and one for each hold: see take_holds for them.
SELECT
    hold_id,
    outcome,
    amount_nano,
    available_nano,
    earlier_request_id,
    minute_requests
FROM settle_and_hold(
    $1::boolean,
    $2::bigint[], $3::uuid[], $4::bigint[], $5::numeric[], $6::text[], $7::bigint[], $8::bigint[],
    $9::uuid, $10::double precision, $11::numeric, $12::integer, $13::integer,
    $14::bigint[], $15::bytea[], $16::uuid[], $17::bigint[], $18::bigint[], $19::text[], $20::text[], $21::text[], $22::bytea[]
);

-- name: release_holds
-- Frees holds. Arrays: $1 accounts, $2 holds, $3 whether it was never learnt what they bought. One row for each that was open.
SELECT hold_id
FROM release_holds($1::bigint[], $2::uuid[], $3::boolean[]);

-- name: hand_over_holds
-- Leaves open holds to recovery, due at once. Arrays: $1 accounts, $2 holds, $3 generation ids or NULL. One row for each that was
-- open.
SELECT hold_id
FROM hand_over_holds($1::bigint[], $2::uuid[], $3::text[]);

-- name: claim_due_holds
-- Open holds whose time has come, at most $1 of them, each for one claimant: the next look is put off by 1, 2, 4 … $2 seconds. Of
-- one that is not left to recovery, only its own process knows whether it was sent: that one's turn must not be far.
UPDATE holds
SET
    due_at = now() + make_interval(
        secs => least(power(2, least(looks, CASE WHEN is_sent THEN 30 ELSE 3 END)), $2::double precision)
    ),
    looks = looks + 1
WHERE (account_id, hold_id) IN (
    SELECT
        due.account_id,
        due.hold_id
    FROM holds AS due
    WHERE due.state = 'open' AND due.due_at <= now()
    ORDER BY due.due_at
    LIMIT $1::integer
    FOR UPDATE SKIP LOCKED
)
RETURNING
    account_id,
    hold_id,
    owner,
    is_sent,
    model,
    request_id,
    generation_id,
    rub_per_usd,
    looks,
    extract(EPOCH FROM now() - created_at)::double precision AS age_s;

-- name: list_open_holds_of
-- What a process that is no more, $1, left open and did not hand over.
SELECT
    account_id,
    hold_id
FROM holds
WHERE state = 'open' AND owner = $1::uuid AND NOT is_sent;

-- name: list_waiting_holds
-- Holds without evidence, the oldest first: open ones past their time or looked at before, and those given up.
SELECT
    account_id,
    hold_id,
    state::text AS state,
    amount_nano,
    model,
    request_id,
    generation_id,
    looks,
    created_at
FROM holds
WHERE (state = 'open' AND (looks > 0 OR due_at < now())) OR is_unresolved
ORDER BY created_at;

-- name: end_connections
-- Ends the connections named $1, and waits until they are gone. One row for each.
SELECT pg_terminate_backend(pid, 5000) AS ended
FROM pg_stat_activity
WHERE application_name = $1::text AND pid <> pg_backend_pid();
