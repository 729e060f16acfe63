"""The process that works on a run, as commands register it and queries return it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Process:
    """A process that works on runs, as this machine knows it: neither a number used again nor a namesake elsewhere."""

    pid: int
    start_time: int
    """Clock ticks since boot (field 22 of /proc/PID/stat)."""
    boot_id: str
    machine: str
    """A hash of the machine's id; empty if it has none."""
    pid_namespace: str
    """The namespace in which the pid counts."""
    cgroup: str | None = None
    oom_kills: int | None = None
    """The cgroup's count of out-of-memory kills when the process was registered."""
