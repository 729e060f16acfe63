"""Death certificates: watches the processes of runs, and closes the runs of those that end without finishing."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from telemetryd.errors import (
    CommandFailedError,
    NotWatchedError,
    RunNotFoundError,
    StoppingError,
    UnavailableError,
    WriterDeadError,
    sentence,
)
from telemetryd.model.commands import Death, EndProcess, RegisterProcess, Registration
from telemetryd.model.processes import Process
from telemetryd.model.queries import ListProcesses
from telemetryd.model.requests import ProcessRequest
from telemetryd.model.values import format_timestamp, shorten, utc_now
from telemetryd.ops import limits
from telemetryd.ops.logs import log
from telemetryd.ops.metrics import Metrics
from telemetryd.services import processes
from telemetryd.services.processes import GoneError, Machine, NotVisibleError
from telemetryd.settings import Settings
from telemetryd.store import Store

_GRACE_S: Final = 0.25
"""A finish may still be on its way when its process is gone; it comes in before the certificate then."""
_RETRY_S: Final = 0.5
_SLICE: Final = 100
_AT_ONCE: Final = 500
_LOOK_EVERY_S: Final = 1.0


def most_processes(settings: Settings) -> int:
    """Return how many processes may be watched: each takes a descriptor, of which connections need most."""
    return min(settings.watched_processes, limits.descriptor_limit() // 4) if settings.death_certificates else 0


@dataclass(slots=True)
class _Watched:
    """A process and the descriptor that names it; many runs may be its own."""

    process: Process
    pidfd: int
    registering: int = 0
    """Registrations that are not stored yet."""
    is_stored: bool = False
    """Whether the database may know it: then it is watched until it has ended, or has nothing to do."""
    has_ended: bool = False


_Key = tuple[int, int]


class Certificates:
    """Watches processes and writes certificates; start it with `resume`, end it with `close`.

    Which runs a process works on stands in the database alone: here is one entry for each process.
    """

    def __init__(self, store: Store, settings: Settings, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._most = most_processes(settings)
        self._machine: Machine | None = processes.this_machine() if settings.death_certificates else None
        self._watched: dict[_Key, _Watched] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._looked_at = 0.0
        metrics.watch_processes(lambda: len(self._watched))

    def resume(self) -> None:
        """Look again, in the background, at the processes that were registered before the daemon was restarted."""
        if self._machine is not None:
            self._start(self._look_again(self._machine))

    async def close(self) -> None:
        """Let go of everything; what is not written now is found at the next start."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for key in [*self._watched]:
            self._let_go(key)

    # --- Registering -----------------------------------------------------------------------------

    async def register(self, event_id: str, wanted: ProcessRequest) -> None:
        """Watch a process that works on a run, and store that it does.

        Raises:
            RunNotFoundError: if there is no such run.
            NotWatchedError: if the process cannot be watched, or the run is not running.
            UnavailableError: if it could not be stored; the same request may be repeated.

        """
        if self._machine is None:
            raise NotWatchedError("Death certificates are off here (TELEMETRY_DEATH_CERTIFICATES, or no pidfds)")
        if wanted.boot_id != self._machine.boot_id:
            raise NotWatchedError("The process runs on another machine, or ran before a reboot of this one")
        key = wanted.pid, wanted.start_time
        if key not in self._watched and len(self._watched) >= self._most:
            await self._let_idle_ones_go()
        watched = self._watched.get(key) or self._take(self._machine, *key)
        watched.registering += 1
        outcome = None
        try:
            # Nothing is awaited between taking it and this: its end is queued after its registration.
            outcome = await self._store.submit(RegisterProcess(event_id, watched.process))
        finally:
            watched.registering -= 1
            watched.is_stored |= outcome in (None, Registration.DONE)  # without an outcome it may have been
        if not (watched.is_stored or watched.registering or watched.has_ended):
            self._let_go(key)  # it must not take a place, least of all for a guess
        if outcome is Registration.NO_RUN:
            raise RunNotFoundError(shorten(event_id))
        if outcome is Registration.NOT_RUNNING:
            raise NotWatchedError("The run is not running")

    def _take(self, machine: Machine, pid: int, start_time: int) -> _Watched:
        if len(self._watched) >= self._most:
            raise NotWatchedError(f"{self._most} processes are watched already (TELEMETRY_WATCHED_PROCESSES)")
        try:
            pidfd = processes.hold(pid, start_time)
        except NotVisibleError as error:
            # Who may write runs need not be on this machine, and must not list its processes; see the log.
            raise NotWatchedError(f"No process {pid} that started at {start_time} can be watched here") from error
        cgroup = processes.cgroup(pid)
        process = Process(
            pid,
            start_time,
            machine.boot_id,
            machine.machine,
            machine.pid_namespace,
            cgroup,
            processes.oom_kills(cgroup),
        )
        return self._watch(process, pidfd)

    def _watch(self, process: Process, pidfd: int) -> _Watched:
        key = process.pid, process.start_time
        watched = self._watched[key] = _Watched(process, pidfd)
        asyncio.get_running_loop().add_reader(pidfd, self._on_end, key)
        return watched

    def _let_go(self, key: _Key) -> None:
        watched = self._watched.pop(key)
        asyncio.get_running_loop().remove_reader(watched.pidfd)
        os.close(watched.pidfd)

    async def _let_idle_ones_go(self) -> None:
        """Give up processes whose runs are all finished; asked for too often, it does nothing."""
        if time.monotonic() - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        busy = {(process.pid, process.start_time) for process in await self._store.fetch(ListProcesses())}
        for key, watched in [*self._watched.items()]:
            if key not in busy and not watched.registering and not watched.has_ended:
                self._let_go(key)

    # --- Ends ------------------------------------------------------------------------------------

    def _on_end(self, key: _Key) -> None:
        watched = self._watched[key]
        watched.has_ended = True
        asyncio.get_running_loop().remove_reader(watched.pidfd)
        kills = processes.oom_kills(watched.process.cgroup)  # now: systemd removes the group of a service that ended
        self._start(self._certify(key, format_timestamp(utc_now()), kills))

    async def _certify(self, key: _Key, ended_at: str, kills: int | None) -> None:
        await asyncio.sleep(_GRACE_S)
        watched = self._watched[key]
        code = processes.exit_code(watched.pidfd)
        self._let_go(key)
        await self._end(watched.process, describe(watched.process, ended_at, code, kills))

    async def _look_again(self, machine: Machine) -> None:
        while True:
            try:
                known = [process for process in await self._store.fetch(ListProcesses()) if self._is_ours(process)]
            except UnavailableError:
                await asyncio.sleep(_RETRY_S)
            else:
                break
        for start in range(0, len(known), _AT_ONCE):  # many ends share a commit
            part = known[start : start + _AT_ONCE]
            await asyncio.gather(*(self._end_unless_alive(process, machine) for process in part))

    def _is_ours(self, process: Process) -> bool:
        """Return whether nobody but this daemon can know of a process: others look after those of their machines."""
        machine = self._machine
        if machine is None or not self._store.is_shared:
            return True
        if process.boot_id != machine.boot_id:
            return process.machine == machine.machine != ""
        return process.pid_namespace == machine.pid_namespace

    async def _end_unless_alive(self, process: Process, machine: Machine) -> None:
        if process.boot_id != machine.boot_id:
            is_here = process.machine == machine.machine != ""
            await self._end(process, _rebooted(process) if is_here else None)
            return
        if (process.pid, process.start_time) in self._watched:  # registered anew, before we came to it
            return
        if process.pid_namespace != machine.pid_namespace or len(self._watched) >= self._most:
            await self._end(process, None)
            return
        try:
            pidfd = processes.hold(process.pid, process.start_time)
        except GoneError:
            kills = processes.oom_kills(process.cgroup)
            await self._end(process, describe(process, format_timestamp(utc_now()), None, kills, while_down=True))
        except NotVisibleError:
            await self._end(process, None)
        else:
            self._watch(process, pidfd).is_stored = True

    async def _end(self, process: Process, death: Death | None) -> None:
        """Write what is known, however long the database takes; without a death the process is only forgotten."""
        more = True
        while more:
            try:
                done = await self._store.submit(EndProcess(process, death, _SLICE))
            except (StoppingError, WriterDeadError):
                return  # the next start looks again
            except UnavailableError as error:
                log.warning("Death certificate postponed", extra={"pid": process.pid, "error_message": sentence(error)})
                await asyncio.sleep(_RETRY_S)
                continue
            except CommandFailedError as error:
                log.error("Death certificate refused", extra={"pid": process.pid, "error_message": sentence(error)})
                return
            more = done.more
            self._metrics.certificates.inc(len(done.failed))
            for event_id in done.failed:
                assert death is not None  # noqa: S101 - without one, nothing fails
                log.warning("Run failed: its process has ended", extra={"event_id": event_id, "pid": process.pid})

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


# --- The words -----------------------------------------------------------------------------------


def describe(
    process: Process, ended_at: str, code: int | None, kills: int | None, *, while_down: bool = False
) -> Death:
    """Say what is known of the end of a process, in the words that its runs get.

    Args:
        process: the one that ended.
        ended_at: when that was seen.
        code: its exit status, negative for a signal; None if it is not known.
        kills: how many out-of-memory kills its control group counted then.
        while_down: whether it ended while no daemon ran.

    """
    before = process.oom_kills
    if code in (None, -signal.SIGKILL) and kills is not None and before is not None and kills > before:
        how = f"Out of memory: process {process.pid} ended before it finished the run"
        more = f"Out-of-memory kills in its control group {process.cgroup} rose from {before} to {kills}."
    elif code is None:
        how, more = f"Process {process.pid} ended without finishing the run", "How it ended is not known."
    elif code < 0:
        how = f"Process {process.pid} was killed by {_signal_name(-code)} before it finished the run"
        more = f"Signal {-code}."
    else:
        how = f"Process {process.pid} exited with status {code} without finishing the run"
        more = f"Exit status {code}."
    seen = f"telemetryd found it gone when it started, at {ended_at}" if while_down else f"seen at {ended_at}"
    return Death(ended_at, how, f"{more} {_certificate(process)}; {seen}.")


def _rebooted(process: Process) -> Death:
    moment = format_timestamp(datetime.fromtimestamp(processes.booted_at(), UTC))
    return Death(
        moment,
        f"The machine was rebooted before process {process.pid} finished the run",
        f"{_certificate(process)}; this boot began at {moment}.",
    )


def _certificate(process: Process) -> str:
    return f"Death certificate of process {process.pid}, started {process.start_time} ticks into boot {process.boot_id}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
