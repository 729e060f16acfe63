"""Subscribes to the daemon's stream of runs and resumes from the last cursor after every disconnect."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import aiohttp
import orjson
from aiohttp.client_exceptions import UnixClientConnectorError

from telemetryd.client.config import Config
from telemetryd.errors import TelemetrydError, UnavailableError
from telemetryd.model import values

_SILENT_S: Final = 40.0
"""A stream that says nothing for so long is dead: the daemon gives a sign of life every 15 seconds."""
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_MESSAGE: Final = 256 * 1024 * 1024
_LONGEST_PAUSE_S: Final = 10.0
_PATIENT: Final = (429, 502, 503, 504)


class DaemonRefusedError(TelemetrydError):
    """The daemon refused the request."""


class GoneError(DaemonRefusedError):
    """The daemon does not know any more what the request refers to."""


@dataclass(frozen=True, slots=True)
class Message:
    """One event of the stream; without data it only carries the cursor."""

    event: str
    data: bytes
    id: str


class Daemon:
    """A daemon to be asked. Make it with `reach`."""

    def __init__(self, session: aiohttp.ClientSession, prefix: str) -> None:
        self._session = session
        self._prefix = prefix

    async def get(self, path: str, parameters: Mapping[str, str]) -> Any:
        """Return the answer to a request.

        Raises:
            DaemonRefusedError: if it is refused; the message is the daemon's. A `GoneError` for 410.
            UnavailableError: if there is no answer, or none now.

        """
        try:
            async with self._session.get(self._prefix + path, params=parameters) as response:
                text = await response.read()
                _check(response.status, text)
                return orjson.loads(text)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UnavailableError(f"Cannot reach the daemon: {reason(error)}") from error

    async def stream(
        self, parameters: Mapping[str, str], on_loss: Callable[[str], None]
    ) -> AsyncGenerator[Message, None]:
        """Yield the messages of the stream for ever; `on_loss` gets the reason of a disconnect.

        Raises:
            DaemonRefusedError: if it is refused.
            UnavailableError: if it cannot be opened the first time.

        """
        last_id = ""
        pause = _FIRST_PAUSE_S
        while True:
            try:
                async for message in self._listen(parameters, last_id):
                    last_id, pause = message.id, _FIRST_PAUSE_S
                    yield message
                reason = "the stream has ended"
            except UnavailableError as error:
                if not last_id:
                    raise
                reason = str(error)
            on_loss(reason)
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    async def _listen(self, parameters: Mapping[str, str], last_id: str) -> AsyncIterator[Message]:
        headers = {"Last-Event-ID": last_id} if last_id else {}
        silence = aiohttp.ClientTimeout(total=None, sock_connect=_LONGEST_PAUSE_S, sock_read=_SILENT_S)
        try:
            path = f"{self._prefix}/api/v1/runs/stream"
            async with self._session.get(path, params=parameters, headers=headers, timeout=silence) as response:
                if response.status != 200:
                    _check(response.status, await response.read())
                async for message in read_messages(response.content.iter_any()):
                    yield message
        except (aiohttp.ClientError, OSError) as error:
            raise UnavailableError(f"Cannot reach the daemon: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return why a daemon was not reached; where a connection was refused, the address and the system's words."""
    if isinstance(error, aiohttp.ClientConnectorError) and error.errno is not None and error.errno > 0:
        place = error.path if isinstance(error, UnixClientConnectorError) else f"{error.host}:{error.port}"
        return f"{place}: {os.strerror(error.errno)}"
    return str(error) or type(error).__name__


async def read_messages(chunks: AsyncIterator[bytes], longest_bytes: int = _LONGEST_MESSAGE) -> AsyncIterator[Message]:
    """Yield the messages of an event stream that comes in pieces; what is cut off at its end is left out.

    Raises:
        UnavailableError: if one does not end; no run is so long.

    """
    begun = bytearray()
    last_id = ""
    async for chunk in chunks:
        seen = max(len(begun) - 1, 0)
        begun += chunk
        while (end := begun.find(b"\n\n", seen)) >= 0:
            seen = 0
            event, data = "message", b""
            for line in bytes(begun[:end]).split(b"\n"):
                name, _, value = line.partition(b": ")
                if name == b"id":
                    last_id = value.decode()
                elif name == b"event":
                    event = value.decode()
                elif name == b"data":
                    data += value
            del begun[: end + 2]
            yield Message(event, data, last_id)
        if len(begun) > longest_bytes:
            raise UnavailableError("The stream holds a message without an end; is this telemetryd?")


def detail_of(text: bytes) -> str:
    """Return what an error of the daemon says of itself."""
    try:
        detail = orjson.loads(text)["detail"]
    except (ValueError, KeyError, TypeError):
        return text[: values.MAX_ECHO].decode("utf-8", "replace")
    return detail if isinstance(detail, str) else orjson.dumps(detail).decode()


def _check(status: int, text: bytes) -> None:
    if status == 200:
        return
    problem = f"The daemon answered {status}: {detail_of(text)}"
    if status in _PATIENT:
        raise UnavailableError(problem)
    raise (GoneError if status == 410 else DaemonRefusedError)(problem)


@asynccontextmanager
async def reach(config: Config) -> AsyncIterator[Daemon]:
    """Give the daemon at the address of a client's settings, with its token."""
    address = urlsplit(config.url)
    is_unix = address.scheme == "unix"
    connector = aiohttp.UnixConnector(unquote(address.netloc + address.path)) if is_unix else aiohttp.TCPConnector()
    base = "http://localhost" if is_unix else f"{address.scheme}://{address.netloc}"
    headers = {"Authorization": f"Bearer {config.token}"} if config.token else {}
    timeout = aiohttp.ClientTimeout(total=config.timeout_s + 60)
    async with aiohttp.ClientSession(base, connector=connector, headers=headers, timeout=timeout) as session:
        yield Daemon(session, "" if is_unix else address.path.rstrip("/"))
