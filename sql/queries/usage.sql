-- name: find_credits
-- The money of account $1, and what it spent: the sum of its other entries less its balance. No row: there is no such account.
WITH other_entries AS (
    SELECT coalesce(sum(amount_nano), 0) AS amount_nano
    FROM ledger
    WHERE account_id = $1::bigint AND kind <> 'charge'
)

SELECT
    accounts.balance_nano,
    accounts.held_nano,
    (other_entries.amount_nano - accounts.balance_nano)::bigint AS spent_nano
FROM accounts
CROSS JOIN other_entries
WHERE accounts.account_id = $1::bigint;

-- name: list_usage
-- A page of the entries of account $1, newest first: those before the position $2 (time) and $3 (entry), and not before $4; at
-- most $5.
SELECT
    ledger.entry_id,
    ledger.created_at,
    ledger.kind::text AS kind,
    ledger.reason,
    ledger.model,
    ledger.amount_nano,
    ledger.cost_usd,
    ledger.rub_per_usd,
    ledger.prompt_tokens,
    ledger.completion_tokens,
    ledger.generation_id,
    holds.request_id,
    api_keys.prefix AS key_prefix
FROM ledger
LEFT JOIN holds ON ledger.account_id = holds.account_id AND ledger.entry_id = holds.hold_id
LEFT JOIN api_keys ON holds.account_id = api_keys.account_id AND holds.key_id = api_keys.key_id
WHERE
    ledger.account_id = $1::bigint
    AND (ledger.created_at, ledger.entry_id) < ($2::timestamptz, $3::uuid)
    AND ledger.created_at >= $4::timestamptz
ORDER BY ledger.created_at DESC, ledger.entry_id DESC
LIMIT $5::integer;

-- name: list_usage_of_model
-- As list_usage, of the model $6 alone.
SELECT
    ledger.entry_id,
    ledger.created_at,
    ledger.kind::text AS kind,
    ledger.reason,
    ledger.model,
    ledger.amount_nano,
    ledger.cost_usd,
    ledger.rub_per_usd,
    ledger.prompt_tokens,
    ledger.completion_tokens,
    ledger.generation_id,
    holds.request_id,
    api_keys.prefix AS key_prefix
FROM ledger
LEFT JOIN holds ON ledger.account_id = holds.account_id AND ledger.entry_id = holds.hold_id
LEFT JOIN api_keys ON holds.account_id = api_keys.account_id AND holds.key_id = api_keys.key_id
WHERE
    ledger.account_id = $1::bigint
    AND ledger.model = $6::text
    AND (ledger.created_at, ledger.entry_id) < ($2::timestamptz, $3::uuid)
    AND ledger.created_at >= $4::timestamptz
ORDER BY ledger.created_at DESC, ledger.entry_id DESC
LIMIT $5::integer;

-- name: sum_usage
-- The charges of account $1 on the UTC days from $2 to $3, added up; $4 whether by day, $5 whether by model. One row for each day
-- and model with charges.
WITH selected AS (
    SELECT
        requests,
        prompt_tokens,
        completion_tokens,
        cost_usd,
        charge_nano,
        CASE WHEN $4::boolean THEN day END AS by_day,
        CASE WHEN $5::boolean THEN model END AS by_model
    FROM usage_days
    WHERE account_id = $1::bigint AND day BETWEEN $2::date AND $3::date
)

SELECT
    by_day AS day,
    by_model AS model,
    sum(requests)::bigint AS requests,
    sum(prompt_tokens) AS prompt_tokens,
    sum(completion_tokens) AS completion_tokens,
    sum(cost_usd) AS cost_usd,
    sum(charge_nano)::bigint AS charge_nano
FROM selected
GROUP BY by_day, by_model
ORDER BY by_day DESC, sum(charge_nano) DESC, by_model ASC;

-- name: cost_by_day
-- What OpenRouter charged us on the UTC days from $1 to $2, by our own books, in dollars. One row for each day with charges.
SELECT
    day,
    sum(cost_usd) AS cost_usd
FROM usage_days
WHERE day BETWEEN $1::date AND $2::date
GROUP BY day;

-- name: find_request
-- The newest request of account $1 with the id $2, which is the request's own or the generation's. No row: there is none.
WITH found AS (
    (
        SELECT *
        FROM requests
        WHERE account_id = $1::bigint AND request_id = $2::text
        ORDER BY created_at DESC
        LIMIT 1
    )
    UNION ALL
    (
        SELECT *
        FROM requests
        WHERE account_id = $1::bigint AND generation_id = $2::text
        ORDER BY created_at DESC
        LIMIT 1
    )
)

SELECT
    found.hold_id,
    found.request_id,
    found.generation_id,
    found.model,
    found.state,
    ledger.prompt_tokens,
    ledger.completion_tokens,
    found.cost_usd,
    found.rub_per_usd,
    found.charge_nano,
    found.held_nano,
    found.created_at,
    found.closed_at,
    api_keys.prefix AS key_prefix
FROM found
LEFT JOIN ledger ON found.account_id = ledger.account_id AND found.hold_id = ledger.entry_id
LEFT JOIN api_keys ON found.account_id = api_keys.account_id AND found.key_id = api_keys.key_id
ORDER BY found.created_at DESC
LIMIT 1;

-- name: report_charges
-- The charges of all accounts on the UTC days from $1 to $2, added up by $3: day, month, model or user. The first row is the
-- total (is_total); then, at most $4, those of days and months in their order, the others by what was charged, most first.
WITH selected AS (
    SELECT
        requests,
        prompt_tokens,
        completion_tokens,
        cost_usd,
        charge_nano,
        CASE WHEN $3::text = 'user' THEN account_id END AS account_id,
        CASE $3::text WHEN 'day' THEN day::text WHEN 'month' THEN to_char(day, 'YYYY-MM') WHEN 'model' THEN model END AS label
    FROM usage_days
    WHERE day BETWEEN $1::date AND $2::date
),

summed AS (
    SELECT
        account_id,
        label,
        grouping(label) = 1 AS is_total,
        coalesce(sum(requests), 0)::bigint AS requests,
        sum(prompt_tokens) AS prompt_tokens,
        sum(completion_tokens) AS completion_tokens,
        coalesce(sum(cost_usd), 0) AS cost_usd,
        coalesce(sum(charge_nano), 0) AS charge_nano
    FROM selected
    GROUP BY GROUPING SETS ((account_id, label), ())
)

SELECT
    account_id,
    label,
    is_total,
    requests,
    prompt_tokens,
    completion_tokens,
    cost_usd,
    charge_nano,
    (
        SELECT accounts.name
        FROM accounts
        WHERE accounts.account_id = summed.account_id
    ) AS account_name
FROM summed
ORDER BY
    is_total DESC,
    CASE WHEN $3::text IN ('day', 'month') THEN label END ASC,
    charge_nano DESC,
    label ASC,
    account_id ASC
LIMIT $4::integer + 1;
