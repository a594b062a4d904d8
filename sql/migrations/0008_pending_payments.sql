-- What was missing: which payments at the payment provider have not ended. A lost notification left a paid payment uncredited.
-- A new table; it locks accounts against writes for the moment in which the foreign key is made, whatever the number of entries.
CREATE TABLE pending_payments (
    payment_id text NOT NULL,
    account_id bigint NOT NULL REFERENCES accounts,
    lookups integer NOT NULL DEFAULT 0,
    next_lookup_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (payment_id, account_id),
    CONSTRAINT payment_id_is_short CHECK (length(payment_id) BETWEEN 1 AND 64),
    CONSTRAINT lookups_is_not_negative CHECK (lookups >= 0)
);

-- For claim_due_payment.
CREATE INDEX pending_payments_by_next_lookup ON pending_payments (next_lookup_at);
-- For count_pending_payments.
CREATE INDEX pending_payments_by_account ON pending_payments (account_id);

COMMENT ON TABLE pending_payments IS
'Payments at the provider whose end is not known yet: a job asks about each until it is booked or will never be.';
COMMENT ON COLUMN pending_payments.payment_id IS 'The provider''s id of the payment.';
COMMENT ON COLUMN pending_payments.lookups IS 'How often the job has asked the provider.';
COMMENT ON COLUMN pending_payments.next_lookup_at IS 'When the job asks next.';
