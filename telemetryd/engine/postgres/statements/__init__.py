"""SQL that carries out commands and answers queries on PostgreSQL."""
