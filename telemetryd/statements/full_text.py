"""The full-text index over what runs say of themselves: made, dropped, verified, and asked for."""

from __future__ import annotations

import sqlite3

from telemetryd.errors import InvalidRequestError
from telemetryd.filters import Filters

_TABLE = "runs_text"


def require(connection: sqlite3.Connection, filters: Filters, schema: str = "main") -> None:
    """Refuse a search for words where there is no index of them.

    Raises:
        InvalidRequestError: if that is so; the sentence names the setting.

    """
    if filters.words is not None and not is_there(connection, schema):
        raise InvalidRequestError(
            "Invalid q: this daemon keeps no full-text index; it must be told to: TELEMETRY_FULL_TEXT=true"
        )


def is_there(connection: sqlite3.Connection, schema: str = "main") -> bool:
    """Tell whether a database has the index."""
    found = connection.execute(f"SELECT 1 FROM {schema}.sqlite_master WHERE name = ?", (_TABLE,))  # noqa: S608 - our own
    return bool(found.fetchone())
