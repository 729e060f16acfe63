"""Storage engines: what the writer and the store need from a database, and the databases that give it."""
