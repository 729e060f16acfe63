"""Opens the storage engine that the settings name."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from importlib.util import find_spec

from telemetryd.engine.interface import Engine, QueryingEngine
from telemetryd.engine.moving import Side, Target
from telemetryd.engine.sqlite.engine import holder, open_sqlite, open_sqlite_read_only
from telemetryd.engine.sqlite.tools import moving
from telemetryd.errors import DatabaseError
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings


async def open_engine(
    settings: Settings,
    metrics: Metrics,
    clock: Callable[[], datetime],
    *,
    full_text: bool | None,
    may_lead: bool = True,
) -> Engine:
    """Open the database that the settings name, made if it is not there, as its one owner.

    Args:
        settings: where it is, and how it is used.
        metrics: where the engine counts.
        clock: gives the moment.
        full_text: whether it has a full-text index from now on; None leaves it as it is.
        may_lead: whether this process may be the one that does what is due once for a database.

    Raises:
        DatabaseError: if it is not, or not yet, a database of this version. Nothing is written then.
        DatabaseOwnedError: if another process owns it.

    """
    if settings.db_url is not None:
        _require_driver()
        from telemetryd.engine.postgres.engine import open_postgres  # noqa: PLC0415 - only where it is used

        return await open_postgres(settings, clock, full_text=full_text, may_lead=may_lead)
    return await open_sqlite(settings, metrics, clock, full_text=full_text)


def owner(settings: Settings) -> str | None:
    """Return the PID of the process that owns the database, or None; nothing is taken or made.

    A database on PostgreSQL is nobody's own: any number of processes write to it.
    """
    if settings.db_url is not None:
        return None
    return holder(settings)


async def open_read_only(settings: Settings) -> QueryingEngine:
    """Open the database that the settings name next to the daemon that owns it, to read only.

    Raises:
        DatabaseError: if it cannot be read, or is not of this version.

    """
    if settings.db_url is not None:
        _require_driver()
        from telemetryd.engine.postgres.engine import open_postgres_read_only  # noqa: PLC0415 - only where it is used

        return await open_postgres_read_only(settings)
    return await open_sqlite_read_only(settings)


def bring_up_to_date(settings: Settings, *, dry_run: bool) -> tuple[int, int]:
    """Bring the schema of a database on PostgreSQL to this version; return the versions before and after.

    Raises:
        DatabaseError: if that is not possible.

    """
    _require_driver()
    from telemetryd.engine.postgres import tools  # noqa: PLC0415 - only where it is used

    return tools.bring_up_to_date(settings, dry_run=dry_run)


def count_wrong(settings: Settings, *, repair: bool) -> int:
    """Count what a database on PostgreSQL counts wrongly, and count it anew if that is wanted.

    Raises:
        DatabaseError: if that is not possible.

    """
    _require_driver()
    from telemetryd.engine.postgres import tools  # noqa: PLC0415 - only where it is used

    return tools.count_wrong(settings, repair=repair)


def read_to_move(settings: Settings) -> AbstractContextManager[Side]:
    """Read a database as one snapshot, inside the block, while nobody writes to it; the caller owns a file.

    Raises:
        DatabaseError: if there is none of this version, or a daemon serves it.

    """
    if settings.db_url is None:
        return moving.reading(settings.db_path)
    _require_driver()
    from telemetryd.engine.postgres.moving import reading  # noqa: PLC0415 - only where it is used

    return reading(settings)


def make_by_moving(settings: Settings) -> AbstractContextManager[Target]:
    """Make a new database, inside the block; nobody sees it before its end.

    Raises:
        DatabaseError: if that is not possible; nothing is left of it then.

    """
    if settings.db_url is None:
        return moving.making(settings.db_path)
    _require_driver()
    from telemetryd.engine.postgres.moving import making  # noqa: PLC0415 - only where it is used

    return making(settings)


def is_filled(settings: Settings) -> bool:
    """Return whether there is anything that a move would have to replace.

    Raises:
        DatabaseError: if that cannot be found out.

    """
    if settings.db_url is None:
        return os.path.lexists(settings.db_path)
    _require_driver()
    from telemetryd.engine.postgres.moving import is_filled  # noqa: PLC0415 - only where it is used

    return is_filled(settings)


def _require_driver() -> None:
    """See that PostgreSQL's driver is installed, which is an extra.

    Raises:
        DatabaseError: if not.

    """
    if find_spec("psycopg") is None:
        raise DatabaseError("TELEMETRY_DB_URL needs the package psycopg: pip install 'telemetryd[postgresql]'")
