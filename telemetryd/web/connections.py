"""Connection limits: how many, and how long a client may take to send and to read."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_exceptions import LineTooLong
from aiohttp.payload import Payload
from aiohttp.web_protocol import RequestHandler

from telemetryd.ops.limits import descriptor_limit
from telemetryd.ops.logs import log
from telemetryd.settings import Settings
from telemetryd.web import private_aiohttp
from telemetryd.web.answers import client_address, error_response, mark, request_id, unexpected_detail
from telemetryd.web.browsers import SAFE_METHODS
from telemetryd.web.compression import LARGE_BYTES, compressor
from telemetryd.web.heads import ANSWERED_BYTES, HEAD_BYTES, LINE_BYTES, HeadTooLargeError, Held, Parser
from telemetryd.web.secure import Handshakes
from telemetryd.web.tls import Tls

KEEPALIVE_S: Final = 75.0
"""How long a connection may rest between two requests."""

_BACKLOG: Final = 2048
_PIECE_BYTES: Final = 256 * 1024
_SPARE_DESCRIPTORS: Final = 80
"""Descriptors for the lock files, the sockets that listen, backups, and what Python opens."""
_DESCRIPTORS_PER_READER: Final = 2


@dataclass(frozen=True, slots=True)
class ConnectionBounds:
    """How much time clients may take, and how much of the memory."""

    handshake_s: float = 10.0
    """How long the handshake of TLS may take."""
    handshakes_bytes: int = 256 * 1024 * 1024
    """What all handshakes may hold; beyond it, those with most of it are cut. It is enough for 6,000.

    A processor core does about as many in the time that each of them may take.
    """
    head_s: float = 10.0
    """How long the head of a request may take, from its first byte, or from the connection's begin."""
    deaf_s: float = 30.0
    """How long a client may take in nothing of what waits for it."""
    linger_s: float = 5.0
    """How long the rest of a body is waited for whose request is answered already, so that the answer gets through."""
    patrol_every_s: float = 1.0
    """How often each connection is looked at."""
    held_bytes: int = 40 * 1024 * 1024
    """What all requests may hold besides their bodies; beyond it, the connections with most of it are cut."""
    unread_bytes: int = 256 * 1024 * 1024
    """How much of all answers together may wait for clients to read; beyond it, those with most of it are cut off."""
    large_bytes: int = LARGE_BYTES
    """From this size on an answer is counted at once, as hundreds of them may come between two patrols."""


class _Pieces(Payload):
    """The body of a large answer, which goes to the transport as the client reads: that would hold a second copy."""

    def __init__(self, body: bytes, coding: str | None) -> None:
        super().__init__(None)
        self._body = body
        self._coding = coding
        self._length = self.left = len(body)

    @property
    def size(self) -> int | None:
        """How many bytes are sent in all; None if they are compressed only as they are sent."""
        return self._length if self._coding is None else None

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the body as text."""
        return self._body.decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Send the body; whether it gets through or not, nothing holds it then."""
        packer = None if self._coding is None else compressor(self._coding)
        try:
            for start in range(0, self.left, _PIECE_BYTES):
                piece = self._body[start : start + _PIECE_BYTES]
                self.left -= len(piece)
                packed = piece if packer is None else await asyncio.to_thread(packer.compress, piece)
                if packed:
                    await writer.write(packed)
            if packer is not None:
                await writer.write(packer.flush())
        finally:
            self.left = 0
            self._body = b""  # a connection that was cut leaves cycles, which are collected late


class _Protocol(RequestHandler):
    """aiohttp's protocol, except that its own errors (a malformed request) are JSON like all others, and its patience.

    aiohttp alone lets a head take as long as a connection may rest, and an unread answer for ever.
    """

    # There may be ten thousand of them.
    __slots__ = (
        "_answer",
        "_answering",
        "_heads",
        "_left",
        "_refusal",
        "_refused",
        "_server",
        "asking_since",
        "unsent",
    )

    def __init__(self, server: _Server, **details: Any) -> None:
        super().__init__(server, **details)
        self._server = server
        self.asking_since: float | None = None
        """Since when a head is awaited that has begun, or is the connection's first."""
        self.unsent: tuple[int, float] = (0, 0.0)
        """How much of the answer waited for the client when the patrol last saw a change, and when that was."""
        self._answer: _Pieces | None = None
        self._answering: asyncio.Task[Any] | None = None
        """What answers a request that changes nothing: it is of no use to anybody once the client has left."""
        self._left: asyncio.Future[None] | None = None
        self._refused = False
        """Whether something was no request, or had too large a head; what follows it is let go."""
        self._refusal: web.Response | None = None
        """The answer to it, which comes after those to the requests before it."""
        self._heads: Parser | None = None
        self._parse_with(Parser(self, asyncio.get_running_loop()))

    def _parse_with(self, parser: Parser) -> None:
        self._heads = parser
        private_aiohttp.use_parser(self, parser)

    @property
    def unread(self) -> int:
        """How many bytes of answers are in memory until the client reads them."""
        waiting = self.transport.get_write_buffer_size() if self.transport is not None else 0
        return waiting if self._answer is None else waiting + self._answer.left

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what never became a request; the parser's text may echo the input, so it is not passed on."""
        identity = uuid.uuid4().hex
        unexpected = status >= 500
        if isinstance(exc, HeadTooLargeError | LineTooLong):
            status = 431  # RFC 6585 §5
        log.log(
            logging.ERROR if unexpected else logging.WARNING,
            "Request failed outside of any handler" if unexpected else "Malformed request",
            extra={
                "status": status,
                "client": client_address(request) or "unix",
                "error_type": type(exc).__name__,
                "request_id": identity,
            },
            exc_info=exc if unexpected else None,
        )
        detail = unexpected_detail(identity) if unexpected else _MALFORMED.get(status, _MALFORMED[400])
        response = error_response(status, detail)
        mark(response, identity)
        response.force_close()
        if not unexpected:
            self._refusal = response
        return response

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a connection, unless so many are open that the database would find no descriptor any more."""
        super().connection_made(transport)
        self.asking_since = asyncio.get_running_loop().time()
        if self._has_no_address() or (self._server.is_full() and not self._server.cut_handshake()):
            cast(asyncio.Transport, transport).abort()

    def _has_no_address(self) -> bool:
        """Return whether the client of a TCP socket has reset the connection already; what it sent could still be read.

        The system tells no address of such a client any more, and a client without one would count as one of the Unix
        socket. Of all others aiohttp keeps the address from this first look on, whenever they leave.
        """
        connection = self.transport.get_extra_info("socket") if self.transport is not None else None
        return self.peername is None and (connection is None or connection.family != socket.AF_UNIX)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End what only the client wanted to know; a write goes on, for later requests get its result."""
        super().connection_lost(exc)
        self._heads = None
        self._server.held.note(self, 0)
        if self._answering is not None:
            self._answering.cancel()
        if self._left is not None and not self._left.done():
            self._left.set_result(None)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request, as long as there is anybody to be answered."""
        if request.method not in SAFE_METHODS:
            return await self._server.answer(request)
        self._answering = asyncio.current_task()
        self._count()
        try:
            return await self._server.answer(request)
        finally:
            self._answering = None
            self._count()

    def _count(self) -> None:
        """Take note of what its requests hold, and cut those who hold most if it is too much."""
        if self.transport is None or self._heads is None:
            return
        waiting = ANSWERED_BYTES if self._answering is not None else 0
        self._server.note(self, self._heads.held + private_aiohttp.unparsed_bytes(self) + waiting)

    def data_received(self, data: bytes) -> None:
        """Take in bytes, and see whether a head is begun and not ended."""
        has_all = not data and self._heads is not None and self._heads.is_drained
        if self._refused or has_all:
            return  # aiohttp asks whether anything waits whenever a body is read
        super().data_received(data)
        if self._heads is not None and (refusal := self._heads.refusal) is not None:
            super().data_received(b"")  # the parser has handed over what came before it, and raises it now
            self._refused = True
            refusal.__traceback__ = None  # its frames hold the parser, as long as it waits to be answered
            self._parse_with(self._heads.renewed(self, asyncio.get_running_loop()))
        self._count()
        if private_aiohttp.has_whole_request(self):
            self.asking_since = None
        elif self.asking_since is None:
            self.asking_since = asyncio.get_running_loop().time()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer, unless with it too much waits to be read, and nowhere more than here."""
        if resp is self._refusal:
            sent = await super().finish_response(request, resp, start_time)
            await self._let_go()
            return sent
        if not isinstance(resp, web.Response):
            return await super().finish_response(request, resp, start_time)
        if not isinstance(body := resp.body, bytes | bytearray) or len(body) < self._server.bounds.large_bytes:
            sent = await super().finish_response(request, resp, start_time)
            resp.body = None  # aiohttp keeps the answer until the connection's next request
            return sent
        resp.body = self._answer = _Pieces(bytes(body), resp.headers.get(hdrs.CONTENT_ENCODING))
        del body  # a handler that does not read it would keep it here
        self._server.bound_unread()
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._answer = None

    async def _let_go(self) -> None:
        """Wait until the client leaves: closed before all is read, a socket takes its answer back (RFC 9112 §9.6)."""
        if self.transport is None:
            return
        self._left = asyncio.get_running_loop().create_future()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._server.bounds.linger_s):
                await self._left

    def abort(self) -> None:
        """Cut the connection."""
        if self.transport is not None:
            self.transport.abort()

    def lost_patience(self, now: float) -> str | None:
        """Say why the connection should be cut, or return None."""
        bounds = self._server.bounds
        if self.asking_since is not None and now - self.asking_since > bounds.head_s:
            return f"No complete request head within {bounds.head_s:g} s"
        waiting = self.unread
        if waiting != self.unsent[0]:
            self.unsent = waiting, now
        elif waiting and now - self.unsent[1] > bounds.deaf_s:
            return f"The client read nothing for {bounds.deaf_s:g} s"
        return None


_MALFORMED: Final = {
    400: "The request is not valid HTTP/1.1",
    431: f"The head of the request is too large: it may have {HEAD_BYTES} bytes, of them {LINE_BYTES} in a line",
}
"""What is answered to a request that never became one, by its status; the parser's own text may echo the input."""


class _Server(web.Server):
    most_connections: int
    bounds: ConnectionBounds
    answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
    held: Held[_Protocol]
    handshakes: Handshakes | None = None
    _patrol: asyncio.Task[None]

    def __call__(self) -> RequestHandler:
        return _Protocol(self, loop=asyncio.get_running_loop(), **private_aiohttp.protocol_arguments(self))

    def is_full(self) -> bool:
        """Return whether more connections are open than there may be, with those that are not ready yet."""
        shaking = 0 if self.handshakes is None else len(self.handshakes)
        return len(self.connections) + shaking > self.most_connections

    def cut_handshake(self) -> bool:
        """Cut a connection whose handshake is not done; return whether there was one."""
        return self.handshakes is not None and self.handshakes.cut_longest()

    def note(self, protocol: _Protocol, held: int) -> None:
        """Take note of what a connection's requests hold, and cut those who hold most if it is too much."""
        self.held.note(protocol, held)
        if cut := self.held.relieve():
            for each in cut:
                each.abort()
            log.warning(
                "Connections cut: requests hold too much besides their bodies", extra={"result_count": len(cut)}
            )

    def start_patrol(self) -> None:
        """Look after every connection again and again, until `shutdown`."""
        self._patrol = asyncio.create_task(self._look_after(), name="patrol")

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(self.bounds.patrol_every_s)
            now = asyncio.get_running_loop().time()
            for protocol in self._protocols():
                if (reason := protocol.lost_patience(now)) is not None:
                    log.debug("Connection cut", extra={"reason": reason})
                    protocol.abort()
            self.bound_unread()

    def _protocols(self) -> list[_Protocol]:
        return [protocol for protocol in self.connections if isinstance(protocol, _Protocol)]

    def bound_unread(self) -> None:
        """Cut off those who leave most unread, as long as it is too much in total: it is all in memory."""
        unread = {protocol: protocol.unread for protocol in self._protocols()}
        total = sum(unread.values())
        if total <= self.bounds.unread_bytes:
            return
        most = sorted(unread, key=unread.__getitem__)
        while total > self.bounds.unread_bytes:
            protocol = most.pop()
            total -= unread[protocol]
            log.warning(
                "Connection cut: too much waits to be read by all clients together",
                extra={"client": str(protocol.peername), "unread_bytes": unread[protocol]},
            )
            protocol.abort()

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - aiohttp's own
        """End every connection."""
        self._patrol.cancel()
        if self.handshakes is not None:
            self.handshakes.end_all()
        await super().shutdown(timeout)


async def _answer_while_there(request: web.BaseRequest) -> web.StreamResponse:
    return await cast(_Protocol, request.protocol).answer(request)


class _Runner(private_aiohttp.AppRunner):
    most_connections: int
    bounds: ConnectionBounds

    def replace_server(self, made: web.Server) -> web.Server:
        """Return a server that keeps its connections within bounds."""

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            try:
                return await made.request_handler(request)
            except web.HTTPExpectationFailed as error:  # the one answer that aiohttp gives before any middleware
                response = error_response(error.status, "Expect can only be 100-continue")
                mark(response, request_id(request))
                return response

        arguments = private_aiohttp.protocol_arguments(made)
        server = _Server(_answer_while_there, request_factory=made.request_factory, **arguments)
        server.most_connections = self.most_connections
        server.answer = answer
        server.bounds = self.bounds
        server.held = Held(self.bounds.held_bytes)
        server.start_patrol()
        return server


def make_runner(
    app: web.Application, settings: Settings, most_watched: int, bounds: ConnectionBounds | None = None
) -> web.AppRunner:
    """Return aiohttp's runner with our own handling of signals, bodies, errors and time limits.

    Args:
        app: what answers.
        settings: how long things may take, and how many readers there are.
        most_watched: how many processes are watched at most; each takes a descriptor that no connection gets.
        bounds: how much clients may take.

    """
    bounds = bounds or ConnectionBounds()
    runner = _Runner(
        app,
        handle_signals=False,  # aiohttp's second SIGTERM aborts the drain
        access_log=None,
        auto_decompress=False,  # body.py does it, within its limits
        keepalive_timeout=KEEPALIVE_S,
        lingering_time=bounds.linger_s,
        # aiohttp waits that long for the handlers, cancels them, and waits as long again.
        shutdown_timeout=settings.shutdown_timeout_s / 4,
    )
    runner.bounds = bounds
    limit = descriptor_limit()
    spare = _SPARE_DESCRIPTORS + _DESCRIPTORS_PER_READER * (settings.db_readers + 1) + most_watched
    runner.most_connections = max(limit - spare, limit // 4)
    return runner


async def listen(
    runner: web.AppRunner, sockets: Sequence[socket.socket], tls: Tls, failed: Callable[[str], None]
) -> tuple[str, ...]:
    """Accept connections on sockets that are bound; return the addresses.

    Args:
        runner: of `make_runner`, set up; it stops listening.
        sockets: Unix sockets always speak plain HTTP.
        tls: what the others speak.
        failed: called with the reason for each handshake that fails.

    """
    server = cast(_Server, runner.server)
    accept: Callable[[], asyncio.Protocol] = server
    if tls.identity is not None:
        server.handshakes = accept = Handshakes(
            tls,
            server,
            server.is_full,
            failed,
            patience_s=server.bounds.handshake_s,
            most_bytes=server.bounds.handshakes_bytes,
        )
    addresses = []
    for listening in sockets:
        is_unix = listening.family == socket.AF_UNIX
        await private_aiohttp.Site(runner, listening, server if is_unix else accept, _BACKLOG).start()
        name = listening.getsockname()
        if is_unix:
            addresses.append(f"unix:{name}")
        else:
            host = f"[{name[0]}]" if ":" in name[0] else name[0]
            addresses.append(f"{'http' if tls.identity is None else 'https'}://{host}:{name[1]}")
    return tuple(addresses)
