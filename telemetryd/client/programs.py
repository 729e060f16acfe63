"""Runs a program as a run: its start, its end, what it used, and the last lines of its errors. POSIX only."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from telemetryd.client.context import parent_span
from telemetryd.client.error_stream import ErrorStream
from telemetryd.client.run import Run

_NOT_EXECUTABLE: Final = 126
_NOT_FOUND: Final = 127
SIGNALLED: Final = 128
"""A shell's exit status for a program that could not be started, was not found, or died of signal n: 128 + n
(POSIX, Shell Command Language, section 2.8.2)."""

_OURS: Final = frozenset(
    {
        *(signal.SIGKILL, signal.SIGSTOP),  # nobody can catch them
        *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS),
        # A terminal stops the program and us alike, and a shell looks at us to know that the job is stopped.
        *(signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT),
        *(signal.SIGPIPE, signal.SIGXFSZ),  # what we write ourselves
        signal.SIGCHLD,
    }
)
"""Signals that are not handed on."""
FORWARDED: Final = signal.valid_signals() - _OURS
ENDING: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
"""Signals by which somebody ends a program: it is cancelled then, and has not failed."""
_FROM_THE_KERNEL: Final = 0x80
"""SI_KERNEL (sigaction(2)): a terminal has sent the signal, to the program as well."""
_STARTING_RESETS: Final = frozenset({signal.SIGPIPE, signal.SIGXFSZ})
"""Python ignores these; a program gets them as it would without us."""
_FOREVER_S: Final = 3600.0


class NotStartedError(Exception):
    """A program could not be started; the text says which and why.

    Attributes:
        exit_status: what a shell exits with then: 127 if there is no such program, 126 if it cannot be executed.

    """

    def __init__(self, program: str, error: OSError) -> None:
        super().__init__(f"{program}: {error.strerror}")
        is_missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        self.exit_status = _NOT_FOUND if is_missing else _NOT_EXECUTABLE


@dataclass(frozen=True, slots=True)
class Manner:
    """How a program is run."""

    timeout_s: float | None = None
    """After so many seconds it gets SIGTERM."""
    kill_after_s: float = 10.0
    """And so many seconds later SIGKILL."""
    tail_bytes: int = 0
    """How much of the end of its standard error is kept; 0 leaves its standard error alone."""
    most_events: int = 0
    """How many lines of its standard error become events of the run."""
    kept: tuple[int, ...] = ()
    """Descriptors that it inherits besides the standard ones."""


def block_signals() -> set[signal.Signals]:
    """Block every signal that is handed on, for this thread and those that it starts; return the mask until now.

    Called before any thread is started: a signal that one of them takes would end the process.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who ignores it never learns how a child has ended
    return {signal.Signals(each) for each in signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED | {signal.SIGCHLD})}


def execute(run: Run, command: list[str], manner: Manner, mask: set[signal.Signals]) -> int:
    """Run a program to its end, and record how it ended.

    Args:
        run: the run, not yet started; it is in the spool before the program starts.
        command: the program, looked for in PATH, and its arguments.
        manner: how it is run.
        mask: the signals that are blocked in it: what `block_signals` has returned.

    Returns:
        The program's exit status as a shell gives it: 128 + n if it died of signal n.

    Raises:
        NotStartedError: if the program could not be started.

    """
    run.join(parent_span())
    run.start()
    errors = ErrorStream(run, manner.tail_bytes, manner.most_events) if manner.tail_bytes else None
    try:
        child = _Child.start(run, command, manner, mask, errors)
    except OSError as error:
        if errors is not None:
            errors.end()
        not_started = NotStartedError(command[0], error)
        figures = {"exit_status": not_started.exit_status}
        run.finish("failure", error_summary=str(not_started), metrics_json=figures)
        raise not_started from error
    child.wait()
    tail = b"" if errors is None else errors.end()
    run.finish(child.outcome(), **child.details(tail.decode("utf-8", "replace")))
    return child.exit_status


@dataclass(slots=True)
class _Child:
    """The program while it runs, and how it ended."""

    pid: int
    has_own_group: bool
    manner: Manner
    began: float = field(default_factory=time.monotonic)
    got: set[signal.Signals] = field(default_factory=set)
    """The signals that it was sent, by us or by a terminal."""
    timed_out: bool = False
    exit_code: int | None = None
    """Its exit status, or a signal's number, negative."""
    used: dict[str, float] = field(default_factory=dict)
    own_rss_kib: int = field(default_factory=lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """Our own peak: Linux counts it as the program's as well, because it begins as a copy of us (exec_mmap)."""

    @classmethod
    def start(
        cls,
        run: Run,
        command: list[str],
        manner: Manner,
        mask: set[signal.Signals],
        errors: ErrorStream | None,
    ) -> _Child:
        """Start the program.

        Raises:
            OSError: if it cannot be started.

        """
        has_own_group = not _has_terminal()
        actions = [] if errors is None else [(os.POSIX_SPAWN_DUP2, errors.writing_end, 2)]
        for number in manner.kept:
            os.set_inheritable(number, True)
        options: dict[str, Any] = {"setsigmask": mask, "setsigdef": _STARTING_RESETS, "file_actions": actions}
        if has_own_group:
            options["setpgroup"] = 0
        environment = run.environment()
        try:
            pid = os.posix_spawnp(command[0], command, environment, **options)
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                raise
            # A script without an interpreter: a shell runs it, as execvp(3) does.
            script = shutil.which(command[0]) or command[0]
            pid = os.posix_spawn("/bin/sh", ["/bin/sh", script, *command[1:]], environment, **options)
        return cls(pid, has_own_group, manner)

    def wait(self) -> None:
        """Hand on signals until the program has ended; end it when its time is over."""
        awaited = FORWARDED | {signal.SIGCHLD}
        while not self._has_ended():
            info = signal.sigtimedwait(awaited, self._rest_s())
            if info is None:
                self._hurry()
            elif info.si_signo != signal.SIGCHLD:
                number = signal.Signals(info.si_signo)
                self.got.add(number)
                if info.si_code != _FROM_THE_KERNEL or self.has_own_group:
                    self._send(number)

    def outcome(self) -> str:
        """Return the status of the run."""
        if self.timed_out:
            return "timeout"
        if self.exit_code == 0:
            return "success"
        return "cancelled" if self.got & ENDING else "failure"

    @property
    def exit_status(self) -> int:
        """Return the exit status that a shell gives."""
        code = self.exit_code or 0
        return code if code >= 0 else SIGNALLED - code

    def details(self, tail: str) -> dict[str, Any]:
        """Return the other fields of the run's end."""
        code = self.exit_code or 0
        ended = {"exit_status": code} if code >= 0 else {"signal": signal_name(-code)}
        found: dict[str, Any] = {"metrics_json": {**ended, **self.used}}
        if self.outcome() != "success":
            how = f"exit status {code}" if code >= 0 else f"killed by {signal_name(-code)}"
            if self.timed_out:
                how = f"timed out after {self.manner.timeout_s:g} s: {how}"
            last = next((line.strip() for line in reversed(tail.splitlines()) if line.strip()), "")
            found["error_summary"] = f"{how}: {last}" if last else how
            if tail:
                found["error_details"] = tail
        return found

    def _has_ended(self) -> bool:
        """Reap what has ended; return whether the program has. As the first process of a container we get orphans."""
        anyone = -1 if os.getpid() == 1 else self.pid
        while True:
            try:
                pid, status, usage = os.wait4(anyone, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            if pid == self.pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
                self.used = {"cpu_user_s": round(usage.ru_utime, 3), "cpu_system_s": round(usage.ru_stime, 3)}
                if usage.ru_maxrss > self.own_rss_kib:
                    self.used["max_rss_bytes"] = usage.ru_maxrss * 1024
                return True

    def _rest_s(self) -> float:
        """Return how long to wait at most until something is to be done."""
        timeout_s = self.manner.timeout_s
        if timeout_s is None:
            return _FOREVER_S
        due = self.began + timeout_s + (self.manner.kill_after_s if self.timed_out else 0.0)
        return max(due - time.monotonic(), 0.0)

    def _hurry(self) -> None:
        if self.manner.timeout_s is None or self._rest_s() > 0:
            return
        if self.timed_out:
            self._send(signal.SIGKILL)
        else:
            self.timed_out = True
            self._send(signal.SIGTERM)
        self._send(signal.SIGCONT)  # a stopped program takes no other signal

    def _send(self, number: signal.Signals) -> None:
        try:
            if self.has_own_group:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)
        except (ProcessLookupError, PermissionError):  # it has just ended, or become another user's
            pass


def _has_terminal() -> bool:
    """Return whether we have a controlling terminal: its signals must reach the program, and it may read from it."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def signal_name(number: int) -> str:
    """Return a signal's name, such as SIGTERM."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between the first and the last one
        return f"signal {number}"


def program_name(command: Sequence[str]) -> str:
    """Return the name of a command's program, without its folder."""
    return Path(command[0]).name or command[0]
