"""Scenarios that write: how many runs are stored in a second, compared with the limits and the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench import acknowledged
from bench.figures import Figure, Unit, at_least
from bench.scenario import Bench, Measure, new_nonce, thousands
from bench.shim import slow_fsync
from bench.workplace import BASELINE, LIMIT_HTTP, TELEMETRYD_DELETE, TELEMETRYD_WAL, Contender

_PATCHED_RUNS: Final = 10_000
_SLOW_FSYNC_MS: Final = 20


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent: wrk's script, over how many connections, and how many runs in a request.

    `sample` is how many runs a Python client posts before, each of which is looked up afterwards.
    """

    script: str
    connections: int
    size: int = 1
    sample: int = 2_000
    variables: Mapping[str, str] = field(default_factory=dict)


def _stored_per_second(bench: Bench, contender: Contender, load: Load, database: Path) -> float:
    """Send a load, kill the server, and make sure that all that was acknowledged is in the database."""
    nonce, sample_nonce = new_nonce(), new_nonce()
    before = acknowledged.last_id(database)
    with bench.place.serving(contender, database, load.variables) as server:
        sample = acknowledged.post_sample(server.url, sample_nonce, load.sample)
        argument = str(_PATCHED_RUNS if load.script == "patch" else load.size)
        running = bench.place.load(server, load.script, load.connections, bench.options.seconds, nonce, argument)
        summary = running.finish()
        server.kill()
    if contender is not LIMIT_HTTP:
        acknowledged.check_ids(database, sample)
        if load.script == "patch":
            acknowledged.check_updated(database, nonce, _PATCHED_RUNS, summary.acknowledged)
        else:
            acknowledged.check_created(database, nonce, before, summary.acknowledged * load.size)
    return summary.per_second * load.size


def _into_empty(bench: Bench, contender: Contender, load: Load) -> Measure:
    def measure() -> float:
        with bench.place.corner() as corner:
            return _stored_per_second(bench, contender, load, corner / "telemetry.sqlite")

    return measure


def _into_seeded(bench: Bench, contender: Contender, load: Load, rows: int) -> Measure:
    return lambda: _stored_per_second(bench, contender, load, bench.seeds.database(rows))


def _into_copy(bench: Bench, contender: Contender, load: Load, rows: int) -> Measure:
    def measure() -> float:
        with bench.place.corner() as corner:
            return _stored_per_second(bench, contender, load, bench.seeds.copy(rows, corner))

    return measure


def _limit_sqlite(bench: Bench) -> Measure:
    def measure() -> float:
        with bench.place.corner() as corner:
            return float(bench.place.run("bench.limit_sqlite", "--database", str(corner / "limit.sqlite")))

    return measure


def post_64(bench: Bench) -> list[Figure]:
    """Single POST over 64 connections, WAL and DELETE journal."""
    load = Load("post", 64)
    found = bench.alternate(
        Unit.REQUESTS,
        {
            "limit-http": _into_empty(bench, LIMIT_HTTP, load),
            "telemetryd WAL": _into_empty(bench, TELEMETRYD_WAL, load),
            "telemetryd DELETE": _into_empty(bench, TELEMETRYD_DELETE, load),
            "baseline": _into_empty(bench, BASELINE, Load("post", 64, sample=200)),
        },
    )
    wal, delete, baseline = found["telemetryd WAL"], found["telemetryd DELETE"], found["baseline"]
    name = "single POST, 64 connections"
    return [
        Figure(f"{name}, WAL", Unit.REQUESTS, wal, found["limit-http"], at_least(0.5)),
        Figure(f"{name}, WAL", Unit.REQUESTS, wal, baseline, at_least(20)),
        Figure(f"{name}, DELETE journal", Unit.REQUESTS, delete, baseline, at_least(12)),
    ]


def post_1(bench: Bench) -> list[Figure]:
    """Single POST over 1 connection."""
    load = Load("post", 1)
    found = bench.alternate(
        Unit.REQUESTS,
        {
            "limit-http": _into_empty(bench, LIMIT_HTTP, load),
            "telemetryd WAL": _into_empty(bench, TELEMETRYD_WAL, load),
            "baseline": _into_empty(bench, BASELINE, Load("post", 1, sample=200)),
        },
    )
    name = "single POST, 1 connection, WAL"
    return [
        Figure(name, Unit.REQUESTS, found["telemetryd WAL"], found["limit-http"], at_least(0.3)),
        Figure(name, Unit.REQUESTS, found["telemetryd WAL"], found["baseline"], at_least(5)),
    ]


def batch_1000(bench: Bench) -> list[Figure]:
    """Batches of 1,000 over 4 connections."""
    load = Load("batch", 4, size=1000)
    found = bench.alternate(
        Unit.ROWS,
        {
            "limit-sqlite": _limit_sqlite(bench),
            "telemetryd WAL": _into_empty(bench, TELEMETRYD_WAL, load),
            "baseline": _into_empty(bench, BASELINE, Load("batch", 4, size=1000, sample=200)),
        },
    )
    name = "batches of 1,000, 4 connections, WAL"
    return [
        Figure(name, Unit.ROWS, found["telemetryd WAL"], found["limit-sqlite"], at_least(0.5)),
        Figure(name, Unit.ROWS, found["telemetryd WAL"], found["baseline"], at_least(6)),
    ]


def batch_100(bench: Bench) -> list[Figure]:
    """Batches of 100 over 4 connections."""
    found = bench.alternate(
        Unit.ROWS,
        {
            "limit-sqlite": _limit_sqlite(bench),
            "telemetryd WAL": _into_empty(bench, TELEMETRYD_WAL, Load("batch", 4, size=100)),
        },
    )
    name = "batches of 100, 4 connections, WAL"
    return [Figure(name, Unit.ROWS, found["telemetryd WAL"], found["limit-sqlite"], at_least(0.4))]


def patch(bench: Bench) -> list[Figure]:
    """PATCH of existing runs over 64 connections."""
    found = bench.alternate(
        Unit.REQUESTS,
        {
            "telemetryd WAL": _into_copy(bench, TELEMETRYD_WAL, Load("patch", 64), _PATCHED_RUNS),
            "baseline": _into_copy(bench, BASELINE, Load("patch", 64, sample=200), _PATCHED_RUNS),
        },
    )
    return [
        Figure("PATCH, 64 connections, WAL", Unit.REQUESTS, found["telemetryd WAL"], found["baseline"], at_least(15))
    ]


def slow_disk(bench: Bench) -> list[Figure]:
    """Single POST over 256 connections while each fsync takes 20 ms longer."""
    variables = slow_fsync(bench.place.folder, _SLOW_FSYNC_MS)
    found = bench.alternate(
        Unit.REQUESTS,
        {
            "telemetryd WAL": _into_empty(bench, TELEMETRYD_WAL, Load("post", 256, variables=variables)),
            "baseline": _into_empty(bench, BASELINE, Load("post", 256, sample=10, variables=variables)),
        },
    )
    name = f"single POST, 256 connections, fsync + {_SLOW_FSYNC_MS} ms, WAL"
    return [Figure(name, Unit.REQUESTS, found["telemetryd WAL"], found["baseline"], at_least(80))]


def ingest(bench: Bench) -> list[Figure]:
    """Write into a big database, singly and in batches, compared with an empty one."""
    figures = []
    big = thousands(bench.options.big)
    for name, unit, load in (
        ("single POST, 64 connections", Unit.REQUESTS, Load("post", 64)),
        ("batches of 100, 4 connections", Unit.ROWS, Load("batch", 4, size=100)),
    ):
        found = bench.alternate(
            unit,
            {
                f"at {big} runs": _into_seeded(bench, TELEMETRYD_WAL, load, bench.options.big),
                "empty": _into_empty(bench, TELEMETRYD_WAL, load),
            },
        )
        figures.append(Figure(f"{name}, at {big} runs", unit, found[f"at {big} runs"], found["empty"], at_least(0.5)))
    return figures
