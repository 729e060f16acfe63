"""A client with one kept connection and next to no cost of its own, to time single requests."""

from __future__ import annotations

import re
import socket
import time
from typing import Final

from bench.errors import BenchError

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_LAST_CHUNK: Final = b"\r\n0\r\n\r\n"


class Client:
    """One connection to a server on this machine."""

    def __init__(self, port: int, timeout_s: float = 60) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get(self, path: str) -> tuple[int, bytes]:
        """Return the status and the body of an answer."""
        return self._request(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    def post(self, path: str, body: bytes) -> None:
        """Send a JSON document.

        Raises:
            BenchError: if it is not accepted.

        """
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        status, answer = self._request(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if status not in (200, 201):
            raise BenchError(f"POST {path} answered {status}: {answer[:300]!r}")

    def download(self, path: str) -> int:
        """Receive an answer of any length, which ends the connection; return how many bytes it has.

        Raises:
            BenchError: if it is not 200, or was broken off.

        """
        self._socket.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        count, start, end = 0, b"", b""
        while part := self._socket.recv(1 << 18):
            count, start, end = count + len(part), start or part, (end + part)[-len(_LAST_CHUNK) :]
        if not start.startswith(b"HTTP/1.1 200") or end != _LAST_CHUNK:
            raise BenchError(f"GET {path} was refused or broken off: {start[:300]!r} … {end!r}")
        return count

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

    def _request(self, request: bytes) -> tuple[int, bytes]:
        self._socket.sendall(request)
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

    def _receive(self) -> bytes:
        part = self._socket.recv(1 << 18)
        if not part:
            raise BenchError("The server closed the connection")
        return part
