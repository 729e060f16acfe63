"""The PostgreSQL engine: SQL and connections; imported only when TELEMETRY_DB_URL is set."""
