"""One corruption for each invariant."""

# Which invariant a corruption breaks, besides others that it may break as well. Run without triggers and CHECK constraints.
CORRUPTIONS = {
    "01_held_is_the_sum_of_open_holds": "UPDATE accounts SET held_nano = held_nano + 1",
    "02_balance_is_the_sum_of_entries": "UPDATE accounts SET balance_nano = balance_nano + 1",
    "03_settled_hold_has_its_charge": "DELETE FROM ledger WHERE kind = 'charge'",
    "04_charge_has_its_settled_hold": "DELETE FROM holds WHERE state = 'settled'",
    "05_charge_count_is_the_number_of_charges": "UPDATE accounts SET charge_count = charge_count + 1",
    "06_available_is_negative_only_by_known_causes": "UPDATE accounts SET held_nano = balance_nano + 1",
    "07_charge_is_the_rounded_product": "UPDATE holds SET charge_nano = charge_nano + 1 WHERE state = 'settled'",
    "08_generation_is_paid_once": (
        "INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, generation_id, cost_usd, rub_per_usd)"
        " SELECT account_id, gen_random_uuid(), kind, amount_nano, contra, generation_id, cost_usd, rub_per_usd"
        " FROM ledger WHERE kind = 'charge'"
    ),
    "09_open_hold_is_not_overdue": "UPDATE holds SET due_at = now() - interval '3 minutes' WHERE state = 'open'",
    "10_evidence_comes_within_a_day": "UPDATE holds SET created_at = now() - interval '25 hours' WHERE state = 'open'",
    "11_reference_is_booked_once": (
        "INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, reference)"
        " SELECT account_id, gen_random_uuid(), 'topup', 1, 'payments', 'pay-1' FROM generate_series(5, 6) AS account_id"
    ),
    "12_hold_ends_after_it_begins": "UPDATE holds SET closed_at = created_at - interval '1 second' WHERE state = 'settled'",
    "13_accounts_and_counter_accounts_sum_to_zero": "UPDATE ledger SET contra = 'payments' WHERE kind = 'charge'",
    "14_open_requests_is_the_number_of_running_holds": "UPDATE accounts SET open_requests = open_requests + 1",
    "15_key_held_is_the_sum_of_its_counting_holds": "UPDATE holds SET counts_against_key_limit = NOT counts_against_key_limit WHERE state = 'open'",
    "16_usage_days_are_the_sums_of_charges": "UPDATE usage_days SET charge_nano = charge_nano + 1",
}
