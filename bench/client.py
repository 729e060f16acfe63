"""A client with one kept connection and next to no cost of its own, to time single requests."""

from __future__ import annotations

import re
import socket
import time
from typing import Final

from bench.errors import BenchError

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Client:
    """One connection to a server on this machine."""

    def __init__(self, port: int, timeout_s: float = 60) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get(self, path: str) -> tuple[int, bytes]:
        """Return the status and the body of an answer."""
        self._socket.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        received = b""
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += self._receive()
        length = _LENGTH.search(received, 0, end + 2)
        if length is None:
            raise BenchError(f"An answer without a length: {received[:end]!r}")
        parts, missing = [received[end + 4 :]], int(length[1]) - (len(received) - end - 4)
        while missing > 0:
            parts.append(self._receive())
            missing -= len(parts[-1])
        return int(received[9:12]), b"".join(parts)

    def time_get(self, path: str, requests: int, seconds: float) -> list[float]:
        """Return how long each of some requests took: as many as asked for, or as fit into the time, but one.

        A query that the daemon cuts off at its deadline (503) counts with the time it took until then.

        Raises:
            BenchError: if the answer is neither.

        """
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < requests and (not times or time.perf_counter() < end):
            started = time.perf_counter()
            status, body = self.get(path)
            times.append(time.perf_counter() - started)
            if status not in (200, 503):
                raise BenchError(f"GET {path} answered {status}: {body[:300]!r}")
        return times

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _receive(self) -> bytes:
        part = self._socket.recv(1 << 18)
        if not part:
            raise BenchError("The server closed the connection")
        return part
