"""The current schema as one SQL file, generated from migrations/ (`make schema`)."""
