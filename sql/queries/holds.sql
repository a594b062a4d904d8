-- name: settle_and_hold
-- Settles some holds, each once, and places others. $1 whether to wait for accounts that are locked.
-- Of the settlements, arrays: $2 accounts, $3 holds, $4 charges in nano-roubles, $5 costs in dollars, $6 generation ids or NULL,
-- $7 prompt and $8 completion tokens or NULL, $9 what proved the cost.
-- Of the new holds: $10 the owner (a run of a process), $11 seconds until recovery looks at one, $12 roubles per dollar, $13
-- requests per minute and $14 concurrent requests of an account (0: no limit); arrays: $15 accounts, $16 SHA-256 of the keys, $17
-- holds, $18 ceilings, $19 smallest holds and $20 least available amounts in nano-roubles, $21 models, $22 request ids, $23
-- idempotency keys or NULL, $24 SHA-256 of the bodies.
-- One row for each settlement and each new hold: for the outcomes see book_charges and place_holds.
SELECT
    hold_id,
    outcome,
    amount_nano,
    available_nano,
    earlier_request_id,
    minute_requests
FROM settle_and_hold(
    wait_for_locks => $1::boolean,
    settled_account_ids => $2::bigint[],
    settled_hold_ids => $3::uuid[],
    charges_nano => $4::bigint[],
    costs_usd => $5::numeric[],
    generation_ids => $6::text[],
    prompt_tokens => $7::bigint[],
    completion_tokens => $8::bigint[],
    evidence => $9::text[],
    owner => $10::uuid,
    hold_ttl_s => $11::double precision,
    rub_per_usd => $12::numeric,
    account_requests_per_minute => $13::integer,
    account_concurrency_limit => $14::integer,
    account_ids => $15::bigint[],
    key_hashes => $16::bytea[],
    hold_ids => $17::uuid[],
    ceilings_nano => $18::bigint[],
    holds_min_nano => $19::bigint[],
    minimums_nano => $20::bigint[],
    models => $21::text[],
    request_ids => $22::text[],
    idempotency_keys => $23::text[],
    body_hashes => $24::bytea[]
);

-- name: release_holds
-- Arrays: $1 accounts, $2 holds, $3 whether what they bought was never learnt. One row for each hold that was open.
SELECT hold_id
FROM release_holds(account_ids => $1::bigint[], hold_ids => $2::uuid[], unresolved => $3::boolean[]);

-- name: hand_over_holds
-- Hands open holds over to recovery. Arrays: $1 accounts, $2 holds, $3 generation ids or NULL. One row for each that was open.
SELECT hold_id
FROM hand_over_holds(account_ids => $1::bigint[], hold_ids => $2::uuid[], generation_ids => $3::text[]);

-- name: mark_outcomes_unknown
-- Marks requests that may have bought something their clients did not get: for $4 seconds, a request with the same body is
-- rejected. Arrays: $1 accounts, $2 holds, $3 SHA-256 of the bodies. One row for each.
UPDATE holds
SET
    body_hash = item.body_hash,
    repeats_rejected_until = now() + make_interval(secs => $4::double precision)
FROM unnest($1::bigint[], $2::uuid[], $3::bytea[]) AS item (account_id, hold_id, body_hash)
WHERE holds.account_id = item.account_id AND holds.hold_id = item.hold_id
RETURNING holds.hold_id;

-- name: clear_marks
-- Clears the marks of mark_outcomes_unknown that have ended, at most $1. One row for each.
UPDATE holds
SET
    repeats_rejected_until = NULL,
    body_hash = CASE WHEN idempotency_key IS NOT NULL THEN body_hash END
WHERE (hold_id, account_id) IN (
    SELECT
        ended.hold_id,
        ended.account_id
    FROM holds AS ended
    WHERE ended.repeats_rejected_until <= now()
    ORDER BY ended.account_id, ended.body_hash
    LIMIT $1::integer
    FOR NO KEY UPDATE SKIP LOCKED
)
RETURNING hold_id;

-- name: restore_holds
-- Places holds again that the database has lost. $1 the owner; arrays: $2 accounts, $3 holds, $4 when they were placed, $5
-- amounts in nano-roubles or NULL, $6 roubles per dollar, $7 the first 8 bytes of the keys' SHA-256, $8 models, $9 request ids,
-- $10 generation ids or NULL, $11 whether evidence of the cost is still looked for.
-- One row for each: for the outcomes see the function.
SELECT
    hold_id,
    outcome
FROM restore_holds(
    owner => $1::uuid,
    account_ids => $2::bigint[],
    hold_ids => $3::uuid[],
    placed_at => $4::timestamptz[],
    amounts_nano => $5::bigint[],
    rates => $6::numeric[],
    key_hash_beginnings => $7::bytea[],
    models => $8::text[],
    request_ids => $9::text[],
    generation_ids => $10::text[],
    await_evidence => $11::boolean[]
);

-- name: find_hold_states
-- The states of the holds $2 of the accounts $1 (arrays). No row: there is no such hold.
SELECT
    holds.hold_id,
    holds.state::text AS state,
    holds.is_handed_over
FROM unnest($1::bigint[], $2::uuid[]) AS i (account_id, hold_id)
INNER JOIN holds ON i.account_id = holds.account_id AND i.hold_id = holds.hold_id;

-- name: find_position
-- Where the server stands, and whether the hold $2 of the account $1 is settled (NULL: there is no such hold). One row.
SELECT
    history,
    wal_bytes,
    (
        SELECT holds.state = 'settled'
        FROM holds
        WHERE holds.account_id = $1::bigint AND holds.hold_id = $2::uuid
    ) AS is_settled
FROM find_position();

-- name: claim_due_holds
-- Open holds that are due, at most $1, each for one claimant: the next look comes after 1, 2, 4 … $2 seconds. A hold that was not
-- handed over is looked at every 8 seconds at most: only the process that owns it knows whether its request was sent.
UPDATE holds
SET
    due_at = now() + make_interval(
        secs => least(
            power(2, least(recovery_attempts, CASE WHEN is_handed_over THEN 30 ELSE 3 END)), $2::double precision
        )
    ),
    recovery_attempts = recovery_attempts + 1
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
    is_handed_over,
    model,
    request_id,
    generation_id,
    amount_nano,
    rub_per_usd,
    coalesce(
        (
            SELECT substr(api_keys.key_hash, 1, 8)
            FROM api_keys
            WHERE api_keys.account_id = holds.account_id AND api_keys.key_id = holds.key_id
        ),
        ''
    ) AS key_hash_beginning,
    recovery_attempts,
    extract(EPOCH FROM now() - created_at)::double precision AS age_s;

-- name: list_open_holds_of
-- What the process run $1, which has ended, left open and did not hand over: at most $3, those after the hold $2.
-- The open holds are read first: they are few, and the order would tempt the planner to read the whole table.
WITH open_holds AS MATERIALIZED (
    SELECT
        account_id,
        hold_id
    FROM holds
    WHERE state = 'open' AND owner = $1::uuid AND NOT is_handed_over
)

SELECT
    account_id,
    hold_id
FROM open_holds
WHERE hold_id > $2::uuid
ORDER BY hold_id
LIMIT $3::integer;

-- name: list_waiting_holds
-- Holds whose cost is not known: open ones that are overdue or that recovery looked at, and unresolved ones. The oldest first,
-- at most $1.
WITH waiting AS (
    SELECT hold_id
    FROM holds
    WHERE state = 'open' AND (recovery_attempts > 0 OR due_at < now())
    UNION ALL
    (
        SELECT hold_id
        FROM holds
        WHERE is_unresolved
        ORDER BY created_at
        LIMIT $1::integer
    )
)

SELECT
    account_id,
    hold_id,
    state,
    amount_nano,
    model,
    request_id,
    generation_id,
    recovery_attempts,
    created_at
FROM requests
WHERE hold_id IN (SELECT waiting.hold_id FROM waiting)
ORDER BY created_at
LIMIT $1::integer;

-- name: sum_waiting_holds
-- How many holds list_waiting_holds would list without a limit, and what they amount to. One row.
WITH waiting AS (
    SELECT amount_nano
    FROM holds
    WHERE state = 'open' AND (recovery_attempts > 0 OR due_at < now())
    UNION ALL
    SELECT amount_nano
    FROM holds
    WHERE is_unresolved
)

SELECT
    count(*) AS holds,
    coalesce(sum(amount_nano), 0)::bigint AS amount_nano
FROM waiting;

-- name: clear_idempotency_keys
-- Clears idempotency keys that are 24 hours old, at most $1. One row for each.
UPDATE holds
SET
    idempotency_key = NULL,
    body_hash = NULL
WHERE (hold_id, account_id) IN (
    SELECT
        expired.hold_id,
        expired.account_id
    FROM holds AS expired
    WHERE expired.idempotency_key IS NOT NULL AND expired.created_at < now() - interval '24 hours'
    ORDER BY expired.created_at
    LIMIT $1::integer
    FOR NO KEY UPDATE SKIP LOCKED
)
RETURNING hold_id;

-- name: end_connections
-- Ends the connections that are named $1, and waits until they are gone. One row for each.
SELECT pg_terminate_backend(pid, 5000) AS ended
FROM pg_stat_activity
WHERE application_name = $1::text AND pid <> pg_backend_pid();
