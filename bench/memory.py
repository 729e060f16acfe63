"""The scenarios of memory: what the daemon holds under full load, and with 10,000 idle connections."""

from __future__ import annotations

import resource
import statistics
import time
from contextlib import ExitStack, closing
from functools import partial
from typing import Final

from bench.acknowledged import check_created, last_id
from bench.client import Client
from bench.figures import Figure, Samples, Unit, at_most
from bench.rows import Ids
from bench.scenario import Bench, new_nonce, thousands
from bench.workplace import LIMIT_HTTP, TELEMETRYD_WAL, Contender

_LIMIT_MIB: Final = 150
_IDLE_CONNECTIONS: Final = 10_000
_MORE_THAN_LIMIT_MIB: Final = 10
_SPARE_DESCRIPTORS: Final = 200


def memory(bench: Bench) -> list[Figure]:
    """Resident memory under full load: how high it is, and whether it grows."""
    seconds = bench.options.full_load_s
    held: list[float] = []
    database, nonce = bench.seeds.database(bench.options.big), new_nonce()
    before = last_id(database)
    with bench.place.serving(TELEMETRYD_WAL, database) as server:
        posts = bench.place.load(server, "post", 64, seconds, nonce, Ids.ORDERED)
        gets = bench.place.load(server, "get", 1, seconds, "/api/v1/runs?limit=100")
        while posts.process.poll() is None:
            time.sleep(min(0.2, seconds / 20))
            held.append(server.resident_mib())
        acknowledged = posts.finish().acknowledged
        gets.finish()
    check_created(database, nonce, before, acknowledged)
    bench.say(f"under {seconds:.0f} s of load: {held[0]:.0f} to {max(held):.0f} MiB")
    quarter = max(1, len(held) // 4)
    early, late = held[quarter : 2 * quarter] or held, held[-quarter:]
    name = f"memory, {seconds:.0f} s of POST and GET, at {thousands(bench.options.big)} runs"
    return [
        Figure(f"{name}: highest", Unit.MIB, Samples("highest", (max(held),)), target=at_most(_LIMIT_MIB, Unit.MIB)),
        Figure(
            f"{name}: growth",
            Unit.MIB,
            Samples("last quarter", (statistics.median(late),)),
            Samples("second quarter", (statistics.median(early),)),
            at_most(1.1),
        ),
    ]


def idle_connections(bench: Bench) -> list[Figure]:
    """Resident memory with 10,000 idle connections, compared with aiohttp alone."""
    count = min(_IDLE_CONNECTIONS, _raise_descriptor_limit() - _SPARE_DESCRIPTORS)
    found = bench.alternate(
        Unit.MIB,
        {
            contender.name: partial(_with_idle_connections, bench, contender, count)
            for contender in (LIMIT_HTTP, TELEMETRYD_WAL)
        },
        rounds=1,
    )
    held, limit = found[TELEMETRYD_WAL.name], found[LIMIT_HTTP.name]
    target = at_most(limit.median + _MORE_THAN_LIMIT_MIB, Unit.MIB)
    return [Figure(f"memory, {count:,} idle connections", Unit.MIB, held, limit, target)]


def _with_idle_connections(bench: Bench, contender: Contender, count: int) -> float:
    with bench.place.corner() as corner, ExitStack() as stack:
        server = stack.enter_context(bench.place.serving(contender, corner / "telemetry.sqlite"))
        for _ in range(count):
            client = stack.enter_context(closing(Client(server.port)))
            client.get("/health")
        time.sleep(min(2, bench.options.seconds))
        return server.resident_mib()


def _raise_descriptor_limit() -> int:
    """Allow this process and its children as many open files as the system does; return how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return 1_000_000 if hard == resource.RLIM_INFINITY else hard
