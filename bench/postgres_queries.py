"""Scenario that reads: every documented filter, and the number of runs that match, on PostgreSQL and on SQLite."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlencode

from bench import postgres
from bench.client import Client
from bench.errors import BenchError
from bench.figures import Figure, Samples, Unit, at_most, show_value
from bench.scenario import Bench, thousands
from bench.workplace import TELEMETRYD_WAL, Contender
from tests.postgres_cluster import Cluster

_RUNS: Final = "/api/v1/runs"
_FEW: Final = 12
_WAIT_S: Final = 600
_FULL_TEXT: Final = {"TELEMETRY_FULL_TEXT": "true", "TELEMETRY_QUERY_TIMEOUT_S": "60"}
_SHOWN: Final = 5
_WARM_S: Final = 0.2


def postgres_queries(bench: Bench) -> list[Figure]:
    """Every documented filter, and the numbers of runs that match, compared with SQLite over HTTP.

    The fastest of some answers counts: whatever else runs on the machine holds up two processes more than one.
    """
    runs = bench.options.big if bench.options.large else 10 * bench.options.big
    values: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        corner = stack.enter_context(bench.place.corner())
        file = bench.seeds.copy(runs, corner)
        newest = _enrich(file)
        cluster = stack.enter_context(postgres.durable_cluster())
        database = stack.enter_context(_filled(bench, cluster, runs, newest))
        clients = {
            "SQLite": stack.enter_context(_client(bench, TELEMETRYD_WAL, file, {})),
            "PostgreSQL": stack.enter_context(
                _client(bench, postgres.DAEMON, corner / "on-postgres.sqlite", database.variables)
            ),
        }
        paths = dict(_queries(file, runs))
        bench.say(f"{len(paths)} queries of {thousands(runs)} runs")
        _warm(clients, paths)
        for number in range(bench.options.few):
            for name, path in paths.items():
                for engine, client in clients.items():
                    times = client.time_get(path, _FEW, bench.options.seconds / 8)
                    values.setdefault(name, {}).setdefault(engine, []).append(min(times))
            bench.say(f"round {number + 1}")
    found = [
        Figure(
            f"GET {name}, at {thousands(runs)} runs",
            Unit.SECONDS,
            Samples("PostgreSQL", tuple(measured["PostgreSQL"])),
            Samples("SQLite", tuple(measured["SQLite"])),
            at_most(3),
        )
        for name, measured in values.items()
    ]
    found.sort(key=lambda figure: figure.ratio or 0, reverse=True)
    for figure in found:
        reference = "" if figure.reference is None else show_value(figure.reference.median, Unit.SECONDS)
        reached = show_value(figure.reached.median, Unit.SECONDS)
        bench.say(f"{show_value(figure.ratio or 0, Unit.RATIO)} ({reached} for {reference}): {figure.load}")
    bench.say(f"{sum(figure.is_met is True for figure in found)} of {len(found)} queries meet the target")
    return found[:_SHOWN]


def _enrich(file: Path) -> int:
    """Give each tenth run what the others have not; return when the last run was created, in seconds since 1970."""
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(postgres.ENRICH.format(json="TEXT"))
        newest = connection.execute("SELECT max(created_at) FROM agent_runs").fetchone()[0]
    return round(datetime.fromisoformat(newest).timestamp())


@contextmanager
def _filled(bench: Bench, cluster: Cluster, runs: int, newest: int) -> Iterator[postgres.Database]:
    with postgres.database(cluster, postgres.make(cluster)) as database:
        started = time.monotonic()
        postgres.fill(database.url, runs, newest)
        bench.say(f"filled PostgreSQL with {runs:,} runs in {time.monotonic() - started:.0f} s")
        yield database


@contextmanager
def _client(bench: Bench, contender: Contender, database: Path, variables: dict[str, str]) -> Iterator[Client]:
    with bench.place.serving(contender, database, {**variables, **_FULL_TEXT}) as server:
        client = Client(server.port)
        try:
            _wait_for_words(client)
            yield client
        finally:
            client.close()


def _wait_for_words(client: Client) -> None:
    """Wait until the index of words is built."""
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        if client.get(f"{_RUNS}?q=timed&limit=1")[0] == 200:
            return
        time.sleep(0.5)
    raise BenchError("The full-text index is not built in time")


def _warm(clients: dict[str, Client], paths: dict[str, str]) -> None:
    """Ask everything a few times, so that what is prepared at the first requests is so for all."""
    for path in paths.values():
        for client in clients.values():  # in turns: a connection that is idle for long is closed
            status, body = client.get(path)
            if status != 200:
                raise BenchError(f"GET {path} answered {status}: {body[:300]!r}")
            client.time_get(path, _FEW, _WARM_S)


def _queries(file: Path, runs: int) -> Iterator[tuple[str, str]]:
    """Yield the names and paths of pages by every filter, and of the exact and the estimated number of those runs."""
    with closing(sqlite3.connect(file)) as connection:

        def of(share: float) -> tuple[str, str]:
            sql = "SELECT created_at, event_id FROM agent_runs WHERE id = ?"
            found: tuple[str, str] = connection.execute(sql, (round(share * runs),)).fetchone()
            return found

        (early, _), (late, event_id), (recent, _), (newer, _) = map(of, (0.25, 0.75, 0.99, 0.995))
    created = {"created_after": early, "created_before": late}
    started = {"start_time_from": early, "start_time_to": late}
    agent, job, status = {"agent_name": "agent-3"}, {"job_type": "job-2"}, {"status": "failure"}
    several = {"agent_name": "agent-1,agent-2,agent-3", "job_type": "job-2,job-3"}
    asked: dict[str, dict[str, str]] = {
        "none": {},
        "agent": agent,
        "job type": job,
        "status": status,
        "agent, job type": agent | job,
        "agent, status": agent | status,
        "job type, status": job | status,
        "agent, job type, status": agent | job | status,
        "two statuses": {"status": "failure,timeout"},
        "three agents": {"agent_name": "agent-1,agent-2,agent-3"},
        "three agents, two job types": several,
        "pattern of agents": {"agent_name": "agent-*"},
        "pattern of agents, job type": {"agent_name": "*-3", **job},
        **{
            f"{name} of all": {name: value}
            for name, value in (
                ("host", "worker-7"), ("environment", "prod"), ("product", "words"),
                ("git_commit_hash", "abcdef1234567"),
            )
        },
        **{
            f"{name} of none": {name: "nothing"}
            for name in ("website", "insight_id", "parent_run_id", "retry_of", "trace_id", "host")
        },
        "conversation_id of some": {"conversation_id": "c-70"},
        "run_id": {"run_id": "20251231T153045Z-hugo-translator-00000777"},
        "event_id": {"event_id": event_id},
        "host, agent": {"host": "worker-7", **agent},
        "label": {"label.team": "t7"},
        "label, status": {"label.team": "t7", **status},
        "two labels' values": {"label.team": "t7,t8"},
        "created": created,
        "created after": {"created_after": early},
        "created before": {"created_before": late},
        "created, agent, status": created | agent | status,
        "started": started,
        "started from": {"start_time_from": early},
        "started to": {"start_time_to": early},
        "started lately": {"start_time_from": recent, "start_time_to": newer},
        "started, agent": started | agent,
        "started, agent, job type, status": started | agent | job | status,
        "started to, host": {"start_time_to": early, "host": "worker-7"},
        "started, created, agent": started | created | agent,
        "min_duration_ms": {"min_duration_ms": "90000"},
        "min_duration_ms, agent": {"min_duration_ms": "90000", **agent},
        "metrics": {"metrics.tokens>": "5"},
        "metrics, status": {"metrics.tokens=": "12345", **status},
        "error": {"error": "TIMED OUT after 7"},
        "q of many": {"q": "connection tim*"},
        "q of some": {"q": '"after 77 s"'},
    }  # fmt: skip
    for name, given in asked.items():
        yield name, f"{_RUNS}?{urlencode({**given, 'limit': '100'})}"
    ordered = {
        "oldest first": {"sort": "created_at"},
        "oldest first, agent, status": {"sort": "created_at", **agent, **status},
        "by start": {"sort": "start_time"},
        "by start, last first": {"sort": "-start_time"},
        "by start, started": {"sort": "start_time", **started},
        "offset 9,000": {"offset": "9000"},
        "offset 9,000, agent": {"offset": "9000", **agent},
        "two fields, agent": {"fields": "event_id,status", **agent},
    }
    for name, given in ordered.items():
        yield name, f"{_RUNS}?{urlencode({**given, 'limit': '100'})}"
    for count in ("exact", "estimated"):
        for name, given in asked.items():
            yield f"count={count}, {name}", f"{_RUNS}?{urlencode({**given, 'limit': '1', 'count': count})}"
