"""The scenario of exports: time, the daemon's memory, and what a poster feels meanwhile."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import orjson

from bench.client import Client
from bench.figures import Figure, Samples, Unit, at_most
from bench.rows import Ids, make_run
from bench.scenario import Bench, new_nonce, thousands
from bench.workplace import TELEMETRYD_WAL

_TARGETS_S: Final = {"ndjson": 10, "csv": 15, "parquet": 15}
_PAUSE_S: Final = 0.005
_QUIET_S: Final = 5
"""How long the poster posts without an export."""
_PATIENCE_S: Final = 600
"""An export begins to answer only when its snapshot is copied."""


@dataclass(slots=True)
class Found:
    """What the rounds found: seconds of exports, highest memory, and the 99th percentiles of single POSTs meanwhile."""

    seconds: list[float] = field(default_factory=list)
    highest_mib: list[float] = field(default_factory=list)
    post_p99_s: list[float] = field(default_factory=list)


def export(bench: Bench) -> list[Figure]:
    """Export many runs in each form while one connection posts; memory compared with an export of a tenth."""
    many, few = bench.options.export, bench.options.export // 10
    found = {(form, rows): Found() for form in _TARGETS_S for rows in (many, few)}
    quiet: list[float] = []
    for number in range(bench.options.few):
        with bench.place.serving(TELEMETRYD_WAL, bench.seeds.database(many)) as server:
            with _posting(server.port) as times:
                time.sleep(min(_QUIET_S, bench.options.seconds))
            quiet.append(_p99(times))
        for (form, rows), into in found.items():
            _export(bench, bench.seeds.database(rows), form, into)
            bench.say(
                f"round {number + 1}: {thousands(rows)} runs as {form} in {into.seconds[-1]:.1f} s, "
                f"{into.highest_mib[-1]:.0f} MiB, POST p99 {into.post_p99_s[-1] * 1000:.1f} ms"
            )
    figures = []
    for form, target_s in _TARGETS_S.items():
        name, at_many, at_few = f"export of {thousands(many)} runs, {form}", found[form, many], found[form, few]
        figures += [
            Figure(name, Unit.SECONDS, Samples(form, tuple(at_many.seconds)), target=at_most(target_s, Unit.SECONDS)),
            Figure(
                f"{name}: highest memory",
                Unit.MIB,
                Samples(form, tuple(at_many.highest_mib)),
                Samples(f"{thousands(few)} runs", tuple(at_few.highest_mib)),
                at_most(1.1),
            ),
            Figure(
                f"{name}: single POST meanwhile, p99",
                Unit.SECONDS,
                Samples(form, tuple(at_many.post_p99_s)),
                Samples("without", tuple(quiet)),
            ),
        ]
    return figures


def _export(bench: Bench, database: Path, form: str, into: Found) -> None:
    """Export once from a new daemon, whose highest memory is that of the export."""
    with bench.place.serving(TELEMETRYD_WAL, database) as server:
        with _posting(server.port) as times, closing(Client(server.port, _PATIENCE_S)) as client:
            started = time.perf_counter()
            client.download(f"/api/v1/runs/export?format={form}")
            into.seconds.append(time.perf_counter() - started)
        into.highest_mib.append(server.highest_mib())
    into.post_p99_s.append(_p99(times))


def _p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[98]


@contextmanager
def _posting(port: int) -> Iterator[list[float]]:
    """Post over one connection for the length of a block, at least two runs; the list gets how long each took."""
    times: list[float] = []
    ended = threading.Event()

    def post() -> None:
        nonce, number = new_nonce(), 0
        with closing(Client(port)) as client:
            while not ended.wait(_PAUSE_S) or len(times) < 2:
                number += 1
                body = orjson.dumps(make_run(nonce, number, Ids.ORDERED))
                started = time.perf_counter()
                client.post("/api/v1/runs", body)
                times.append(time.perf_counter() - started)

    poster = threading.Thread(target=post)
    poster.start()
    try:
        yield times
    finally:
        ended.set()
        poster.join()
