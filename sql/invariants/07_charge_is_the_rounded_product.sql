-- A charge is the cost in dollars × the rate, rounded half up to one nano-rouble.
SELECT
    account_id,
    hold_id,
    charge_nano,
    cost_usd,
    rub_per_usd
FROM holds
WHERE state = 'settled' AND charge_nano <> round(cost_usd * rub_per_usd * 1000000000);
