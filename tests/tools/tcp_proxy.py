"""A TCP proxy to a Unix socket that breaks PostgreSQL's connections at a chosen moment."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Final

_COMMIT: Final = b"COMMIT\0"
"""As it stands in a Parse or Query message (postgresql.org/docs/current/protocol-message-formats.html)."""
_WRITES: Final = b"INSERT INTO run_deltas"
"""What only a connection sends that writes what clients send."""
_IN_TURN: Final = b"INSERT INTO run_changes"
"""What a connection sends when it has the turn to draw numbers."""
_TAG: Final = b"COMMIT\0"
"""As it stands in the server's CommandComplete message."""


class Cut(StrEnum):
    """What happens to the next COMMIT of a connection that writes what clients send."""

    NEVER = "never"
    BEFORE = "before"
    """The server does not get it."""
    AFTER = "after"
    """The server has done it, and its answer is lost."""
    FREEZE = "freeze"
    """The server has done it, and nothing comes through any more."""
    HOLD = "hold"
    """The server has got everything up to the turn to draw numbers, and gets nothing any more: all is held."""


class Proxy:
    """Listens on loopback, and passes everything on to a server's socket until it is told to break it off."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self.cut = Cut.NEVER
        self.holds = threading.Event()
        """Set when a connection is held in the turn."""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._open: list[socket.socket] = []
        self._writing: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(str(self._target))
                self._open += [client, server]
                for pass_on, source, sink in ((self._to_server, client, server), (self._to_client, server, client)):
                    threading.Thread(target=pass_on, args=(source, sink), daemon=True).start()

    def _to_server(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                if _WRITES in data:
                    self._writing.add(server)
                if server in self._writing and self.cut is Cut.BEFORE and _COMMIT in data:
                    self.cut = Cut.NEVER
                    break
                if server in self._writing and self.cut is Cut.HOLD and _IN_TURN in data:
                    self.cut = Cut.NEVER
                    server.sendall(data[: data.index(_IN_TURN)])
                    self.holds.set()
                    return
                server.sendall(data)
        _end(client, server)

    def _to_client(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if server in self._writing and self.cut in (Cut.AFTER, Cut.FREEZE) and _TAG in data:
                    frozen, self.cut = self.cut is Cut.FREEZE, Cut.NEVER
                    if frozen:
                        return
                    break
                client.sendall(data)
        _end(client, server)

    def close(self) -> None:
        """Break everything off."""
        self._listening.close()
        _end(*self._open)


def _end(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


@contextlib.contextmanager
def proxy_to(target: Path) -> Iterator[Proxy]:
    """Run a proxy to a socket inside the block."""
    proxy = Proxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
