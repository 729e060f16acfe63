"""Scenarios that write: how many runs are stored in a second, compared with the limits and the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import orjson

from bench import acknowledged, agent
from bench.client import Client
from bench.figures import Figure, Unit, at_least, at_most
from bench.rows import Ids, make_run
from bench.scenario import Bench, Measure, new_nonce, thousands
from bench.shim import slow_fsync
from bench.workplace import BASELINE, LIMIT_HTTP, LIMIT_HTTP_FSYNC, TELEMETRYD_DELETE, TELEMETRYD_WAL, Contender

_PATCHED_RUNS: Final = 10_000
_SLOW_FSYNC_MS: Final = 20
_WRITTEN_ROWS: Final = 150_000
_CLIENT_RUNS: Final = 50_000
_TARGET_CLIENT: Final = 20_000


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent: wrk's script, over how many connections, how many runs in a request, and with which ids.

    `sample` is how many runs a Python client posts before, each of which is looked up afterwards.
    """

    script: str
    connections: int
    size: int = 1
    ids: Ids = Ids.ORDERED
    sample: int = 1_000
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[str, ...]:
        """What wrk's script is given after the nonce."""
        return (str(_PATCHED_RUNS),) if self.script == "patch" else (self.ids, str(self.size))


def _stored_per_second(bench: Bench, contender: Contender, load: Load, database: Path) -> float:
    """Send a load, kill the server, and make sure that all that was acknowledged is in the database."""
    nonce, sample_nonce = new_nonce(), new_nonce()
    before = acknowledged.last_id(database)
    with bench.place.serving(contender, database, load.variables) as server:
        sample = acknowledged.post_sample(server.url, sample_nonce, load.sample, load.ids)
        seconds = bench.options.seconds
        summary = bench.place.load(server, load.script, load.connections, seconds, nonce, *load.arguments).finish()
        server.kill()
    if contender not in (LIMIT_HTTP, LIMIT_HTTP_FSYNC):
        acknowledged.check_ids(database, sample)
        if load.script == "patch":
            acknowledged.check_updated(database, nonce, _PATCHED_RUNS, summary.acknowledged)
        else:
            acknowledged.check_created(database, nonce, before, summary.acknowledged * load.size)
    return summary.per_second * load.size


def into_empty(bench: Bench, contender: Contender, load: Load) -> Measure:
    """Return what measures a load on a contender with a database of its own."""

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


def _limit_sqlite(bench: Bench, ids: Ids) -> Measure:
    def measure() -> float:
        with bench.place.corner() as corner:
            database = corner / "limit.sqlite"
            return float(bench.place.run("bench.limit_sqlite", "--database", str(database), "--ids", ids))

    return measure


def post_64(bench: Bench) -> list[Figure]:
    """Single POST over 64 connections: WAL with both kinds of ids, DELETE journal."""
    load = Load("post", 64)
    found = bench.alternate(
        Unit.REQUESTS,
        {
            "limit-http": into_empty(bench, LIMIT_HTTP, load),
            "WAL": into_empty(bench, TELEMETRYD_WAL, load),
            "WAL, random ids": into_empty(bench, TELEMETRYD_WAL, Load("post", 64, ids=Ids.RANDOM)),
            "DELETE": into_empty(bench, TELEMETRYD_DELETE, load),
            "baseline": into_empty(bench, BASELINE, Load("post", 64, sample=200)),
        },
    )
    wal, delete = found["WAL"], found["DELETE"]
    name = "single POST, 64 connections"
    return [
        Figure(f"{name}, WAL, {Ids.ORDERED} ids", Unit.REQUESTS, wal, found["limit-http"], at_least(0.25)),
        Figure(f"{name}, WAL, {Ids.RANDOM} ids", Unit.REQUESTS, found["WAL, random ids"], found["limit-http"]),
        Figure(f"{name}, WAL, {Ids.ORDERED} ids", Unit.REQUESTS, wal, found["baseline"], at_least(20)),
        Figure(f"{name}, DELETE, {Ids.ORDERED} ids", Unit.REQUESTS, delete, wal, at_least(0.6)),
        Figure(f"{name}, DELETE, {Ids.ORDERED} ids", Unit.REQUESTS, delete, found["baseline"], at_least(12)),
    ]


def post_1(bench: Bench) -> list[Figure]:
    """Single POST over 1 connection, time-ordered ids, compared with aiohttp that syncs as often."""
    load = Load("post", 1)
    found = bench.alternate(
        Unit.REQUESTS,
        {
            "limit-http-fsync": into_empty(bench, LIMIT_HTTP_FSYNC, load),
            "WAL": into_empty(bench, TELEMETRYD_WAL, load),
        },
    )
    name = f"single POST, 1 connection, WAL, {Ids.ORDERED} ids"
    return [Figure(name, Unit.REQUESTS, found["WAL"], found["limit-http-fsync"], at_least(0.6))]


def batches(bench: Bench) -> list[Figure]:
    """Batches of 1,000 and of 100 over 4 connections, with both kinds of ids, compared with SQLite alone."""
    targets = {
        (1000, Ids.ORDERED): at_least(0.8),
        (1000, Ids.RANDOM): at_least(0.95),
        (100, Ids.ORDERED): at_least(0.6),
        (100, Ids.RANDOM): None,
    }
    limit = "limit-sqlite-1000"
    found = bench.alternate(
        Unit.ROWS,
        {
            **{f"{limit}, {ids}": _limit_sqlite(bench, ids) for ids in Ids},
            **{
                f"batches of {size:,}, {ids}": into_empty(bench, TELEMETRYD_WAL, Load("batch", 4, size=size, ids=ids))
                for size, ids in targets
            },
        },
    )
    return [
        Figure(
            f"batches of {size:,}, 4 connections, WAL, {ids} ids",
            Unit.ROWS,
            found[f"batches of {size:,}, {ids}"],
            found[f"{limit}, {ids}"],
            target,
        )
        for (size, ids), target in targets.items()
    ]


def written(bench: Bench) -> list[Figure]:
    """Bytes that the daemon writes for each row of 150,000 in batches of 1,000, its last checkpoint included."""
    found = bench.alternate(Unit.BYTES, {ids: partial(_bytes_per_row, bench, ids) for ids in Ids}, rounds=1)
    targets = {Ids.ORDERED: at_most(3_500, Unit.BYTES), Ids.RANDOM: at_most(9_000, Unit.BYTES)}
    return [
        Figure(f"written for each row, batches of 1,000, WAL, {ids} ids", Unit.BYTES, found[ids], target=target)
        for ids, target in targets.items()
    ]


def _bytes_per_row(bench: Bench, ids: Ids) -> float:
    # Always so many rows, not seconds: random ids cost the more, the larger the indexes are.
    nonce, size, connections = new_nonce(), 1000, 4

    def post(first: int) -> None:
        with closing(Client(server.port)) as client:
            for start in range(first * size, _WRITTEN_ROWS, connections * size):
                runs = [make_run(nonce, number, ids) for number in range(start, start + size)]
                client.post("/api/v1/runs/batch", orjson.dumps(runs))

    with bench.place.corner() as corner:
        database = corner / "telemetry.sqlite"
        with bench.place.serving(TELEMETRYD_WAL, database) as server:
            with ThreadPoolExecutor(connections) as pool:
                list(pool.map(post, range(connections)))
            count = server.bytes_written_until_stopped()
        acknowledged.check_created(database, nonce, 0, _WRITTEN_ROWS)
    return count / _WRITTEN_ROWS


def client(bench: Bench) -> list[Figure]:
    """`telemetryd.client` end to end, in one process, from the first call to the last acknowledgement."""

    def measure() -> float:
        with (
            bench.place.corner() as corner,
            bench.place.serving(TELEMETRYD_WAL, corner / "telemetry.sqlite") as server,
        ):
            return agent.runs_per_second(server, corner / "buffer", _CLIENT_RUNS)

    found = bench.alternate(Unit.ROWS, {"telemetryd.client": measure}, bench.options.few)
    target = at_least(_TARGET_CLIENT, Unit.ROWS)
    return [Figure("telemetryd.client end to end, one process", Unit.ROWS, found["telemetryd.client"], target=target)]


def patch(bench: Bench) -> list[Figure]:
    """PATCH over 64 connections, which writes no ids, compared with single POST of time-ordered ids."""
    found = bench.alternate(
        Unit.REQUESTS,
        {
            "PATCH": _into_copy(bench, TELEMETRYD_WAL, Load("patch", 64), _PATCHED_RUNS),
            "single POST": _into_copy(bench, TELEMETRYD_WAL, Load("post", 64), _PATCHED_RUNS),
        },
    )
    return [
        Figure("PATCH, 64 connections, WAL", Unit.REQUESTS, found["PATCH"], found["single POST"], at_least(1)),
    ]


def slow_disk(bench: Bench) -> list[Figure]:
    """Single POST over 256 connections while each fsync takes 20 ms longer."""
    variables = slow_fsync(bench.place.folder, _SLOW_FSYNC_MS)
    found = bench.alternate(
        Unit.REQUESTS,
        {
            "telemetryd WAL": into_empty(bench, TELEMETRYD_WAL, Load("post", 256, variables=variables)),
            "baseline": into_empty(bench, BASELINE, Load("post", 256, sample=10, variables=variables)),
        },
        bench.options.few,
    )
    name = f"single POST, 256 connections, fsync + {_SLOW_FSYNC_MS} ms, WAL, {Ids.ORDERED} ids"
    return [Figure(name, Unit.REQUESTS, found["telemetryd WAL"], found["baseline"], at_least(80))]


def ingest(bench: Bench) -> list[Figure]:
    """Write into a big database, singly and in batches, with both kinds of ids, compared with an empty one."""
    figures = []
    big = f"at {thousands(bench.options.big)} runs"
    for name, unit, load in (
        *((f"single POST, 64 connections, {ids} ids", Unit.REQUESTS, Load("post", 64, ids=ids)) for ids in Ids),
        *((f"batches of 100, 4 connections, {ids} ids", Unit.ROWS, Load("batch", 4, 100, ids)) for ids in Ids),
    ):
        found = bench.alternate(
            unit,
            {
                big: _into_seeded(bench, TELEMETRYD_WAL, load, bench.options.big),
                "empty": into_empty(bench, TELEMETRYD_WAL, load),
            },
        )
        figures.append(Figure(f"{name}, {big}", unit, found[big], found["empty"], at_least(0.5)))
    return figures
