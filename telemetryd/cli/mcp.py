"""The command that answers an assistant over its standard streams: mcp."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, TypeVar

import aiohttp
import click
import orjson

from telemetryd.cli.database import refuse_missing
from telemetryd.cli.options import failing
from telemetryd.cli.reach import (
    RefusedError,
    Request,
    Where,
    read_object,
    reason,
    refusal,
    refuse_missing_socket,
    session,
    target_flags,
)
from telemetryd.cli.target import decide
from telemetryd.engine.factory import open_read_only
from telemetryd.engine.interface import QueryingEngine
from telemetryd.errors import BodyTooLargeError, InvalidBodyError, TelemetrydError, UnavailableError, sentence
from telemetryd.mcp import protocol, tools
from telemetryd.mcp.endpoint import LONGEST_MESSAGE, PATH
from telemetryd.mcp.messages import Id, RpcError, id_of
from telemetryd.model import alerts
from telemetryd.model.bodies import parse_json
from telemetryd.model.queries import Query
from telemetryd.model.rules import load_rules
from telemetryd.settings import Settings

A = TypeVar("A")

_AT_ONCE: Final = 16
"""Calls that are answered at a time."""
_WAITING: Final = 256
"""Messages that are held at a time; others wait on standard input. It is many, so that a cancellation gets through."""
_END: Final = b""
"""What stands for the end of standard input, among lines that are not empty."""
_ANSWERED: Final = (200, 400, 404)
"""The statuses with which the daemon answers by messages of its own."""
_OF_RESULT: Final = ("content", "structuredContent", "isError")
_PATIENCE: Final = aiohttp.ClientTimeout(total=2 * tools.DEADLINE_S)


@click.command(
    help=r"""Answer an assistant over standard input and output (MCP).

    It speaks the Model Context Protocol. Assistants start it by themselves; docs/how-to/mcp.md shows what to put into
    their settings. The daemon is asked; the database is read where none runs, and alongside one that cannot be reached.
    Everything here only reads.

    \b
    Examples:
      telemetryd mcp
      telemetryd mcp --url https://telemetry.example.com --auth-token-file ~/.config/telemetryd.token
      telemetryd mcp --db-path /var/lib/telemetryd/telemetry.sqlite
    """
)
@target_flags
def mcp(*, where: Where) -> None:
    with failing():
        decide(where)  # flags and settings that are wrong are reported at once; the rest, each call tells
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_Conversation(where).run())


# --- The standard streams ------------------------------------------------------------------------


class _Conversation:
    """Answers each line of standard input with a line of standard output, several at a time."""

    def __init__(self, where: Where) -> None:
        self._where = where
        self._earlier: str | None = None
        self._running: dict[Id, asyncio.Task[Any]] = {}
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._room = asyncio.Semaphore(_WAITING)

    async def run(self) -> None:
        """Answer until standard input ends, and what has been asked until then."""
        try:
            async with asyncio.TaskGroup() as tasks:
                async for line in _lines():
                    await self._take(line, tasks)
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # such as that nobody reads any more; one says enough

    async def _take(self, line: bytes | None, tasks: asyncio.TaskGroup) -> None:
        """Begin to answer a line; None was too long."""
        try:
            message = _decoded(line)
        except (BodyTooLargeError, InvalidBodyError) as error:
            _write(protocol.unreadable(sentence(error)))
            return
        if (cancelled := _cancelled(message)) is not None:
            if (running := self._running.get(cancelled)) is not None:
                running.cancel()
        elif isinstance(message, dict) and message.get("method") == "initialize":
            await self._answer(message)  # before what follows it, which depends on the version that is agreed on
        else:
            await self._room.acquire()
            tasks.create_task(self._answer(message)).add_done_callback(lambda _: self._room.release())

    async def _answer(self, message: object) -> None:
        with self._registered(message):
            reply = await protocol.answer(message, self._call, earlier=self._earlier)
        if reply.said.get("rpc_method") == "initialize" and reply.message is not None and "result" in reply.message:
            self._earlier = reply.message["result"]["protocolVersion"]
        _write(reply)

    @contextlib.contextmanager
    def _registered(self, message: object) -> Iterator[None]:
        """Know the task of a request inside the block, so that it can be cancelled."""
        number = id_of(message)
        task = asyncio.current_task()
        if number is None or task is None:
            yield
            return
        self._running[number] = task
        try:
            yield
        finally:
            if self._running.get(number) is task:
                del self._running[number]

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            async with self._places, _find(self._where) as call:
                return await call(name, arguments)
        except TelemetrydError as error:
            return tools.failed(sentence(error))


def _decoded(line: bytes | None) -> object:
    if line is None:
        raise BodyTooLargeError(f"A message must not be larger than {LONGEST_MESSAGE} bytes")
    return parse_json(line)


def _write(reply: protocol.Reply) -> None:
    if reply.message is not None:
        sys.stdout.buffer.write(orjson.dumps(reply.message, option=orjson.OPT_APPEND_NEWLINE))
        sys.stdout.buffer.flush()


def _cancelled(message: object) -> Id | None:
    """Return the id of the request that a message cancels, or None if it is not about that."""
    if not isinstance(message, dict) or message.get("method") != "notifications/cancelled":
        return None
    params = message.get("params")
    return id_of({"id": params.get("requestId")}) if isinstance(params, dict) else None


async def _lines() -> AsyncIterator[bytes | None]:
    """Yield what `split` makes of standard input.

    A thread reads the descriptor itself: asyncio cannot wait for regular files, and Python's own buffer would be
    locked when the interpreter ends.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes | None] = asyncio.Queue(1)

    def read() -> None:
        with contextlib.suppress(RuntimeError, CancelledError):  # the loop has ended first
            for line in chain(split(_parts()), (_END,)):
                asyncio.run_coroutine_threadsafe(queue.put(line), loop).result()

    threading.Thread(target=read, name="stdin", daemon=True).start()
    while (line := await queue.get()) != _END:
        yield line


def _parts() -> Iterator[bytes]:
    with contextlib.suppress(OSError):  # such as of a terminal that is gone: that is an end as well
        while part := os.read(0, LONGEST_MESSAGE):
            yield part


def split(parts: Iterable[bytes], longest: int = LONGEST_MESSAGE) -> Iterator[bytes | None]:
    """Yield each line that is not blank of what comes in parts, the last one too; None for one that is too long."""
    begun, is_too_long = b"", False
    for part in parts:
        *whole, begun = (begun + part).split(b"\n")
        for line in whole:
            if is_too_long or len(line) > longest:
                yield None
            elif line.strip():
                yield line
            is_too_long = False
        if len(begun) > longest:
            begun, is_too_long = b"", True
    if is_too_long:
        yield None
    elif begun.strip():
        yield begun


# --- Who is asked --------------------------------------------------------------------------------


@asynccontextmanager
async def _find(where: Where) -> AsyncIterator[protocol.Caller]:
    """Give what calls tools: the daemon, or the database where none can be reached; decided anew for each call.

    An assistant runs for days, in which a daemon may come and go. The database is only read, and owned by nobody.

    Raises:
        TelemetrydError: if neither can be used.

    """
    place = await asyncio.to_thread(decide, where)
    if place.config is not None:
        refuse_missing_socket(place.config)
        async with session(place.config, _PATIENCE) as request:
            yield _Daemon(request)
        return
    assert place.settings is not None  # noqa: S101 - for the type checker
    if place.settings.db_url is None:
        refuse_missing(place.settings.db_path, by_address=True)
    engine = await open_read_only(place.settings)
    source = _Database(engine, place.settings)

    async def call(name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        return await tools.call(source, name, arguments)

    try:
        yield call
    finally:
        await engine.close()


@dataclass(frozen=True, slots=True)
class _Database:
    """A database that is read without its daemon."""

    engine: QueryingEngine
    settings: Settings

    async def fetch(self, query: Query[A]) -> A:
        """Answer a query."""
        return await self.engine.read(query)

    async def alerts(self) -> alerts.Alerts:
        """Return the rules of the file that the settings name, with what a daemon has last found them firing for."""
        rules = load_rules(self.settings.alerts_file)
        return alerts.shown(rules, await self.engine.read(alerts.ListFiring()), None, {}, {})


@dataclass(frozen=True, slots=True)
class _Daemon:
    """A running daemon, over HTTP."""

    request: Request

    async def __call__(self, name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Call a tool of the daemon.

        Raises:
            RpcError: if it refuses the call as such.
            RefusedError: if it refuses the request, or is no telemetryd of this version.
            UnavailableError: if it cannot be reached.

        """
        meta = {protocol.VERSION_KEY: protocol.MODERN, protocol.CAPABILITIES_KEY: {}}
        params = {"name": name, "arguments": arguments, "_meta": meta}
        headers = {
            protocol.VERSION_HEADER: protocol.MODERN,
            protocol.METHOD_HEADER: "tools/call",
            protocol.NAME_HEADER: name,
        }
        body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        try:
            async with self.request("POST", PATH, json=body, headers=headers) as response:
                text = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise UnavailableError(f"Cannot reach the daemon: {reason(error, self.request.url)}") from error
        if response.status not in _ANSWERED or b'"jsonrpc"' not in text:
            raise RefusedError(refusal(response, text), response.status)
        said = read_object(response, text, ("jsonrpc",))
        if "error" in said:
            raise RpcError(said["error"]["code"], said["error"]["message"])
        return {name: said["result"][name] for name in _OF_RESULT if name in said["result"]}
