-- What was missing: a user's contact and a note about them, finding users by name and contact, and erasing a user.
-- The columns are added at once; the constraints and the index read all accounts, for which requests wait: about a second for
-- each hundred thousand accounts, whatever the number of entries.
ALTER TABLE accounts
ADD COLUMN contact text NOT NULL DEFAULT '',
ADD COLUMN note text NOT NULL DEFAULT '',
ADD COLUMN erased_at timestamptz,
ADD CONSTRAINT contact_is_short CHECK (length(contact) <= 200),
ADD CONSTRAINT note_is_short CHECK (length(note) <= 500),
ADD CONSTRAINT erased_accounts_are_nameless_and_inactive CHECK (
    erased_at IS NULL OR (name = '' AND contact = '' AND note = '' AND NOT is_active)
);

-- For find_accounts_by_words, which has the same expression: the words of name and contact, without punctuation, in lower case,
-- with е for ё. lower() knows Cyrillic letters in some locales only, and translate() in all.
CREATE INDEX accounts_by_words ON accounts USING gin (
    array_to_tsvector(
        array_remove(
            string_to_array(
                translate(
                    lower(left(name, 200) || ' ' || contact),
                    'АБВГДЕЁЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯё!"#$%&''()*+,-./:;<=>?@[\]^_`{|}~',
                    'абвгдеежзийклмнопрстуфхцчшщъыьэюяе                                '
                ),
                ' '
            ),
            ''
        )
    )
);

COMMENT ON COLUMN accounts.name IS 'In the administrator''s words, or "vk" and the VK id.';
COMMENT ON COLUMN accounts.contact IS 'How to reach the user: an e-mail address, a telephone number, or other words.';
COMMENT ON COLUMN accounts.note IS 'What administrators want to remember about the user.';
COMMENT ON COLUMN accounts.erased_at IS 'When all that identifies the user was removed, for good. NULL: it was not.';
