"""Distributes committed changes to subscribers: read, encoded and held once, sent as fast as each can read."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlencode

import orjson

from telemetryd.errors import QueryTimeoutError, TooManyTailsError, TooManyWaitsError, UnavailableError
from telemetryd.model.changes import PAGE_BYTES, Changes, ChangesRequest, ListChanges, Place
from telemetryd.model.filters import Filters
from telemetryd.model.values import MAX_INTEGER
from telemetryd.ops.logs import log
from telemetryd.ops.metrics import Metrics
from telemetryd.services.frames import PIECE_BYTES, Frame, Held, encode, joined
from telemetryd.services.ring import Cursor, Ring
from telemetryd.store import Store

_PAGE: Final = 250
_LEAST_PAGE_BYTES: Final = 256 * 1024
_PAUSE_S: Final = 0.5

RETRY: Final = b"retry: 2000\n"
"""Tells a browser after how many milliseconds to come back."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much a feed does and holds at most."""

    tails: int = 2_000
    waits: int = 2_000
    heartbeat_s: float = 15.0
    """After so long without anything to say, a tail says that it is still there, and how far it is."""
    ring_bytes: int = 16 * 1024 * 1024
    """What a ring keeps for those who are slow, besides its last page; beyond it, they read from the database."""
    held_bytes: int = 64 * 1024 * 1024
    """What rings and tails hold together; beyond it, those who take nothing give up what waits for them."""
    behind: int = 50_000
    """A tail that is more changes behind than this is told how many it missed, and goes on from now."""


class Feed:
    """Knows how far the commits have got, and all who wait for the next one."""

    def __init__(self, store: Store, metrics: Metrics, bounds: Bounds | None = None) -> None:
        self.bounds = bounds or Bounds()
        self._store = store
        self._news = asyncio.Event()
        self._polling = asyncio.Lock()
        self.waits = 0
        """Requests that wait for a commit."""
        self.tails: set[Tail] = set()
        self.held = Held()
        self._plain = Lane(self, store.fetch_news)
        self._searching = Lane(self, store.fetch)
        self.closed = False
        self.encoding = asyncio.Lock()
        """Held by the task that has frames in hand that are counted nowhere yet: a page at most."""
        self.metrics = metrics
        metrics.watch_tails(lambda: len(self.tails))
        store.on_commit(self._wake)

    def lane(self, filters: Filters) -> Lane:
        """Return where tails with these filters are handed what is new."""
        return self._searching if filters.is_search else self._plain

    def _wake(self) -> None:
        """Take note of a commit; called by the writer's task, so it only sets some flags."""
        self._plain.unread.set()
        self._searching.unread.set()
        self._news.set()
        self._news = asyncio.Event()

    async def wait(self, asked: ChangesRequest) -> Changes:
        """Read what comes after a place; if that is nothing, wait for a commit as long as was asked for.

        Raises:
            UnavailableError: if the database cannot be read now.
            CursorGoneError: if the place is not known any more.
            TooManyWaitsError: if too many wait already.

        """
        if asked.wait_s and self.waits >= self.bounds.waits:
            raise TooManyWaitsError
        self.waits += 1
        try:
            return await self._wait(asked)
        finally:
            self.waits -= 1

    async def _wait(self, asked: ChangesRequest) -> Changes:
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
        async with asyncio.TaskGroup() as lanes:
            lanes.create_task(self._plain.run())
            lanes.create_task(self._searching.run())

    def relieve(self) -> None:
        """While too much is held, have those who take nothing give it up, then the rings; if need be, end tails."""
        if self.held.bytes <= self.bounds.held_bytes:
            return
        slowest = sorted((tail for tail in self.tails if tail.is_sending), key=lambda tail: tail.since)
        for tail in slowest:
            if self.held.bytes > self.bounds.held_bytes:
                tail.give_up()
        for lane in (self._plain, self._searching):
            if self.held.bytes > self.bounds.held_bytes:
                lane.forget()
        for tail in slowest[:-1]:  # the last one may be sent a single run of any size
            if self.held.bytes > self.bounds.held_bytes:
                log.warning("Stream cut: too much waits to be read by all streams together")
                tail.end()

    def open(self, place: Place | None, filters: Filters) -> Tail:
        """Return a new tail, which continues after a place, or begins with the next commit.

        Raises:
            TooManyTailsError: if too many are open.

        """
        if len(self.tails) >= self.bounds.tails:
            raise TooManyTailsError
        tail = Tail(self, place, filters)
        self.tails.add(tail)
        return tail

    def close(self) -> None:
        """End every tail and every wait at once; who comes back later goes on where it was."""
        if self.closed:
            return
        self.closed = True
        self._wake()
        for tail in [*self.tails]:
            tail.end()


class Lane:
    """Hands out to tails whose filters cost about the same, so that nobody waits for a costlier one.

    Args:
        feed: whose tails they are.
        fetch: reads for them, and for nobody who would have to wait for less.

    """

    def __init__(self, feed: Feed, fetch: Callable[[ListChanges], Awaitable[Changes]]) -> None:
        self._feed = feed
        self._fetch = fetch
        self._turn = asyncio.Lock()
        self._reading = asyncio.Lock()
        self.unread = asyncio.Event()
        """Whether there was a commit since it began to read."""
        self.live: dict[str, list[Tail]] = {}
        """Those that are handed what is new, by their filters."""
        self.ring = Ring(feed.held)
        """What was handed to them and not yet taken by all."""

    async def read(self, after: int, *filters: Filters) -> Changes:
        """Read what comes after a number; one at a time, so that tails leave the readers to those who ask.

        Raises:
            UnavailableError: if the database cannot be read now.
            InvalidRequestError: if a filter cannot be used.

        """
        async with self._turn:
            return await self._fetch(ListChanges(after, _PAGE, filters))

    async def catch_up(self, tail: Tail) -> bytes:
        """Let the next page from the database wait for a tail that is behind; return what it gets instead.

        Raises:
            UnavailableError: if the database cannot be read now.

        """
        # One at a time asks for the second lock, so that what is new is handed out in between. That one is held until
        # the tail has joined: so nothing is handed out that is not in the page.
        async with self._turn, self._reading:
            # It may have read further than the others, and is to be handed nothing twice.
            while self.live and self.ring.last < tail.position and await self._hand_out():
                pass
            share = self._feed.bounds.held_bytes // len(self._feed.tails)
            most_bytes = min(max(share, _LEAST_PAGE_BYTES), PAGE_BYTES)
            page = ListChanges(tail.position, _PAGE, (tail.filters,), most_bytes=most_bytes)
            changes = await self._fetch(page)
            async with self._feed.encoding:
                told = await tail.take_in(changes)
                self._feed.relieve()
            return told

    async def run(self) -> None:
        """Hand out what is committed, until it is cancelled."""
        while True:
            await self.unread.wait()
            self.unread.clear()
            try:
                more = True
                while more and self.live:
                    async with self._reading:
                        more = await self._hand_out()
            except QueryTimeoutError:  # the filters of all of them are too much for one query
                for tails in [*self.live.values()]:
                    for tail in tails:
                        tail.fall_behind()
            except UnavailableError:  # it is opened again, or overloaded; those who follow only wait longer
                await asyncio.sleep(_PAUSE_S)
                self.unread.set()

    async def _hand_out(self) -> bool:
        """Give each group of tails with the same filters what matches them; return whether there is more."""
        groups = {key: tails[0].filters for key, tails in self.live.items()}
        changes = await self._fetch(ListChanges(self.ring.last, _PAGE, (*groups.values(),)))
        async with self._feed.encoding:
            matching = dict(zip(groups, changes.matching, strict=True))
            frames = await encode(changes, frozenset().union(*matching.values()), changes.last)
            # From here on nothing is awaited, so that all of this is one step for every tail.
            pieces = {}
            for key, tails in self.live.items():
                if wanted := [frame for frame in frames if frame.run in matching[key]]:
                    pieces[key] = joined(wanted) if len(tails) > 1 else wanted
            self.offer(changes.last, pieces)
            self._feed.relieve()
        return changes.more

    def offer(self, last: int, pieces: Mapping[str, Sequence[Frame]]) -> None:
        """Hand to all who live on it what their filters let through of the changes up to a number."""
        self.ring.append(last, pieces, self._feed.bounds.ring_bytes)
        self._wake(pieces)

    def forget(self) -> None:
        """Keep nothing; a tail that has not taken it yet reads it from the database."""
        self.ring.clear()
        self._wake(())

    def _wake(self, keys: Collection[str]) -> None:
        for key, tails in [*self.live.items()]:
            for tail in [*tails]:
                tail.look(has_news=key in keys)

    def join(self, tail: Tail, last: int) -> Cursor | None:
        """Let a tail that has read up to a number live on what is handed out, if it is where the others are."""
        # Also if nobody lives on it now: what somebody was handed since this was read may be on its way still.
        if last < self.ring.last or (self.live and last > self.ring.last):
            return None
        self.ring.last = last
        self.live.setdefault(tail.key, []).append(tail)
        self.unread.set()  # there may have been a commit since it read
        return self.ring.enter(tail.key)

    def leave(self, tail: Tail) -> None:
        """Hand a tail nothing any more."""
        others = [other for other in self.live.pop(tail.key, []) if other is not tail]
        if others:
            self.live[tail.key] = others


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
        self.lane = feed.lane(filters)
        self._place = place
        self.position = 0
        """How far it has come; what waits for it alone goes up to here."""
        self.since = 0.0
        """Since when what waits has not become less."""
        self._epoch = ""
        self._cursor: Cursor | None = None
        """Where it stands in the lane's ring, while it lives on what is handed out."""
        self._has_ended = False
        self._waiting: deque[Frame] = deque()
        """What it holds: the rest of its page from the database, or the one frame of the ring that it is sending."""
        self._offset = 0
        """How much of the first frame that waits is sent already."""
        self._ready = asyncio.Event()
        self._life = asyncio.timeout(None)

    async def __aenter__(self) -> Tail:
        """Begin a life that `end` ends, whatever is awaited in the block."""
        await self._life.__aenter__()
        return self

    async def __aexit__(self, *details: object) -> bool:
        """End it; an end by `end` is no error."""
        self._feed.tails.discard(self)
        self._let_go()
        try:
            await self._life.__aexit__(*details)  # type: ignore[arg-type]
        except TimeoutError:
            return True
        return False

    def end(self) -> None:
        """End the block at once."""
        if not self._has_ended:
            self._has_ended = True
            self._let_go()
            self._life.reschedule(0)

    def _let_go(self) -> None:
        self.fall_behind()
        while self._waiting:
            self._feed.held.release(self._waiting.pop())

    @property
    def is_sending(self) -> bool:
        """Whether it holds anything."""
        return bool(self._waiting)

    def look(self, *, has_news: bool) -> None:
        """See where it stands after something was appended to the ring, or dropped."""
        if self._cursor is None:
            return
        self.lane.ring.advance(self._cursor)
        if self.lane.ring.has_lapped(self._cursor):
            self.fall_behind()
        elif has_news:
            self._ready.set()

    def fall_behind(self) -> None:
        """Be handed nothing more, and read from the database what comes after that which was taken."""
        if self._cursor is not None:
            self.position = max(self.position, self.lane.ring.place(self._cursor))
            self.lane.leave(self)
            self.lane.ring.leave(self._cursor)
            self._cursor = None
            self._ready.set()

    def give_up(self) -> None:
        """Keep only the run that is being sent, and read from the database what comes after it."""
        self.fall_behind()
        while len(self._waiting) > 1:
            self._feed.held.release(self._waiting.pop())
        self.position = self._waiting[0].seq

    async def begin(self) -> bytes:
        """Find the place to begin at; return its frame, so that a client that is cut off at once knows where to resume.

        Raises:
            UnavailableError: if the database cannot be read now.
            InvalidRequestError: if its filters cannot be used.

        """
        changes = await self.lane.read(MAX_INTEGER, self.filters)
        self._epoch, self.position = changes.epoch, changes.newest
        place = self._place
        if place is None:
            return RETRY + self._mark()
        if place.epoch not in (None, changes.epoch) or place.seq > changes.newest:
            # Another database gave that place; nobody knows what was seen of this one.
            return RETRY + self._tell_missed(changes.newest)
        self.position = place.seq
        return RETRY + self._mark()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield what is to be sent after the beginning, without an end; now and then a sign of life."""
        while not (self._feed.closed or self._has_ended):
            if self._has_next():
                yield self._take()
            elif self._cursor is None:
                if told := await self._catch_up():
                    yield told
            elif not await self._is_ready():
                yield b":\n" + self._mark()

    def _mark(self) -> bytes:
        return f"id: {Place(self.position, self._epoch)}\n\n".encode()

    def _tell_missed(self, missed: int) -> bytes:
        self._feed.metrics.tails_missed.inc(missed)
        self.missed += missed
        data = orjson.dumps({"missed": missed})
        return b"event: missed\ndata: " + data + b"\n" + self._mark()

    async def _catch_up(self) -> bytes:
        try:
            return await self.lane.catch_up(self)
        except UnavailableError:
            await asyncio.sleep(_PAUSE_S)
            return b""

    async def take_in(self, changes: Changes) -> bytes:
        """Let a page wait; join those who live on what is handed out if it was the last one.

        Return what is to be sent instead if it is not wanted any more.
        """
        behind = changes.newest - self.position
        if behind > self._feed.bounds.behind:
            self.position = changes.newest
            return self._tell_missed(behind)
        last = changes.last
        if self.lane.live and self.position <= self.lane.ring.last:
            last = min(last, self.lane.ring.last)  # what comes after that is about to be handed to all
        frames = await encode(changes, changes.matching[0], last)
        for frame in frames:
            self._feed.held.acquire(frame)
        self._waiting.extend(frames)
        self.since = time.monotonic()
        self.position = last
        self._ready.clear()
        if last < changes.last or not changes.more:
            self._cursor = self.lane.join(self, last)
        return b""

    async def _is_ready(self) -> bool:
        try:
            async with asyncio.timeout(self._feed.bounds.heartbeat_s):
                await self._ready.wait()
        except TimeoutError:
            if not self._ready.is_set():  # it may be, in the same turn of the loop
                self.position = max(self.position, self.lane.ring.last)
                return False
        self._ready.clear()
        return True

    def _has_next(self) -> bool:
        """Return whether it holds something to send; if not, take one frame of the ring."""
        if not self._waiting and self._cursor is not None:
            frame = self.lane.ring.take(self._cursor)
            if frame is not None:
                self._waiting.append(frame)
                self.position = self.lane.ring.place(self._cursor)
        return bool(self._waiting)

    def _take(self) -> bytes:
        """Take as much of what waits as is sent at once: small runs as wholes, or a part of a large one."""
        parts: list[bytes] = []
        room = PIECE_BYTES
        while self._has_next():
            frame = self._waiting[0]
            text = frame.text
            if parts and len(text) > room:
                break
            part = text[self._offset : self._offset + room]
            parts.append(part)
            room -= len(part)
            self._offset += len(part)
            if self._offset < len(text):
                break
            self._feed.held.release(self._waiting.popleft())
            self._offset = 0
            self.sent += frame.runs
        self.since = time.monotonic()
        return b"".join(parts)
