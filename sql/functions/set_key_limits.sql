-- Sets all limits of a key; NULL lifts one. A limit that is set, lifted or gets another reset counts from then on: what was spent
-- and held before is not in it. With if_unchanged, only while the limits are the expected ones. Outcomes:
--   done       the limits are set
--   changed    they were not the expected ones, and nothing was done
--   not_found  the account has no such live key
CREATE OR REPLACE FUNCTION set_key_limits(
    owner_account_id bigint, changed_key_id bigint,
    new_limit_nano bigint, new_limit_reset text, new_requests_per_minute integer, new_expires_at timestamptz,
    if_unchanged boolean,
    expected_limit_nano bigint, expected_limit_reset text, expected_requests_per_minute integer, expected_expires_at timestamptz
) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    present api_keys;
BEGIN
    PERFORM FROM accounts WHERE account_id = owner_account_id FOR NO KEY UPDATE;
    SELECT * INTO present FROM api_keys
    WHERE account_id = owner_account_id AND key_id = changed_key_id AND revoked_at IS NULL;
    IF NOT FOUND THEN
        RETURN 'not_found';
    END IF;
    IF if_unchanged
        AND (expected_limit_nano, expected_limit_reset, expected_requests_per_minute, expected_expires_at)
        IS DISTINCT FROM (present.limit_nano, present.limit_reset, present.requests_per_minute, present.expires_at) THEN
        RETURN 'changed';
    END IF;
    IF (new_limit_nano IS NULL, new_limit_reset) IS DISTINCT FROM (present.limit_nano IS NULL, present.limit_reset) THEN
        UPDATE holds SET counts_against_key_limit = FALSE
        WHERE account_id = owner_account_id AND key_id = changed_key_id AND counts_against_key_limit
            AND state <> 'settled'; -- a settled hold never counts again
        UPDATE api_keys SET spent_nano = 0, held_nano = 0
        WHERE account_id = owner_account_id AND key_id = changed_key_id;
    END IF;
    UPDATE api_keys
    SET limit_nano = new_limit_nano, limit_reset = new_limit_reset, requests_per_minute = new_requests_per_minute,
        expires_at = new_expires_at
    WHERE account_id = owner_account_id AND key_id = changed_key_id;
    RETURN 'done';
END $$;
