"""Brings the parts up in order, serves until it is told to stop, and takes them down in reverse."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import signal
import socket
import sqlite3
import stat
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from aiohttp import web

import telemetryd
from telemetryd import upkeep
from telemetryd.connections import make_runner
from telemetryd.http import make_app
from telemetryd.logs import log
from telemetryd.metrics import Metrics
from telemetryd.runs import utc_now
from telemetryd.settings import LoadedSettings, Settings
from telemetryd.store import Store
from telemetryd.systemd import Notifier, passed_sockets

_BACKLOG: Final = 2048
_STATUS_EVERY_S: Final = 10.0
_LONGEST_START_S: Final = 1.0
"""How long a start may go on after a signal, before the process ends without it: nothing was acknowledged yet."""
EXIT_FAILURE: Final = 1


@dataclass(frozen=True, slots=True)
class Running:
    """A daemon that answers: its store, and where it listens."""

    store: Store
    addresses: tuple[str, ...]


@asynccontextmanager
async def running(
    settings: Settings, clock: Callable[[], datetime] = utc_now, passed: Sequence[socket.socket] = ()
) -> AsyncIterator[Running]:
    """Run a daemon inside the block: lock → schema → writer → readers → app → sockets; then in reverse.

    Sockets that the service manager has passed stand in for those that the settings name.

    Raises:
        DatabaseError: if the database cannot be used.
        OSError: if an address cannot be listened on.

    """
    metrics = Metrics()
    store = await Store.open(settings, metrics, clock)
    try:
        runner = make_runner(make_app(store, settings, metrics), settings)
        await runner.setup()
        chores = asyncio.create_task(upkeep.keep_up(store, settings, clock))
        try:
            yield Running(store, await _listen(runner, settings, passed))
        finally:
            chores.cancel()
            await asyncio.wait((chores,))
            # First no new requests and an answer to those in flight, for which the writer is still needed.
            await runner.cleanup()
    finally:
        await store.close()


async def _listen(runner: web.AppRunner, settings: Settings, passed: Sequence[socket.socket]) -> tuple[str, ...]:
    for listening in passed:
        await web.SockSite(runner, listening, backlog=_BACKLOG).start()
    unix_passed = [listening for listening in passed if listening.family == socket.AF_UNIX]
    if len(unix_passed) == len(passed):
        await web.TCPSite(runner, settings.api_host, settings.api_port, backlog=_BACKLOG).start()
    if settings.api_unix is not None and not unix_passed:
        await web.SockSite(runner, _bind_unix(str(settings.api_unix.absolute())), backlog=_BACKLOG).start()
    addresses = []
    for address in runner.addresses:
        if isinstance(address, str):
            addresses.append(f"unix:{address}")
        else:
            host = f"[{address[0]}]" if ":" in address[0] else address[0]
            addresses.append(f"http://{host}:{address[1]}")
    return tuple(addresses)


def _bind_unix(path: str) -> socket.socket:
    """Return a socket that is nobody else's from its first moment on, whatever the umask.

    Raises:
        OSError: if something else stands there, or it cannot be made.

    """
    _remove_dead_socket(path)
    bound = socket.socket(socket.AF_UNIX)
    before = os.umask(0o117)
    try:
        bound.bind(path)
    except OSError as error:
        bound.close()
        raise OSError(error.errno or errno.EINVAL, error.strerror or str(error), path) from error
    finally:
        os.umask(before)
    return bound


def _remove_dead_socket(path: str) -> None:
    """Remove the socket of a daemon that died, because binding would also take that of one that is alive.

    Raises:
        OSError: if the socket is in use, or what stands there is no socket.

    """
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "there is a file that is not a socket", path)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, "another process listens there", path)


async def serve(loaded: LoadedSettings) -> int:
    """Serve until SIGTERM or SIGINT, or until the writer dies of a bug; return the process's exit status.

    Raises:
        DatabaseError: if the database cannot be used.
        OSError: if an address cannot be listened on.

    """
    settings = loaded.settings
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, stop, number)
    for remark in loaded.remarks:
        log.warning("Configuration remark", extra={"remark": remark})
    notifier = Notifier()
    impatience = asyncio.create_task(_leave_after(stop))
    async with running(settings, passed=passed_sockets()) as daemon:
        impatience.cancel()
        _announce(settings, daemon)
        notifier.send(READY=1, STATUS="Serving")
        signs = asyncio.create_task(_show_life(notifier, daemon.store))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((stopped, daemon.store.writing), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        signs.cancel()
        notifier.send(STOPPING=1, STATUS="Committing what is queued")
        if daemon.store.writing.done():
            log.critical(
                "The writer has died; exiting, so that the service manager restarts the daemon",
                exc_info=daemon.store.writing.exception(),
            )
        log.info("Stopping", extra={"queue_depth": daemon.store.health().queue_depth})
        loop.call_later(settings.shutdown_timeout_s, _give_up, settings.shutdown_timeout_s)
    death = daemon.store.writing.exception()
    if death is not None:  # perhaps only while it committed what was queued
        log.critical("Stopped while the database was not usable", exc_info=death)
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
        if health.idle or health.groups != groups:
            # A problem of the disk is none that a restart would mend.
            notifier.send(WATCHDOG=1, STATUS=health.problem or f"Serving, {health.queue_depth} writes waiting")
        else:
            notifier.send(STATUS=health.problem or f"The writer does not get on, {health.queue_depth} writes waiting")
        groups = health.groups
        await asyncio.sleep(pause_s)


async def _leave_after(stop: asyncio.Event) -> None:
    """End a start that is told to stop and does not come to its end: SQLite may wait long for somebody else's lock."""
    await stop.wait()
    await asyncio.sleep(_LONGEST_START_S)
    print("telemetryd: stopped before it served", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(0)


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
    if not settings.api_auth_enabled:
        state = "loopback clients only" if settings.api_protected_mode else "every client that can reach it"
        log.info("Authentication is off", extra={"served": state})
