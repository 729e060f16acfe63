"""The signals by which somebody ends a program, while they are blocked in this process. POSIX only."""

from __future__ import annotations

import signal
from typing import Final

ENDING: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})


def ending_signals() -> set[int]:
    """Return those that end us: nohup(1) or a shell may have had us ignore some, and what we start as well."""
    return {number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN}


def wait_for_ending(timeout_s: float) -> int | None:
    """Wait until one comes, and take it; return its number, or None after a time."""
    info = signal.sigtimedwait(ending_signals(), timeout_s)
    return None if info is None else info.si_signo


def is_ending() -> bool:
    """Return whether one has come that nobody has taken yet."""
    return bool(signal.sigpending() & ending_signals())
