"""A blocking HTTP client for tests that talk to a daemon process; no answer at all is status None."""

from __future__ import annotations

import http.client
import json
import time
import urllib.request
from typing import Any
from urllib.parse import urlsplit


def call(url: str, method: str, path: str, body: object = None, timeout_s: float = 60) -> tuple[int | None, Any]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout_s)
    try:
        headers = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError):
        return None, None
    finally:
        connection.close()


def post(url: str, run: object) -> tuple[int | None, Any]:
    return call(url, "POST", "/api/v1/runs", run)


def get(url: str, path: str) -> tuple[int | None, Any]:
    return call(url, "GET", path)


def prometheus(url: str) -> str:
    """Return the metrics as Prometheus reads them."""
    with urllib.request.urlopen(f"{url}/metrics?format=prometheus", timeout=60) as answer:
        return str(answer.read().decode())


def wait_for_health(url: str, status: int) -> Any:
    """Wait until /health has a status, which may be a second late; return its answer."""
    deadline = time.monotonic() + 60
    while (answer := get(url, "/health"))[0] != status:
        assert time.monotonic() < deadline, answer
        time.sleep(0.05)
    return answer[1]
