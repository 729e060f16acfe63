"""Runs the commands and queries of docs/how-to/sql.md in their order, on what a real daemon has stored."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import duckdb
import duckdb_extension_sqlite_scanner
import psycopg
import pytest
from psycopg import errors

from tests.conftest import StartDaemon, choose_port, make_run
from tests.http_client import call, post
from tests.needs import require_program
from tests.postgres_cluster import Cluster
from tests.tools.forks import popen

PAGE: Final = Path(__file__).parents[1] / "docs" / "how-to" / "sql.md"
ROLE: Final = "telemetry_read"


def blocks(*languages: str) -> list[tuple[str, str]]:
    """Return the page's blocks in some languages, in order: the language and the text of each."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, text) for language, text in found if language in languages]


def fill(url: str) -> None:
    for number in range(4):
        run = make_run(
            event_id=f"run-{number}",
            agent_name="crawler" if number % 2 else "indexer",
            status="failure" if number == 1 else "success",
            error_summary="KeyError: 'sitemap'" if number == 1 else None,
            duration_ms=1000 * number,
            metrics_json={"tokens": 100 * number},
            labels={"team": "search"} if number == 2 else None,
        )
        assert post(url, run)[0] == 201
    assert call(url, "POST", "/api/v1/runs/run-1/events", {"event_type": "page_failed"})[0] == 201


def with_extension(home: Path) -> None:
    """Put DuckDB's extension for SQLite, from its package, where `INSTALL sqlite` would put it."""
    [(platform,)] = duckdb.sql("PRAGMA platform").fetchall()
    packed = Path(duckdb_extension_sqlite_scanner.__file__).parent / "extensions" / f"v{duckdb.__version__}"
    place = home / ".duckdb" / "extensions" / f"v{duckdb.__version__}" / platform
    place.mkdir(parents=True)
    shutil.copy(packed / "sqlite_scanner.duckdb_extension", place)


def serves(command: str, folder: Path, environment: dict[str, str]) -> str:
    """Start a server by its command, and return a page of it; then it ends."""
    port = choose_port()
    words = ["bash", "-c", f"exec {command.replace('8001', str(port))}"]
    with popen(words, environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/runs/agent_runs", timeout=60) as answer:
                        return str(answer.read().decode())
                except OSError:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
        finally:
            process.kill()


def test_the_commands_and_queries_of_the_page_work_as_they_stand_there(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    require_program("sqlite3", "sqlite3")
    daemon = start_daemon()
    fill(daemon.url)
    with_extension(tmp_path)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    environment = {
        **kept,
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
        "TELEMETRY_API_URL": daemon.url,
        "TELEMETRY_DB_PATH": str(daemon.database),
    }
    said: list[str] = []
    for language, text in blocks("bash", "python"):
        if text.startswith("datasette serve"):
            said.append(serves(text.strip(), tmp_path, environment))
            continue
        command = [sys.executable, "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
        with popen(command, environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            out, err = process.communicate(timeout=120)
        assert process.returncode == 0, f"{text}\n{out}{err}"
        said.append(out)
    everything = "\n".join(said)
    for expected in (
        r"crawler +│ 2 +│ 0\.5 +│ 2\.0",  # sqlite3: runs, success rate, seconds
        r"crawler +│ 400 ",
        r"run-2 +│ success",
        r"page_failed +│ 1 ",
        r"KeyError: &#39;sitemap&#39;",  # Datasette's page
        r'\{"status": "failure", "runs": 1\}',
        r"crawler +│ \S+ \S+ +│ +2 │ +1 │ +2900\.0",  # DuckDB: runs, failures, p95
        r"KeyError: 'sitemap' +│ +1 │",
    ):
        assert re.search(expected, everything), f"{expected}\n{everything}"


@pytest.mark.postgresql
def test_the_role_of_the_page_reads_and_does_nothing_else(cluster: Cluster, postgres_database: str) -> None:
    (_, role), (_, query) = blocks("sql")
    name = urlsplit(postgres_database).path.removeprefix("/")
    with psycopg.connect(postgres_database, autocommit=True) as owner:
        owner.execute(role.replace("DATABASE telemetry", f"DATABASE {name}").encode())
        try:
            owner.execute(
                "INSERT INTO agent_runs (event_id, run_id, created_at, updated_at, start_time, agent_name, job_type, "
                "status, duration_ms, metrics_json) SELECT 'run-1', 'run-1', now, now, now, 'crawler', 'crawl', "
                """'failure', 1500, '{"tokens": 7}' FROM to_char(now() AT TIME ZONE 'UTC', """
                """'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS now"""
            )
            reads_and_does_nothing_else(cluster.url(name, ROLE).replace("@/", ":choose-another@/"), query)
        finally:
            owner.execute(f"DROP OWNED BY {ROLE}; DROP ROLE {ROLE}".encode())


def reads_and_does_nothing_else(url: str, query: str) -> None:
    with psycopg.connect(url, autocommit=True) as reader:
        [(agent, _, runs, failures, p95, tokens)] = reader.execute(query.encode()).fetchall()
        assert (agent, runs, failures, p95, tokens) == ("crawler", 1, 1, 1500, 7)
        for table in ("run_events", "run_labels"):
            reader.execute(f"SELECT count(*) FROM {table}".encode())
        for setting, value in (("statement_timeout", "30s"), ("lock_timeout", "2s")):
            assert reader.execute(f"SHOW {setting}".encode()).fetchone() == (value,)
        with pytest.raises(errors.ReadOnlySqlTransaction):
            reader.execute("DELETE FROM agent_runs")
        reader.execute("SET default_transaction_read_only = off")
        for refused in ("DELETE FROM agent_runs", "SELECT * FROM alert_deliveries"):
            with pytest.raises(errors.InsufficientPrivilege):
                reader.execute(refused.encode())
