"""A proxy that shows a daemon under a sub-path, as nginx does with `location /telemetry/ { proxy_pass …/; }`."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import urlsplit

PREFIX: Final = "/telemetry"
_HOP_BY_HOP: Final = ("connection", "transfer-encoding", "content-length", "keep-alive")


@contextlib.contextmanager
def sub_path(target: str, headers: dict[str, str] | None = None) -> Iterator[str]:
    """Give the address under which the daemon at `target` is found; `headers` are added to each request."""
    daemon = urlsplit(target).netloc

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(f"{PREFIX}/"):
                self.send_error(404)  # what is there belongs to somebody else
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            connection = http.client.HTTPConnection(daemon, timeout=60)
            passed = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
            with contextlib.closing(connection), contextlib.suppress(OSError):  # the browser may leave
                connection.request(self.command, self.path.removeprefix(PREFIX), body, passed | (headers or {}))
                response = connection.getresponse()
                self.send_response_only(response.status)
                for name, value in response.getheaders():
                    if name.lower() not in _HOP_BY_HOP:
                        self.send_header(name, value)
                self.end_headers()
                while part := response.read1(65536):
                    self.wfile.write(part)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}{PREFIX}"
    finally:
        server.shutdown()
        server.server_close()
