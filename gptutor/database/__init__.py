"""PostgreSQL: connections, named statements, migrations, the embedded server."""
