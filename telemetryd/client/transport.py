"""Speaks HTTP/1.1 to the daemon over one kept connection, TCP or Unix socket, with the standard library only."""

from __future__ import annotations

import gzip
import http.client
import io
import ipaddress
import selectors
import socket
import ssl
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from urllib.parse import quote

import orjson

import telemetryd
from telemetryd.client.address import Address, tls_context, why
from telemetryd.client.config import Config
from telemetryd.client.descriptors import Descriptor, LostError

_CONNECT_TIMEOUT_S: Final = 5.0
_MAX_ANSWER: Final = 32 << 20
_AT_ONCE: Final = 64 << 10
"""A larger body is sent in pieces, with an eye on an answer that comes before its end."""
_LATE_ANSWER_S: Final = 2.0
"""How long we wait for the answer of who does not take the rest of a body."""
_DEEPEST: Final = 100
"""How deep an answer of the daemon may be nested at most; its own are not nearly as deep."""
_GZIP_FROM: Final = 1024
_MAX_PATH: Final = 8000
_IDLE_ERRORS: Final = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError, LostError)
SERVER_HEADER: Final = "telemetry-server"
"""The header by which the daemon identifies itself (API.md, amendments)."""


class UnreachableError(Exception):
    """There was no answer, or none that is HTTP."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the daemon, or something in its place, answered."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: Any
    """The decoded JSON; None if it is none."""

    @property
    def is_daemons(self) -> bool:
        """Whether telemetryd itself gave this answer: not a proxy, and not another server at the address."""
        return self.headers.get(SERVER_HEADER, "").startswith("telemetryd")

    @property
    def detail(self) -> Any:
        """What an error says of itself."""
        return self.body.get("detail") if isinstance(self.body, dict) else None


def _decoded(text: bytes) -> Any:
    """Return the JSON of an answer; None if it is none, or nested so deep that to handle it would break something.

    orjson reads 1024 levels; repr() and json.dumps() break before.
    """
    try:
        value = orjson.loads(text)
    except ValueError:
        return None
    if text.count(b"[") + text.count(b"{") > _DEEPEST:
        try:
            orjson.dumps(value)  # at most 254 levels
        except TypeError:
            return None
    return value


def run_path(event_id: str) -> str:
    """Return the path of a run."""
    return f"/api/v1/runs/{quote(event_id, safe='')}"


def runs_path(run_id: str) -> str:
    """Return the path of the runs with a run_id; what separates values in a filter is escaped."""
    value = run_id.replace("\\", "\\\\").replace(",", "\\,")
    return f"/api/v1/runs?run_id={quote(value, safe='')}"


def _is_local(sock: socket.socket) -> bool:
    """Return whether both ends of a connection are on this machine: they have the same address, or one is loopback."""
    if sock.family == socket.AF_UNIX:
        return True
    peer = sock.getpeername()[0]
    return bool(peer == sock.getsockname()[0] or ipaddress.ip_address(peer.partition("%")[0]).is_loopback)


def is_addressable(event_id: str) -> bool:
    """Return whether a run with this event_id can have a path; servers take lines of 8 KiB or so."""
    try:
        return event_id != "" and len(run_path(event_id)) <= _MAX_PATH
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def _is_free_to_send(sock: socket.socket, timeout_s: float) -> bool:
    """Wait until a socket takes something; False if it has something to say before, be it that it is closed.

    Raises:
        TimeoutError: if it does neither.

    """
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
        events = selector.select(timeout_s)
    if not events:
        raise TimeoutError("timed out")
    return not any(happened & selectors.EVENT_READ for _, happened in events)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _Answering(http.client.HTTPResponse):
    """An answer that has to be complete by a moment: a socket's own time-out is for each read anew."""

    def __init__(self, ends: float, own: Descriptor, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Bounded(self.fp.detach(), sock, own, ends))


class _Bounded(io.RawIOBase):
    """Reads from a socket until a moment (time.monotonic)."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, own: Descriptor, ends: float) -> None:
        super().__init__()
        self._raw = raw
        self._socket = sock
        self._own = own
        self._ends = ends

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read what is there.

        Raises:
            TimeoutError: if nothing comes before the moment, or it has passed.
            LostError: if the agent has closed the socket.

        """
        self._own.check()
        left = self._ends - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        """Close what it reads from."""
        self._raw.close()
        super().close()


class Transport:
    """One connection, made when it is needed and made anew when it is broken; not for several threads at once."""

    def __init__(self, config: Config) -> None:
        self._url = config.url
        self._address = Address.parse(config.url)
        self._tls_files = config.ca_file, config.client_cert, config.client_key
        self._tls: ssl.SSLContext | None = None
        self._timeout_s = config.timeout_s
        self._headers: dict[str, str | bytes] = {"User-Agent": f"telemetryd-client/{telemetryd.__version__}"}
        if config.token:
            self._headers["Authorization"] = f"Bearer {config.token}".encode()
        self._connection: http.client.HTTPConnection | None = None
        self._socket: Descriptor | None = None
        self.is_local: bool | None = None
        """Whether the daemon runs on this very machine, as far as the last connection shows; None before the first."""

    def request(
        self, method: str, path: str, body: bytes | None = None, media_type: str = "application/json"
    ) -> Answer:
        """Send a request and return the answer, whatever its status.

        Every request of the client may be repeated. So if a kept connection turns out to be closed, it is sent again
        at once.

        Raises:
            UnreachableError: if there is no answer; the message says why.

        """
        was_idle = self._connection is not None
        try:
            try:
                return self._exchange(method, path, body, media_type)
            except _IDLE_ERRORS:
                self.close()
                if not was_idle:
                    raise
                return self._exchange(method, path, body, media_type)
        except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
            self.close()
            if isinstance(error, ssl.SSLError):
                self._tls = None  # the next attempt reads the files again: one may have been renewed
            raise UnreachableError(f"{self._url}: {why(error, self._url)}") from error

    def _exchange(self, method: str, path: str, body: bytes | None, media_type: str) -> Answer:
        connection = self._connection
        if connection is None:
            connection = self._connection = self._connect()
            self.is_local = _is_local(connection.sock)
        own = self._socket = self._socket or Descriptor(connection.sock.fileno())
        own.check()
        headers = dict(self._headers)
        if body is not None:
            headers["Content-Type"] = media_type
            # On the same machine compressing costs more than it saves (docs/reference/client.md has the figures).
            if not self.is_local and len(body) >= _GZIP_FROM:
                body = gzip.compress(body, 1)
                headers["Content-Encoding"] = "gzip"
        connection.sock.settimeout(self._timeout_s)
        is_whole = True
        try:
            if body is None or len(body) <= _AT_ONCE:
                connection.request(method, self._address.prefix + path, body, headers)
            else:
                headers["Content-Length"] = str(len(body))
                connection.request(method, self._address.prefix + path, None, headers)
                is_whole = self._send_body(connection, own, body)
        except OSError as error:
            if isinstance(error, (TimeoutError, LostError)):
                raise
            is_whole = False  # who takes no more has perhaps said why
        ends = time.monotonic() + (self._timeout_s if is_whole else min(self._timeout_s, _LATE_ANSWER_S))
        connection.response_class = partial(_Answering, ends, own)  # type: ignore[assignment]
        with connection.getresponse() as response:
            text = response.read(_MAX_ANSWER)
            answer_headers = {name.lower(): value for name, value in response.getheaders()}
            if not response.isclosed() or response.will_close or not is_whole:
                self.close()  # there is more than we care to read, or nothing more to come
        return Answer(response.status, answer_headers, _decoded(text))

    def _send_body(self, connection: http.client.HTTPConnection, own: Descriptor, body: bytes) -> bool:
        """Send a large body; return whether all of it was sent: not if an answer comes before.

        "A client sending a message body SHOULD monitor the connection for an error response while it is transmitting
        the request" (RFC 9112, 9.5). A TLS connection may bring records that are no answer, so there the answer is
        looked for only when no more is taken.
        """
        rest = memoryview(body)
        is_plain = type(connection.sock) is socket.socket
        while rest:
            own.check()
            if is_plain and not _is_free_to_send(connection.sock, self._timeout_s):
                return False
            rest = rest[connection.sock.send(rest[:_AT_ONCE]) :]
        return True

    def _connect(self) -> http.client.HTTPConnection:
        address, timeout = self._address, min(_CONNECT_TIMEOUT_S, self._timeout_s)
        connection: http.client.HTTPConnection
        if address.scheme == "unix":
            connection = _UnixConnection(address.socket, timeout)
        elif address.scheme == "https":
            self._tls = self._tls or tls_context(*self._tls_files)
            connection = http.client.HTTPSConnection(address.host, address.port, timeout=timeout, context=self._tls)
        else:
            connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout)
        connection.connect()
        return connection

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        connection, own, self._connection, self._socket = self._connection, self._socket, None, None
        if connection is None:
            return
        if connection.sock is not None and own is not None and not own.is_ours():
            connection.sock.detach()  # what has the number now is the agent's
        connection.close()

    def forget(self) -> None:
        """In a forked process: close the copy of the parent's connection, and nothing else of it.

        The parent's thread may have been reading, and then the copy of the reader's lock is never released.
        """
        connection, own, self._connection, self._socket = self._connection, self._socket, None, None
        if connection is not None and connection.sock is not None:
            connection.sock.detach()
            if own is not None:
                own.close()
