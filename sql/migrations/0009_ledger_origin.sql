-- What was missing: who booked an entry stood only in the log, which is deleted after a month, and what proved the cost of a
-- charge stood nowhere. Both columns are added at once, whatever the number of entries, under a lock of the ledger for a moment;
-- older entries have NULL. The constraints are not checked for them, which would read the whole ledger.
ALTER TABLE ledger ADD COLUMN booked_by text;
ALTER TABLE ledger ADD COLUMN evidence text;
ALTER TABLE ledger ADD CONSTRAINT booked_by_is_short CHECK (length(booked_by) <= 200) NOT VALID;
ALTER TABLE ledger ADD CONSTRAINT evidence_is_of_a_charge CHECK (
    evidence IS NULL OR (kind = 'charge' AND evidence IN ('response', 'generation', 'journal'))
) NOT VALID;

COMMENT ON COLUMN ledger.booked_by IS
'Who booked the entry: cli:<user of the system>, admin:<name of the token>, yookassa, vk (the bonus at sign-in), demo. '
'NULL: a charge, or an entry from before this column.';
COMMENT ON COLUMN ledger.evidence IS
'What proved the cost of a charge: response (OpenRouter''s response stated it), generation (it was looked up at /generation), '
'journal (the response stated it to a process that died or was cut off). NULL: not a charge, or one from before this column.';
