"""SQL files, one per step of the schema; see README.md beside this file."""
