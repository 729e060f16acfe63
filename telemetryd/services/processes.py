"""Facts about a local process: whether it is the one that was meant, whether it has ended, and how."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import select
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
_CGROUPS: Final = Path("/sys/fs/cgroup")
# cgroups(7): version 2, which counts a group's own kills apart; version 1; a mixture of both.
_KILL_COUNTS: Final = (
    ("", "memory.events.local"),
    ("memory", "memory.oom_control"),
    ("unified", "memory.events.local"),
)
_MACHINE_IDS: Final = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))

# ioctl_pidfd(2): struct pidfd_info with mask, cgroupid, eleven numbers, exit_code; the kernel reports the last one
# (from 6.15) only of a process that its parent has waited for.
_PIDFD_INFO: Final = struct.Struct("QQ11Ii")
_PIDFD_GET_INFO: Final = 0xC0000000 | _PIDFD_INFO.size << 16 | 0xFF << 8 | 11
_PIDFD_INFO_EXIT: Final = 1 << 3


@dataclass(frozen=True, slots=True)
class Machine:
    """Where this process runs; a pid means something only together with all of it."""

    boot_id: str
    machine: str
    """A hash of the machine's id (machine-id(5) asks not to show the id itself); empty if it has none."""
    pid_namespace: str


def this_machine() -> Machine | None:
    """Return where we run, or None if processes cannot be watched here."""
    if not hasattr(os, "pidfd_open"):  # a Python that was built for older kernels
        return None
    try:
        os.close(os.pidfd_open(os.getpid()))
        boot_id = (PROC / "sys/kernel/random/boot_id").read_text("ascii").strip()
        namespace = os.readlink(PROC / "self/ns/pid")
    except OSError:  # no /proc, a sandbox, a kernel before 5.3
        return None
    return Machine(boot_id, _machine(), namespace) if start_time(os.getpid()) is not None else None


def _machine() -> str:
    for path in _MACHINE_IDS:
        try:
            identity = path.read_text("ascii").strip()
        except OSError:
            continue
        if identity:
            return hashlib.blake2b(identity.encode(), digest_size=16, person=b"telemetryd").hexdigest()
    return ""


def booted_at() -> float:
    """Return the moment of this boot, in seconds since the epoch."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


class NotVisibleError(Exception):
    """There is no such process here, or it is unknown whether it is the one."""


class GoneError(NotVisibleError):
    """The process has ended: its pid is free, or another process has it."""


def hold(pid: int, started: int) -> int:
    """Return a pidfd of the process with a pid and a start time, which names it even after its end.

    The pidfd comes first: whatever has the start time that was claimed before has had the pid all the time.

    Raises:
        GoneError: if it has ended.
        NotVisibleError: if there is none that can be recognised here; also for a thread that is not a process.

    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise GoneError(f"There is no process {pid} here") from error
    except OSError as error:
        what = "not a process" if error.errno in (errno.EINVAL, errno.ENOENT) else f"not open to us ({error.strerror})"
        raise NotVisibleError(f"{pid} is {what}") from error
    try:
        _recognise(descriptor, pid, started)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _recognise(descriptor: int, pid: int, started: int) -> None:
    found = start_time(pid)
    if has_ended(descriptor) or (found is not None and found != started):
        raise GoneError(f"Process {pid} has ended, or is not the one that started at {started}")
    if found is None:
        raise NotVisibleError(f"Process {pid} is hidden from us")


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot (field 22 of proc_pid_stat(5)); None if hidden."""
    try:
        line = (PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    return int(line.rpartition(b")")[2].split()[19])  # the name in front of it may hold anything


def has_ended(pidfd: int) -> bool:
    """Return whether a process has ended, be it waited for or not."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def exit_code(pidfd: int) -> int | None:
    """Return how an ended process ended (negative: by a signal), or None if that is not known, or not yet."""
    info = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, *[0] * 13))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:
        return None
    mask, *_, status = _PIDFD_INFO.unpack(info)
    return os.waitstatus_to_exitcode(status) if mask & _PIDFD_INFO_EXIT else None


def cgroup(pid: int) -> str | None:
    """Return the path of the control group that bounds a process's memory, as we see it, or None."""
    try:
        lines = (PROC / str(pid) / "cgroup").read_text("utf-8", "replace")
    except OSError:
        return None
    found = _VERSION_1.search(lines) or _VERSION_2.search(lines)
    return found[1] if found and ".." not in found[1].split("/") else None


_VERSION_1: Final = re.compile(r"^\d+:(?:[^:]*,)?memory(?:,[^:]*)?:(/.*)$", re.MULTILINE)
_VERSION_2: Final = re.compile(r"^0::(/.*)$", re.MULTILINE)


def oom_kills(path: str | None, groups: Path = _CGROUPS) -> int | None:
    """Return how many processes of a control group the kernel has killed for lack of memory, or None if unknown."""
    if path is None:
        return None
    for hierarchy, name in _KILL_COUNTS:
        try:
            counts = (groups / hierarchy / path.lstrip("/") / name).read_text("ascii")
        except OSError:
            continue
        found = re.search(r"^oom_kill (\d+)$", counts, re.MULTILINE)
        return int(found[1]) if found else None
    return None
