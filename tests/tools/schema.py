"""Writes schema/telemetry.sql, the current schema as one file for people, from migrations/."""

from __future__ import annotations

from pathlib import Path

from telemetryd.engine.sqlite.files import APPLICATION_ID
from telemetryd.engine.sqlite.tools import migrate

SCHEMA = Path(__file__).parents[2] / "schema" / "telemetry.sql"


def render() -> str:
    """Return the schema of a fresh database as one SQL script."""
    statements = "".join(f"{sql};\n\n" for sql in migrate.expected_schema().values())
    return (
        f"-- The schema of a telemetryd database, version {migrate.current_version()}.\n"
        "-- Generated from migrations/ by `make schema`; do not edit.\n\n"
        f"{statements}"
        f"PRAGMA application_id = {APPLICATION_ID};\n"
        f"PRAGMA user_version = {migrate.current_version()};\n"
    )


if __name__ == "__main__":
    SCHEMA.write_text(render(), "utf-8")
