CREATE TABLE identities (
    provider text NOT NULL,
    subject text NOT NULL,
    account_id bigint NOT NULL REFERENCES accounts,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (provider, subject), -- a directory over all accounts: the one key without the account in it
    CONSTRAINT identity_is_short CHECK (length(provider) <= 20 AND length(subject) BETWEEN 1 AND 64)
);

-- For list_identities.
CREATE INDEX identities_by_account ON identities (account_id);

COMMENT ON TABLE identities IS 'Which account a user of an identity provider has.';
COMMENT ON COLUMN identities.provider IS 'The identity provider: vk.';
COMMENT ON COLUMN identities.subject IS 'The user''s id at the provider.';
