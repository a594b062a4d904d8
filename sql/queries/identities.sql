-- name: find_or_create_account
-- The account of the user $2 of the identity provider $1, created at the first sign-in, with the name $3 and a bonus: $4 its
-- entry, $5 nano-roubles (0: none). One row.
SELECT
    account_id,
    is_new
FROM find_or_create_account(
    new_provider => $1::text,
    new_subject => $2::text,
    new_name => $3::text,
    bonus_entry_id => $4::uuid,
    bonus_nano => $5::bigint
);

-- name: find_identity
-- The account of the user $2 of the identity provider $1. No row: the user has none.
SELECT account_id
FROM identities
WHERE provider = $1::text AND subject = $2::text;

-- name: list_identities
-- The identities of account $1.
SELECT
    provider,
    subject,
    created_at
FROM identities
WHERE account_id = $1::bigint
ORDER BY provider, subject;
