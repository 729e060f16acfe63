"""The context of a run: time, host, process, parent run."""

from __future__ import annotations

import itertools
import os
import re
import sys
import time
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from telemetryd import traces
from telemetryd.client.git import git_fields
from telemetryd.traces import Span

if TYPE_CHECKING:
    from collections.abc import Mapping

PARENT_VARIABLE: Final = "TELEMETRY_PARENT_RUN_ID"
"""Hands the enclosing run's run_id to child processes."""


class Enclosing(Protocol):
    """What is asked of the run around what a task or a thread does."""

    run_id: str
    span: Span | None

    def event(self, event_type: str | None = None, payload: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Record something that happened during the run."""


enclosing_run: ContextVar[Enclosing | None] = ContextVar("telemetryd_enclosing_run", default=None)


def parent_run_id() -> str | None:
    """Return the run_id of the enclosing run: of this task or thread, else of the parent process."""
    run = enclosing_run.get()
    return os.environ.get(PARENT_VARIABLE) or None if run is None else run.run_id


def parent_span() -> Span | None:
    """Return the span of the enclosing run: of this task or thread, else what the parent process hands on."""
    run = enclosing_run.get()
    return Span.parse(os.environ.get(traces.VARIABLE)) if run is None else run.span


# --- Identities ----------------------------------------------------------------------------------


def _first_suffix() -> int:
    return int.from_bytes(os.urandom(4))


_suffixes = itertools.count(_first_suffix())
_SCATTER: Final = 0x9E3779B1
"""Odd, so that multiplying by it maps 32 bits one to one."""


def _after_fork() -> None:
    global _suffixes  # noqa: PLW0603 - a forked process must not go on where its parent goes on
    _suffixes = itertools.count(_first_suffix())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.-]+")
_MAX_AGENT: Final = 200


def new_run_id(agent_name: str) -> str:
    """Return a run_id such as 20251231T153045Z-hugo-translator-a1b2c3d4.

    Random digits alone would soon be the same for two runs of one second, where there are thousands of them: 32 bits
    are few. So each process counts from a different start, and scatters the numbers.
    """
    suffix = next(_suffixes) * _SCATTER & 0xFFFFFFFF
    agent = _UNSAFE.sub("-", agent_name)[:_MAX_AGENT] if not agent_name.isidentifier() else agent_name[:_MAX_AGENT]
    return f"{_second(time.time())[1]}-{agent}-{suffix:08x}"


# --- Time ----------------------------------------------------------------------------------------

_cached_second: tuple[int, str, str] = (0, "", "")


def _second(moment: float) -> tuple[str, str]:
    """Return a moment's second as 2025-12-31T15:30:45 and as 20251231T153045Z; the last one is remembered."""
    global _cached_second  # noqa: PLW0603 - a cache of one, replaced whole
    whole = int(moment)
    known = _cached_second
    if known[0] != whole:
        parts = time.gmtime(whole)
        known = (whole, time.strftime("%Y-%m-%dT%H:%M:%S", parts), time.strftime("%Y%m%dT%H%M%SZ", parts))
        _cached_second = known
    return known[1], known[2]


def timestamp(moment: float | None = None) -> str:
    """Return a moment (seconds since the epoch; by default now) as 2025-12-31T15:30:45.123456Z."""
    moment = time.time() if moment is None else moment
    return f"{_second(moment)[0]}.{int(moment % 1 * 1_000_000):06d}Z"


# --- The process ---------------------------------------------------------------------------------


def host() -> str:
    """Return the name of this machine."""
    if hasattr(os, "uname"):
        return os.uname().nodename
    return os.environ.get("COMPUTERNAME", "")


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """What names one process for as long as the machine runs."""

    pid: int
    start_time: int
    """Clock ticks since the machine started: field 22 of /proc/PID/stat (proc(5))."""
    boot_id: str

    @classmethod
    def own(cls) -> ProcessIdentity | None:
        """Return this process's identity, or None where /proc does not tell it."""
        if sys.platform != "linux":
            return None
        try:
            stat = Path("/proc/self/stat").read_bytes()
            boot_id = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
            # The second field is the program's name in parentheses, and may hold blanks and parentheses.
            return cls(os.getpid(), int(stat.rpartition(b")")[2].split()[19]), boot_id)
        except (OSError, ValueError, IndexError):
            return None


# --- What every run gets by itself ---------------------------------------------------------------


class Surroundings:
    """The fields that each run of this process gets by itself: host and git, looked up again now and then.

    Args:
        given: fields with values of the user's own, which win.
        fresh_s: how long what was read of git is taken for true.

    """

    def __init__(self, given: Mapping[str, str], fresh_s: float = 5.0) -> None:
        self._given = dict(given)
        self._fresh_s = fresh_s
        self._until = 0.0
        self._fields: dict[str, str] = {}

    def fields(self) -> dict[str, str]:
        """Return the fields; the caller does not change them."""
        now = time.monotonic()
        if now >= self._until:
            self._until = now + self._fresh_s
            try:
                folder = Path.cwd()
            except OSError:  # the folder was deleted under us
                folder = Path("/")
            self._fields = {"host": host(), **git_fields(folder), **self._given}
        return self._fields
