"""The full-text index over what runs say of themselves: made, dropped, verified, and asked for."""

from __future__ import annotations

import sqlite3

from telemetryd.errors import InvalidRequestError
from telemetryd.filters import Filters

_TABLE = "runs_text"


def require(connection: sqlite3.Connection, filters: Filters) -> None:
    """Refuse a search for words where there is no index of them.

    Raises:
        InvalidRequestError: if that is so; the sentence names the setting.

    """
    if filters.words is not None and not is_there(connection):
        raise InvalidRequestError(
            "Invalid q: this daemon keeps no full-text index; it must be told to: TELEMETRY_FULL_TEXT=true"
        )


def is_there(connection: sqlite3.Connection) -> bool:
    """Tell whether a database has the index."""
    return bool(connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (_TABLE,)).fetchone())
