"""Starts the daemon's parts in order, serves until it is asked to stop, and stops them in reverse order."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Final

import telemetryd
from telemetryd.configuration import LoadedSettings
from telemetryd.http import make_app
from telemetryd.model.rules import load_rules
from telemetryd.model.values import utc_now
from telemetryd.ops.logs import log
from telemetryd.ops.metrics import Metrics
from telemetryd.ops.systemd import Notifier, passed_sockets
from telemetryd.reloading import LogLevels, Part, Reloading, collected
from telemetryd.services.alerting import Alerting
from telemetryd.services.certificates import most_processes
from telemetryd.services.upkeep import Upkeep
from telemetryd.settings import Settings
from telemetryd.store import Store
from telemetryd.web.connections import listen, make_runner
from telemetryd.web.listening import bound, bound_next_to_database
from telemetryd.web.tls import Tls, read_identity
from telemetryd.web.tokens import Tokens, unused

_STATUS_EVERY_S: Final = 10.0
_LONGEST_START_S: Final = 1.0
"""How long a start may go on after a signal, before the process ends without it: nothing was acknowledged yet."""
EXIT_FAILURE: Final = 1


@dataclass(frozen=True, slots=True)
class Running:
    """A daemon that answers: its store, where it listens, and what can be reloaded."""

    store: Store
    addresses: tuple[str, ...]
    parts: tuple[Part, ...]


_READERS: Final[tuple[Callable[[Settings], object], ...]] = (
    lambda settings: load_rules(settings.alerts_file),
    lambda settings: Tokens(settings, Metrics()),
    read_identity,
)
"""What a start and a reload read besides the settings."""


def check(settings: Settings) -> None:
    """Read every file that the settings name, as a start and a reload do.

    Raises:
        ConfigurationError: with every problem.

    """
    collected([partial(read, settings) for read in _READERS])


@asynccontextmanager
async def running(
    settings: Settings, clock: Callable[[], datetime] = utc_now, passed: Sequence[socket.socket] = ()
) -> AsyncIterator[Running]:
    """Run a daemon inside the block: address → lock → schema → writer → readers → app → listen; then in reverse.

    Sockets that the service manager has passed stand in for those that the settings name.

    Raises:
        ConfigurationError: if the rules of alerts, the certificate or the tokens cannot be used; nothing is touched.
        AddressError: if an address cannot be listened on; the database is not touched then.
        DatabaseError: if the database cannot be used.

    """
    rules, metrics = load_rules(settings.alerts_file), Metrics()
    tokens, tls = Tokens(settings, metrics), Tls(settings)
    metrics.watch_certificate(tls.expires)
    async with bound(settings, passed) as sockets:
        store = await Store.open(settings, metrics, clock, full_text=settings.full_text)
        try:
            alerting = Alerting(store, rules, clock, given_up=metrics.deliveries_given_up.inc)
            upkeep = Upkeep(store, settings, clock)
            app = make_app(store, settings, metrics, alerting=alerting, upkeep=upkeep, tokens=tokens)
            runner = make_runner(app, settings, most_processes(settings))
            await runner.setup()
            with bound_next_to_database(settings) as own:
                background = tuple(map(asyncio.create_task, (upkeep.run(), alerting.run())))
                parts = (
                    Part("log level", LogLevels(settings), follows=("log_level",)),
                    Part("alert rules", alerting, follows=("alerts_file",)),
                    Part("tokens", tokens, follows=("api_auth_token", "api_auth_token_file", "tokens_file")),
                    Part("certificate", tls, follows=("tls_cert", "tls_key", "tls_client_ca")),
                )
                try:
                    listening = [*sockets, *([own] if own is not None else [])]
                    yield Running(store, await listen(runner, listening, tls, metrics.count_handshake), parts)
                finally:
                    for task in background:
                        task.cancel()
                    await asyncio.wait(background)
                    # First no new requests and an answer to those in flight, for which the writer is still needed.
                    await runner.cleanup()
        finally:
            await store.close()


async def serve(loaded: LoadedSettings, load: Callable[[], LoadedSettings]) -> int:
    """Serve until SIGTERM or SIGINT, or until the writer dies of a bug; return the process's exit status.

    Args:
        loaded: the settings.
        load: collects them anew, for SIGHUP.

    Raises:
        ConfigurationError: if the rules of alerts, the certificate or the tokens cannot be used.
        AddressError: if an address cannot be listened on.
        DatabaseError: if the database cannot be used.

    """
    settings = loaded.settings
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, stop, number)
    notifier = Notifier()
    reloading = Reloading(loaded, load, notifier)
    loop.add_signal_handler(signal.SIGHUP, _on_hang_up, stop, reloading, _terminals())
    for remark in loaded.remarks:
        log.warning("Configuration remark", extra={"remark": remark})
    impatience = asyncio.create_task(_leave_after(stop))
    with ExitStack() as patience:
        async with AsyncExitStack() as up:
            with notifier.asking_for_time("Starting"):
                daemon = await up.enter_async_context(running(settings, passed=passed_sockets()))
            impatience.cancel()
            _announce(settings, daemon)
            notifier.send(READY=1, STATUS="Serving")
            signs = asyncio.create_task(_show_life(notifier, daemon.store, reloading))
            reloads = asyncio.create_task(reloading.run(daemon.parts))
            reloads.add_done_callback(_report_death)
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait((stopped, daemon.store.writing), return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            signs.cancel()
            reloads.cancel()
            notifier.send(STOPPING=1, STATUS="Committing what is queued")
            patience.enter_context(notifier.asking_for_time("Committing what is queued"))
            is_reported = daemon.store.writing.done()
            if is_reported:
                log.critical(
                    "The writer has died; exiting, so that the service manager restarts the daemon",
                    exc_info=daemon.store.writing.exception(),
                )
            log.info("Stopping", extra={"queue_depth": daemon.store.health().queue_depth})
            loop.call_later(settings.shutdown_timeout_s, _give_up, settings.shutdown_timeout_s)
    death = daemon.store.writing.exception()
    if death is not None:
        # It may have come only while what was queued was committed.
        log.critical("Stopped while the database was not usable", exc_info=None if is_reported else death)
        return EXIT_FAILURE
    log.info("Stopped")
    return 0


def _report_death(reloads: asyncio.Task[None]) -> None:
    if not reloads.cancelled() and (death := reloads.exception()) is not None:
        log.critical("Reloading has failed for good; a restart reads everything again", exc_info=death)


async def _show_life(notifier: Notifier, store: Store, reloading: Reloading) -> None:
    """Report to the service manager the queue's depth, and that the writer makes progress, as long as it does."""
    if not notifier.is_active:
        return
    pause_s = min(_STATUS_EVERY_S, (notifier.watchdog_s or math.inf) / 3)
    groups = -1
    while True:
        health = store.health()
        if health.idle or health.groups != groups:
            # A problem of the disk is none that a restart would fix.
            status = health.problem or f"Serving, {health.queue_depth} writes waiting"
            notifier.send(WATCHDOG=1, STATUS=f"{status}. {reloading.problem}" if reloading.problem else status)
        else:
            notifier.send(STATUS=health.problem or f"The writer is stuck, {health.queue_depth} writes waiting")
        groups = health.groups
        await asyncio.sleep(pause_s)


async def _leave_after(stop: asyncio.Event) -> None:
    """End a start that is asked to stop and hangs: SQLite may wait long for another process's lock."""
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


def _on_hang_up(stop: asyncio.Event, reloading: Reloading, terminals: list[int]) -> None:
    """Reload, or stop if it is a terminal that has been closed: then it is none any more."""
    if terminals == _terminals():
        reloading.ask()
    else:
        stop.set()


def _terminals() -> list[int]:
    return [descriptor for descriptor in range(3) if os.isatty(descriptor)]


def _give_up(after_s: float) -> None:
    print(f"telemetryd: not stopped after {after_s:g} s, exiting", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(EXIT_FAILURE)


def _announce(settings: Settings, daemon: Running) -> None:
    health, introduction = daemon.store.health(), daemon.store.introduction()
    log.info(
        "Serving",
        extra={
            "addresses": daemon.addresses,
            "version": telemetryd.__version__,
            **health.description,
            **introduction.versions,
            "pid": os.getpid(),
        },
    )
    for message, fields in introduction.warnings:
        log.warning(message, extra=dict(fields))
    if settings.api_auth_enabled:
        served = "every client that brings a token"
    elif not settings.api_protected_mode:
        served = "every client that can reach it"
    else:
        served = "this machine only" if settings.tls_client_ca is None else "clients with a certificate only"
    log.info(f"Authentication is {'on' if settings.api_auth_enabled else 'off'}", extra={"served": served})
    if (count := unused(settings)) > 0:
        log.warning("Tokens are not asked for, because TELEMETRY_API_AUTH_ENABLED is false", extra={"tokens": count})
    terminal = next((stream for stream in (sys.stderr, sys.stdout) if stream is not None and stream.isatty()), None)
    if terminal is not None:  # somebody tries it out
        print(_hint(settings, daemon.addresses, served), file=terminal, flush=True)


def _hint(settings: Settings, addresses: Sequence[str], served: str) -> str:
    page = next((f"{address}/" for address in addresses if address.startswith("http")), "/")
    page = page.replace("//0.0.0.0:", "//localhost:").replace("//[::]:", "//localhost:")
    state = "on" if settings.api_auth_enabled else "off"
    return f"telemetryd: ready; try {page}. Authentication is {state}: {served}. Ctrl-C stops."
