"""Checks that what a server acknowledged is in its database, after the server was killed."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

import aiohttp

from bench.errors import LostRunError
from bench.rows import Ids, make_run

_CONNECTIONS: Final = 64


def post_sample(url: str, nonce: str, count: int, ids: Ids) -> list[str]:
    """Create so many runs over 64 connections; return each event_id that was acknowledged. Warms up the server, too."""
    return asyncio.run(_post_sample(url, nonce, count, ids))


async def _post_sample(url: str, nonce: str, count: int, ids: Ids) -> list[str]:
    acknowledged: list[str] = []
    numbers = iter(range(count))

    async def post(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            run = make_run(nonce, number, ids)
            async with session.post(f"{url}/api/v1/runs", json=run) as response:
                await response.read()
                if response.status in (200, 201):
                    acknowledged.append(run["event_id"])

    connector = aiohttp.TCPConnector(limit=_CONNECTIONS)
    async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
        await asyncio.gather(*(post(session) for _ in range(_CONNECTIONS)))
    return acknowledged


def last_id(database: Path) -> int:
    """Return the highest row number of a database, or 0 if it is new."""
    if not database.exists():
        return 0
    with _open(database) as connection:
        exists = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'agent_runs'").fetchone()
        return int(connection.execute("SELECT coalesce(max(id), 0) FROM agent_runs").fetchone()[0]) if exists else 0


def check_ids(database: Path, event_ids: list[str]) -> None:
    """Make sure that each of these runs is stored.

    Raises:
        LostRunError: naming the first one that is not.

    """
    with _open(database) as connection:
        for event_id in event_ids:
            if connection.execute("SELECT 1 FROM agent_runs WHERE event_id = ?", (event_id,)).fetchone() is None:
                raise LostRunError(f"{event_id} was acknowledged and is not in {database}")


def check_created(database: Path, nonce: str, after: int, acknowledged: int) -> None:
    """Make sure that a load's runs, which came after a row number, are at least as many as were acknowledged.

    Raises:
        LostRunError: if they are fewer.

    """
    sql = "SELECT count(*) FROM agent_runs WHERE id > ? AND event_id GLOB ?"
    _check_count(database, sql, (after, f"*-{nonce}"), acknowledged)


def check_updated(database: Path, nonce: str, seeded: int, acknowledged: int) -> None:
    """Make sure that a load's changes, which went round the seeded runs, are stored.

    Raises:
        LostRunError: if there are too few.

    """
    sql = "SELECT count(*) FROM agent_runs WHERE id <= ? AND output_summary GLOB ?"
    _check_count(database, sql, (seeded, f"{nonce}-*"), min(seeded, acknowledged))


def _check_count(database: Path, sql: str, parameters: tuple[int, str], acknowledged: int) -> None:
    with _open(database) as connection:
        stored = connection.execute(sql, parameters).fetchone()[0]
    if stored < acknowledged:
        raise LostRunError(f"{acknowledged} writes were acknowledged, but {database} holds only {stored} of them")


def _open(database: Path) -> closing[sqlite3.Connection]:
    """Open a database; this recovers what the killed server left half done."""
    return closing(sqlite3.connect(database, timeout=60))
