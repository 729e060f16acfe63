"""SQL: how each command and each query is said to SQLite."""
