"""The private names of aiosqlite that we use, and why: `setup.cfg` therefore holds it to a minor version."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import asyncio
    import sqlite3
    from collections.abc import Callable

    import aiosqlite

T = TypeVar("T")

logging.getLogger("aiosqlite").setLevel(logging.INFO)  # at DEBUG it logs each call, with all its values


def put(
    connection: aiosqlite.Connection, answer: asyncio.Future[T], function: Callable[[sqlite3.Connection], T]
) -> None:
    """Have a connection's thread call a function with the plain connection, and set the answer.

    aiosqlite's public methods are coroutines, each for one call of SQLite; a whole function costs one hop so.

    Raises:
        ValueError: if the connection is closed.

    """
    connection._tx.put_nowait((answer, partial(function, connection._conn)))


def plain(connection: aiosqlite.Connection) -> sqlite3.Connection:
    """Return the plain connection, which may be interrupted from any thread at once; `interrupt` is a coroutine.

    Raises:
        ValueError: if the connection is closed.

    """
    return connection._conn
