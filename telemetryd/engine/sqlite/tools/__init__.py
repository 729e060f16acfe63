"""Work on a database file: migrate, back up, check, salvage."""
