"""Hands what was committed to everyone who follows: read and encoded once, in order, to each as fast as it can take it."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from typing import Final

import orjson

from telemetryd import runs
from telemetryd.changes import Changes, Filters, ListChanges, Place, matches
from telemetryd.errors import TooManyTailsError, UnavailableError
from telemetryd.metrics import Metrics
from telemetryd.store import Store

MAX_TAILS: Final = 2_000
HEARTBEAT_S: Final = 15.0
"""After so long without anything to say, a tail says that it is still there, and how far it is."""

BUFFER_BYTES: Final = 1024 * 1024
"""What waits for one tail at most. A chunk is shared by all tails with the same filters."""

BEHIND: Final = 50_000
"""A tail that is more changes behind than this is told how many it missed, and goes on from now."""

_PAGE: Final = 250
_SLICE_S: Final = 0.002
"""How long changes are encoded before the event loop gets its turn."""
_PAUSE_S: Final = 0.5

RETRY: Final = b"retry: 2000\n"
"""Tells a browser after how many milliseconds to come back."""

_Frames = list[tuple[int, bytes]]


class Feed:
    """Knows how far the commits have got, and all who wait for the next one."""

    def __init__(self, store: Store, metrics: Metrics) -> None:
        self._store = store
        self._news = asyncio.Event()
        self._unread = asyncio.Event()
        self._reading = asyncio.Lock()
        self._tails: set[Tail] = set()
        self._live: defaultdict[Filters, set[Tail]] = defaultdict(set)
        self.position = 0
        """Up to which number everything was handed to the tails that are not behind."""
        self.closed = False
        self._metrics = metrics
        metrics.watch_tails(lambda: len(self._tails))
        store.watch_commits(self._wake)

    def _wake(self) -> None:
        """Take note of a commit; called by the writer's task, so it only sets two flags."""
        self._unread.set()
        self._news.set()

    async def read(self, after: int, limit: int = _PAGE) -> Changes:
        """Read what lies behind a number; one at a time, so that tails leave the readers to those who ask.

        Raises:
            UnavailableError: if the database cannot be read now.

        """
        async with self._reading:
            return await self._store.fetch(ListChanges(after, limit))

    async def wait(self, after: int, limit: int, seconds: float) -> Changes:
        """Read what lies behind a number, and wait for a commit if that is nothing.

        Raises:
            UnavailableError: if the database cannot be read now.

        """
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            self._news.clear()
            changes = await self._store.fetch(ListChanges(after, limit))
            if changes.found or changes.more or self.closed:
                return changes
            try:
                async with asyncio.timeout_at(deadline):
                    await self._news.wait()
            except TimeoutError:
                return changes

    async def run(self) -> None:
        """Hand out what is committed, until it is cancelled."""
        while True:
            await self._unread.wait()
            self._unread.clear()
            try:
                while any(self._live.values()):
                    changes = await self.read(self.position)
                    await self._hand_out(changes)
                    if not changes.more:
                        break
            except UnavailableError:  # it is opened again, or overloaded; those who follow only wait longer
                await asyncio.sleep(_PAUSE_S)
                self._unread.set()

    async def _hand_out(self, changes: Changes) -> None:
        frames = {filters: await encode(changes, filters) for filters in [*self._live]}
        # From here on nothing is awaited, so that every tail is at the same place as the feed.
        for filters, chosen in frames.items():
            for tail in [*self._live.get(filters, ())]:
                tail.offer(chosen)
        self.position = max(self.position, changes.last)

    def join(self, tail: Tail, changes: Changes) -> bool:
        """Let a tail that has read up to `changes.last` live on what is handed out, if it has caught up."""
        if any(self._live.values()) and changes.last < self.position:
            return False
        if not any(self._live.values()):
            self.position = changes.last
        self._live[tail.filters].add(tail)
        self._unread.set()  # there may have been a commit since it read
        return True

    def leave(self, tail: Tail) -> None:
        """Hand a tail nothing any more."""
        self._live[tail.filters].discard(tail)
        if not self._live[tail.filters]:
            del self._live[tail.filters]

    def open(self, place: Place | None, filters: Filters) -> Tail:
        """Return a new tail, which goes on behind a place, or begins with the next commit.

        Raises:
            TooManyTailsError: if too many are open.

        """
        if len(self._tails) >= MAX_TAILS:
            raise TooManyTailsError
        tail = Tail(self, place, filters)
        self._tails.add(tail)
        return tail

    def forget(self, tail: Tail) -> None:
        """Take note that a tail has ended."""
        self._tails.discard(tail)
        self.leave(tail)

    def close(self) -> None:
        """End every tail and every wait at once; who comes back later goes on where it was."""
        self.closed = True
        self._wake()
        for tail in [*self._tails]:
            tail.end()


class Tail:
    """One who follows: what waits for it, and how far it is. Use it in a `with` block."""

    def __init__(self, feed: Feed, place: Place | None, filters: Filters) -> None:
        self.filters = filters
        self.sent = 0
        """Runs that were handed over."""
        self.missed = 0
        """Changes that were left out because it was too slow."""
        self._feed = feed
        self._place = place
        self._position = 0
        self._epoch = ""
        self._is_live = False
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self._ready = asyncio.Event()
        self._life = asyncio.timeout(None)

    async def __aenter__(self) -> Tail:
        """Begin a life that `end` ends, whatever is awaited in the block."""
        await self._life.__aenter__()
        return self

    async def __aexit__(self, *details: object) -> bool:
        """End it; an end by `end` is no error."""
        self._feed.forget(self)
        try:
            await self._life.__aexit__(*details)  # type: ignore[arg-type]
        except TimeoutError:
            return True
        return False

    def end(self) -> None:
        """End the block at once."""
        self._life.reschedule(0)

    def offer(self, frames: _Frames) -> None:
        """Let frames wait for it; if it is too slow for that, it reads them from the database later."""
        if self._position >= 0 and frames and frames[0][0] <= self._position:
            frames = [frame for frame in frames if frame[0] > self._position]
        if not frames:
            return
        chunk = b"".join(frame for _, frame in frames)
        if self._waiting and self._bytes + len(chunk) > BUFFER_BYTES:
            self._feed.leave(self)
            self._is_live = False
            self._waiting.clear()
            self._bytes = 0
        else:
            self._waiting.append((len(frames), chunk))
            self._bytes += len(chunk)
        self._ready.set()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield what is to be sent, without an end; while nothing happens, now and then a sign of life."""
        yield RETRY + await self._begin()
        while not self._feed.closed:
            if not self._is_live:
                chunk = await self._catch_up()
            elif await self._is_ready():
                chunk = self._take()
            else:
                chunk = b":\n" + self._mark()
            if chunk:
                yield chunk

    async def _begin(self) -> bytes:
        """Find the place to begin at; return what tells it, so that who is cut off at once knows where to go on."""
        while True:
            try:
                changes = await self._feed.read(2**63 - 1)
                break
            except UnavailableError:
                await asyncio.sleep(_PAUSE_S)
        self._epoch, self._position = changes.epoch, changes.newest
        place = self._place
        if place is None:
            return self._mark()
        if place.epoch not in (None, changes.epoch) or place.seq > changes.newest:
            return self._tell_missed(changes.newest)  # of another database; nobody knows what it has seen
        self._position = place.seq
        return self._mark()

    def _mark(self) -> bytes:
        return f"id: {Place(self._position, self._epoch)}\n\n".encode()

    def _tell_missed(self, missed: int) -> bytes:
        self.missed += missed
        data = orjson.dumps({"missed": missed})
        return b"event: missed\ndata: " + data + b"\n" + self._mark()

    async def _catch_up(self) -> bytes:
        """Read the next page from the database; join those who live on what is handed out if that was the last one."""
        try:
            changes = await self._feed.read(self._position)
        except UnavailableError:
            await asyncio.sleep(_PAUSE_S)
            return b""
        behind = changes.newest - self._position
        if behind > BEHIND:
            self._position = changes.newest
            return self._tell_missed(behind)
        frames = await encode(changes, self.filters)
        self._position = changes.last
        self._ready.clear()
        self._is_live = not changes.more and self._feed.join(self, changes)
        self.sent += len(frames)
        return b"".join(frame for _, frame in frames)

    async def _is_ready(self) -> bool:
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                await self._ready.wait()
        except TimeoutError:
            self._position = max(self._position, self._feed.position)
            return False
        return True

    def _take(self) -> bytes:
        """Take everything that waits."""
        self._ready.clear()
        if not self._is_live:  # what waited was given up
            return b""
        self.sent += sum(count for count, _ in self._waiting)
        chunk = b"".join(chunk for _, chunk in self._waiting)
        self._waiting.clear()
        self._bytes = 0
        self._position = max(self._position, self._feed.position)
        return chunk


async def encode(changes: Changes, filters: Filters) -> _Frames:
    """Return the runs that pass the filters as events of a stream, each with its number."""
    frames: _Frames = []
    turn = time.perf_counter()
    for seq, what in changes.found:
        if isinstance(what, tuple) and matches(what, filters):
            data = orjson.dumps(runs.to_json(what))
            frames.append((seq, b"id: %b\nevent: run\ndata: %b\n\n" % (_id(changes.epoch, seq), data)))
            if time.perf_counter() - turn > _SLICE_S:
                await asyncio.sleep(0)
                turn = time.perf_counter()
    return frames


def _id(epoch: str, seq: int) -> bytes:
    return str(Place(seq, epoch)).encode()
