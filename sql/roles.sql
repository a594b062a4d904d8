-- The rights of the service, for an installation in which it does not own its tables (optional): the owner migrates, the service
-- reads and writes. Run it as a superuser, or as an owner who may create roles (CREATEROLE), after every `gptutor migrate`:
--   psql -v ON_ERROR_STOP=1 -d gptutor -f sql/roles.sql
-- Then, once and in the same way, make the service's own role:
--   CREATE ROLE gptutor_service LOGIN PASSWORD '…' IN ROLE gptutor_app;
-- DATABASE_URL of the service names gptutor_service; `gptutor migrate` is run with the owner's.
-- What the service's role cannot do: change or delete an entry of the ledger, delete anything, or change the schema.

BEGIN; -- all of it or nothing

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'gptutor_app') THEN
        CREATE ROLE gptutor_app NOLOGIN;
    END IF;
END $$;

REVOKE CREATE ON SCHEMA public FROM public;
REVOKE ALL ON ALL TABLES IN SCHEMA public FROM gptutor_app;
GRANT USAGE ON SCHEMA public TO gptutor_app;
GRANT SELECT ON schema_migrations TO gptutor_app;
GRANT SELECT, INSERT ON ledger, identities TO gptutor_app;
GRANT SELECT, INSERT, UPDATE ON accounts, api_keys, holds, usage_days TO gptutor_app;

COMMIT;
