CREATE TABLE api_keys (
    account_id bigint NOT NULL REFERENCES accounts,
    key_id bigint GENERATED ALWAYS AS IDENTITY,
    key_hash bytea NOT NULL,
    prefix text NOT NULL,
    name text NOT NULL DEFAULT '',
    is_main boolean NOT NULL DEFAULT FALSE,
    encrypted_key bytea,
    secret_id text,
    limit_nano bigint,
    limit_reset text,
    spent_nano bigint NOT NULL DEFAULT 0,
    spent_on date NOT NULL DEFAULT '-infinity',
    held_nano bigint NOT NULL DEFAULT 0,
    requests_per_minute integer,
    minute timestamptz NOT NULL DEFAULT '-infinity',
    minute_requests integer NOT NULL DEFAULT 0,
    expires_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz,
    PRIMARY KEY (account_id, key_hash), -- authentication looks up exactly this
    CONSTRAINT key_hash_is_sha256 CHECK (length(key_hash) = 32),
    CONSTRAINT encrypted_key_names_its_secret CHECK ((encrypted_key IS NULL) = (secret_id IS NULL)),
    CONSTRAINT limit_is_not_negative CHECK (limit_nano >= 0),
    CONSTRAINT limit_reset_is_known CHECK (limit_reset = 'daily'),
    CONSTRAINT limit_reset_needs_a_limit CHECK (limit_reset IS NULL OR limit_nano IS NOT NULL),
    CONSTRAINT spent_and_held_are_not_negative CHECK (spent_nano >= 0 AND held_nano >= 0),
    CONSTRAINT requests_per_minute_is_positive CHECK (requests_per_minute > 0)
);

-- Keys are named by key_id in the API and in holds.
CREATE UNIQUE INDEX api_keys_key_id_is_unique ON api_keys (account_id, key_id);
CREATE UNIQUE INDEX api_keys_one_main_key_is_live ON api_keys (account_id) WHERE is_main AND revoked_at IS NULL;
-- For find_accounts: by a key's first characters, with LIKE.
CREATE INDEX api_keys_by_prefix ON api_keys (prefix text_pattern_ops);

COMMENT ON TABLE api_keys IS
'The keys of an account: one main key, which sign-in shows, and others with limits of their own. Revoked keys stay.';
COMMENT ON COLUMN api_keys.key_hash IS 'SHA-256 of the whole key.';
COMMENT ON COLUMN api_keys.prefix IS 'The beginning of the key, which may be displayed: sk-user-17-abcd.';
COMMENT ON COLUMN api_keys.is_main IS 'The key that sign-in shows.';
COMMENT ON COLUMN api_keys.encrypted_key IS 'The whole key by AES-GCM, to be shown again. NULL: there is no copy.';
COMMENT ON COLUMN api_keys.secret_id IS 'Which secret encrypted_key is encrypted with.';
COMMENT ON COLUMN api_keys.limit_nano IS 'The most that the key may spend in a period. NULL: no limit of its own.';
COMMENT ON COLUMN api_keys.limit_reset IS 'The period: daily (UTC), or NULL for everything since the limit was set.';
COMMENT ON COLUMN api_keys.spent_nano IS 'Charged against the limit in the period of spent_on.';
COMMENT ON COLUMN api_keys.spent_on IS 'The UTC day of the latest charge against the limit.';
COMMENT ON COLUMN api_keys.held_nano IS 'The sum of the open holds that count against the limit.';
COMMENT ON COLUMN api_keys.requests_per_minute IS 'The key''s own rate limit. NULL: the account''s alone.';
COMMENT ON COLUMN api_keys.minute IS 'The minute of the key''s latest request; counted only for keys with limits.';
COMMENT ON COLUMN api_keys.minute_requests IS 'How many requests the key had in that minute.';
