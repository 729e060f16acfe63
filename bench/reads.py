"""Scenarios that read: how long an answer takes, and what it depends on."""

from __future__ import annotations

import itertools
import sqlite3
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlencode

import orjson

from bench.acknowledged import check_created, last_id
from bench.client import Client
from bench.errors import BenchError
from bench.figures import Figure, Samples, Unit, at_least, at_most, show_value
from bench.limit_select import median_s
from bench.rows import Ids
from bench.scenario import Bench, Measure, new_nonce, thousands
from bench.workplace import TELEMETRYD_WAL, Server
from telemetryd.model.queries import ListRuns, Position

_RUNS: Final = "/api/v1/runs"
_EQUAL: Final = (("agent_name", "agent-3"), ("job_type", "job-2"), ("status", "failure"))
_FAR_PAGE: Final = 10_000
_STATS: Final = "/api/v1/stats?"
_REFUSED: Final = 400
"""The status of statistics that would have too many groups."""


def get(bench: Bench) -> list[Figure]:
    """`GET limit=100` and `limit=1000` over 1 connection, compared with the same SELECT + orjson in-process."""
    figures = []
    database, seconds = bench.seeds.database(bench.options.big), bench.options.seconds
    with bench.place.serving(TELEMETRYD_WAL, database) as server:
        for limit in (100, 1000):
            found = bench.alternate(
                Unit.SECONDS,
                {
                    "telemetryd": _median_answer(bench, server, f"{_RUNS}?limit={limit}"),
                    "in-process": lambda limit=limit: median_s(database, limit, seconds / 2),  # type: ignore[misc]
                },
            )
            name = f"GET limit={limit}, 1 connection"
            figures.append(Figure(name, Unit.SECONDS, found["telemetryd"], found["in-process"], at_most(2)))
    return figures


def _median_answer(bench: Bench, server: Server, path: str) -> Measure:
    return lambda: bench.place.load(server, "get", 1, bench.options.seconds / 2, path).finish().p50_s


def filters(bench: Bench) -> list[Figure]:
    """Every documented combination of filters on a big database, compared with a small one; the slowest ones count."""
    options = bench.options
    limit = 100 if options.large else 10  # each combination has at least so many runs in the small database
    values: dict[tuple[str, int], list[float]] = {}
    names = {rows: f"{thousands(rows)} runs" for rows in (options.big, options.small)}
    with ExitStack() as stack:
        clients = {rows: stack.enter_context(_client(bench, bench.seeds.database(rows))) for rows in names}
        paths = {rows: dict(_combinations(bench.seeds.database(rows), limit)) for rows in names}
        for rows, client in clients.items():
            for combination, path in paths[rows].items():
                _check_full(client, path, limit, f"filter {combination} at {names[rows]}")
        for number in range(options.few):
            for combination in paths[options.big]:
                for rows, client in clients.items():
                    times = client.time_get(paths[rows][combination], 12, options.seconds)
                    values.setdefault((combination, rows), []).append(statistics.median(times))
            bench.say(f"round {number + 1}: {len(paths[options.big])} combinations")
    found = [
        Figure(
            f"GET limit={limit}, filter {combination}, at {thousands(options.big)} runs",
            Unit.SECONDS,
            Samples(names[options.big], tuple(values[combination, options.big])),
            Samples(names[options.small], tuple(values[combination, options.small])),
            at_most(1.5),
        )
        for combination in paths[options.big]
    ]
    found.sort(key=lambda figure: figure.ratio or 0, reverse=True)
    for figure in found:
        if not figure.is_met:
            bench.say(f"misses with {show_value(figure.ratio or 0, Unit.RATIO)}: {figure.load}")
    bench.say(f"{sum(figure.is_met is True for figure in found)} of {len(found)} combinations meet the target")
    return found[:3]


def _check_full(client: Client, path: str, limit: int, name: str) -> None:
    status, body = client.get(path)
    if status == 200 and (count := len(orjson.loads(body))) != limit:
        raise BenchError(f"{name}: {count} runs instead of {limit}")


def _combinations(database: Path, limit: int) -> Iterator[tuple[str, str]]:
    """Yield each combination's name and path; the bounds are the quarters of the seeded history."""
    with closing(sqlite3.connect(database)) as connection:
        sql = "SELECT created_at FROM agent_runs WHERE id = (SELECT max(id) * ? / 4 FROM agent_runs)"
        early, late = (connection.execute(sql, (quarter,)).fetchone()[0] for quarter in (1, 3))
    bounds = (
        ("created_after", early),
        ("created_before", late),
        ("start_time_from", early),
        ("start_time_to", late),
    )
    every = (*_EQUAL, *bounds)
    for chosen in itertools.product((False, True), repeat=len(every)):
        given = dict(itertools.compress(every, chosen))
        yield " + ".join(given) or "none", f"{_RUNS}?{urlencode({**given, 'limit': limit})}"


def cursor(bench: Bench) -> list[Figure]:
    """Page 10,000 by cursor compared with page 1."""
    limit = min(100, bench.options.big // _FAR_PAGE)
    database = bench.seeds.database(bench.options.big)
    query = ListRuns(limit=limit)
    with closing(sqlite3.connect(database)) as connection:
        sql = "SELECT created_at, id FROM agent_runs ORDER BY created_at DESC, id DESC LIMIT 1 OFFSET ?"
        end_of_page_before = Position(*connection.execute(sql, (limit * (_FAR_PAGE - 1) - 1,)).fetchone())
    far = query.next_page(_RUNS, end_of_page_before)
    with bench.place.serving(TELEMETRYD_WAL, database) as server:
        found = bench.alternate(
            Unit.SECONDS,
            {
                "page 10,000": _median_answer(bench, server, far),
                "page 1": _median_answer(bench, server, f"{_RUNS}?limit={limit}"),
            },
        )
    name = f"GET limit={limit}, page 10,000 by cursor, at {thousands(bench.options.big)} runs"
    return [Figure(name, Unit.SECONDS, found["page 10,000"], found["page 1"], at_most(1.2))]


def totals(bench: Bench) -> list[Figure]:
    """`/metrics`, `/metadata` and `/health` of a big database compared with an empty one."""
    figures = []
    big = f"{thousands(bench.options.big)} runs"
    with ExitStack() as stack:
        corner = stack.enter_context(bench.place.corner())
        full = stack.enter_context(bench.place.serving(TELEMETRYD_WAL, bench.seeds.database(bench.options.big)))
        empty = stack.enter_context(bench.place.serving(TELEMETRYD_WAL, corner / "telemetry.sqlite"))
        for path in ("/metrics", "/api/v1/metadata", "/health"):
            found = bench.alternate(
                Unit.SECONDS,
                {big: _median_answer(bench, full, path), "empty": _median_answer(bench, empty, path)},
                bench.options.few,
            )
            figures.append(Figure(f"GET {path}, at {big}", Unit.SECONDS, found[big], found["empty"], at_most(1.5)))
    return figures


def stats(bench: Bench) -> list[Figure]:
    """Statistics over 30 days by every grouping and bucket that is answered; the slowest one counts."""
    found: dict[str, list[float]] = {}
    with _client(bench, bench.seeds.database(bench.options.big)) as client:
        queries = [query for query in _groupings() if _is_answered(client, query)]
        for number in range(bench.options.few):
            for query in queries:
                times = client.time_get(_STATS + query, 3, bench.options.seconds)
                found.setdefault(query, []).append(statistics.median(times))
            bench.say(f"round {number + 1}: {len(queries)} groupings")
    for query, values in sorted(found.items(), key=lambda item: statistics.median(item[1]), reverse=True)[:5]:
        bench.say(f"{show_value(statistics.median(values), Unit.SECONDS)}: {query}")
    slowest = max(found, key=lambda query: statistics.median(found[query]))
    name = (
        f"GET /api/v1/stats over 30 days, at {thousands(bench.options.big)} runs, slowest of {len(queries)}: {slowest}"
    )
    reached = Samples("slowest", tuple(found[slowest]))
    return [Figure(name, Unit.SECONDS, reached, target=at_most(0.3, Unit.SECONDS))]


def _is_answered(client: Client, query: str) -> bool:
    """Tell whether statistics are answered with groups, rather than refused because they would have too many."""
    status, body = client.get(_STATS + query)
    if status != _REFUSED and (status != 200 or not orjson.loads(body)["groups"]):
        raise BenchError(f"GET {_STATS}{query} answered {status}: {body[:300]!r}")
    return status != _REFUSED


def _groupings() -> Iterator[str]:
    for names in itertools.product((False, True), repeat=len(_EQUAL)):
        chosen = ",".join(itertools.compress((name for name, _ in _EQUAL), names))
        for bucket in ("", "1h", "6h", "1d", "1w"):
            given = {"from": "-30d", "group_by": chosen, "bucket": bucket}
            yield urlencode({name: value for name, value in given.items() if value}, safe=",")


def mixed(bench: Bench) -> list[Figure]:
    """GET while 64 connections post: its p99 compared with its idle p50, and what the posts lose."""
    path, seconds = f"{_RUNS}?limit=100", bench.options.seconds
    latency: list[float] = []
    alone: list[float] = []
    idle: list[float] = []
    together: list[float] = []
    acknowledged: dict[str, int] = {}
    database = bench.seeds.database(bench.options.big)
    before = last_id(database)
    with bench.place.serving(TELEMETRYD_WAL, database) as server:

        def post(nonce: str) -> Callable[[], float]:
            load = bench.place.load(server, "post", 64, seconds, nonce, Ids.ORDERED)

            def finish() -> float:
                summary = load.finish()
                acknowledged[nonce] = summary.acknowledged
                return summary.per_second

            return finish

        for number in range(bench.options.rounds):
            idle.append(bench.place.load(server, "get", 1, seconds, path).finish().p50_s)
            alone.append(post(new_nonce())())
            finish_posting = post(new_nonce())
            latency.append(bench.place.load(server, "get", 1, seconds, path).finish().p99_s)
            together.append(finish_posting())
            bench.say(
                f"round {number + 1}: GET idle p50 {show_value(idle[-1], Unit.SECONDS)}, under load p99 "
                f"{show_value(latency[-1], Unit.SECONDS)}; POST alone {show_value(alone[-1], Unit.REQUESTS)}, "
                f"with GET {show_value(together[-1], Unit.REQUESTS)}"
            )
    for nonce, count in acknowledged.items():
        check_created(database, nonce, before, count)
    name = "GET limit=100 while 64 connections post"
    return [
        Figure(
            f"{name}: p99",
            Unit.SECONDS,
            Samples("under load, p99", tuple(latency)),
            Samples("idle, p50", tuple(idle)),
            at_most(10),
        ),
        Figure(
            f"{name}: ingest",
            Unit.REQUESTS,
            Samples("with GET", tuple(together)),
            Samples("without", tuple(alone)),
            at_least(0.75),
        ),
    ]


@contextmanager
def _client(bench: Bench, database: Path) -> Iterator[Client]:
    with bench.place.serving(TELEMETRYD_WAL, database) as server:
        client = Client(server.port)
        try:
            yield client
        finally:
            client.close()
