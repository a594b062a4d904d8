"""PostgreSQL: errors, named statements, connections, migrations, the embedded server."""
