"""Lanes of readers: which of an engine's connections run a query, so that long ones keep nobody waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum, auto
from typing import Final, TypeVar

T = TypeVar("T")

MOST_WAITING: Final = 2_000
"""Queries that may wait for a connection; each holds what its request holds."""


class Lane(Enum):
    """Which connections run a query."""

    QUICK = auto()
    LONG = auto()
    """Those for queries that may read many runs, however few they answer."""
    FEED = auto()
    """The one of the feed."""


def share_out(connections: Sequence[T]) -> Mapping[Lane, asyncio.LifoQueue[T]]:
    """Return for each lane the connections that run nothing.

    Half of them are for long queries, so that quick ones need not wait until those are through; the first one is for
    the feed, which waits for nobody's.
    """
    feed, *others = connections
    half = len(others) // 2
    quick = _idle(others[half:])
    return {Lane.QUICK: quick, Lane.LONG: _idle(others[:half]) if half else quick, Lane.FEED: _idle([feed])}


def _idle(connections: Iterable[T]) -> asyncio.LifoQueue[T]:
    idle: asyncio.LifoQueue[T] = asyncio.LifoQueue()
    for connection in connections:
        idle.put_nowait(connection)
    return idle
