"""Reads request heads within limits: size of each, and memory for all requests besides their bodies."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from aiohttp.http import HttpVersion10
from aiohttp.http_exceptions import BadHttpMessage, HttpProcessingError
from aiohttp.http_parser import HttpRequestParser, RawRequestMessage
from aiohttp.web_protocol import MAX_MSG_QUEUE_SIZE, RequestPayloadError

if TYPE_CHECKING:
    import asyncio

    from aiohttp.base_protocol import BaseProtocol
    from aiohttp.streams import StreamReader

HEAD_BYTES: Final = 64 * 1024
"""What a head may have; of its lines aiohttp takes 128."""

ANSWERED_BYTES: Final = 10 * 1024
"""About what a request takes while it is being answered or waits for that: tasks, the query, its place in a queue."""

_COPIES: Final = 3
"""The parser has a head as bytes, as text, and meanwhile as what came in; it keeps it until the next one begins."""
_FIELD_BYTES: Final = 300
"""What a field takes besides: objects, and a place in two lists and a map."""
_FIELD_SIGNS: Final = len(": \r\n")
_BLANK_LINE: Final = b"\r\n\r\n"
_SLICE_BYTES: Final = 16 * 1024
"""How much of a head is looked at until it is counted."""
LINE_BYTES: Final = 8190
"""What a line of a head may have, and its request line's path."""
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
    """aiohttp's parser, which knows how much of heads it holds, and hands over the requests before one that is bad."""

    __slots__ = ("_asked", "_body", "_current", "_end", "_since_blank", "_unfinished", "is_drained", "refusal")

    def __init__(self, protocol: BaseProtocol, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            protocol,
            loop,
            _READ_BYTES,
            max_line_size=LINE_BYTES,
            max_field_size=LINE_BYTES,
            payload_exception=RequestPayloadError,
            auto_decompress=False,  # body.py does it, within its limits
            max_msg_queue_size=1,  # it pauses after each request, or a bad one would take those before it along
        )
        self.refusal: HttpProcessingError | None = None
        """Why something was no request, or had too large a head; what comes after it means nothing."""
        self.is_drained = True
        """Whether all that has come is parsed, so that there is nothing to be found by asking again."""
        self._body: StreamReader | None = None
        self._unfinished = 0
        """How many bytes have come of a head that has not ended, or wait until fewer requests do."""
        self._since_blank = 0
        """How many bytes have come since the last blank line, with which heads and chunked bodies end."""
        self._end = b""
        """The last bytes that have come, which may be the beginning of a blank line."""
        self._asked: list[int] = []
        """What the heads hold whose turn has not come; they are few, and an empty deque takes ten times as much."""
        self._current = 0

    @property
    def held(self) -> int:
        """About how many bytes of heads are in memory."""
        return _COPIES * self._unfinished + sum(self._asked) + self._current

    def message_consumed(self) -> None:
        """Take note that the next request is being answered."""
        self._current = self._asked.pop(0) if self._asked else 0

    def renewed(self, protocol: BaseProtocol, loop: asyncio.AbstractEventLoop) -> Parser:
        """Return a parser that has nothing of what has come but the requests whose turn has not."""
        parser = Parser(protocol, loop)
        parser._asked, parser._current = self._asked, self._current
        return parser

    def feed_data(self, data: bytes, *_: Any) -> Any:
        """Parse what has come in, up to what is refused.

        Raises:
            HttpProcessingError: the refusal, when what came before it has been returned.

        """
        if self.refusal is not None:
            raise self.refusal
        found: list[Any] = []
        while True:
            is_body = _is_open(self._body)
            end = len(data) if is_body else _SLICE_BYTES
            messages, is_upgraded, tail = self._feed(data[:end], is_body=is_body)
            found += messages
            data = data[end:]
            if not data or is_upgraded or self.refusal is not None:
                return found, is_upgraded, tail + data

    def _parse(self, data: bytes) -> Any:
        """Parse as aiohttp does, but request by request, so that those before a bad one are known."""
        found: list[Any] = []
        body = self._body
        self.is_drained = False
        while True:
            was_open = _is_open(body)
            try:
                messages, is_upgraded, tail = super().feed_data(data)
                _refuse_without_version(messages)
            except HttpProcessingError as error:
                self.refusal = error.with_traceback(None)  # its frames hold what has come
                if found and _is_open(found[-1][1]):  # the fault is in its body
                    found.pop()
                return found, False, b""
            found += messages
            if messages:
                body = messages[-1][1]
            is_full = len(self._asked) + len(found) >= MAX_MSG_QUEUE_SIZE
            if is_upgraded or is_full or _is_open(body):
                return found, is_upgraded, tail
            if not (messages or was_open):
                self.is_drained = True
                return found, is_upgraded, tail
            data = b""  # what comes after the end of a request waits in the parser

    def _feed(self, data: bytes, *, is_body: bool) -> Any:
        read = self._body.total_bytes if is_body and self._body is not None else 0
        parsed = messages, is_upgraded, tail = self._parse(data)
        if len(messages) == 1 and not (is_body or self._unfinished or self._asked):  # nearly every request comes so
            message, self._body = messages[0]
            self._asked.append(_held(message, _size(message)))
            self._since_blank, self._end = 0, b""  # what comes after it in this slice is hardly worth counting
            return parsed
        if not (messages or data):  # aiohttp asks so whether anything waits, after each request
            return parsed
        sizes = [_size(message) for message, _ in messages]
        of_bodies = sum(body.total_bytes for _, body in messages)
        if is_body and self._body is not None:
            of_bodies += self._body.total_bytes - read
        if messages:
            self._body = messages[-1][1]
        allowed = [*takewhile(lambda size: size <= HEAD_BYTES, sizes)]
        self._asked.extend(_held(message, size) for size, (message, _) in zip(allowed, messages, strict=False))
        self._look_for_blank_line(data)
        self._unfinished = max(self._unfinished + len(data) - sum(sizes) - of_bodies, 0)
        if _is_open(self._body):  # all that is not parsed yet belongs to it
            self._unfinished = 0
        elif len(self._asked) < MAX_MSG_QUEUE_SIZE:  # all is parsed
            self._unfinished = min(self._unfinished, self._since_blank)
        is_too_long = self._unfinished > HEAD_BYTES and len(self._asked) < MAX_MSG_QUEUE_SIZE
        if len(allowed) < len(sizes) or (is_too_long and self.refusal is None):
            self.refusal = HeadTooLargeError(f"The head of a request must not be larger than {HEAD_BYTES} bytes")
        return messages[: len(allowed)], is_upgraded, tail

    def _look_for_blank_line(self, data: bytes) -> None:
        come = self._end + data
        found = come.rfind(_BLANK_LINE)
        self._since_blank = self._since_blank + len(data) if found < 0 else len(come) - found - len(_BLANK_LINE)
        self._end = come[1 - len(_BLANK_LINE) :]


def _is_open(body: StreamReader | None) -> bool:
    """Return whether more of a body is to come."""
    return body is not None and not body.is_eof()


def _refuse_without_version(messages: list[Any]) -> None:
    """Refuse requests of HTTP/0.9, of which the parser itself only says later that they are none.

    Raises:
        BadHttpMessage: then.

    """
    if messages and messages[0][0].version < HttpVersion10:
        raise BadHttpMessage("Requests of HTTP/0.9 are not answered")


def _size(message: RawRequestMessage) -> int:
    """Return about how many bytes a head had."""
    fields = message.raw_headers
    return len(message.path) + sum(map(len, chain.from_iterable(fields))) + _FIELD_SIGNS * len(fields)


def _held(message: RawRequestMessage, size: int) -> int:
    """Return about how many bytes a head of a size takes in memory."""
    return _COPIES * size + _FIELD_BYTES * len(message.raw_headers)
