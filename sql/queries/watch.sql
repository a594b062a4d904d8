-- name: mark_now
-- The oldest transaction that may be under way: whatever is written from now on has its number, or a later one. One row.
SELECT pg_snapshot_xmin(pg_current_snapshot())::text AS mark;

-- name: list_accounts_written_since
-- Accounts whose row was written by the transaction $1 (a mark) or a later one, whoever wrote it and by what means.
SELECT account_id
FROM accounts
WHERE age(xmin) <= age($1::text::xid8::xid)
ORDER BY account_id;

-- name: check_accounts
-- Of the accounts $1, those whose balance is not the sum of their entries, or whose reserve is not the sum of their open holds.
-- Charges are taken by day: that is as quick however long the ledger is.
WITH given AS (
    SELECT
        account_id,
        sum(amount_nano) AS nano
    FROM ledger
    WHERE kind <> 'charge' AND account_id = any($1::bigint[])
    GROUP BY account_id
),

charged AS (
    SELECT
        account_id,
        sum(charge_nano) AS nano
    FROM usage_days
    WHERE account_id = any($1::bigint[])
    GROUP BY account_id
),

reserved AS (
    SELECT
        account_id,
        sum(amount_nano) AS nano
    FROM holds
    WHERE state = 'open' AND account_id = any($1::bigint[])
    GROUP BY account_id
),

compared AS (
    SELECT
        accounts.account_id,
        accounts.balance_nano,
        accounts.held_nano,
        coalesce(given.nano, 0) - coalesce(charged.nano, 0) AS entries_nano,
        coalesce(reserved.nano, 0) AS open_holds_nano
    FROM accounts
    LEFT JOIN given ON accounts.account_id = given.account_id
    LEFT JOIN charged ON accounts.account_id = charged.account_id
    LEFT JOIN reserved ON accounts.account_id = reserved.account_id
    WHERE accounts.account_id = any($1::bigint[])
)

SELECT
    account_id,
    balance_nano,
    held_nano,
    entries_nano,
    open_holds_nano
FROM compared
WHERE balance_nano <> entries_nano OR held_nano <> open_holds_nano
ORDER BY account_id;
