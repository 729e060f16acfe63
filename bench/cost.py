"""Where a request's processor time goes: by thread, for telemetryd and for limit-http, under the same load.

Processor time counts only what a thread itself does, so this can be measured on a machine that is not idle. While a
thread of Python runs its own code it holds the interpreter's lock: what the event loop, the writer's thread and the
log's thread need together, less what SQLite and the kernel do without the lock, is the least that a request can take.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from bench.acknowledged import post_sample
from bench.figures import Figure, Samples, Unit, at_most
from bench.rows import Ids
from bench.scenario import Bench, new_nonce
from bench.workplace import LIMIT_HTTP, ROOT, TELEMETRYD_DELETE, TELEMETRYD_WAL, Contender, Workplace, workplace
from bench.wrk import require_wrk

_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
_USER, _SYSTEM = 11, 12
"""Where both stand after the name in /proc/PID/task/TID/stat (proc(5))."""


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds of processor time: of a thread's own code (and SQLite's), and in the kernel."""

    own: float = 0
    kernel: float = 0

    @property
    def both(self) -> float:
        """All of it."""
        return self.own + self.kernel


@dataclass(frozen=True, slots=True)
class Cost:
    """What one request costs a server, and how many of them it answers in a second."""

    per_second: float
    loop: Time
    others: tuple[Time, ...]
    """The other threads, the busiest first: of telemetryd the writer's and the log's."""

    @property
    def whole(self) -> float:
        """Seconds of processor time of all threads."""
        return self.loop.both + sum(thread.both for thread in self.others)

    @property
    def writer(self) -> Time:
        """The busiest thread but the event loop."""
        return self.others[0]


def _seconds_by_thread(pid: int) -> dict[int, Time]:
    times = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text("ascii").rpartition(")")[2].split()
        times[int(task.name)] = Time(int(fields[_USER]) * _TICK_S, int(fields[_SYSTEM]) * _TICK_S)
    return times


def measure(place: Workplace, contender: Contender, connections: int, seconds: float) -> Cost:
    """Return what a single POST with time-ordered ids costs."""
    with place.corner() as corner, place.serving(contender, corner / "telemetry.sqlite") as server:
        post_sample(server.url, new_nonce(), 500, Ids.ORDERED)  # warm
        before = _seconds_by_thread(server.process.pid)
        summary = place.load(server, "post", connections, seconds, new_nonce(), Ids.ORDERED).finish()
        after = _seconds_by_thread(server.process.pid)
    count = summary.requests
    used = {
        thread: Time((now.own - then.own) / count, (now.kernel - then.kernel) / count)
        for thread, now in after.items()
        for then in [before.get(thread, Time())]
    }
    loop = used.pop(server.process.pid)
    return Cost(summary.per_second, loop, tuple(sorted(used.values(), key=lambda time: time.both, reverse=True)))


def cost(bench: Bench) -> list[Figure]:
    """Processor time of a single POST; its targets are absolute, so they depend on the machine."""
    found: dict[tuple[str, int], list[Cost]] = {}
    for number in range(bench.options.few):
        for connections in (64, 1):
            for contender in (LIMIT_HTTP, TELEMETRYD_WAL):
                measured = measure(bench.place, contender, connections, bench.options.seconds)
                found.setdefault((contender.name, connections), []).append(measured)
                name = f"{contender.name}, connections: {connections},"
                bench.say(f"round {number + 1}: {name} {measured.whole * 1e6:.0f} µs of processor time")

    def samples(name: str, contender: Contender, connections: int, part: Callable[[Cost], float]) -> Samples:
        return Samples(name, tuple(part(measured) for measured in found[contender.name, connections]))

    parts: tuple[tuple[str, int, Callable[[Cost], float], float], ...] = (
        ("daemon, single POST, 64 connections", 64, lambda found: found.whole, 115e-6),
        (
            "writer's thread, group of one (1 connection), own code and SQLite",
            1,
            lambda found: found.writer.own,
            100e-6,
        ),
        ("writer's thread, group of one (1 connection), in the kernel", 1, lambda found: found.writer.kernel, 100e-6),
    )
    return [
        Figure(
            f"processor time: {name}, WAL, {Ids.ORDERED} ids",
            Unit.SECONDS,
            samples(name, TELEMETRYD_WAL, connections, part),
            samples(LIMIT_HTTP.name, LIMIT_HTTP, connections, lambda found: found.whole),
            at_most(bound, Unit.SECONDS),
        )
        for name, connections, part, bound in parts
    ]


@click.command()
@click.option("--connections", default=64)
@click.option("--seconds", default=5.0)
def main(connections: int, seconds: float) -> None:
    """Print the microseconds of processor time that each thread spends on one request (single POST)."""
    require_wrk()
    with workplace(ROOT / "build" / "bench") as place:
        for contender in (LIMIT_HTTP, TELEMETRYD_WAL, TELEMETRYD_DELETE):
            found = measure(place, contender, connections, seconds)
            click.echo(f"{contender.name}: {found.per_second:,.0f} requests/s, {found.whole * 1e6:.0f} µs of each")
            threads = zip(
                ("event loop", "busiest other (writer)", "next (log)"), (found.loop, *found.others), strict=False
            )
            for name, time in threads:
                click.echo(f"    {name:<24} own code {time.own * 1e6:6.1f} µs   kernel {time.kernel * 1e6:6.1f} µs")


if __name__ == "__main__":
    main()
