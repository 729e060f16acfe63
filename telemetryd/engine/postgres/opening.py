"""Looks at a server before anything is written to it: its version, what it is set to, and who stands in between."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from telemetryd.engine.postgres.connection import Plain, Target, answering
from telemetryd.engine.postgres.schema import steps
from telemetryd.errors import DatabaseError
from telemetryd.ops.logs import log
from telemetryd.settings import Sync

_OLDEST: Final = 150_000
_LOOK: Final = """
    SELECT current_setting('server_version_num')::int, current_setting('server_version'),
        current_setting('server_encoding'), pg_is_in_recovery(), current_setting('fsync'),
        current_setting('full_page_writes'), current_setting('synchronous_commit'),
        current_setting('synchronous_standby_names'),
        coalesce(host(inet_server_addr()) || ':' || inet_server_port(), ''),
        CASE WHEN pg_is_in_recovery() THEN 0
            ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int END
"""


def look(plain: Plain, target: Target) -> dict[str, Any]:
    """Return what a server is, for the log and for `/health`.

    Raises:
        DatabaseError: if runs cannot be kept there as they are promised to be.

    """
    with answering(plain):
        row = plain.execute(_LOOK).fetchone()
    assert row is not None  # noqa: S101 - without FROM there is one row
    number, version, encoding, in_recovery, fsync, page_writes, commit, standbys, primary, timeline = row
    if number < _OLDEST:
        raise DatabaseError(f"{target.name} is PostgreSQL {version}; telemetryd needs 15 or newer")
    if encoding != "UTF8":
        raise DatabaseError(f"{target.name} has the encoding {encoding}; make a database with ENCODING 'UTF8'")
    if in_recovery:
        raise DatabaseError(f"{target.name} is a standby, which takes no writes; name the primary as well")
    if target.sync is not Sync.NONE:
        _check_promises(target, {"fsync": fsync, "full_page_writes": page_writes, "synchronous_commit": commit})
    check_standbys(target, standbys)
    return {
        "version": version.split()[0],
        "standbys": standbys,
        "primary": primary or plain.info.host,
        "timeline": timeline,
    }


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
    if target.waits_for_standby and not names:
        raise DatabaseError(
            f"{target.name} has no synchronous standby (synchronous_standby_names is empty), so none would hold what "
            "is acknowledged; set one up, or set TELEMETRY_DB_SYNC=local"
        )


_GRANTS: Final = """
    SELECT string_agg(name, ', ' ORDER BY name) FROM (
        SELECT relname AS name FROM pg_class
        WHERE relnamespace = %(schema)s::regnamespace AND relkind = 'r' AND relname = ANY (%(tables)s)
            AND NOT (has_table_privilege(oid, 'SELECT') AND has_table_privilege(oid, 'INSERT')
                AND has_table_privilege(oid, 'UPDATE') AND has_table_privilege(oid, 'DELETE'))
        UNION ALL
        SELECT relname FROM pg_class
        WHERE relnamespace = %(schema)s::regnamespace AND relkind = 'S' AND relname IN ('numbers', 'event_numbers')
            AND NOT (has_sequence_privilege(oid, 'USAGE') AND has_sequence_privilege(oid, 'UPDATE'))
    ) AS missing
"""


def check_grants(plain: Plain, target: Target) -> None:
    """Stop where our user may not do what writing needs.

    Raises:
        DatabaseError: naming every table and sequence on which it lacks a grant.

    """
    tables = [table for step in steps() for table in step.tables]
    row = plain.execute(_GRANTS, {"schema": f'"{target.schema}"', "tables": tables}).fetchone()
    if row is not None and row[0] is not None:
        raise DatabaseError(
            f"The user of {target.name} lacks grants on {row[0]}; grant SELECT, INSERT, UPDATE and DELETE on all "
            f"tables and USAGE and UPDATE on all sequences of the schema {target.schema}"
        )


def compare_clocks(plain: Plain, now: datetime, most_apart_s: float) -> None:
    """Warn if the server's clock and ours differ: what several daemons store would be out of order."""
    ((theirs,),) = plain.execute("SELECT clock_timestamp()").fetchall()
    apart_s = abs((theirs - now).total_seconds())
    if apart_s > most_apart_s:
        log.warning(
            "The clocks of the database server and of this machine differ", extra={"seconds": round(apart_s, 3)}
        )
