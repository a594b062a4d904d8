-- A generation of OpenRouter's is charged once, over all accounts.
SELECT
    generation_id,
    count(*) AS charges
FROM ledger
WHERE kind = 'charge' AND generation_id IS NOT NULL
GROUP BY generation_id
HAVING count(*) > 1;
