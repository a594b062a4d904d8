-- A role with few privileges for the service (optional): the owner of the tables migrates, the service reads and writes.
-- Run this as a superuser, or as an owner who may create roles (CREATEROLE), after every `gptutor migrate`:
--   psql -v ON_ERROR_STOP=1 -d gptutor -f sql/roles.sql
-- Then, once and in the same way, create the service's own role:
--   CREATE ROLE gptutor_service LOGIN PASSWORD '…' IN ROLE gptutor_app;
-- The service's DATABASE_URL has gptutor_service; `gptutor migrate` runs with the owner's.
-- The service's role cannot change or delete a ledger entry, delete anything but identities, alerts and pending payments, or
-- change the schema.

BEGIN;

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'gptutor_app') THEN
        CREATE ROLE gptutor_app NOLOGIN;
    END IF;
END $$;

REVOKE CREATE ON SCHEMA public FROM public;
REVOKE ALL ON ALL TABLES IN SCHEMA public FROM gptutor_app;
GRANT USAGE ON SCHEMA public TO gptutor_app;
GRANT SELECT ON schema_migrations, schema_functions, requests TO gptutor_app;
GRANT SELECT, INSERT ON ledger TO gptutor_app;
GRANT SELECT, INSERT, DELETE ON identities TO gptutor_app;
GRANT SELECT, INSERT, UPDATE ON accounts, api_keys, holds, usage_days TO gptutor_app;
GRANT SELECT, INSERT, UPDATE ON alert_events TO gptutor_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON pending_payments, alerts TO gptutor_app;
GRANT USAGE ON SEQUENCE accounts_account_id_seq TO gptutor_app;

GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO gptutor_app;

COMMIT;
