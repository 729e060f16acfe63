"""The least that a server in Python can be: what it needs for an answer, the machine needs, and not telemetryd."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

from aiohttp import web

LIMIT_S = 0.1
"""What /health may take where nothing else is at work."""


@contextlib.contextmanager
def control() -> Iterator[str]:
    """Run a server that answers everything with the same few bytes; yield its address."""
    process = subprocess.Popen([sys.executable, "-m", "tests.faults.control"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def probe(url: str) -> float:
    """Ask for the health over a new connection; return for how many seconds that took."""
    started = time.monotonic()
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)) as connection:
        connection.request("GET", "/health")
        connection.getresponse().read()
    return time.monotonic() - started


def calm() -> bool:
    """Whether the machine has the processors that such a test needs; others may be at work. Ask before the test."""
    return os.getloadavg()[0] <= (os.cpu_count() or 1)


def check_health(healths: list[float], controls: list[float], *, was_calm: bool) -> None:
    """Compare how long /health took with what the control took for its answers, under the same load.

    A machine that is busy with other work slows both down, and neither at the same moments: there only an answer that
    waits for the writer's whole backlog is a fault for sure.
    """
    assert min(len(healths), len(controls)) >= 5, "too few to tell"
    usual = statistics.median(controls)
    most = sorted(healths)[len(healths) * 9 // 10]
    measured = (
        f"{statistics.median(healths):.3f}, {most:.3f}, {max(healths):.3f} s next to {usual:.3f}, {max(controls):.3f}"
    )
    assert statistics.median(healths) < max(10 * LIMIT_S, 10 * usual), measured
    if was_calm:
        assert statistics.median(healths) < max(LIMIT_S, 4 * usual), measured
        assert most < max(2 * LIMIT_S, 8 * usual), measured
        assert max(healths) < max(LIMIT_S, 2 * max(controls), 8 * usual), measured


async def _answer(_: web.BaseRequest) -> web.Response:
    return web.json_response({"detail": "no"}, status=503)


async def _serve() -> None:
    runner = web.ServerRunner(web.Server(_answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)  # noqa: T201
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve())
