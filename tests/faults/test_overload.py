"""More than the daemon can take: 503 for what the queue does not hold, /health at once, and full speed after it."""

from __future__ import annotations

import contextlib
import json
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import wrk
from bench.rows import Ids
from bench.scenario import new_nonce
from bench.shim import slow_fsync
from tests.conftest import Daemon, StartDaemon, make_run
from tests.faults.conftest import Rounds
from tests.faults.control import calm, check_health, control, probe
from tests.faults.ledger import Ledger
from tests.faults.told import Told
from tests.needs import require_program

_QUEUE = 20
_FSYNC_MS = 100
"""So that the disk can take about 200 runs a second, whatever the machine."""

_SENDERS = 4
"""Few enough to add little to the load, and enough that some of what they send is accepted."""


def resident_mb(daemon: Daemon, name: str = "VmRSS") -> float:
    """How much memory the daemon has (VmHWM: had at most)."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) / 1024


@contextlib.contextmanager
def overload(url: str, connections: int, seconds: float) -> Iterator[wrk.Wrk]:
    load = wrk.start(url, "post", connections, seconds, new_nonce(), Ids.RANDOM)
    try:
        yield load
    finally:
        load.kill()


def probe_under_load(connections: int) -> list[float]:
    """How long the control takes to answer while as many clients keep it busy."""
    with control() as url, overload(url, connections, 10):
        time.sleep(0.5)
        return [probe(url) for _ in range(15)]


def run_through(start_daemon: StartDaemon, tmp_path: Path, ledger: Ledger, connections: int, seconds: float) -> None:
    require_program("wrk", "wrk")
    require_program("gcc", "gcc")
    was_calm = calm()
    controls = probe_under_load(connections)
    daemon = start_daemon(
        TELEMETRY_DB_JOURNAL_MODE="WAL",
        TELEMETRY_QUEUE_MAX=str(_QUEUE),
        **slow_fsync(tmp_path, _FSYNC_MS),
    )
    told = Told(daemon.url)
    alone = timed(told, 5)
    before = resident_mb(daemon)
    healths: list[float] = []
    accepted: list[float] = []
    refused: list[float] = []

    def send_until(end: float) -> None:
        run = make_run()
        while time.monotonic() < end:
            started = time.monotonic()
            status = told.send(run)
            (accepted if status == 201 else refused).append(time.monotonic() - started)
            if status == 201:
                run = make_run()

    with overload(daemon.url, connections, seconds) as load:
        time.sleep(0.5)
        end = time.monotonic() + seconds - 1
        senders = [threading.Thread(target=send_until, args=(end,)) for _ in range(_SENDERS)]
        for sender in senders:
            sender.start()
        while time.monotonic() < end:
            started = time.monotonic()
            assert told.health()[0] in (200, 503)
            healths.append(time.monotonic() - started)
            time.sleep(0.01)
        for sender in senders:
            sender.join()
        output, errors = load.process.communicate()
    told.send_until(lambda status: status == 201)  # what was queued at the end goes first
    afterwards = timed(told, 5)
    assert load.process.returncode == 0, errors
    line = next(line for line in output.splitlines() if line.startswith("SUMMARY "))
    summary = wrk.Summary(**json.loads(line.removeprefix("SUMMARY ")))

    assert resident_mb(daemon, "VmHWM") - before < 100
    assert refused
    assert told.details[-1].startswith("Too many writes are waiting")
    controls += probe_under_load(connections)  # again: what else the machine does may have changed
    check_health(healths, controls, was_calm=was_calm)
    if was_calm:  # else the clients of the load have less of the machine, too
        assert summary.requests > 10 * summary.acknowledged, f"that was no overload: {summary}"
        assert len(accepted) >= 5, "too few to tell how long they take"
        assert statistics.median(accepted) < 6 * _FSYNC_MS / 1000 + 4 * statistics.median(controls), sorted(accepted)
        assert max(accepted) < 20 * _FSYNC_MS / 1000, sorted(accepted)
        assert afterwards < 2 * alone + 0.2, "it is as fast as before, at once"

    stored = told.call("GET", "/metrics")[2]["total_runs"]
    acknowledged = summary.acknowledged + len(told.acknowledged)
    told.repeat()
    assert daemon.stop() == 0
    counted = told.compare(daemon.database)
    counted["acknowledged"] = acknowledged
    counted["lost"] += max(0, acknowledged - stored)
    ledger.record(
        fault=f"overload, {summary.requests / max(1, summary.acknowledged):.0f} times what the disk takes, "
        f"{seconds:.0f} s over {connections} connections; slowest /health {max(healths) * 1000:.0f} ms",
        mode="WAL",
        rounds=1,
        **counted,
    )


def timed(told: Told, count: int) -> float:
    """Return the median of how long a run takes that is sent alone."""
    times = []
    for _ in range(count):
        started = time.monotonic()
        assert told.send() == 201
        times.append(time.monotonic() - started)
    return statistics.median(times)


def test_ten_times_what_it_can_take(start_daemon: StartDaemon, tmp_path: Path, ledger: Ledger) -> None:
    run_through(start_daemon, tmp_path, ledger, connections=64, seconds=5)


@pytest.mark.slow
def test_ten_times_what_it_can_take_for_minutes(
    start_daemon: StartDaemon, tmp_path: Path, ledger: Ledger, rounds: Rounds
) -> None:
    run_through(start_daemon, tmp_path, ledger, connections=64, seconds=rounds(180, least=60))
