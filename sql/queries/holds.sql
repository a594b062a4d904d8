-- name: hold_funds
-- Authenticates and reserves, at once. $1 account, $2 SHA-256 of the key, $3 hold, $4 the most to hold, $5 the least that must
-- be available, $6 roubles per dollar, $7 model, $8 request id, $9 seconds until the hold waits for evidence.
-- No row: the key is unknown, revoked, or its account inactive. amount_nano NULL: available_nano does not suffice.
WITH caller AS MATERIALIZED (
    SELECT
        accounts.account_id,
        accounts.balance_nano - accounts.held_nano AS available_nano
    FROM accounts
    INNER JOIN api_keys ON accounts.account_id = api_keys.account_id
    WHERE
        accounts.account_id = $1::bigint
        AND accounts.is_active
        AND api_keys.key_hash = $2::bytea
        AND api_keys.revoked_at IS NULL
    FOR NO KEY UPDATE OF accounts
),

granted AS MATERIALIZED (
    SELECT
        account_id,
        least($4::bigint, available_nano) AS amount_nano
    FROM caller
    WHERE available_nano >= $5::bigint
),

reserved AS (
    UPDATE accounts
    SET held_nano = accounts.held_nano + granted.amount_nano
    FROM granted
    WHERE accounts.account_id = granted.account_id
),

hold AS (
    INSERT INTO holds (account_id, hold_id, amount_nano, rub_per_usd, model, request_id, expires_at)
    SELECT
        account_id,
        $3::uuid AS hold_id,
        amount_nano,
        $6::numeric AS rub_per_usd,
        $7::text AS model,
        $8::text AS request_id,
        now() + make_interval(secs => $9::double precision) AS expires_at
    FROM granted
    RETURNING amount_nano
)

SELECT
    caller.available_nano,
    hold.amount_nano
FROM caller
LEFT JOIN hold ON TRUE;

-- name: settle_holds
-- Books charges, each once. Arrays: $1 accounts, $2 holds, $3 charges in nano-roubles, $4 costs in dollars, $5 generation ids.
-- One row for each hold with its outcome: settled, settled_late, already, no_hold.
SELECT
    hold_id,
    outcome
FROM settle_holds($1::bigint[], $2::uuid[], $3::bigint[], $4::numeric[], $5::text[]);

-- name: release_holds
-- Frees holds that bought nothing. Arrays: $1 accounts, $2 holds. One row for each hold that was open.
SELECT hold_id
FROM release_holds($1::bigint[], $2::uuid[]);
