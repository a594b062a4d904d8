-- A payment is credited once, over all accounts.
SELECT
    reference,
    count(*) AS entries
FROM ledger
WHERE kind = 'topup' AND reference IS NOT NULL
GROUP BY reference
HAVING count(*) > 1;
