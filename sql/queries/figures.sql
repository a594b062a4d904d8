-- name: sum_open_holds
-- How many holds are open; of those that wait for evidence, how many there are, what they amount to, and the age of the oldest in
-- seconds (0: none). One row.
SELECT
    count(*) AS open_holds,
    count(*) FILTER (WHERE is_handed_over) AS waiting,
    coalesce(sum(amount_nano) FILTER (WHERE is_handed_over), 0)::bigint AS waiting_nano,
    coalesce(
        extract(EPOCH FROM now() - min(created_at) FILTER (WHERE is_handed_over)), 0
    )::double precision AS oldest_s
FROM holds
WHERE state = 'open';

-- name: sum_balances
-- A part of the sum of all balances. $1 the last account of the part before (0 for the first), $2 how many accounts.
-- The last account of this part (NULL: there are no more), the sums of the positive and of the negative balances. One row.
WITH part AS (
    SELECT
        account_id,
        balance_nano
    FROM accounts
    WHERE account_id > $1::bigint
    ORDER BY account_id
    LIMIT $2::integer
)

SELECT
    max(account_id) AS last_account_id,
    count(*) AS accounts,
    coalesce(sum(balance_nano) FILTER (WHERE balance_nano > 0), 0)::numeric AS positive_nano,
    coalesce(sum(balance_nano) FILTER (WHERE balance_nano < 0), 0)::numeric AS negative_nano
FROM part;
