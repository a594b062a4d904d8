-- name: create_account
-- $1 name. One row.
INSERT INTO accounts (name)
VALUES ($1::text)
RETURNING
    account_id,
    name,
    contact,
    note,
    balance_nano,
    held_nano,
    is_active,
    created_at,
    updated_at,
    erased_at;

-- name: find_account
-- $1 account. No row: there is no such account.
SELECT
    account_id,
    name,
    contact,
    note,
    balance_nano,
    held_nano,
    is_active,
    created_at,
    updated_at,
    erased_at
FROM accounts
WHERE account_id = $1::bigint;

-- name: list_accounts
-- A page by id. $1 the last id of the previous page (0 for the first), $2 how many.
SELECT
    account_id,
    name,
    contact,
    note,
    balance_nano,
    held_nano,
    is_active,
    created_at,
    updated_at,
    erased_at
FROM accounts
WHERE account_id > $1::bigint
ORDER BY account_id
LIMIT $2::integer;

-- name: set_account_active
-- $1 account, $2 whether its keys are accepted. No row: there is no such account, or it was erased.
UPDATE accounts
SET
    is_active = $2::boolean,
    updated_at = now()
WHERE account_id = $1::bigint AND erased_at IS NULL
RETURNING
    account_id,
    name,
    contact,
    note,
    balance_nano,
    held_nano,
    is_active,
    created_at,
    updated_at,
    erased_at;

-- name: set_account_details
-- Of account $1: $2 name, $3 contact, $4 note; NULL leaves one as it is. No row: there is no such account, or it was erased.
UPDATE accounts
SET
    name = coalesce($2::text, name),
    contact = coalesce($3::text, contact),
    note = coalesce($4::text, note),
    updated_at = now()
WHERE account_id = $1::bigint AND erased_at IS NULL
RETURNING
    account_id,
    name,
    contact,
    note,
    balance_nano,
    held_nano,
    is_active,
    created_at,
    updated_at,
    erased_at;

-- name: erase_user
-- Removes what identifies the user of account $1. With $2, a balance is forfeited by an adjustment with the id $3 and the reason
-- $4, booked by $5. No row: there is no such account. Outcomes: see the function.
SELECT
    outcome,
    balance_nano
FROM erase_user(
    erased_account_id => $1::bigint,
    forfeit_balance => $2::boolean,
    forfeit_entry_id => $3::uuid,
    forfeit_reason => $4::text,
    forfeit_booked_by => $5::text
);

-- name: count_accounts
-- How many accounts there are. One row.
SELECT count(*) AS accounts
FROM accounts;

-- name: find_accounts
-- Accounts by the id $1, by VK's id $2, by the prefix of a key $3 (a LIKE pattern); each NULL if it is not given. At most $4.
WITH matching AS (
    SELECT $1::bigint AS account_id
    UNION
    SELECT identities.account_id
    FROM identities
    WHERE identities.provider = 'vk' AND identities.subject = $2::text
    UNION
    SELECT api_keys.account_id
    FROM api_keys
    WHERE api_keys.prefix LIKE $3::text
)

SELECT
    accounts.account_id,
    accounts.name,
    accounts.contact,
    accounts.note,
    accounts.balance_nano,
    accounts.held_nano,
    accounts.is_active,
    accounts.created_at,
    accounts.updated_at,
    accounts.erased_at
FROM accounts
INNER JOIN matching ON accounts.account_id = matching.account_id
ORDER BY accounts.account_id
LIMIT $4::integer;

-- name: find_accounts_by_words
-- Accounts whose name and contact contain all texts of $1, each word in them at the beginning of a word, in upper or lower case.
-- At most $2, in no order, so that no more are read. No row: none does, or there is no letter or digit in $1.
WITH asked AS (
    SELECT translate(lower(term), 'АБВГДЕЁЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯё', 'абвгдеежзийклмнопрстуфхцчшщъыьэюяе') AS term
    FROM unnest($1::text[]) AS term
),

asked_words AS (
    -- The words have no quotation mark and no backslash: those are punctuation too.
    SELECT string_agg(format('''%s'':*', word), ' & ')::tsquery AS query
    FROM asked,
        unnest(
            string_to_array(translate(term, '!"#$%&''()*+,-./:;<=>?@[\]^_`{|}~', '                                '), ' ')
        ) AS word
    WHERE word <> ''
)

SELECT
    accounts.account_id,
    accounts.name,
    accounts.contact,
    accounts.note,
    accounts.balance_nano,
    accounts.held_nano,
    accounts.is_active,
    accounts.created_at,
    accounts.updated_at,
    accounts.erased_at
FROM accounts
WHERE
    -- The expression of the index accounts_by_words, literally.
    array_to_tsvector(
        array_remove(
            string_to_array(
                translate(
                    lower(left(accounts.name, 200) || ' ' || accounts.contact),
                    'АБВГДЕЁЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯё!"#$%&''()*+,-./:;<=>?@[\]^_`{|}~',
                    'абвгдеежзийклмнопрстуфхцчшщъыьэюяе                                '
                ),
                ' '
            ),
            ''
        )
    ) @@ (SELECT asked_words.query FROM asked_words)
    AND NOT EXISTS (
        SELECT
        FROM asked
        WHERE
            strpos(
                translate(
                    lower(left(accounts.name, 200) || ' ' || accounts.contact),
                    'АБВГДЕЁЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯё',
                    'абвгдеежзийклмнопрстуфхцчшщъыьэюяе'
                ),
                asked.term
            ) = 0
    )
LIMIT $2::integer; -- noqa: AM09

-- name: next_account_id
-- A number that no other account gets, for create_user. One row.
SELECT nextval(pg_get_serial_sequence('accounts', 'account_id')) AS account_id;

-- name: create_user
-- Creates account $1 with the name $2, its top-up ($3 the entry, $4 nano-roubles or 0 for none, $5 counter-account, $6 reason,
-- $7 who books it) and its main key ($8 SHA-256, $9 prefix, $10 the key, encrypted, $11 with which secret). One row.
SELECT
    create_user(
        new_account_id => $1::bigint,
        new_name => $2::text,
        new_entry_id => $3::uuid,
        new_balance_nano => $4::bigint,
        new_contra => $5::text,
        new_reason => $6::text,
        new_booked_by => $7::text,
        new_key_hash => $8::bytea,
        new_prefix => $9::text,
        new_encrypted_key => $10::bytea,
        new_secret_id => $11::text
    ) AS key_id;

-- name: find_present_accounts
-- Those of the accounts $1 that exist.
SELECT account_id
FROM accounts
WHERE account_id = any($1::bigint[]);

-- name: find_latest_change
-- The time of the latest change of an account or a key. NULL: there are none. One row. Reads all accounts and keys.
SELECT greatest(
    (
        SELECT max(accounts.updated_at)
        FROM accounts
        WHERE accounts.account_id > 0
    ),
    (
        SELECT max(api_keys.created_at)
        FROM api_keys
    ),
    (
        SELECT max(api_keys.revoked_at)
        FROM api_keys
    )
) AS latest;
