"""Distributes committed changes to subscribers: read, encoded and held once, sent as fast as each can read."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final
from urllib.parse import urlencode

import orjson

from telemetryd.errors import QueryTimeoutError, TooManySubscribersError, TooManyWaitsError, UnavailableError
from telemetryd.model.changes import PAGE_BYTES, Changes, ChangesRequest, Cursor, ListChanges
from telemetryd.model.filters import Filters
from telemetryd.model.values import MAX_INTEGER
from telemetryd.ops.logs import log
from telemetryd.ops.metrics import Metrics
from telemetryd.services.frames import PIECE_BYTES, Frame, Held, encode, joined
from telemetryd.services.ring import Ring, RingCursor
from telemetryd.store import Store

_PAGE: Final = 250
_LEAST_PAGE_BYTES: Final = 256 * 1024
_PAUSE_S: Final = 0.5

RETRY: Final = b"retry: 2000\n"
"""After how many milliseconds a browser reconnects."""


@dataclass(frozen=True, slots=True)
class FeedBounds:
    """How much a feed does and holds at most."""

    subscribers: int = 2_000
    waits: int = 2_000
    heartbeat_s: float = 15.0
    """After so long without an event, a stream sends a sign of life with its position."""
    ring_bytes: int = 16 * 1024 * 1024
    """What a ring keeps for slow subscribers, besides its last page; beyond it, they read from the database."""
    held_bytes: int = 64 * 1024 * 1024
    """What rings and subscribers hold together; beyond it, slow subscribers give up what they hold."""
    behind: int = 50_000
    """A subscriber that is further behind gets the number of changes it missed, and continues with the next commit."""


class Feed:
    """Knows how far the commits have got, and every request and stream that waits for the next one."""

    def __init__(self, store: Store, metrics: Metrics, bounds: FeedBounds | None = None) -> None:
        self.bounds = bounds or FeedBounds()
        self._store = store
        self._news = asyncio.Event()
        self._polling = asyncio.Lock()
        self.waits = 0
        """Requests that wait for a commit."""
        self.subscribers: set[Subscriber] = set()
        self.held = Held()
        self._plain = Lane(self, store.fetch_news)
        self._searching = Lane(self, store.fetch)
        self.closed = False
        self.encoding = asyncio.Lock()
        """Held by the task that has frames in hand that are counted nowhere yet: a page at most."""
        self.metrics = metrics
        metrics.watch_subscribers(lambda: len(self.subscribers))
        store.on_commit(self._wake)

    def lane(self, filters: Filters) -> Lane:
        """Return the lane of subscribers with these filters."""
        return self._searching if filters.is_search else self._plain

    def _wake(self) -> None:
        """Note a commit; the writer's task calls this, so it only sets some flags."""
        self._plain.unread.set()
        self._searching.unread.set()
        self._news.set()
        self._news = asyncio.Event()

    async def wait(self, asked: ChangesRequest) -> Changes:
        """Read what comes after a cursor; if there is nothing, wait for a commit as long as the request allows.

        Raises:
            UnavailableError: if the database cannot be read now.
            CursorGoneError: if the cursor is not known any more.
            TooManyWaitsError: if too many requests wait already.

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
            async with self._polling:  # a commit wakes all of them; at once, they would occupy every reader
                news = self._news
                changes = await self._store.fetch(asked.query)

    async def run(self) -> None:
        """Hand out what is committed, until it is cancelled."""
        async with asyncio.TaskGroup() as lanes:
            lanes.create_task(self._plain.run())
            lanes.create_task(self._searching.run())

    def relieve(self) -> None:
        """While too much is held, empty slow subscribers, then the rings; if that is not enough, end some."""
        if self.held.bytes <= self.bounds.held_bytes:
            return
        sending = (subscriber for subscriber in self.subscribers if subscriber.is_sending)
        slowest = sorted(sending, key=attrgetter("since"))
        for subscriber in slowest:
            if self.held.bytes > self.bounds.held_bytes:
                subscriber.give_up()
        for lane in (self._plain, self._searching):
            if self.held.bytes > self.bounds.held_bytes:
                lane.forget()
        for subscriber in slowest[:-1]:  # the last one may be sent a single run of any size
            if self.held.bytes > self.bounds.held_bytes:
                log.warning("Stream cut: too much waits to be read by all streams together")
                subscriber.end()

    async def forget(self) -> None:
        """Let go of all that waits to be sent: what comes to slow subscribers from now on is read again."""
        async with self.encoding:
            for subscriber in self.subscribers:
                if subscriber.is_sending:
                    subscriber.give_up()
            for lane in (self._plain, self._searching):
                lane.forget()

    def open(self, after: Cursor | None, filters: Filters) -> Subscriber:
        """Return a new subscriber, which continues after a cursor, or begins with the next commit.

        Raises:
            TooManySubscribersError: if too many are open.

        """
        if len(self.subscribers) >= self.bounds.subscribers:
            raise TooManySubscribersError
        subscriber = Subscriber(self, after, filters)
        self.subscribers.add(subscriber)
        return subscriber

    def close(self) -> None:
        """End every subscriber and every wait at once; a client that comes back resumes where it was."""
        if self.closed:
            return
        self.closed = True
        self._wake()
        for subscriber in [*self.subscribers]:
            subscriber.end()


class Lane:
    """Hands out changes to subscribers whose filters cost about the same, so that none waits for a costlier one.

    Args:
        feed: the feed of these subscribers.
        fetch: reads for them, and not for queries that are quicker.

    """

    def __init__(self, feed: Feed, fetch: Callable[[ListChanges], Awaitable[Changes]]) -> None:
        self._feed = feed
        self._fetch = fetch
        self._turn = asyncio.Lock()
        self._reading = asyncio.Lock()
        self.unread = asyncio.Event()
        """Whether there was a commit since it began to read."""
        self.live: dict[str, list[Subscriber]] = {}
        """Subscribers that are handed what is new, by their filters."""
        self.ring = Ring(feed.held)
        """What was handed out and not yet taken by all of them."""

    async def read(self, after: int, *filters: Filters) -> Changes:
        """Read what comes after a number; one at a time, so that subscribers leave readers to other queries.

        Raises:
            UnavailableError: if the database cannot be read now.
            InvalidRequestError: if a filter cannot be used.

        """
        async with self._turn:
            return await self._fetch(ListChanges(after, _PAGE, filters))

    async def catch_up(self, subscriber: Subscriber) -> bytes:
        """Fetch the next page from the database for a subscriber that is behind; return what it is sent instead.

        Raises:
            UnavailableError: if the database cannot be read now.

        """
        # Only one at a time asks for the second lock, so that what is new is handed out in between. It is held until
        # the subscriber has joined, so nothing is handed out that is not in the page.
        async with self._turn, self._reading:
            # It may have read further than the others, and is to be handed nothing twice.
            while self.live and self.ring.last < subscriber.position and await self._hand_out():
                pass
            share = self._feed.bounds.held_bytes // len(self._feed.subscribers)
            most_bytes = min(max(share, _LEAST_PAGE_BYTES), PAGE_BYTES)
            page = ListChanges(subscriber.position, _PAGE, (subscriber.filters,), most_bytes=most_bytes)
            changes = await self._fetch(page)
            async with self._feed.encoding:
                notice = await subscriber.take_in(changes)
                self._feed.relieve()
            return notice

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
                for subscribers in [*self.live.values()]:
                    for subscriber in subscribers:
                        subscriber.fall_behind()
            except UnavailableError:  # it is opened again, or overloaded; subscribers only wait longer
                await asyncio.sleep(_PAUSE_S)
                self.unread.set()

    async def _hand_out(self) -> bool:
        """Give each group of subscribers with the same filters what matches them; return whether there is more."""
        groups = {key: subscribers[0].filters for key, subscribers in self.live.items()}
        changes = await self._fetch(ListChanges(self.ring.last, _PAGE, (*groups.values(),)))
        async with self._feed.encoding:
            matching = dict(zip(groups, changes.matching, strict=True))
            frames = await encode(changes, frozenset().union(*matching.values()), changes.last)
            # From here on nothing is awaited, so that all of this is one step for every subscriber.
            pieces = {}
            for key, subscribers in self.live.items():
                if wanted := [frame for frame in frames if frame.run in matching[key]]:
                    pieces[key] = joined(wanted) if len(subscribers) > 1 else wanted
            self.offer(changes.last, pieces)
            self._feed.relieve()
        return changes.more

    def offer(self, last: int, pieces: Mapping[str, Sequence[Frame]]) -> None:
        """Hand out to all live subscribers what their filters let through of the changes up to a number."""
        self.ring.append(last, pieces, self._feed.bounds.ring_bytes)
        self._wake(pieces)

    def forget(self) -> None:
        """Keep nothing; a subscriber that has not taken it yet reads it from the database."""
        self.ring.clear()
        self._wake(())

    def _wake(self, keys: Collection[str]) -> None:
        for key, subscribers in [*self.live.items()]:
            for subscriber in [*subscribers]:
                subscriber.look(has_news=key in keys)

    def join(self, subscriber: Subscriber, last: int) -> RingCursor | None:
        """Let a subscriber that has read up to a number live on what is handed out, if the others are no further."""
        # Also if there is no live one now: what was handed out since this was read may still be on its way.
        if last < self.ring.last or (self.live and last > self.ring.last):
            return None
        self.ring.last = last
        self.live.setdefault(subscriber.key, []).append(subscriber)
        self.unread.set()  # there may have been a commit since it read
        return self.ring.enter(subscriber.key)

    def leave(self, subscriber: Subscriber) -> None:
        """Hand out nothing more to a subscriber."""
        others = [other for other in self.live.pop(subscriber.key, []) if other is not subscriber]
        if others:
            self.live[subscriber.key] = others


class Subscriber:
    """One open stream: what waits for it, and its position. Use it in an `async with` block."""

    def __init__(self, feed: Feed, after: Cursor | None, filters: Filters) -> None:
        self.filters = filters
        self.key = urlencode(filters.parameters())
        """The same for all subscribers with the same filters."""
        self.sent = 0
        """Runs that were handed over."""
        self.missed = 0
        """Changes that were skipped because it was too slow."""
        self._feed = feed
        self.lane = feed.lane(filters)
        self._after = after
        self.position = 0
        """The number up to which it holds or was sent everything."""
        self.since = 0.0
        """Since when what waits has not become less."""
        self._epoch = ""
        self._cursor: RingCursor | None = None
        """Its cursor in the lane's ring, while it lives on what is handed out."""
        self._has_ended = False
        self._waiting: deque[Frame] = deque()
        """What it holds: the rest of its page from the database, or the one frame of the ring that it is sending."""
        self._offset = 0
        """How much of the first frame that waits is sent already."""
        self._ready = asyncio.Event()
        self._life = asyncio.timeout(None)

    async def __aenter__(self) -> Subscriber:
        """Begin a life that `end` ends, whatever is awaited in the block."""
        await self._life.__aenter__()
        return self

    async def __aexit__(self, *details: object) -> bool:
        """End it; an end by `end` is no error."""
        self._feed.subscribers.discard(self)
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
        """Check the position after something was appended to the ring, or dropped."""
        if self._cursor is None:
            return
        self.lane.ring.advance(self._cursor)
        if self.lane.ring.has_lapped(self._cursor):
            self.fall_behind()
        elif has_news:
            self._ready.set()

    def fall_behind(self) -> None:
        """Leave the live subscribers, and read from the database what comes after that which was taken."""
        if self._cursor is not None:
            self.position = max(self.position, self.lane.ring.position(self._cursor))
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
        """Find where to begin; return that as a frame, so that a client that is cut off at once knows where to resume.

        Raises:
            UnavailableError: if the database cannot be read now.
            InvalidRequestError: if its filters cannot be used.

        """
        changes = await self.lane.read(MAX_INTEGER, self.filters)
        self._epoch, self.position = changes.epoch, changes.newest
        after = self._after
        if after is None:
            return RETRY + self._mark()
        if after.epoch not in (None, changes.epoch) or after.seq > changes.newest:
            # Another database gave that cursor; what the client has seen of this one is unknown.
            return RETRY + self._report_missed(changes.newest)
        self.position = after.seq
        return RETRY + self._mark()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield what is to be sent after the beginning, without an end; now and then a sign of life."""
        while not (self._feed.closed or self._has_ended):
            if self._has_next():
                yield self._take()
            elif self._cursor is None:
                if notice := await self._catch_up():
                    yield notice
            elif not await self._is_ready():
                yield b":\n" + self._mark()

    def _mark(self) -> bytes:
        return f"id: {Cursor(self.position, self._epoch)}\n\n".encode()

    def _report_missed(self, missed: int) -> bytes:
        self._feed.metrics.changes_missed.inc(missed)
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
        """Hold a page; join the live subscribers if it was the last one.

        Return what is to be sent instead if the subscriber is too far behind.
        """
        behind = changes.newest - self.position
        if behind > self._feed.bounds.behind:
            self.position = changes.newest
            return self._report_missed(behind)
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
                self.position = self.lane.ring.position(self._cursor)
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
