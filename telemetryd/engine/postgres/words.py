"""Makes the full-text index, or drops it, while the daemon serves; of several daemons one does it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import psycopg

from telemetryd.engine.postgres.connection import Plain, Target, connect, first_line, writing_session
from telemetryd.engine.postgres.schema import CLASS, INDEXING
from telemetryd.engine.postgres.statements.full_text import INDEX
from telemetryd.errors import DatabaseError, sentence
from telemetryd.ops.logs import log

_TAKE: Final = "SELECT pg_try_advisory_lock(%s, %s)"
_STATE: Final = "SELECT indisvalid AND indisready FROM pg_index WHERE indexrelid = to_regclass(%s)"
# Without pending entries, which would be merged in at some unlucky INSERT.
_MAKE: Final = f"""
    CREATE INDEX CONCURRENTLY {INDEX} ON agent_runs
    USING gin (telemetryd_words(input_summary, output_summary, error_summary, error_details)) WITH (fastupdate = off)
"""
_DROP: Final = f"DROP INDEX CONCURRENTLY IF EXISTS {INDEX}"
_PAUSE_S: Final = 0.05


def is_made(plain: Plain) -> bool | None:
    """Return whether the index is complete; None if there is none at all."""
    found = plain.execute(_STATE, (INDEX,)).fetchone()
    return None if found is None else bool(found[0])


def wait_until_begun(plain: Plain, is_over: Callable[[], bool]) -> None:
    """Wait until there is an index, complete or not, or until the one that makes it has given up."""
    while is_made(plain) is None and not is_over():
        time.sleep(_PAUSE_S)


async def keep(target: Target, *, wanted: bool) -> None:
    """Make the index or drop it, as the setting says, through a connection of its own; cancel it to leave that."""
    try:
        connection = await connect(target, "words", {**writing_session(target), "lock_timeout": "0"})
    except DatabaseError as error:
        _report(sentence(error))
        return
    try:
        await connection.run(lambda plain: _keep(plain, wanted=wanted))
    except psycopg.Error as error:
        _report(first_line(error))
    finally:
        await connection.drop()


def _report(reason: str) -> None:
    log.error("The full-text index was not changed", extra={"error_message": reason})


def _keep(plain: Plain, *, wanted: bool) -> None:
    """Wait for the daemon that does it now, and do what is left."""
    while not plain.execute(_TAKE, (CLASS, INDEXING)).fetchall()[0][0]:
        time.sleep(_PAUSE_S)
    found = is_made(plain)
    if wanted and not found:
        log.info("Building the full-text index")
        plain.execute(_DROP)  # what an attempt that was cut off has left
        plain.execute(_MAKE)
    elif not wanted and found is not None:
        log.info("Dropping the full-text index")
        plain.execute(_DROP)
        log.info("The full-text index is dropped")
