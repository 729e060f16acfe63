"""Brings the parts up in order, serves until it is told to stop, and takes them down in reverse."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sqlite3
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Final, cast

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

import telemetryd
from telemetryd import upkeep
from telemetryd.http import make_app
from telemetryd.listening import bound
from telemetryd.logs import log
from telemetryd.metrics import Metrics
from telemetryd.middleware import error_response, request_id, unexpected_detail
from telemetryd.runs import utc_now
from telemetryd.settings import LoadedSettings, Settings
from telemetryd.store import Store
from telemetryd.systemd import Notifier, passed_sockets

_BACKLOG: Final = 2048
_KEEPALIVE_S: Final = 75.0
_MOST_DESCRIPTORS: Final = 65_536
_SPARE_DESCRIPTORS: Final = 80
"""For the database, its journal and log, the lock files, the sockets that listen, and what Python opens."""
_STATUS_EVERY_S: Final = 10.0
EXIT_FAILURE: Final = 1


def _descriptor_limit() -> int:
    """Raise the process's limit on open files as far as it may be raised, and return it."""
    if sys.platform == "win32":
        return 8192
    import resource  # noqa: PLC0415 - POSIX only

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = min(hard, _MOST_DESCRIPTORS) if hard != resource.RLIM_INFINITY else _MOST_DESCRIPTORS
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


class _Protocol(RequestHandler):
    """aiohttp's protocol, except that its own errors (a malformed request) are JSON like all others."""

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
        log.log(
            logging.ERROR if unexpected else logging.WARNING,
            "Request failed outside of any handler" if unexpected else "Malformed request",
            extra={
                "status": status,
                "client": request.remote or "unix",
                "error_type": type(exc).__name__,
                "request_id": identity,
            },
            exc_info=exc if unexpected else None,
        )
        detail = unexpected_detail(identity) if unexpected else "The request is not valid HTTP/1.1"
        response = error_response(status, detail, {"X-Request-ID": identity})
        response.force_close()
        return response

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a connection, unless so many are open that the database would find no descriptor any more."""
        super().connection_made(transport)
        if isinstance(self._manager, _Server) and len(self._manager.connections) > self._manager.most_connections:
            cast(asyncio.Transport, transport).abort()


class _Server(web.Server):
    most_connections: int

    def __call__(self) -> RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)


class _Runner(web.AppRunner):
    async def _make_server(self) -> web.Server:
        made = await super()._make_server()

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            try:
                return await made.request_handler(request)
            except web.HTTPExpectationFailed as error:  # the one answer that aiohttp gives before any middleware
                return error_response(
                    error.status, "Expect can only be 100-continue", {"X-Request-ID": request_id(request)}
                )

        server = _Server(answer, request_factory=made.request_factory, **made._kwargs)
        server.most_connections = _descriptor_limit() - _SPARE_DESCRIPTORS
        return server


def make_runner(app: web.Application, settings: Settings) -> web.AppRunner:
    """Return aiohttp's runner with our own handling of signals, bodies, errors and time limits."""
    return _Runner(
        app,
        handle_signals=False,  # aiohttp's second SIGTERM aborts the drain
        access_log=None,
        auto_decompress=False,  # body.py does it, within its limits
        keepalive_timeout=_KEEPALIVE_S,
        # aiohttp waits that long for the handlers, cancels them, and waits as long again.
        shutdown_timeout=settings.shutdown_timeout_s / 4,
    )


@dataclass(frozen=True, slots=True)
class Running:
    """A daemon that answers: its store, and where it listens."""

    store: Store
    addresses: tuple[str, ...]


@asynccontextmanager
async def running(
    settings: Settings, clock: Callable[[], datetime] = utc_now, passed: Sequence[socket.socket] = ()
) -> AsyncIterator[Running]:
    """Run a daemon inside the block: address → lock → schema → writer → readers → app → listen; then in reverse.

    Sockets that the service manager has passed stand in for those that the settings name.

    Raises:
        AddressError: if an address cannot be listened on; the database is not touched then.
        DatabaseError: if the database cannot be used.

    """
    async with bound(settings, passed) as sockets:
        metrics = Metrics()
        store = await Store.open(settings, metrics, clock)
        try:
            runner = make_runner(make_app(store, settings, metrics), settings)
            await runner.setup()
            chores = asyncio.create_task(upkeep.keep_up(store, settings, clock))
            try:
                yield Running(store, await _listen(runner, sockets))
            finally:
                chores.cancel()
                await asyncio.wait((chores,))
                # First no new requests and an answer to those in flight, for which the writer is still needed.
                await runner.cleanup()
        finally:
            await store.close()


async def _listen(runner: web.AppRunner, sockets: Sequence[socket.socket]) -> tuple[str, ...]:
    for listening in sockets:
        await web.SockSite(runner, listening, backlog=_BACKLOG).start()
    addresses = []
    for address in runner.addresses:
        if isinstance(address, str):
            addresses.append(f"unix:{address}")
        else:
            host = f"[{address[0]}]" if ":" in address[0] else address[0]
            addresses.append(f"http://{host}:{address[1]}")
    return tuple(addresses)


async def serve(loaded: LoadedSettings) -> int:
    """Serve until SIGTERM or SIGINT, or until the writer dies; return the process's exit status.

    Raises:
        AddressError: if an address cannot be listened on.
        DatabaseError: if the database cannot be used.

    """
    settings = loaded.settings
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        _handle_signal(loop, number, partial(_on_signal, stop, number))
    for remark in loaded.remarks:
        log.warning("Configuration remark", extra={"remark": remark})
    notifier = Notifier()
    async with running(settings, passed=passed_sockets()) as daemon:
        _announce(settings, daemon)
        notifier.send(READY=1, STATUS="Serving")
        signs = asyncio.create_task(_show_life(notifier, daemon.store))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((stopped, daemon.store.writing), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        signs.cancel()
        notifier.send(STOPPING=1, STATUS="Committing what is queued")
        is_told = daemon.store.writing.done()
        if is_told:
            log.critical(
                "The writer has died; exiting, so that the service manager restarts the daemon",
                exc_info=daemon.store.writing.exception(),
            )
        log.info("Stopping", extra={"queue_depth": daemon.store.health().queue_depth})
        loop.call_later(settings.shutdown_timeout_s, _give_up, settings.shutdown_timeout_s)
    death = daemon.store.writing.exception()
    if death is not None:
        # It may have come only while what was queued was committed.
        log.critical("Stopped after the writer's death", exc_info=None if is_told else death)
        return EXIT_FAILURE
    log.info("Stopped")
    return 0


async def _show_life(notifier: Notifier, store: Store) -> None:
    """Tell the service manager the queue's depth, and that the writer makes progress, as long as it does."""
    if not notifier.is_active:
        return
    pause_s = min(_STATUS_EVERY_S, (notifier.watchdog_s or math.inf) / 3)
    groups = -1
    while True:
        health = store.health()
        if health.problem is None and (health.idle or health.groups != groups):
            notifier.send(WATCHDOG=1, STATUS=f"Serving, {health.queue_depth} writes waiting")
        else:
            notifier.send(STATUS=health.problem or f"The writer does not get on, {health.queue_depth} writes waiting")
        groups = health.groups
        await asyncio.sleep(pause_s)


def _handle_signal(loop: asyncio.AbstractEventLoop, number: signal.Signals, handle: Callable[[], None]) -> None:
    if sys.platform == "win32":  # its event loops have no add_signal_handler
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(handle))
    else:
        loop.add_signal_handler(number, handle)


def _on_signal(stop: asyncio.Event, number: int) -> None:
    if stop.is_set():
        # Whatever is not committed now has not been acknowledged either.
        print("telemetryd: second signal, exiting at once", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(128 + number)
    log.info("Signal received", extra={"signal": signal.Signals(number).name})
    stop.set()


def _give_up(after_s: float) -> None:
    print(f"telemetryd: not stopped after {after_s:g} s, exiting", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(EXIT_FAILURE)


def _announce(settings: Settings, daemon: Running) -> None:
    health = daemon.store.health()
    log.info(
        "Serving",
        extra={
            "addresses": daemon.addresses,
            "version": telemetryd.__version__,
            "db_path": str(health.path),
            "journal_mode": health.modes.journal_mode,
            "synchronous": health.modes.synchronous,
            "sqlite_version": sqlite3.sqlite_version,
            "pid": os.getpid(),
        },
    )
    if not health.durable:
        log.warning(
            "Acknowledged writes survive a crash, not a power cut",
            extra={"setting": "TELEMETRY_DB_SYNCHRONOUS=NORMAL"},
        )
    if settings.api_auth_enabled:
        served = "every client that brings the token"
    else:
        served = "this machine only" if settings.api_protected_mode else "every client that can reach it"
    log.info(f"Authentication is {'on' if settings.api_auth_enabled else 'off'}", extra={"served": served})
    terminal = next((stream for stream in (sys.stderr, sys.stdout) if stream is not None and stream.isatty()), None)
    if terminal is not None:  # somebody tries it out
        print(_hint(settings, daemon.addresses, served), file=terminal, flush=True)


def _hint(settings: Settings, addresses: Sequence[str], served: str) -> str:
    page = next((f"{address}/docs" for address in addresses if address.startswith("http")), "/docs")
    page = page.replace("//0.0.0.0:", "//localhost:").replace("//[::]:", "//localhost:")
    state = "on" if settings.api_auth_enabled else "off"
    return f"telemetryd: ready; try {page}. Authentication is {state}: {served}. Ctrl-C stops."
