-- Closing a hold needs two looks: lock the account, then see the hold as it is now. One statement has one snapshot, taken before
-- it waited for the lock, so these are functions: each statement inside them sees what was committed before it began.
-- The lock order everywhere is accounts by id, then holds; whoever changes an account's holds owns the account's row first.
-- Both take arrays, so that many requests can be closed in one round trip; an item is never the reason for another's failure.

-- Books charges. Outcome of each hold: settled, settled_late (it had been released), already (booked before), no_hold.
CREATE FUNCTION settle_holds(
    account_ids bigint[], hold_ids uuid[], charges_nano bigint[], costs_usd numeric[], generation_ids text[]
) RETURNS TABLE (hold_id uuid, outcome text) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    PERFORM FROM accounts WHERE account_id = ANY(account_ids) ORDER BY account_id FOR NO KEY UPDATE;

    RETURN QUERY
    WITH item AS MATERIALIZED (
        SELECT DISTINCT ON (account_id, hold_id) *
        FROM unnest(account_ids, hold_ids, charges_nano, costs_usd, generation_ids)
            AS i (account_id, hold_id, charge_nano, cost_usd, generation_id)
    ),
    before AS MATERIALIZED (
        SELECT account_id, hold_id, state, CASE state WHEN 'open' THEN amount_nano ELSE 0 END AS freed_nano
        FROM holds JOIN item USING (account_id, hold_id)
    ),
    settled AS (
        UPDATE holds
        SET state = 'settled', charge_nano = item.charge_nano, cost_usd = item.cost_usd, closed_at = clock_timestamp(),
            generation_id = coalesce(item.generation_id, holds.generation_id)
        FROM item JOIN before USING (account_id, hold_id)
        WHERE holds.account_id = item.account_id AND holds.hold_id = item.hold_id AND before.state <> 'settled'
        RETURNING holds.*, before.freed_nano, before.state AS state_before
    ),
    booked AS (
        INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, model, generation_id, cost_usd, rub_per_usd)
        SELECT account_id, hold_id, 'charge', -charge_nano, 'revenue', model, generation_id, cost_usd, rub_per_usd FROM settled
    ),
    total AS (
        SELECT account_id, sum(charge_nano)::bigint AS charge_nano, sum(freed_nano)::bigint AS freed_nano, count(*) AS charges
        FROM settled GROUP BY account_id
    ),
    balanced AS (
        UPDATE accounts
        SET balance_nano = balance_nano - total.charge_nano, held_nano = held_nano - total.freed_nano,
            charges = accounts.charges + total.charges, updated_at = clock_timestamp()
        FROM total WHERE accounts.account_id = total.account_id
    )
    SELECT item.hold_id, CASE
        WHEN settled.state_before = 'open' THEN 'settled'
        WHEN settled.state_before = 'released' THEN 'settled_late'
        WHEN before.state IS NOT NULL THEN 'already'
        ELSE 'no_hold'
    END
    FROM item LEFT JOIN before USING (account_id, hold_id) LEFT JOIN settled USING (account_id, hold_id);
END $$;

-- Frees holds whose requests bought nothing; returns those that were open.
CREATE FUNCTION release_holds(account_ids bigint[], hold_ids uuid[])
RETURNS TABLE (hold_id uuid) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    PERFORM FROM accounts WHERE account_id = ANY(account_ids) ORDER BY account_id FOR NO KEY UPDATE;

    RETURN QUERY
    WITH released AS (
        UPDATE holds SET state = 'released', closed_at = clock_timestamp()
        FROM unnest(account_ids, hold_ids) AS item (account_id, hold_id)
        WHERE holds.account_id = item.account_id AND holds.hold_id = item.hold_id AND holds.state = 'open'
        RETURNING holds.account_id, holds.hold_id, holds.amount_nano
    ),
    total AS (
        SELECT account_id, sum(amount_nano)::bigint AS freed_nano FROM released GROUP BY account_id
    ),
    balanced AS (
        UPDATE accounts SET held_nano = held_nano - total.freed_nano, updated_at = clock_timestamp()
        FROM total WHERE accounts.account_id = total.account_id
    )
    SELECT hold_id FROM released;
END $$;
