"""Makes the full-text index, or drops it, while the daemon serves; of several daemons one does it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Final

import psycopg

from telemetryd.engine.postgres.connection import Plain, Target, connect, first_line, writing_session
from telemetryd.engine.postgres.schema import CLASS, INDEXING
from telemetryd.engine.postgres.statements.full_text import INDEX
from telemetryd.errors import DatabaseError, sentence
from telemetryd.ops.logs import log

_WANTING: Final = 51
"""The second half of the lock that every daemon shares which wants the index (`schema.CLASS`)."""

_TAKE: Final = "SELECT pg_try_advisory_lock(%s, %s)"
_STATE: Final = "SELECT indisvalid AND indisready FROM pg_index WHERE indexrelid = to_regclass(%s)"
# Without pending entries, which would be merged in at some unlucky INSERT.
_MAKE: Final = f"""
    CREATE INDEX CONCURRENTLY {INDEX} ON agent_runs
    USING gin (telemetryd_words(input_summary, output_summary, error_summary, error_details)) WITH (fastupdate = off)
"""
_DROP: Final = f"DROP INDEX CONCURRENTLY IF EXISTS {INDEX}"
_HOLD: Final = "SELECT pg_advisory_lock_shared(%s, %s)"
_LEAVE: Final = "SELECT pg_advisory_unlock(%s, %s)"
_IS_HELD: Final = """
    SELECT EXISTS (
        SELECT 1 FROM pg_locks
        WHERE locktype = 'advisory' AND classid = %s AND objid = %s AND pid = pg_backend_pid() AND granted
    )
"""
_PAUSE_S: Final = 0.05
_AGAIN_S: Final = 60.0
"""After so long an attempt that has failed is repeated, and an index that is wanted is looked at."""


def is_made(plain: Plain) -> bool | None:
    """Return whether the index is complete; None if there is none at all."""
    found = plain.execute(_STATE, (INDEX,)).fetchone()
    return None if found is None else bool(found[0])


def wait_until_begun(plain: Plain, is_over: Callable[[], bool]) -> None:
    """Wait until there is an index, complete or not, or until the one that makes it has given up."""
    while is_made(plain) is None and not is_over():
        time.sleep(_PAUSE_S)


async def keep(target: Target, *, wanted: bool, tried: threading.Event) -> None:
    """Make the index or drop it, as the setting says, through a connection of its own; cancel it to leave that.

    One that is wanted is held, so that no other daemon drops it, and looked after for as long as this goes on.

    Args:
        target: the database.
        wanted: whether there is to be an index.
        tried: is set when the first attempt has failed.

    """
    while True:
        try:
            connection = await connect(target, "words", {**writing_session(target), "lock_timeout": "0"})
            try:
                if not wanted:
                    await connection.run(_drop)
                    return
                while True:
                    await connection.run(_make)
                    await asyncio.sleep(_AGAIN_S)
            finally:
                await connection.drop()
        except DatabaseError as error:
            _report(sentence(error))
        except psycopg.Error as error:
            _report(first_line(error))
        tried.set()
        await asyncio.sleep(_AGAIN_S)


def _report(reason: str) -> None:
    log.error("The full-text index was not changed; that is tried again", extra={"error_message": reason})


def _wait_for_turn(plain: Plain) -> None:
    """Wait for the daemon that makes or drops the index now."""
    while not plain.execute(_TAKE, (CLASS, INDEXING)).fetchall()[0][0]:
        time.sleep(_PAUSE_S)


def _make(plain: Plain) -> None:
    """Make the index if it is not there, and hold it."""
    if is_made(plain) and _holds(plain):
        return
    _wait_for_turn(plain)
    if not _holds(plain):
        plain.execute(_HOLD, (CLASS, _WANTING))
    if not is_made(plain):
        log.info("Building the full-text index")
        plain.execute(_DROP)  # what an attempt that was cut off has left
        plain.execute(_MAKE)
    plain.execute(_LEAVE, (CLASS, INDEXING))


def _holds(plain: Plain) -> bool:
    return bool(plain.execute(_IS_HELD, (CLASS, _WANTING)).fetchall()[0][0])


def _drop(plain: Plain) -> None:
    """Drop the index, unless another daemon holds it."""
    _wait_for_turn(plain)
    if is_made(plain) is None:
        return
    if not plain.execute(_TAKE, (CLASS, _WANTING)).fetchall()[0][0]:
        log.info("The full-text index stays: another daemon keeps it")
        return
    log.info("Dropping the full-text index")
    plain.execute(_DROP)
    log.info("The full-text index is dropped")
