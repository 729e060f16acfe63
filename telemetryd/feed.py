"""Hands what was committed to all who follow: read and encoded once, to each as fast as it can take it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Collection
from functools import cached_property
from typing import Final, NamedTuple
from urllib.parse import urlencode

import orjson

from telemetryd import runs
from telemetryd.changes import Changes, ChangesRequest, ListChanges, Place
from telemetryd.errors import QueryTimeoutError, TooManyTailsError, UnavailableError
from telemetryd.filters import Filters
from telemetryd.metrics import Metrics
from telemetryd.runs import MAX_INTEGER
from telemetryd.store import Store

MAX_TAILS: Final = 2_000
HEARTBEAT_S: Final = 15.0
"""After so long without anything to say, a tail says that it is still there, and how far it is."""

BUFFER_BYTES: Final = 1024 * 1024
"""What waits for one tail at most, besides a single chunk. Tails with the same filters share their chunks."""

BEHIND: Final = 50_000
"""A tail that is more changes behind than this is told how many it missed, and goes on from now."""

_PAGE: Final = 250
_SLICE_S: Final = 0.002
"""How long changes are encoded before the event loop gets its turn."""
_PAUSE_S: Final = 0.5

RETRY: Final = b"retry: 2000\n"
"""Tells a browser after how many milliseconds to come back."""


class Frame(NamedTuple):
    """A run as an event of a stream."""

    seq: int
    run: int
    text: bytes


class Chunk:
    """Frames that are handed to many tails at once, and held in memory once for all of them."""

    def __init__(self, frames: list[Frame]) -> None:
        self.frames = frames

    @cached_property
    def text(self) -> bytes:
        """All of them as they are sent."""
        return b"".join(frame.text for frame in self.frames)

    def behind(self, seq: int) -> Chunk:
        """Return those that lie behind a number."""
        if not self.frames or self.frames[0].seq > seq:
            return self
        return Chunk([frame for frame in self.frames if frame.seq > seq])


class Feed:
    """Knows how far the commits have got, and all who wait for the next one."""

    def __init__(self, store: Store, metrics: Metrics) -> None:
        self._store = store
        self._news = asyncio.Event()
        self._unread = asyncio.Event()
        self._reading = asyncio.Lock()
        self._polling = asyncio.Lock()
        self._tails: set[Tail] = set()
        self._live: dict[str, list[Tail]] = {}
        self.position = 0
        """Up to which number everything was handed to the tails that are not behind."""
        self.closed = False
        self.metrics = metrics
        metrics.watch_tails(lambda: len(self._tails))
        store.watch_commits(self._wake)

    def _wake(self) -> None:
        """Take note of a commit; called by the writer's task, so it only sets two flags."""
        self._unread.set()
        self._news.set()
        self._news = asyncio.Event()

    async def read(self, after: int, *filters: Filters) -> Changes:
        """Read what lies behind a number; one at a time, so that tails leave the readers to those who ask.

        Raises:
            UnavailableError: if the database cannot be read now.
            InvalidRequestError: if a filter cannot be used.

        """
        async with self._reading:
            return await self._store.fetch(ListChanges(after, _PAGE, filters))

    async def wait(self, asked: ChangesRequest) -> Changes:
        """Read what lies behind a place; if that is nothing, wait for a commit as long as was asked for.

        Raises:
            UnavailableError: if the database cannot be read now.
            CursorGoneError: if the place is not known any more.

        """
        deadline = asyncio.get_running_loop().time() + asked.wait_s
        news = self._news  # taken before the database is read, so that no commit comes between
        changes = await self._store.fetch(asked.query)
        while True:
            changes.check(asked.after, asked.begun)
            if changes.found or changes.events or changes.more or self.closed:
                return changes
            try:
                async with asyncio.timeout_at(deadline):
                    await news.wait()
            except TimeoutError:
                return changes
            async with self._polling:  # a commit wakes all of them, who would take every reader from those who ask
                news = self._news
                changes = await self._store.fetch(asked.query)

    async def run(self) -> None:
        """Hand out what is committed, until it is cancelled."""
        while True:
            await self._unread.wait()
            self._unread.clear()
            try:
                while self._live:
                    async with self._reading:
                        groups = {key: tails[0].filters for key, tails in self._live.items()}
                        changes = await self._store.fetch(ListChanges(self.position, _PAGE, (*groups.values(),)))
                    await self._hand_out(changes, [*groups])
                    if not changes.more:
                        break
            except QueryTimeoutError:  # the filters of all of them are too much for one query
                for tails in [*self._live.values()]:
                    for tail in tails:
                        tail.fall_behind()
            except UnavailableError:  # it is opened again, or overloaded; those who follow only wait longer
                await asyncio.sleep(_PAUSE_S)
                self._unread.set()

    async def _hand_out(self, changes: Changes, groups: list[str]) -> None:
        """Give each group of tails with the same filters what matches them."""
        frames = await encode(changes, frozenset().union(*changes.matching))
        # From here on nothing is awaited, so that every tail is at the same place as the feed. One that has joined
        # in the meantime may have filters that nobody had asked for: it reads for itself.
        for key, tails in [*self._live.items()]:
            if key in groups:
                matching = changes.matching[groups.index(key)]
                chosen = Chunk([frame for frame in frames if frame.run in matching])
                for tail in [*tails]:
                    tail.offer(chosen)
            else:
                for tail in [*tails]:
                    tail.fall_behind()
        self.position = max(self.position, changes.last)

    def join(self, tail: Tail, changes: Changes) -> bool:
        """Let a tail that has read up to `changes.last` live on what is handed out, if it has caught up."""
        # Also if nobody lives on it now: what somebody was handed since this was read may be on its way still.
        if changes.last < self.position:
            return False
        if not self._live:
            self.position = changes.last
        self._live.setdefault(tail.key, []).append(tail)
        self._unread.set()  # there may have been a commit since it read
        return True

    def leave(self, tail: Tail) -> None:
        """Hand a tail nothing any more."""
        others = [other for other in self._live.pop(tail.key, []) if other is not tail]
        if others:
            self._live[tail.key] = others

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
        if self.closed:
            return
        self.closed = True
        self._wake()
        for tail in [*self._tails]:
            tail.end()


class Tail:
    """One who follows: what waits for it, and how far it is. Use it in a `with` block."""

    def __init__(self, feed: Feed, place: Place | None, filters: Filters) -> None:
        self.filters = filters
        self.key = urlencode(filters.parameters())
        """The same for all tails with the same filters."""
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

    def offer(self, chunk: Chunk) -> None:
        """Let frames wait for it; if it is too slow for that, it reads them from the database later."""
        chunk = chunk.behind(self._position)  # it may have read further than the others
        if not chunk.frames:
            return
        if self._waiting and self._bytes + len(chunk.text) > BUFFER_BYTES:
            self.fall_behind()
        else:
            self._waiting.append((len(chunk.frames), chunk.text))
            self._bytes += len(chunk.text)
            self._ready.set()

    def fall_behind(self) -> None:
        """Give up what waits, and read from the database what lies behind the last thing that was sent."""
        self._feed.leave(self)
        self._is_live = False
        self._waiting.clear()
        self._bytes = 0
        self._ready.set()

    async def begin(self) -> bytes:
        """Find the place to begin at; return what tells it, so that who is cut off at once knows where to go on.

        Raises:
            UnavailableError: if the database cannot be read now.
            InvalidRequestError: if its filters cannot be used.

        """
        changes = await self._feed.read(MAX_INTEGER, self.filters)
        self._epoch, self._position = changes.epoch, changes.newest
        place = self._place
        if place is None:
            return RETRY + self._mark()
        if place.epoch not in (None, changes.epoch) or place.seq > changes.newest:
            # Another database gave that place; nobody knows what was seen of this one.
            return RETRY + self._tell_missed(changes.newest)
        self._position = place.seq
        return RETRY + self._mark()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield what is to be sent after the beginning, without an end; now and then a sign of life."""
        while not self._feed.closed:
            if not self._is_live:
                chunk = await self._catch_up()
            elif await self._is_ready():
                chunk = self._take()
            else:
                chunk = b":\n" + self._mark()
            if chunk:
                yield chunk

    def _mark(self) -> bytes:
        return f"id: {Place(self._position, self._epoch)}\n\n".encode()

    def _tell_missed(self, missed: int) -> bytes:
        self._feed.metrics.tails_missed.inc(missed)
        self.missed += missed
        data = orjson.dumps({"missed": missed})
        return b"event: missed\ndata: " + data + b"\n" + self._mark()

    async def _catch_up(self) -> bytes:
        """Read the next page from the database; join those who live on what is handed out if that was the last one."""
        try:
            changes = await self._feed.read(self._position, self.filters)
        except UnavailableError:
            await asyncio.sleep(_PAUSE_S)
            return b""
        behind = changes.newest - self._position
        if behind > BEHIND:
            self._position = changes.newest
            return self._tell_missed(behind)
        frames = await encode(changes, changes.matching[0])
        self._position = changes.last
        self._ready.clear()
        self._is_live = not changes.more and self._feed.join(self, changes)
        self.sent += len(frames)
        return b"".join(frame.text for frame in frames)

    async def _is_ready(self) -> bool:
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                await self._ready.wait()
        except TimeoutError:
            if self._ready.is_set():  # in the same turn of the loop
                return True
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


async def encode(changes: Changes, matching: Collection[int]) -> list[Frame]:
    """Return the runs with these ids as events of a stream, in their order."""
    frames = []
    turn = time.perf_counter()
    for seq, what in changes.found:
        if isinstance(what, tuple) and what[0] in matching:
            place, data = str(Place(seq, changes.epoch)).encode(), orjson.dumps(runs.to_json(what))
            frames.append(Frame(seq, int(what[0] or 0), b"id: %b\nevent: run\ndata: %b\n\n" % (place, data)))
            if time.perf_counter() - turn > _SLICE_S:
                await asyncio.sleep(0)
                turn = time.perf_counter()
    return frames
