-- The rights of the service, for an installation in which it does not own its tables (optional): the owner migrates, the service
-- reads and writes. Run by the owner, in the database, after every `gptutor migrate`:  psql -f sql/roles.sql
-- Then, once:  CREATE ROLE gptutor LOGIN PASSWORD '…' IN ROLE gptutor_app;  and DATABASE_URL of the service names that role.
-- What it cannot do: change or delete an entry of the ledger, delete anything, or change the schema.

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
