-- name: write_alerts
-- The conditions $1 are on, with the texts $2, in this order; $3: which are over as soon as no process writes them. One row each:
-- whether it is new.
INSERT INTO alerts (name, text, may_expire)
SELECT
    written.name,
    written.text,
    written.may_expire
FROM unnest($1::text[], $2::text[], $3::boolean[]) AS written (name, text, may_expire)
ORDER BY written.name
ON CONFLICT (name) DO UPDATE
    SET
        text = excluded.text,
        seen_at = now(),
        may_expire = excluded.may_expire
RETURNING name, since = now() AS is_new;

-- name: end_alert
-- The end of the condition $1 was seen. No row: it is not on.
UPDATE alerts
SET may_expire = TRUE
WHERE name = $1::text
RETURNING name;

-- name: delete_ended_alerts
-- The conditions that no process has written for $1 seconds, and that may expire, are over. One row each.
DELETE FROM alerts
WHERE may_expire AND seen_at < now() - make_interval(secs => $1::double precision)
RETURNING name, since;

-- name: list_alerts
-- The conditions that are on, the oldest first.
SELECT
    name,
    text,
    since
FROM alerts
ORDER BY since, name;

-- name: count_alert_events
-- $3 events $1 have happened, the latest as the text $2 says. Those of more than $4 seconds ago do not count any more. No row.
INSERT INTO alert_events AS known (name, text, events)
VALUES ($1::text, $2::text, $3::bigint)
ON CONFLICT (name) DO UPDATE
    SET
        text = excluded.text,
        events = excluded.events + CASE
            WHEN known.since < now() - make_interval(secs => $4::double precision) THEN 0
            ELSE known.events
        END,
        since = CASE
            WHEN known.events = 0 OR known.since < now() - make_interval(secs => $4::double precision) THEN now()
            ELSE known.since
        END;

-- name: claim_alert_events
-- Events that are to be told now, for one claimant: of the names $1 at least as many as $2 says, in this order, of which none was
-- told within the last $3 seconds. One row each.
WITH due AS (
    SELECT
        alert_events.name,
        alert_events.events
    FROM alert_events
    INNER JOIN unnest($1::text[], $2::bigint[]) AS rules (name, least) ON alert_events.name = rules.name
    WHERE
        alert_events.events >= rules.least
        AND (alert_events.told_at IS NULL OR alert_events.told_at < now() - make_interval(secs => $3::double precision))
    FOR UPDATE OF alert_events SKIP LOCKED
)

UPDATE alert_events
SET events = 0, told_at = now()
FROM due
WHERE alert_events.name = due.name
RETURNING alert_events.name, alert_events.text, due.events;

-- name: list_alert_events
-- The latest event of each kind, the latest first.
SELECT
    name,
    text,
    events,
    told_at
FROM alert_events
ORDER BY coalesce(told_at, since) DESC, name;
