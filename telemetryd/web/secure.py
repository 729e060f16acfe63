"""TLS connections: handshakes within bounds, and the transport that an application's protocol gets after its own.

asyncio and uvloop can do TLS, too, but their servers close a connection whose handshake fails without a word, so that
the client never learns that its certificate is missing or expired; they call nobody when one fails; they keep the
context that they were started with; and each connection keeps up to 256 KiB for what it reads. All cryptography is
OpenSSL's here as well; this module carries bytes between it and the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, cast

from aiohttp import web

from telemetryd.ops.logs import log
from telemetryd.web.heads import Held
from telemetryd.web.tls import Identity, Tls

_RECORD_BYTES: Final = 16 * 1024
"""The most that a record of TLS holds (RFC 8446 §5.1); OpenSSL's buffers grow to what they are given at once."""
_HEADER_BYTES: Final = 5
"""What begins each record: its type, a version, and in the last two bytes how many follow."""
_MOST_EMPTY: Final = 64
"""Records more that bring nothing than such that bring something: a handshake has a few, and nobody needs more later.

Each request for new keys (KeyUpdate) has the processor work for 0.1 ms, and may come again and again.
"""
_TURN_S: Final = 0.005
"""How long a connection is decrypted until the event loop gets its turn: its socket may bring megabytes at once."""
_BEGUN_BYTES: Final = 40 * 1024
"""About what a handshake takes besides what its client has sent, as soon as that has begun."""
_NOTHING: Final = memoryview(b"")
_LOG_EVERY_S: Final = 60.0
_IDENTITY: Final = "identity"
_CLIENT_CERTIFICATE: Final = "client_certificate"

REASONS: Final = {
    "HTTP_REQUEST": "plain_http",
    "HTTPS_PROXY_REQUEST": "plain_http",
    "UNSUPPORTED_PROTOCOL": "version",
    "VERSION_TOO_LOW": "version",
    "WRONG_VERSION_NUMBER": "not_tls",
    "NO_SHARED_CIPHER": "cipher",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no_client_certificate",
    "CERTIFICATE_VERIFY_FAILED": "client_certificate",
}
"""Why a handshake fails, by OpenSSL's name of it."""
_REFUSED: Final = "refused_by_client"
"""The client has said why in an alert: mostly, it does not accept our certificate."""
_TIMEOUT, _CROWDED, _DISCONNECTED, _OTHER = "timeout", "crowded", "disconnected", "other"


class Handshakes:
    """The TLS connections of one server that are not ready yet; a call makes one more.

    Args:
        tls: gives the identity for each of them.
        make: makes the protocol that gets a connection once its handshake is done.
        is_full: whether more connections are open than there may be; those of `len(self)` are among them.
        failed: called with the reason for each handshake that fails: one of a few.
        patience_s: how long a handshake may take.
        most_bytes: what all of them may hold; beyond it, those with most of it are cut.
        clock: monotonic seconds.

    """

    def __init__(
        self,
        tls: Tls,
        make: Callable[[], asyncio.Protocol],
        is_full: Callable[[], bool],
        failed: Callable[[str], None],
        *,
        patience_s: float,
        most_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tls = tls
        self.make = make
        self.patience_s = patience_s
        self._is_full = is_full
        self._failed = failed
        self._clock = clock
        self._open: dict[SecureConnection, None] = {}
        self._held: Held[SecureConnection] = Held(most_bytes)
        self._unlogged: Counter[str] = Counter()
        self._logged_at = -_LOG_EVERY_S

    def __call__(self) -> asyncio.Protocol:
        """Return the protocol of a connection that has just been accepted."""
        identity = self._tls.identity
        assert identity is not None  # noqa: S101 - for the type checker: TLS is never switched off
        return SecureConnection(self, identity)

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, connection: SecureConnection) -> None:
        """Take note of a connection, and cut the one whose handshake takes longest if there are too many."""
        self._open[connection] = None
        if self._is_full():
            self.cut_longest()

    def end(self, connection: SecureConnection) -> None:
        """Forget a connection whose handshake is over."""
        self._open.pop(connection, None)
        self._held.note(connection, 0)

    def note(self, connection: SecureConnection, come: int) -> None:
        """Take note of how much a client has sent for its handshake, and cut those who hold most if it is too much."""
        self._held.note(connection, _BEGUN_BYTES + come)
        for each in self._held.relieve():
            each.give_up(_CROWDED)

    def cut_longest(self) -> bool:
        """Cut the connection whose handshake takes longest; return whether there was one.

        A client that means it needs milliseconds, so a client that only takes up room is cut before one that needs it.
        """
        longest = next(iter(self._open), None)
        if longest is not None:
            longest.give_up(_CROWDED)
        return longest is not None

    def end_all(self) -> None:
        """Cut every connection that is not ready, because the server stops."""
        for connection in list(self._open):
            connection.abort()

    def count(self, reason: str, client: object) -> None:
        """Count a handshake that has failed; there is one line in the log a minute at most."""
        self._failed(reason)
        self._unlogged[reason] += 1
        now = self._clock()
        if now - self._logged_at >= _LOG_EVERY_S:
            counts = dict(self._unlogged)
            log.warning("TLS handshakes failed", extra={"reasons": counts, "last_client": client})
            self._unlogged.clear()
            self._logged_at = now


class SecureConnection(asyncio.Protocol, asyncio.Transport):
    """A TLS connection: to the socket's transport it is the protocol, to the application's protocol the transport."""

    __slots__ = (
        "_application",
        "_come",
        "_empty",
        "_failure",
        "_handshakes",
        "_identity",
        "_incoming",
        "_is_ending",
        "_is_paused",
        "_left",
        "_outgoing",
        "_session",
        "_timer",
        "_transport",
        "_waiting",
    )

    def __init__(self, handshakes: Handshakes, identity: Identity) -> None:
        super().__init__()
        self._handshakes = handshakes
        self._identity = identity
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._session = identity.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._transport: asyncio.Transport
        self._application: asyncio.Protocol | None = None
        """None until the handshake is done."""
        self._failure: str | None = None
        """Why the handshake has failed."""
        self._come = 0
        """How many bytes the client has sent for its handshake."""
        self._waiting = _NOTHING
        """What has come and was not handed over to OpenSSL."""
        self._left = 0
        """How many bytes of the record are still to come that was handed over last."""
        self._empty = 0
        """How many records more have brought nothing than such that brought something."""
        self._is_paused = False
        self._is_ending = False
        """Whether the client has been told that nothing more comes; what it still sends is let go."""
        self._timer: asyncio.TimerHandle | None = None

    # --- The protocol of the socket's transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the client to begin its handshake."""
        self._transport = cast(asyncio.Transport, transport)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._handshakes.patience_s, self.give_up, _TIMEOUT)
        self._handshakes.begin(self)

    def data_received(self, data: bytes) -> None:
        """Decrypt what has come, as far as it is taken."""
        if self._is_ending:
            return
        if self._application is None:
            self._come += len(data)
            self._handshakes.note(self, self._come)
        self._waiting = memoryview(bytes(self._waiting) + data if self._waiting else data)
        self._decrypt()

    def eof_received(self) -> None:
        """Let the transport close: a client that ends without a goodbye has broken off."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass it on, or count a handshake that the client has broken off."""
        self._end_handshake()
        if self._application is not None:
            self._application.connection_lost(exc)
        elif self._failure is None:
            self._fail(_DISCONNECTED)

    def pause_writing(self) -> None:
        """Pass it on: what is encrypted waits in the socket's transport alone."""
        if self._application is not None:
            self._application.pause_writing()

    def resume_writing(self) -> None:
        """Pass it on."""
        if self._application is not None:
            self._application.resume_writing()

    def give_up(self, reason: str) -> None:
        """Cut the connection before its handshake is done."""
        if self._failure is None:
            self._fail(reason)
        self._end_handshake()
        self._transport.abort()

    def _decrypt(self) -> None:
        """Hand over what waits to OpenSSL record by record: its buffer never becomes smaller again."""
        turn = time.monotonic()
        while not (self._is_paused or self._is_ending or self.is_closing()) and (piece := self._piece()):
            self._incoming.write(piece)
            brought = self._advance()
            if self._left:
                continue
            self._empty = max(self._empty - 1, 0) if brought else self._empty + 1
            if self._empty > _MOST_EMPTY:
                self._refuse_more()
            elif self._waiting and not self.is_closing() and time.monotonic() - turn > _TURN_S:
                self._transport.pause_reading()
                asyncio.get_running_loop().call_soon(self._go_on)
                return
        if len(self._waiting) < _HEADER_BYTES or self._is_ending:
            # A view would keep all of what it is a view of.
            self._waiting = _NOTHING if self._is_ending else memoryview(bytes(self._waiting))

    def _piece(self) -> memoryview:
        """Take off what waits of one record, which is nothing as long as its header is not whole."""
        if not self._left:
            if len(self._waiting) < _HEADER_BYTES:
                return _NOTHING
            self._left = _HEADER_BYTES + int.from_bytes(self._waiting[_HEADER_BYTES - 2 : _HEADER_BYTES], "big")
        size = min(self._left, _RECORD_BYTES)
        piece, self._waiting = self._waiting[:size], self._waiting[size:]
        self._left -= len(piece)
        return piece

    def _refuse_more(self) -> None:
        """Cut the connection of a client that sends record after record without anything in them."""
        log.debug("TLS connection cut", extra={"reason": "records without content"})
        if self._application is None:
            self.give_up(_OTHER)
        else:
            self.abort()

    def _go_on(self) -> None:
        """Take what has waited while the application paused or others had their turn, and only then more."""
        if self.is_closing():
            return
        self._advance()
        self._decrypt()
        if not (self._is_paused or self.is_closing() or len(self._waiting) >= _HEADER_BYTES):
            self._transport.resume_reading()

    def _advance(self) -> bool:
        """Do what can be done with what OpenSSL has; return whether there was something for the application."""
        if self._application is None and not self._is_ending:
            self._shake_hands()
        brought = False
        try:
            while self._application is not None and not (self._is_paused or self._is_ending or self.is_closing()):
                if not (plain := self._session.read(_RECORD_BYTES)):
                    self._application.eof_received()
                    self.close()
                    break
                brought = True
                self._application.data_received(plain)
        except ssl.SSLWantReadError:
            self._send()
        except ssl.SSLError as error:  # a record that was changed on its way, or none at all
            log.debug("TLS connection broken", extra={"reason": error.reason})
            self._send()
            self.close()
        return brought

    def _shake_hands(self) -> None:
        try:
            self._session.do_handshake()
        except ssl.SSLWantReadError:
            self._send()
            return
        except ssl.SSLError as error:
            self._fail(_reason(error))
            self._send()  # an alert says why
            self._is_ending = True
            if self._transport.can_write_eof():
                self._transport.write_eof()  # closed before all is read, a socket takes the alert back
            return
        self._send()
        self._end_handshake()
        application = self._application = self._handshakes.make()
        application.connection_made(self)

    def _fail(self, reason: str) -> None:
        self._failure = reason
        peer = self._transport.get_extra_info("peername")
        self._handshakes.count(reason, peer[0] if peer else None)

    def _end_handshake(self) -> None:
        self._handshakes.end(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _send(self) -> None:
        if self._outgoing.pending and not self._transport.is_closing():
            self._transport.write(self._outgoing.read())

    # --- The transport of the application's protocol ---

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what is known of the connection; the names are asyncio's, and two of ours."""
        if name == "sslcontext":
            return self._identity.context
        if name == "ssl_object":
            return self._session
        if name == _IDENTITY:
            return self._identity
        if name == _CLIENT_CERTIFICATE:
            return bool(self._session.getpeercert())
        return self._transport.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Hand the connection over to another protocol."""
        self._application = cast(asyncio.Protocol, protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the application's protocol."""
        assert self._application is not None  # noqa: S101 - for the type checker: nobody else has this transport
        return self._application

    def is_reading(self) -> bool:
        """Return whether the application takes what comes."""
        return not self._is_paused

    def pause_reading(self) -> None:
        """Let what comes wait."""
        self._is_paused = True
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on with what has waited."""
        if not self._is_paused:
            return
        self._is_paused = False
        asyncio.get_running_loop().call_soon(self._go_on)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set how much may wait to be sent."""
        self._transport.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        """Return how much waits to be sent."""
        return self._transport.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return how much may wait to be sent."""
        return self._transport.get_write_buffer_limits()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send."""
        if self._is_ending or self._transport.is_closing():
            return
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _RECORD_BYTES):
            self._session.write(view[start : start + _RECORD_BYTES])
            self._transport.write(self._outgoing.read())

    def can_write_eof(self) -> bool:
        """Return that a client can be told that nothing more comes."""
        return self._transport.can_write_eof()

    def write_eof(self) -> None:
        """Say that nothing more comes, and let go what the client still sends."""
        self._say_goodbye()
        if not self._transport.is_closing():
            self._transport.write_eof()

    def is_closing(self) -> bool:
        """Return whether the connection is closed or about to be."""
        return self._transport.is_closing()

    def close(self) -> None:
        """Send what waits, and close."""
        self._say_goodbye()
        self._transport.close()

    def abort(self) -> None:
        """Cut the connection."""
        self._transport.abort()

    def _say_goodbye(self) -> None:
        """Send an alert that nothing more comes (close_notify): without it, an answer could have been cut off."""
        if self._is_ending:
            return
        self._is_ending = True
        with contextlib.suppress(ssl.SSLError):  # there is no goodbye of the client's yet, and nobody waits for it
            self._session.unwrap()
        self._send()


def _reason(error: ssl.SSLError) -> str:
    name = error.reason or ""
    return REASONS.get(name) or (_REFUSED if "_ALERT_" in name else _OTHER)


def is_for(request: web.Request, host: str) -> bool:
    """Return whether a request came over TLS, by a certificate that is made for a host name."""
    identity = request.transport.get_extra_info(_IDENTITY) if request.transport is not None else None
    return identity is not None and identity.is_for(host)


def has_client_certificate(request: web.Request) -> bool:
    """Return whether a request's client has shown a certificate that was accepted."""
    return request.transport is not None and bool(request.transport.get_extra_info(_CLIENT_CERTIFICATE))
