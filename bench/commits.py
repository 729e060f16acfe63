"""What it takes to ask which commit broke it: `GET /api/v1/regressions` over 50 pairs, one of which has 2,000 commits.

The database is made by SQL, its cells are counted by telemetryd, and the daemon answers over HTTP. With `--url` all of
it happens in an empty database on PostgreSQL.
"""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import click
import orjson
from pydantic import SecretStr

from telemetryd.engine.postgres import schema
from telemetryd.engine.postgres.connection import Target, connect_plainly
from telemetryd.engine.postgres.groups import transact
from telemetryd.engine.postgres.statements import deltas
from telemetryd.engine.sqlite.statements import rollups
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.model.values import format_timestamp, utc_now
from telemetryd.settings import Settings, Sync

_PAIRS: Final = 50
_DAYS: Final = 30
_COMMITS: Final = 300
"""Commits of a pair; the first one has 2,000."""
_BAD_SINCE: Final = _DAYS - 8
_ASKED: Final = 7
_PATHS: Final = ("/api/v1/regressions", "/api/v1/regressions?agent_name=agent-0", "/api/v1/regressions?from=-14d")

_COLUMNS: Final = (
    "id, event_id, run_id, created_at, updated_at, start_time, agent_name, job_type, status, duration_ms, git_repo, "
    "git_commit_hash"
)
_NUMBER: Final = f"CAST(floor(age * CASE n % {_PAIRS} WHEN 0 THEN 2000 ELSE {_COMMITS} END / {_DAYS}) AS bigint)"
# Of a pair one run in twenty fails; of the second one two in five, since a commit of eight days ago.
_MADE: Final = f"""
    n, 'e' || n, 'r', {{moment}}, {{moment}}, '', 'agent-' || (n % {_PAIRS} / 2), 'job-' || (n % 2),
    CASE WHEN n * 7919 % 1009 < CASE WHEN n % {_PAIRS} = 1 AND age >= {_BAD_SINCE} THEN 400 ELSE 50 END
        THEN 'failure' ELSE 'success' END,
    1000 + n * 7919 % 60000, 'git@github.com:acme/site.git', {{commit}}
"""
_AGES: Final = f"SELECT n, {_DAYS}.0 * (n - 1) / {{rows}} AS age FROM numbers"


def _for_sqlite(rows: int, now: int) -> str:
    made = _MADE.format(
        moment=f"strftime('%Y-%m-%dT%H:%M:%S.000000Z', {now} - ({_DAYS} - age) * 86400, 'unixepoch')",
        commit=f"printf('%07x%02x', {_NUMBER}, n % {_PAIRS})",
    )
    return f"""
        WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {rows}),
            aged AS ({_AGES.format(rows=rows)})
        INSERT INTO agent_runs ({_COLUMNS}) SELECT {made} FROM aged
    """


def _for_postgres(rows: int, now: int) -> str:
    made = _MADE.format(
        moment=f"to_char(to_timestamp({now} - ({_DAYS} - age) * 86400) AT TIME ZONE 'UTC', "
        '\'YYYY-MM-DD"T"HH24:MI:SS.000000"Z"\')',
        commit=f"lpad(to_hex({_NUMBER}), 7, '0') || lpad(to_hex(n % {_PAIRS}), 2, '0')",
    )
    return f"""
        WITH numbers AS (SELECT generate_series(1::bigint, {rows}) AS n), aged AS ({_AGES.format(rows=rows)})
        INSERT INTO agent_runs ({_COLUMNS}) SELECT {made} FROM aged
    """


def _make_sqlite(path: Path, rows: int) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -262144", "auto_vacuum = INCREMENTAL"):
            connection.execute(f"PRAGMA {pragma}")
        migrate.create(connection, format_timestamp(utc_now()))
        connection.execute("BEGIN")
        indexes = migrate.drop_indexes(connection)
        connection.execute(_for_sqlite(rows, int(time.time())))
        for statement in indexes:
            connection.execute(statement)
        migrate.derive(connection)
        connection.execute("COMMIT")
        begun = time.monotonic()
        connection.execute("BEGIN")
        rollups.rebuild(connection)
        connection.execute("COMMIT")
        _say_counted(begun, connection.execute("SELECT count(*) FROM run_commits").fetchone()[0])


def _make_postgres(url: str, rows: int) -> None:
    target = Target.of(Settings(db_url=SecretStr(url), db_sync=Sync.NONE))
    with closing(connect_plainly(target, "bench", {})) as plain:
        schema.make(plain, target, format_timestamp(utc_now()), count_anew=None)
        plain.execute(_for_postgres(rows, int(time.time())).encode())
        plain.execute(f"SELECT setval('numbers', {2 * rows})".encode())
        plain.execute("INSERT INTO run_changes (run, seq) SELECT id, 1000000000 + id FROM agent_runs")
        plain.execute("SELECT setval('numbers', 2000000000)")
        begun = time.monotonic()
        transact(plain, deltas.rebuild)
        _say_counted(begun, plain.execute("SELECT count(*) FROM run_commits").fetchall()[0][0])
        plain.execute("ANALYZE")


def _say_counted(begun: float, cells: int) -> None:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    click.echo(f"counted in {time.monotonic() - begun:.0f} s: {cells:,} cells; memory at most {largest:.0f} MiB")


@contextmanager
def _serving(**variables: str) -> Iterator[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    command = [sys.executable, "-m", "telemetryd", "serve", "--log-format", "json"]
    with subprocess.Popen(
        command, env={**environment, "TELEMETRY_API_PORT": "0", **variables}, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        try:
            lines = (orjson.loads(line) for line in process.stdout)
            yield next(line["addresses"][0] for line in lines if line["message"] == "Serving")
        finally:
            process.terminate()
            process.stdout.read()


def _ask(url: str) -> tuple[float, Any]:
    begun = time.perf_counter()
    with urllib.request.urlopen(url, timeout=120) as answer:  # noqa: S310 - our own daemon
        body = orjson.loads(answer.read())
    return time.perf_counter() - begun, body


@click.command()
@click.option("--runs", default=10_000_000, help="Runs to make.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("bench-commits"), help="Where the file stays.")
@click.option("--url", help="An empty database on PostgreSQL, instead of a file.")
def main(runs: int, folder: Path, url: str | None) -> None:
    """Print how long the daemon takes to answer."""
    path = folder / "telemetry.sqlite"
    if url is not None:
        _make_postgres(url, runs)
    elif not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _make_sqlite(path, runs)
    place = {"TELEMETRY_DB_PATH": str(path)} if url is None else {"TELEMETRY_DB_URL": url, "TELEMETRY_DB_SYNC": "none"}
    with _serving(**place) as address:
        for asked in _PATHS:
            answers = [_ask(f"{address}{asked}") for _ in range(_ASKED)]
            times = sorted(seconds for seconds, _ in answers[1:])
            found = answers[0][1]
            click.echo(
                f"{asked}: first {answers[0][0] * 1000:.0f} ms, then {times[0] * 1000:.0f} to {times[-1] * 1000:.0f} "
                f"ms; {found['pairs']} pairs, {len(found['regressions'])} found"
            )


if __name__ == "__main__":
    main()
