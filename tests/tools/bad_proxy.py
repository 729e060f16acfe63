"""A proxy between client and daemon that answers as it is told: errors, garbage, halves, or not at all."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

DAEMONS = {"Telemetry-Server": "telemetryd/4"}
"""By this the daemon's own answers are told from a proxy's."""
ERRORS = {
    "503": (503, {"Retry-After": "0"}, b'{"detail":"Too many writes are waiting"}'),
    "429": (429, {"Retry-After": "0"}, b'{"detail":"Too many requests"}'),
    "500": (500, {}, b'{"detail":"Internal error"}'),
    "502": (502, {}, b"<html>Bad gateway</html>"),
    "408": (408, {}, b""),
    "200 of somebody else": (200, {"Content-Type": "text/html"}, b"<html>Welcome to the hotel's network</html>"),
    "200 of nonsense": (200, {}, b'{"inserted": 0, "duplicates": 0, "errors": [], "total": 0}'),
}
BREAKS = ("garbage", "half", "half headers", "lost before", "lost after", "slow")
"""What else a proxy can do to a request; "lost after" means that the daemon has it and the answer is lost."""


class BadProxy:
    """Forwards to a daemon, except that the next requests get what stands in `script`."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target).netloc
        self.script: list[str] = []
        self.seen: list[tuple[str, str, int]] = []
        """Method, path and length of the body of each request."""
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.flow: str | None = None
        """A Telemetry-Flow header to put into answers."""
        self.limit: int | None = None
        """How large a body may be, as nginx's client_max_body_size."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                proxy.handle(self)

            do_PATCH = do_POST  # noqa: N815
            do_GET = do_POST  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        self.seen.append((request.command, request.path, len(body)))
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.bodies.append(body)
        if self.limit is not None and len(body) > self.limit:
            self._answer(request, 413, {"Content-Type": "text/html"}, b"<html>413 Request Entity Too Large</html>")
            return
        what = self.script.pop(0) if self.script else "pass"
        if what in ERRORS:
            self._answer(request, *ERRORS[what])
            return
        if what == "garbage":
            request.wfile.write(b"\x00\xff this is not HTTP\r\n\r\n")
        if what in ("garbage", "lost before"):
            request.close_connection = True
            return
        if what == "slow":
            time.sleep(0.5)
        status, headers, answer = self._forward(request, body)
        if what == "lost after":
            request.close_connection = True
        elif what in ("half", "half headers"):
            head = f"HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\nContent-Length: {len(answer)}\r\n\r\n"
            whole = head.encode() + answer
            request.wfile.write(whole[: len(head) + 10 if what == "half" else 20])
            request.close_connection = True
        else:
            self._answer(request, status, headers, answer)

    def _forward(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.target, timeout=60)
        with contextlib.closing(connection):
            kept = ("content-type", "content-encoding", "authorization")
            headers = {name: value for name, value in request.headers.items() if name.lower() in kept}
            connection.request(request.command, request.path, body or None, headers)
            response = connection.getresponse()
            answer = response.read()
            names = ("content-type", "link", "telemetry-flow", "telemetry-server")
            passed = {name: value for name, value in response.getheaders() if name.lower() in names}
            if self.flow is not None:
                passed["Telemetry-Flow"] = self.flow
            return response.status, passed, answer

    def _answer(self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
        with contextlib.suppress(OSError):
            request.send_response(status)
            for name, value in headers.items():
                request.send_header(name, value)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def bad_proxy(target: str) -> Iterator[BadProxy]:
    proxy = BadProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
