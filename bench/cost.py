"""Where a request's processor time goes: by thread, for telemetryd and for limit-http, under the same load.

Processor time counts only what a thread itself does, so this can be measured on a machine that is not idle. While a
thread of Python runs its own code it holds the interpreter's lock: what the event loop, the writer's thread and the
log's thread need together, less what SQLite and the kernel do without the lock, is the least that a request can take.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import click

from bench.scenario import new_nonce
from bench.workplace import LIMIT_HTTP, ROOT, TELEMETRYD_DELETE, TELEMETRYD_WAL, Contender, Workplace, workplace
from bench.wrk import require_wrk

_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
_USER, _SYSTEM = 11, 12
"""Where both stand after the name in /proc/PID/task/TID/stat (proc(5))."""


def _seconds_by_thread(pid: int) -> dict[int, tuple[float, float]]:
    times = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text("ascii").rpartition(")")[2].split()
        times[int(task.name)] = int(fields[_USER]) * _TICK_S, int(fields[_SYSTEM]) * _TICK_S
    return times


def measure(
    place: Workplace, contender: Contender, connections: int, seconds: float
) -> tuple[float, Mapping[str, float]]:
    """Return the requests of a second, and the microseconds of each thread for one request."""
    with place.corner() as corner, place.serving(contender, corner / "telemetry.sqlite") as server:
        place.load(server, "post", connections, 1, new_nonce(), "1").finish()  # warm
        before = _seconds_by_thread(server.process.pid)
        summary = place.load(server, "post", connections, seconds, new_nonce(), "1").finish()
        after = _seconds_by_thread(server.process.pid)
    used = {
        thread: tuple((now - then) / summary.requests * 1e6 for now, then in zip(times, before[thread], strict=True))
        for thread, times in after.items()
        if thread in before
    }
    loop = used.pop(server.process.pid)
    others = sorted(used.values(), key=sum, reverse=True)
    found = {"event loop, own code": loop[0], "event loop, in the kernel": loop[1]}
    for name, times in zip(("busiest other thread (writer)", "next (log)"), others, strict=False):
        found[f"{name}, own code and SQLite"], found[f"{name}, in the kernel"] = times
    return summary.per_second, found


@click.command()
@click.option("--connections", default=64)
@click.option("--seconds", default=5.0)
def main(connections: int, seconds: float) -> None:
    """Print the microseconds of processor time that each thread spends on one request (single POST)."""
    require_wrk()
    with workplace(ROOT / "build" / "bench") as place:
        for contender in (LIMIT_HTTP, TELEMETRYD_WAL, TELEMETRYD_DELETE):
            per_second, found = measure(place, contender, connections, seconds)
            click.echo(f"{contender.name}: {per_second:,.0f} requests/s, {1e6 / per_second:.0f} µs each by the clock")
            for name, microseconds in found.items():
                if microseconds >= 0.5:
                    click.echo(f"    {microseconds:6.1f} µs  {name}")


if __name__ == "__main__":
    main()
