-- name: oldest_transaction
-- The oldest transaction that may be running: every row version written from now on has its number or a later one. One row.
SELECT pg_snapshot_xmin(pg_current_snapshot())::text AS xid;

-- name: list_accounts_written_since
-- Accounts whose row was written by the transaction $1 or a later one, by whatever means.
SELECT account_id
FROM accounts
WHERE age(xmin) <= age($1::text::xid8::xid)
ORDER BY account_id;

-- name: check_accounts
-- Of the accounts $1, those whose balance is not the sum of their entries, or whose held amount is not that of their open holds.
-- Charges are taken by day, so the length of the ledger does not matter.
WITH other_entries AS (
    SELECT
        account_id,
        sum(amount_nano) AS amount_nano
    FROM ledger
    WHERE kind <> 'charge' AND account_id = any($1::bigint[])
    GROUP BY account_id
),

charges AS (
    SELECT
        account_id,
        sum(charge_nano) AS amount_nano
    FROM usage_days
    WHERE account_id = any($1::bigint[])
    GROUP BY account_id
),

open_holds AS (
    SELECT
        account_id,
        sum(amount_nano) AS amount_nano
    FROM holds
    WHERE state = 'open' AND account_id = any($1::bigint[])
    GROUP BY account_id
),

compared AS (
    SELECT
        accounts.account_id,
        accounts.balance_nano,
        accounts.held_nano,
        coalesce(other_entries.amount_nano, 0) - coalesce(charges.amount_nano, 0) AS entries_nano,
        coalesce(open_holds.amount_nano, 0) AS open_holds_nano
    FROM accounts
    LEFT JOIN other_entries ON accounts.account_id = other_entries.account_id
    LEFT JOIN charges ON accounts.account_id = charges.account_id
    LEFT JOIN open_holds ON accounts.account_id = open_holds.account_id
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
