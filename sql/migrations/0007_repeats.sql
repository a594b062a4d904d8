-- A request that failed after it may have bought something could be repeated by a client, and bought twice.
-- The column is added at once; the index reads all holds, for which requests wait: a few seconds with ten million.
ALTER TABLE holds ADD COLUMN repeats_rejected_until timestamptz;

-- For place_holds and clear_marks: nearly always empty.
CREATE INDEX holds_marked ON holds (account_id, body_hash) WHERE repeats_rejected_until IS NOT NULL;

COMMENT ON COLUMN holds.repeats_rejected_until IS
'The request may have bought something that the client did not get: until then, one with the same body is rejected.';
COMMENT ON COLUMN holds.body_hash IS
'SHA-256 of the request''s body; kept with idempotency_key and repeats_rejected_until, and cleared with them.';
