"""The systemd protocol without its library: readiness, status, watchdog, socket activation."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Final

_FIRST_DESCRIPTOR: Final = 3
_FIRST_ASKED_S: Final = 2.0
_ASKED_EVERY_S: Final = 10.0
_LONGEST: Final = 800
"""Characters of a value: the manager ignores a message of more than 4,096 bytes, with all that it says."""
_EXTENDED_S: Final = 60.0
"""How much longer the manager waits after each request for time."""


class Notifier:
    """Sends state changes to the service manager (sd_notify(3)); does nothing where there is none.

    The variables are taken out of the environment, so that no child speaks in our name.
    """

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        self._address = environment.pop("NOTIFY_SOCKET", "")
        self.watchdog_s = _watchdog_s(environment)
        """After how many seconds without a sign of life the manager kills us, or None if it does not watch."""

    @property
    def is_active(self) -> bool:
        """Whether somebody listens."""
        return bool(self._address)

    def send(self, **fields: str | int) -> None:
        """Send `READY=1` and the like; a manager that does not listen is no reason to stop serving."""
        if not self._address:
            return
        # A leading @ stands for the NUL byte of Linux's abstract names.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        message = "\n".join(f"{name}={_one_line(value)}" for name, value in fields.items())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
            connection.setblocking(False)
            try:
                connection.sendto(message.encode(), address)
            except OSError:
                return

    def send_reloading(self) -> None:
        """Report that settings are being read again, until the next `READY=1`."""
        self.send(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000, STATUS="Reloading")

    @contextmanager
    def asking_for_time(
        self, status: str, *, first_s: float = _FIRST_ASKED_S, every_s: float = _ASKED_EVERY_S
    ) -> Iterator[None]:
        """Ask the manager again and again not to give up, as long as the block takes (EXTEND_TIMEOUT_USEC).

        A thread does it, because what takes long may block the event loop.
        """
        is_over = threading.Event()

        def ask() -> None:
            pause_s = first_s
            while not is_over.wait(pause_s):
                self.send(EXTEND_TIMEOUT_USEC=round(_EXTENDED_S * 1e6), STATUS=status)
                pause_s = every_s

        if not self.is_active:
            yield
            return
        asking = threading.Thread(target=ask, name="patience", daemon=True)
        asking.start()
        try:
            yield
        finally:
            is_over.set()
            asking.join()


def _one_line(value: str | int) -> str:
    return " ".join(str(value).splitlines())[:_LONGEST]


def _watchdog_s(environment: MutableMapping[str, str]) -> float | None:
    microseconds = environment.pop("WATCHDOG_USEC", "")
    for_process = environment.pop("WATCHDOG_PID", str(os.getpid()))
    if not microseconds.isdigit() or for_process != str(os.getpid()):
        return None
    return int(microseconds) / 1e6 or None


def passed_sockets(environment: MutableMapping[str, str] = os.environ) -> list[socket.socket]:
    """Return the listening sockets that systemd opened for us (sd_listen_fds(3)); none if they are not for us."""
    count = environment.pop("LISTEN_FDS", "")
    for_process = environment.pop("LISTEN_PID", "")
    environment.pop("LISTEN_FDNAMES", None)
    if not count.isdigit() or for_process != str(os.getpid()):
        return []
    descriptors = range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(count))
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return [socket.socket(fileno=descriptor) for descriptor in descriptors]
