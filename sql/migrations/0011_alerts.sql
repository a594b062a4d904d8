-- What was missing: which alerts the operator was told, so that of several processes one tells each, once.
-- Two new tables of a few rows; nothing is locked, whatever the number of entries.
CREATE TABLE alerts (
    name text PRIMARY KEY,
    text text NOT NULL,
    since timestamptz NOT NULL DEFAULT now(),
    seen_at timestamptz NOT NULL DEFAULT now(),
    may_expire boolean NOT NULL
);

CREATE TABLE alert_events (
    name text PRIMARY KEY,
    text text NOT NULL,
    events bigint NOT NULL,
    since timestamptz NOT NULL DEFAULT now(),
    told_at timestamptz,
    CONSTRAINT events_is_not_negative CHECK (events >= 0)
);

COMMENT ON TABLE alerts IS 'Conditions that are on, as gptutor alerts lists them. No row depends on an account.';
COMMENT ON COLUMN alerts.seen_at IS 'When a process has last found the condition on.';
COMMENT ON COLUMN alerts.may_expire IS
'Whether the condition is over as soon as no process finds it on; otherwise a process must have seen its end, too.';
COMMENT ON TABLE alert_events IS 'Events that the operator is told: the latest of each kind. No row depends on an account.';
COMMENT ON COLUMN alert_events.events IS 'How many have happened since `since`, and are not told.';
