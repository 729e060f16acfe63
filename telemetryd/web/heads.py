"""Reads request heads within limits: size of each, and memory for all requests besides their bodies."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from aiohttp.http_exceptions import BadHttpMessage, HttpProcessingError
from aiohttp.http_parser import HttpRequestParser, RawRequestMessage
from aiohttp.web_protocol import MAX_MSG_QUEUE_SIZE, RequestPayloadError

if TYPE_CHECKING:
    import asyncio

    from aiohttp.base_protocol import BaseProtocol
    from aiohttp.streams import StreamReader

HEAD_BYTES: Final = 64 * 1024
"""What a head may have; aiohttp bounds its lines, of which it takes 128, and their length."""

ANSWERED_BYTES: Final = 10 * 1024
"""About what a request takes while it is being answered or waits for that: tasks, the query, its place in a queue."""

_COPIES: Final = 3
"""The parser has a head as bytes, as text, and meanwhile as what came in; it keeps it until the next one begins."""
_FIELD_BYTES: Final = 300
"""What a field takes besides: objects, and a place in two lists and a map."""
_FIELD_SIGNS: Final = len(": \r\n")
_SLICE_BYTES: Final = 16 * 1024
"""How much of a head is looked at until it is counted."""
_READ_BYTES: Final = 64 * 1024
"""aiohttp's own default: what of a body may wait to be read before its sender has to pause."""

H = TypeVar("H", bound=Hashable)


class HeadTooLargeError(BadHttpMessage):
    """A head is larger than `HEAD_BYTES`."""


class Held(Generic[H]):
    """How much each connection holds, and all of them together.

    Args:
        most: how many bytes that may be.

    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.bytes = 0
        self._by_holder: dict[H, int] = {}

    def note(self, holder: H, held: int) -> None:
        """Note how much a holder holds now."""
        self.bytes += held - self._by_holder.pop(holder, 0)
        if held:
            self._by_holder[holder] = held

    def relieve(self) -> Sequence[H]:
        """If it is too much, forget and return those who hold most, of equal ones those unchanged for longest."""
        if self.bytes <= self._most:
            return ()
        relieved = []
        for holder in sorted(self._by_holder, key=self._by_holder.__getitem__, reverse=True):
            if self.bytes <= self._most * 3 // 4:  # some at once, for the order costs a look at all of them
                break
            self.note(holder, 0)
            relieved.append(holder)
        return relieved


class Parser(HttpRequestParser):
    """aiohttp's parser, which knows how much of heads it holds."""

    def __init__(self, protocol: BaseProtocol, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            protocol,
            loop,
            _READ_BYTES,
            payload_exception=RequestPayloadError,
            auto_decompress=False,  # body.py does it, within its limits
            max_msg_queue_size=MAX_MSG_QUEUE_SIZE,
        )
        self.has_refused = False
        """Whether something was no request, or had too large a head; what comes after it means nothing."""
        self._body: StreamReader | None = None
        self._unfinished = 0
        """How many bytes have come of a head that has not ended."""
        self._asked: deque[int] = deque()
        """What the heads hold whose turn has not come."""
        self._current = 0

    @property
    def held(self) -> int:
        """About how many bytes of heads are in memory."""
        return _COPIES * self._unfinished + sum(self._asked) + self._current

    def message_consumed(self) -> None:
        """Take note that the next request is being answered."""
        super().message_consumed()
        if self._asked:
            self._current = self._asked.popleft()

    def feed_data(self, data: bytes, *_: Any) -> Any:
        """Parse what has come in.

        Raises:
            HttpProcessingError: if it is no request; a `HeadTooLargeError` if a head is too large, ended or not.

        """
        found: list[Any] = []
        while True:
            is_body = self._body is not None and not self._body.is_eof()
            end = len(data) if is_body else _SLICE_BYTES
            try:
                messages, is_upgraded, tail = self._feed(data[:end], is_body=is_body)
            except HttpProcessingError:
                self.has_refused = True
                raise
            found += messages
            data = data[end:]
            if not data or is_upgraded:
                return found, is_upgraded, tail + data

    def _feed(self, data: bytes, *, is_body: bool) -> Any:
        read = self._body.total_bytes if is_body and self._body is not None else 0
        parsed = messages, is_upgraded, tail = super().feed_data(data)
        if len(messages) == 1 and not (is_body or self._unfinished or self._asked):  # nearly every request comes so
            message, self._body = messages[0]
            self._asked.append(_held(message, _size(message)))
            return parsed
        if not (messages or data):  # aiohttp asks so whether anything waits, after each request
            return parsed
        sizes = [_size(message) for message, _ in messages]
        of_bodies = sum(body.total_bytes for _, body in messages)
        if is_body and self._body is not None:
            of_bodies += self._body.total_bytes - read
        self._unfinished = max(self._unfinished + len(data) - sum(sizes) - of_bodies, 0)
        if messages:
            self._body = messages[-1][1]
            self._asked.extend(_held(message, size) for size, (message, _) in zip(sizes, messages, strict=True))
            # What comes after them in this slice is hardly worth counting, unless much has to wait for its turn.
            if not (is_body or len(self._asked) >= MAX_MSG_QUEUE_SIZE):
                self._unfinished = 0
        if self._body is not None and not self._body.is_eof():  # all that is not parsed yet belongs to it
            self._unfinished = 0
        if max(sizes, default=0) > HEAD_BYTES or (
            self._unfinished > HEAD_BYTES and len(self._asked) < MAX_MSG_QUEUE_SIZE
        ):
            raise HeadTooLargeError(f"The head of a request must not be larger than {HEAD_BYTES} bytes")
        return messages, is_upgraded, tail


def _size(message: RawRequestMessage) -> int:
    """Return about how many bytes a head had."""
    fields = message.raw_headers
    return len(message.path) + sum(map(len, chain.from_iterable(fields))) + _FIELD_SIGNS * len(fields)


def _held(message: RawRequestMessage, size: int) -> int:
    """Return about how many bytes a head of a size takes in memory."""
    return _COPIES * size + _FIELD_BYTES * len(message.raw_headers)
