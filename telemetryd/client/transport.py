"""Speaks HTTP/1.1 to the daemon over one kept connection, TCP or Unix socket, with the standard library only."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import ipaddress
import os
import socket
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from urllib.parse import SplitResult, quote, unquote, urlsplit

import orjson

import telemetryd
from telemetryd.client.config import Config

_CONNECT_TIMEOUT_S: Final = 5.0
_MAX_ANSWER: Final = 32 << 20
_GZIP_FROM: Final = 1024
_MAX_PATH: Final = 8000
_IDLE_ERRORS: Final = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)


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
    def detail(self) -> Any:
        """What an error says of itself."""
        return self.body.get("detail") if isinstance(self.body, dict) else None


def run_path(event_id: str) -> str:
    """Return the path of a run."""
    return f"/api/v1/runs/{quote(event_id, safe='')}"


def _is_local(sock: socket.socket) -> bool:
    """Tell whether both ends of a connection are on this very machine: then they have one address, or a loopback's."""
    if sock.family == socket.AF_UNIX:
        return True
    peer = sock.getpeername()[0]
    return bool(peer == sock.getsockname()[0] or ipaddress.ip_address(peer.partition("%")[0]).is_loopback)


def is_addressable(event_id: str) -> bool:
    """Tell whether a run with this event_id can have a path; servers take lines of 8 KiB or so."""
    try:
        return event_id != "" and len(run_path(event_id)) <= _MAX_PATH
    except UnicodeEncodeError:  # half a surrogate pair
        return False


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

    def __init__(self, ends: float, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Bounded(self.fp.detach(), sock, ends))


class _Bounded(io.RawIOBase):
    """Reads from a socket until a moment (time.monotonic)."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, ends: float) -> None:
        super().__init__()
        self._raw = raw
        self._socket = sock
        self._ends = ends

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read what is there.

        Raises:
            TimeoutError: if nothing comes before the moment, or it has passed.

        """
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
        self._address: SplitResult = urlsplit(config.url)
        self._timeout_s = config.timeout_s
        self._prefix = "" if self._address.scheme == "unix" else self._address.path.rstrip("/")
        self._headers: dict[str, str | bytes] = {"User-Agent": f"telemetryd-client/{telemetryd.__version__}"}
        if config.token:
            self._headers["Authorization"] = f"Bearer {config.token}".encode()
        self._connection: http.client.HTTPConnection | None = None
        self.is_local: bool | None = None
        """Whether the daemon runs on this very machine, as far as the last connection tells; None before the first."""

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
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            why = error.strerror if isinstance(error, OSError) else None
            raise UnreachableError(f"{self._address.geturl()}: {why or error or type(error).__name__}") from error

    def _exchange(self, method: str, path: str, body: bytes | None, media_type: str) -> Answer:
        connection = self._connection
        if connection is None:
            connection = self._connection = self._connect()
            self.is_local = _is_local(connection.sock)
        headers = dict(self._headers)
        if body is not None:
            headers["Content-Type"] = media_type
            # On the same machine compressing costs more than it saves (docs/client.md has the figures).
            if not self.is_local and len(body) >= _GZIP_FROM:
                body = gzip.compress(body, 1)
                headers["Content-Encoding"] = "gzip"
        connection.sock.settimeout(self._timeout_s)
        ends = time.monotonic() + self._timeout_s
        connection.response_class = partial(_Answering, ends)  # type: ignore[assignment]
        connection.request(method, self._prefix + path, body, headers)
        with connection.getresponse() as response:
            text = response.read(_MAX_ANSWER)
            if not response.isclosed():
                self.close()  # more than we care to read
            answer_headers = {name.lower(): value for name, value in response.getheaders()}
            if response.will_close:
                self.close()
        decoded = None
        with contextlib.suppress(ValueError):
            decoded = orjson.loads(text)
        return Answer(response.status, answer_headers, decoded)

    def _connect(self) -> http.client.HTTPConnection:
        address, timeout = self._address, min(_CONNECT_TIMEOUT_S, self._timeout_s)
        connection: http.client.HTTPConnection
        if address.scheme == "unix":
            connection = _UnixConnection(unquote(address.netloc + address.path), timeout)
        elif address.scheme == "https":
            connection = http.client.HTTPSConnection(address.hostname or "", address.port, timeout=timeout)
        else:
            connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=timeout)
        connection.connect()
        return connection

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def forget(self) -> None:
        """In a forked process: close the copy of the parent's connection, and nothing else of it.

        The parent's thread may have been reading, and then the copy of the reader's lock is never released.
        """
        if self._connection is not None and self._connection.sock is not None:
            os.close(self._connection.sock.detach())
        self._connection = None
