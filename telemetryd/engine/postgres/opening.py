"""Looks at a server before anything is written to it: its version, what it is set to, and who stands in between."""

from __future__ import annotations

from typing import Any, Final

import psycopg

from telemetryd.engine.postgres.connection import Plain, Target, first_line
from telemetryd.errors import DatabaseError
from telemetryd.settings import Sync

_OLDEST: Final = 150_000
_LOOK: Final = """
    SELECT current_setting('server_version_num')::int, current_setting('server_version'),
        current_setting('server_encoding'), pg_is_in_recovery(), current_setting('fsync'),
        current_setting('full_page_writes'), current_setting('synchronous_commit'),
        current_setting('synchronous_standby_names'), pg_backend_pid()
"""


def look(plain: Plain, target: Target) -> dict[str, Any]:
    """Return what a server is, for the log and for `/health`.

    Raises:
        DatabaseError: if runs cannot be kept there as they are promised to be.

    """
    try:
        row = plain.execute(_LOOK).fetchone()
    except psycopg.Error as error:
        raise DatabaseError(f"Cannot use {target.name}: {first_line(error)}") from None
    assert row is not None  # noqa: S101 - without FROM there is one row
    number, version, encoding, in_recovery, fsync, page_writes, commit, standbys, _ = row
    if number < _OLDEST:
        raise DatabaseError(f"{target.name} is PostgreSQL {version}; telemetryd needs 15 or newer")
    if encoding != "UTF8":
        raise DatabaseError(f"{target.name} has the encoding {encoding}; make a database with ENCODING 'UTF8'")
    if in_recovery:
        raise DatabaseError(f"{target.name} is a standby, which takes no writes; name the primary as well")
    if target.sync is not Sync.NONE:
        _check_promises(target, {"fsync": fsync, "full_page_writes": page_writes, "synchronous_commit": commit})
    check_standbys(target, standbys)
    return {"version": version.split()[0], "synchronous_commit": commit, "standbys": standbys}


def _check_promises(target: Target, settings: dict[str, str]) -> None:
    for name, value in settings.items():
        if value == "off":
            raise DatabaseError(
                f"{target.name} has {name} = off: a crash would lose acknowledged runs; turn it on, or set "
                "TELEMETRY_DB_SYNC=none if that may be"
            )


def check_standbys(target: Target, names: str) -> None:
    """Stop where no standby would hold what is committed, although one is asked for.

    Raises:
        DatabaseError: then.

    """
    if target.sync in (Sync.STANDBY, Sync.APPLY) and not names:
        raise DatabaseError(
            f"{target.name} has no synchronous standby (synchronous_standby_names is empty), so none would hold what "
            "is acknowledged; set one up, or set TELEMETRY_DB_SYNC=local"
        )
