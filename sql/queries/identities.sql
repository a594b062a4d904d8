-- name: account_of
-- The account of the person $2 of the provider $1, made at the first sight of him, with the name $3. $4 the entry of the bonus,
-- $5 its nano-roubles (0: none). One row.
SELECT
    account_id,
    is_new
FROM account_of($1::text, $2::text, $3::text, $4::uuid, $5::bigint);

-- name: find_identity
-- Whose account the person $2 of the provider $1 has. No row: nobody's.
SELECT account_id
FROM identities
WHERE provider = $1::text AND subject = $2::text;

-- name: list_identities
-- Who the account $1 is outside.
SELECT
    provider,
    subject,
    created_at
FROM identities
WHERE account_id = $1::bigint
ORDER BY provider, subject;
