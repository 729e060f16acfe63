"""Measures the client: what a call costs the agent, events per second end to end, memory while the daemon is down.

python -m bench.agent        (make bench-client)
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
import orjson

from bench.client import Client as Probe
from bench.errors import BenchError
from telemetryd.client import Client

TARGET_CALL_US: Final = 20.0
TARGET_RATE: Final = 25_000
_RUN: Final[dict[str, Any]] = {
    "agent_name": "hugo-translator",
    "job_type": "translate_directory",
    "start_time": "2025-12-24T10:00:00Z",
    "end_time": "2025-12-24T10:05:00Z",
    "status": "success",
    "items_discovered": 100,
    "items_succeeded": 98,
    "duration_ms": 300_000,
    "metrics_json": {"tokens": 12345, "cost": 0.25},
}


def _start_daemon(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    log_file = folder / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    environment |= {"TELEMETRY_DB_PATH": str(folder / "telemetry.sqlite"), "TELEMETRY_DB_JOURNAL_MODE": "WAL"}
    command = [sys.executable, "-m", "telemetryd", "serve", "--port", "0", "--log-format", "json"]
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for line in log_file.read_bytes().splitlines():
            if b'"Serving"' in line:
                return process, int(orjson.loads(line)["addresses"][0].rpartition(":")[2])
        time.sleep(0.05)
    process.kill()
    raise BenchError(f"The daemon did not start: {log_file.read_text()}")


def _times(call: Callable[[], object], count: int) -> tuple[float, float]:
    """Return the median and the 99th percentile of how long a call takes, in µs."""
    clock = time.perf_counter
    times = []
    for _ in range(count):
        began = clock()
        call()
        times.append(clock() - began)
    cuts = statistics.quantiles(times, n=100)
    return statistics.median(times) * 1e6, cuts[98] * 1e6


def _calls(url: str, folder: Path, *, send: bool) -> list[str]:
    client = Client(url, buffer_dir=folder / f"calls-{send}", send=send)
    run = client.run("bench", "calls").start()
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "record(dict)": (lambda: client.record(_RUN), 30_000),
        "run.event(…)": (lambda: run.event("step", number=1), 10_000),
        "run.metrics(…)": (lambda: run.metrics(tokens=5), 10_000),
        "run().start()": (lambda: client.run("bench", "calls").start(), 3000),
    }
    lines = []
    for name, (call, count) in calls.items():
        median, p99 = _times(call, count)
        verdict = "" if median < TARGET_CALL_US else "  MISSED"
        lines.append(f"  {name:<16} median {median:6.1f} µs   p99 {p99:8.1f} µs{verdict}")
        if send:
            client.flush(120)
    client.close(60)
    return lines


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _memory(folder: Path, seconds: float) -> str:
    client = Client("http://127.0.0.1:9", buffer_dir=folder / "down", max_bytes=256 << 20, flush_timeout_s=0)
    for _ in range(20_000):
        client.record(_RUN)
    before = _resident()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        client.record(_RUN)
    grown = _resident() - before
    recorded = client.stats()["recorded"]
    client.close(0)
    return f"  {recorded:,} runs in {seconds:g} s with the daemon down: {grown / 1024:+.0f} KiB"


def _rate(url: str, port: int, folder: Path, count: int, **settings: Any) -> float:
    """Return events per second from the first call to the last acknowledgement, each stored."""
    probe = Probe(port)
    stored = _total(probe)
    client = Client(url, buffer_dir=folder / f"rate-{stored}", **settings)
    began = time.perf_counter()
    for _ in range(count):
        client.record(_RUN)
    if not client.flush(300):
        raise BenchError(f"Not everything was acknowledged: {client.stats()}")
    seconds = time.perf_counter() - began
    client.close()
    if _total(probe) - stored != count:
        raise BenchError(f"{count} sent, {_total(probe) - stored} stored")
    probe.close()
    return count / seconds


def _total(probe: Probe) -> int:
    return int(probe.get("/metrics")[1].partition(b'"total_runs":')[2].partition(b",")[0])


@click.command()
@click.option("--events", default=200_000, show_default=True, help="Events of an end-to-end round.")
@click.option("--rounds", default=3, show_default=True, help="Rounds, of which the median counts.")
@click.option("--memory-seconds", default=60.0, show_default=True, help="How long the daemon is down.")
def main(events: int, rounds: int, memory_seconds: float) -> None:
    r"""Measure the client on this machine, with the daemon next to it.

    \b
    Examples:
      python -m bench.agent
      python -m bench.agent --memory-seconds 3600
    """
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as name:
        folder = Path(name)
        daemon, port = _start_daemon(folder)
        url = f"http://127.0.0.1:{port}"
        try:
            click.echo(f"What a call costs the agent (target: median under {TARGET_CALL_US:g} µs)")
            click.echo("\n".join(_calls(url, folder, send=False)))
            click.echo(" while the background thread sends")
            click.echo("\n".join(_calls(url, folder, send=True)))
            rates = sorted(_rate(url, port, folder, events) for _ in range(rounds))
            middle = rates[len(rates) // 2]
            click.echo(f"Events per second end to end, one process (target: {TARGET_RATE:,})")
            click.echo(
                f"  {middle:,.0f} (of {', '.join(f'{rate:,.0f}' for rate in rates)}; {events:,} a round)"
                + ("" if middle >= TARGET_RATE else "  MISSED")
            )
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)
        click.echo("Memory while the daemon is down (target: flat)")
        click.echo(_memory(folder, memory_seconds))


if __name__ == "__main__":
    main()
