-- name: find_requests
-- The requests of all accounts whose request id or generation id is $1, or whose hold is $2 (NULL: no hold), newest first, at
-- most $3. Clients choose request ids: of one that many have used, those of the first $3 accounts, and of each the newest $3.
WITH RECURSIVE next_account (account_id, number) AS (
    (
        SELECT
            holds.account_id,
            1 AS number
        FROM holds
        WHERE holds.request_id = $1::text
        ORDER BY holds.account_id
        LIMIT 1
    )
    UNION ALL
    SELECT
        (
            SELECT holds.account_id
            FROM holds
            WHERE holds.request_id = $1::text AND holds.account_id > next_account.account_id
            ORDER BY holds.account_id
            LIMIT 1
        ) AS account_id,
        next_account.number + 1 AS number
    FROM next_account
    WHERE next_account.account_id IS NOT NULL AND next_account.number < $3::integer
),

matching AS (
    SELECT
        next_account.account_id,
        newest.hold_id,
        newest.created_at
    FROM next_account
    CROSS JOIN
        LATERAL (
            SELECT
                holds.hold_id,
                holds.created_at
            FROM holds
            WHERE holds.request_id = $1::text AND holds.account_id = next_account.account_id
            ORDER BY holds.created_at DESC
            LIMIT $3::integer
        ) AS newest
    UNION
    (
        SELECT
            holds.account_id,
            holds.hold_id,
            holds.created_at
        FROM holds
        WHERE holds.generation_id = $1::text
        ORDER BY holds.account_id
        LIMIT $3::integer
    )
    UNION
    SELECT
        holds.account_id,
        holds.hold_id,
        holds.created_at
    FROM holds
    WHERE holds.hold_id = $2::uuid
),

newest_matching AS (
    SELECT
        account_id,
        hold_id
    FROM matching
    ORDER BY created_at DESC
    LIMIT $3::integer
)

SELECT
    found.account_id,
    found.hold_id,
    found.request_id,
    found.generation_id,
    found.key_id,
    api_keys.prefix AS key_prefix,
    api_keys.name AS key_name,
    found.model,
    found.state,
    ledger.evidence,
    ledger.prompt_tokens,
    ledger.completion_tokens,
    found.cost_usd,
    found.rub_per_usd,
    found.charge_nano,
    found.amount_nano,
    found.held_nano,
    found.recovery_attempts,
    found.due_at,
    found.created_at,
    found.closed_at,
    (
        SELECT accounts.name
        FROM accounts
        WHERE accounts.account_id = found.account_id
    ) AS account_name
FROM newest_matching
INNER JOIN requests AS found
    ON newest_matching.account_id = found.account_id AND newest_matching.hold_id = found.hold_id
LEFT JOIN ledger ON found.account_id = ledger.account_id AND found.hold_id = ledger.entry_id
LEFT JOIN api_keys ON found.account_id = api_keys.account_id AND found.key_id = api_keys.key_id
ORDER BY found.created_at DESC;
