"""Subscribes to the daemon's stream of runs and resumes from the last cursor after every disconnect."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from telemetryd.cli.reach import RefusedError, Request, read_list, read_object, reason, refusal, session
from telemetryd.client.config import Config
from telemetryd.errors import UnavailableError

_SILENT_S: Final = 40.0
"""A stream that says nothing for so long is dead: the daemon gives a sign of life every 15 seconds."""
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_MESSAGE: Final = 256 * 1024 * 1024
_LONGEST_PAUSE_S: Final = 10.0
_LONGEST_WAIT_S: Final = 60.0
"""For how long the daemon waits for news at most, before it answers that there are none."""
_PATIENT: Final = (429, 502, 503, 504)


class GoneError(RefusedError):
    """The daemon does not know any more what the request refers to."""


@dataclass(frozen=True, slots=True)
class Message:
    """One event of the stream; without data it only carries the cursor."""

    event: str
    data: bytes
    id: str


class Daemon:
    """A daemon to be asked. Make it with `reach`."""

    def __init__(self, request: Request) -> None:
        self._request = request

    async def get(self, path: str, parameters: Mapping[str, str], fields: Collection[str]) -> dict[str, Any]:
        """Return the object that answers a request and has these fields.

        Raises:
            RefusedError: if it is refused, or something else answers. A `GoneError` for 410.
            UnavailableError: if there is no answer, or none now.

        """
        return (await self.timed(path, parameters, fields))[0]

    async def timed(
        self, path: str, parameters: Mapping[str, str], fields: Collection[str]
    ) -> tuple[dict[str, Any], float]:
        """Return the answer to a request as `get` does, and for how many seconds it came in."""
        response, text, seconds = await self._get(path, parameters)
        return read_object(response, text, fields), seconds

    async def list(self, path: str, parameters: Mapping[str, str], field: str) -> list[dict[str, Any]]:
        """Return the list of objects, each with this field, that answers a request; raise as `get` does."""
        response, text, _ = await self._get(path, parameters)
        return read_list(response, text, field)

    async def _get(self, path: str, parameters: Mapping[str, str]) -> tuple[aiohttp.ClientResponse, bytes, float]:
        try:
            async with self._request("GET", path, params=parameters) as response:
                began = time.monotonic()
                text = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise UnavailableError(f"Cannot reach the daemon: {reason(error, self._request.url)}") from error
        _check(response, text)
        return response, text, time.monotonic() - began

    async def stream(
        self, parameters: Mapping[str, str], on_loss: Callable[[str], None]
    ) -> AsyncGenerator[Message, None]:
        """Yield the messages of the stream for ever; `on_loss` gets the reason of a disconnect.

        Raises:
            RefusedError: if it is refused, or something else answers.
            UnavailableError: if it cannot be opened the first time.

        """
        last_id = ""
        pause = _FIRST_PAUSE_S
        while True:
            try:
                async for message in self._listen(parameters, last_id):
                    last_id, pause = message.id, _FIRST_PAUSE_S
                    yield message
                lost = "the stream has ended"
            except UnavailableError as error:
                if not last_id:
                    raise
                lost = str(error)
            on_loss(lost)
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    async def _listen(self, parameters: Mapping[str, str], last_id: str) -> AsyncIterator[Message]:
        headers = {"Last-Event-ID": last_id} if last_id else {}
        silence = aiohttp.ClientTimeout(total=None, sock_connect=_LONGEST_PAUSE_S, sock_read=_SILENT_S)
        try:
            stream = self._request("GET", "/api/v1/runs/stream", params=parameters, headers=headers, timeout=silence)
            async with stream as response:
                if response.status != 200:
                    _check(response, await response.read())
                if response.content_type != "text/event-stream":
                    raise RefusedError("What answered is no telemetryd: it sent no stream of events", response.status)
                async for message in read_messages(response.content.iter_any()):
                    yield message
        except (aiohttp.ClientError, OSError) as error:
            raise UnavailableError(f"Cannot reach the daemon: {reason(error, self._request.url)}") from error


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


def _check(response: aiohttp.ClientResponse, text: bytes) -> None:
    if response.status == 200:
        return
    problem = refusal(response, text)
    if response.status in _PATIENT:
        raise UnavailableError(problem)
    raise (GoneError if response.status == 410 else RefusedError)(problem, response.status)


@asynccontextmanager
async def reach(config: Config, longest_wait_s: float = _LONGEST_WAIT_S) -> AsyncIterator[Daemon]:
    """Give the daemon at the address of a client's settings, with its token."""
    # An answer may take as long as it likes while it comes in: a page over a slow link takes minutes.
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=config.timeout_s, sock_read=config.timeout_s + longest_wait_s
    )
    async with session(config, timeout) as request:
        yield Daemon(request)
