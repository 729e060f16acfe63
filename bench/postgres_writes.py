"""Scenarios that write into PostgreSQL, compared with PostgreSQL alone and with SQLite."""

from __future__ import annotations

import re
import shutil
import subprocess
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Final

from bench import postgres
from bench.acknowledged import post_sample
from bench.errors import BenchError
from bench.figures import Figure, Unit, at_least
from bench.postgres import Database
from bench.rows import Ids
from bench.scenario import Bench, Measure, new_nonce
from bench.workplace import TELEMETRYD_WAL, Server
from bench.writes import Load, into_empty
from tests.postgres_cluster import Cluster

_DAEMONS: Final = 4
_ROWS: Final = 50_000
_SIZE: Final = 1_000
# What the loads send, made by the server: no program on the other side takes part of the processors. A colon would be
# the begin of a variable of pgbench.
_PGBENCH: Final = r"""
INSERT INTO agent_runs (
    event_id, run_id, created_at, updated_at, start_time, end_time, agent_name, job_type, status, items_discovered,
    items_succeeded, items_failed, duration_ms, metrics_json, host, environment, git_repo, git_branch, git_commit_hash,
    product, trigger_type
)
SELECT id, 'run-' || id, moment, moment, moment, moment, 'agent-' || n % 20, 'translate_directory', 'success', 100, 98,
    2, 300000, U&'{"tokens"\003A12345,"cost"\003A0.25}', 'worker-7', 'prod', U&'git@github.com\003Aacme/site.git',
    'main', 'abcdef1234567', 'words', 'cron'
FROM (
    SELECT n, U&'2025-12-31T15\003A30\003A45.000000Z' AS moment, lpad(to_hex(nextval('numbers')), 36, '0') AS id
    FROM generate_series(1, SIZE) AS n OFFSET 0
) AS made
ON CONFLICT (event_id) DO NOTHING
"""
_TPS: Final = re.compile(r"tps = ([\d.]+) \(without")


def postgres_batches(bench: Bench) -> list[Figure]:
    """Batches of 1,000 through one daemon and through four, compared with PostgreSQL alone."""
    limit, alone = f"limit-postgres-{_SIZE}", f"pgbench, {_SIZE:,} rows a transaction"
    with postgres.durable_cluster() as cluster:
        template = postgres.make(cluster)
        found = bench.alternate(
            Unit.ROWS,
            {
                limit: partial(_limit, bench, cluster, template),
                alone: partial(_pgbench, bench, cluster, template, 1, _SIZE),
                "one daemon": _posted(bench, cluster, template, 1, Load("batch", _DAEMONS, _SIZE)),
                "four daemons": _posted(bench, cluster, template, _DAEMONS, Load("batch", 1, _SIZE)),
            },
        )
    name = f"PostgreSQL, batches of {_SIZE:,}, 4 connections, {Ids.ORDERED} ids"
    return [
        Figure(f"{name}, one daemon", Unit.ROWS, found["one daemon"], found[limit], at_least(0.5)),
        Figure(f"{name}, one daemon", Unit.ROWS, found["one daemon"], found[alone]),
        Figure(f"{name}, four daemons", Unit.ROWS, found["four daemons"], found["one daemon"], at_least(1)),
    ]


def postgres_singles(bench: Bench) -> list[Figure]:
    """Single POST over 64 connections, compared with SQLite and with PostgreSQL alone."""
    alone, sqlite = "pgbench, 64 clients", "SQLite, WAL"
    with postgres.durable_cluster() as cluster:
        template = postgres.make(cluster)
        found = bench.alternate(
            Unit.REQUESTS,
            {
                sqlite: into_empty(bench, TELEMETRYD_WAL, Load("post", 64)),
                alone: partial(_pgbench, bench, cluster, template, 64, 1),
                "PostgreSQL": _posted(bench, cluster, template, 1, Load("post", 64)),
            },
        )
    name = f"PostgreSQL, single POST, 64 connections, {Ids.ORDERED} ids"
    return [
        Figure(name, Unit.REQUESTS, found["PostgreSQL"], found[sqlite], at_least(0.5)),
        Figure(name, Unit.REQUESTS, found["PostgreSQL"], found[alone]),
    ]


def _limit(bench: Bench, cluster: Cluster, template: str) -> float:
    with postgres.database(cluster, template) as database:
        return float(bench.place.run("bench.limit_postgres", "--url", database.url, "--rows", str(_ROWS)))


def _pgbench(bench: Bench, cluster: Cluster, template: str, clients: int, size: int) -> float:
    """Return how many rows pgbench stores in a second."""
    with bench.place.corner() as corner, postgres.database(cluster, template) as database:
        script = corner / "insert.sql"
        script.write_text(" ".join(_PGBENCH.replace("SIZE", str(size)).split()) + ";\n")
        where = ("-h", str(cluster.folder), "-U", "postgres", database.name)
        how = ("-n", "-M", "prepared", "-c", str(clients), "-T", str(max(1, round(bench.options.seconds))))
        done = subprocess.run(
            [shutil.which("pgbench") or "pgbench", *how, "-f", str(script), *where],
            capture_output=True,
            text=True,
            check=False,
        )
        found = _TPS.search(done.stdout)
        if done.returncode != 0 or found is None:
            raise BenchError(f"pgbench failed: {done.stderr[-1000:]}")
        return float(found[1]) * size


def _posted(bench: Bench, cluster: Cluster, template: str, daemons: int, load: Load) -> Measure:
    """Return what measures a load on each of so many daemons of one database, all at the same time."""

    def measure() -> float:
        with postgres.database(cluster, template) as database:
            nonces = {new_nonce(): 0 for _ in range(daemons)}
            with ExitStack() as stack:
                servers = [
                    stack.enter_context(_serving(bench, stack.enter_context(bench.place.corner()), database))
                    for _ in nonces
                ]
                for server in servers:
                    post_sample(server.url, new_nonce(), load.sample, load.ids)
                running = {
                    nonce: bench.place.load(
                        server, load.script, load.connections, bench.options.seconds, nonce, *load.arguments
                    )
                    for nonce, server in zip(nonces, servers, strict=True)
                }
                found = {nonce: each.finish() for nonce, each in running.items()}
            for nonce, summary in found.items():
                database.check_created(nonce, summary.acknowledged * load.size)
            return sum(summary.per_second for summary in found.values()) * load.size

    return measure


def _serving(bench: Bench, corner: Path, database: Database) -> AbstractContextManager[Server]:
    return bench.place.serving(postgres.DAEMON, corner / "telemetry.sqlite", database.variables)
