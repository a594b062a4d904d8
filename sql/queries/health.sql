-- name: ping
-- Whether the database responds.
SELECT 1 AS alive;
