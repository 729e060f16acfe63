"""The process: how it starts, after whatever happened before, and how it stops."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import telemetryd
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import JournalMode, Settings
from telemetryd.store import Store
from tests.conftest import PATIENCE_S, Daemon, StartDaemon, make_run
from tests.faults.hot_journal import cut_off_growing
from tests.faults.strace import needs_strace, strace
from tests.http_client import call, get, post

NOW = "2026-01-01T00:00:00.000000Z"


class Load:
    """Threads that post until the daemon is gone, and the event_ids that were acknowledged to them."""

    def __init__(self, url: str, threads: int = 8) -> None:
        self._netloc = urlsplit(url).netloc
        self.acknowledged: list[str] = []
        self.unanswered: list[str] = []
        self._threads = [threading.Thread(target=self._post) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _post(self) -> None:
        connection = http.client.HTTPConnection(self._netloc, timeout=60)
        while True:
            run = make_run()
            try:
                connection.request("POST", "/api/v1/runs", json.dumps(run), {"Content-Type": "application/json"})
                response = connection.getresponse()
                response.read()
            except (OSError, http.client.HTTPException):
                self.unanswered.append(run["event_id"])
                break
            if response.status == 201:
                self.acknowledged.append(run["event_id"])
            else:
                assert response.status == 503
        connection.close()

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while len(self.acknowledged) < count:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


def stored(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {row[0] for row in connection.execute("SELECT event_id FROM agent_runs")}


def one_line(errors: str) -> str:
    assert len(errors.splitlines()) == 1, errors
    return errors.strip()


# --- Stop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "journal_mode"), [(signal.SIGTERM, "DELETE"), (signal.SIGTERM, "WAL"), (signal.SIGINT, "WAL")]
)
def test_a_signal_under_load_loses_nothing(start_daemon: StartDaemon, number: int, journal_mode: str) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE=journal_mode)
    load = Load(daemon.url)
    load.wait_for(200)
    daemon.process.send_signal(number)
    status, errors = daemon.wait()
    load.join()
    assert status == 0
    assert errors == ""
    # checkpointed and closed: nothing is left next to the file but its lock
    assert {path.name for path in daemon.folder.iterdir()} == {"telemetry.sqlite", "telemetry.sqlite.lock"}
    found = stored(daemon.database)
    assert set(load.acknowledged) <= found <= {*load.acknowledged, *load.unanswered}
    assert [line["message"] for line in daemon.lines if line["level"] in ("ERROR", "CRITICAL")] == []


@needs_strace
def test_what_is_in_flight_when_the_signal_comes_is_answered(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    url = daemon.url
    answers: list[int | None] = []
    with strace(daemon.process.pid, tmp_path / "trace", "-e", "inject=fdatasync:delay_enter=300000"):
        senders = [threading.Thread(target=lambda: answers.append(post(url, make_run())[0])) for _ in range(10)]
        for sender in senders:
            sender.start()
        _wait_for_text(tmp_path / "trace", " fdatasync(")
        while get(url, "/health")[1]["queue_depth"] < 1:
            time.sleep(0.005)
        assert daemon.stop() == 0
        for sender in senders:
            sender.join()
    committed = len(stored(daemon.database))
    assert answers.count(201) == committed >= 2
    assert set(answers) <= {201, 503, None}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_and_acknowledges_nothing_uncommitted(
    start_daemon: StartDaemon, number: int
) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL", TELEMETRY_SHUTDOWN_TIMEOUT_S="60")
    url = daemon.url
    kept = make_run()
    assert post(url, kept)[0] == 201
    answers: list[int | None] = []
    with closing(sqlite3.connect(daemon.database, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")  # the writer waits for this lock for up to 30 s
        sender = threading.Thread(target=lambda: answers.append(post(url, make_run())[0]))
        sender.start()
        _wait_until_it_waits_for_the_lock(daemon)
        daemon.process.send_signal(number)
        daemon.wait_for_line("Stopping")
        assert daemon.process.poll() is None
        started = time.monotonic()
        daemon.process.send_signal(number)
        status, errors = daemon.wait()
        assert time.monotonic() - started < 20, "it waits for no lock"
        sender.join()
    assert answers == [None]
    assert status == 128 + number
    assert one_line(errors) == "telemetryd: second signal, exiting at once"
    assert stored(daemon.database) == {kept["event_id"]}


def test_a_stop_that_takes_too_long_is_cut_off(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TELEMETRY_SHUTDOWN_TIMEOUT_S="1", TELEMETRY_DB_JOURNAL_MODE="WAL")
    url = daemon.url
    with closing(sqlite3.connect(daemon.database, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")  # the writer waits for this lock for up to 30 s
        sender = threading.Thread(target=lambda: post(url, make_run()))
        sender.start()
        _wait_until_it_waits_for_the_lock(daemon)
        started = time.monotonic()
        daemon.process.send_signal(signal.SIGTERM)
        status, errors = daemon.wait()
        sender.join()
    assert time.monotonic() - started < 20, "it waits for no lock"
    assert status == 1
    assert one_line(errors) == "telemetryd: not stopped after 1 s, exiting"


def test_a_signal_during_the_start_is_a_clean_stop(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    while not daemon.database.exists():
        assert daemon.process.poll() is None
        time.sleep(0.001)
    assert daemon.stop() == 0
    assert stored(daemon.database) == set()


# --- Start ---------------------------------------------------------------------------------------


def test_the_first_line_says_what_runs(start_daemon: StartDaemon) -> None:
    """The reader of a report needs SQLite's version as much as ours."""
    line = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL").wait_for_line("Serving")
    assert line["sqlite_version"] == sqlite3.sqlite_version
    assert line["version"] == telemetryd.__version__
    assert (line["journal_mode"], line["synchronous"]) == ("WAL", "FULL")


@pytest.mark.parametrize("journal_mode", ["DELETE", "PERSIST", "WAL"])
def test_it_starts_after_kill_under_load(start_daemon: StartDaemon, tmp_path: Path, journal_mode: str) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "telemetry.sqlite"
    daemon = start_daemon(TELEMETRY_DB_PATH=str(path), TELEMETRY_DB_JOURNAL_MODE=journal_mode)
    load = Load(daemon.url)
    load.wait_for(50)
    daemon.stop(signal.SIGKILL)
    load.join()
    link = tmp_path / "link.sqlite"
    link.symlink_to(path)
    again = start_daemon(TELEMETRY_DB_PATH=str(link), TELEMETRY_DB_JOURNAL_MODE=journal_mode)
    assert post(again.url, make_run(event_id=load.acknowledged[0]))[0] == 200
    assert again.stop() == 0
    assert set(load.acknowledged) <= stored(path)


@pytest.mark.parametrize("by_link", [False, True])
def test_it_recovers_from_a_hot_journal(start_daemon: StartDaemon, tmp_path: Path, by_link: bool) -> None:
    """A transaction half in the file: the old pages are in the journal only."""
    path, journal = tmp_path / "telemetry.sqlite", tmp_path / "telemetry.sqlite-journal"
    _make_database(path, 2000)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN")
        connection.execute("UPDATE agent_runs SET agent_name = 'torn', host = hex(randomblob(100))")
        torn, log = path.read_bytes(), journal.read_bytes()
        connection.execute("ROLLBACK")
    path.write_bytes(torn)
    journal.write_bytes(log)
    variables = {}
    if by_link:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "link.sqlite").symlink_to(path)
        variables["TELEMETRY_DB_PATH"] = str(tmp_path / "elsewhere" / "link.sqlite")
    daemon = start_daemon(**variables)
    assert get(daemon.url, "/metrics")[1]["agents"] == {"agent": 2000}
    assert get(daemon.url, "/api/v1/runs?agent_name=torn")[1] == []
    assert daemon.stop() == 0
    assert len(stored(path)) == 2000


def test_it_recovers_when_the_file_was_to_become_longer(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """A commit writes the first page first: it tells of pages that are not there yet."""
    path = tmp_path / "telemetry.sqlite"
    _make_database(path, 200)
    cut_off_growing(path)
    daemon = start_daemon()
    assert get(daemon.url, "/metrics")[1]["total_runs"] == 200
    assert daemon.stop() == 0
    assert len(stored(path)) == 200


@pytest.mark.parametrize("next_mode", ["WAL", "DELETE"])
def test_it_takes_over_a_write_ahead_log(start_daemon: StartDaemon, tmp_path: Path, next_mode: str) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    run_ids = [make_run() for _ in range(20)]
    for run in run_ids:
        assert post(daemon.url, run)[0] == 201
    assert daemon.database.stat().st_size == 4096, "so that even the schema stands only in the log"
    daemon.stop(signal.SIGKILL)
    assert (tmp_path / "telemetry.sqlite-wal").stat().st_size > 0
    again = start_daemon(TELEMETRY_DB_JOURNAL_MODE=next_mode)
    assert get(again.url, "/metrics")[1]["total_runs"] == 20
    assert get(again.url, "/health")[1]["journal_mode"] == next_mode
    assert again.stop() == 0
    assert stored(daemon.database) == {run["event_id"] for run in run_ids}


def test_start_up_does_not_read_the_whole_database(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    _make_database(path, 150_000)
    assert path.stat().st_size > 40_000_000

    def read_bytes() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    async def start(journal_mode: JournalMode) -> None:
        settings = Settings(db_path=path, db_journal_mode=journal_mode)
        read, used = read_bytes(), time.process_time()
        store = await Store.open(settings, Metrics())
        assert time.process_time() - used < 1
        assert read_bytes() - read < 20_000_000
        await store.close()

    for journal_mode in (JournalMode.DELETE, JournalMode.WAL):
        asyncio.run(start(journal_mode))
        daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE=journal_mode)
        assert get(daemon.url, "/metrics")[1]["total_runs"] == 150_000
        assert daemon.stop() == 0


def test_a_port_in_use_is_one_clear_line(start_daemon: StartDaemon) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        daemon = start_daemon("--host", "127.0.0.1", "--port", str(port))
        status, errors = daemon.wait()
    assert status == 1
    assert f"127.0.0.1:{port}" in one_line(errors)
    assert "already in use" in errors
    again = start_daemon()
    assert post(again.url, make_run())[0] == 201


# --- Unix socket ---------------------------------------------------------------------------------


def test_it_answers_on_a_unix_socket_also_after_kill(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    daemon = start_daemon("--unix", str(path))
    run = make_run()
    assert _until_answered(path, "POST", "/api/v1/runs", run)[0] == 201
    assert get(daemon.url, f"/api/v1/runs/{run['event_id']}")[0] == 200
    assert path.stat().st_mode & 0o007 == 0
    daemon.stop(signal.SIGKILL)
    assert path.exists()
    again = start_daemon("--unix", str(path))
    assert again.url
    assert _over_unix(path, "POST", "/api/v1/runs", run)[0] == 200
    assert again.stop() == 0


def test_the_socket_of_a_living_daemon_is_not_taken_away(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    first = start_daemon("--unix", str(path))
    assert first.url
    second = start_daemon("--unix", str(path), TELEMETRY_DB_PATH=str(tmp_path / "other.sqlite"))
    status, errors = second.wait()
    assert status == 1
    assert str(path) in one_line(errors)
    run = make_run()
    assert _over_unix(path, "POST", "/api/v1/runs", run)[0] == 201
    assert get(first.url, f"/api/v1/runs/{run['event_id']}")[0] == 200


def test_a_file_at_the_sockets_path_is_not_deleted(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = tmp_path / "precious.txt"
    path.write_text("do not delete")
    status, errors = start_daemon("--unix", str(path)).wait()
    assert status == 1
    assert str(path) in one_line(errors)
    assert path.read_text() == "do not delete"


# --- Helpers -------------------------------------------------------------------------------------


def _make_database(path: Path, count: int) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        migrate.create(connection, NOW)
        connection.execute("BEGIN")
        connection.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
            " INSERT INTO agent_runs (event_id, run_id, created_at, updated_at, start_time, agent_name, job_type)"
            " SELECT 'event-' || i, 'run', ?, ?, ?, 'agent', 'job' FROM n",
            (count, NOW, NOW, NOW),
        )
        connection.execute("INSERT INTO run_totals VALUES ('agent', 'job', 'running', ?)", (count,))
        connection.execute("INSERT INTO run_minutes VALUES (?, ?)", (NOW[:16], count))
        connection.execute("COMMIT")


def _wait_for_text(path: Path, text: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while text not in path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _wait_until_it_waits_for_the_lock(daemon: Daemon) -> None:
    """Wait until a thread keeps sleeping in SQLite's busy handler, as the kernel tells; the log's naps are short."""
    deadline = time.monotonic() + PATIENCE_S
    seen: Counter[str] = Counter()
    while max(seen.values(), default=0) < 8:
        assert time.monotonic() < deadline
        tasks = list(Path(f"/proc/{daemon.process.pid}/task").iterdir())
        sleeping = {task.name for task in tasks if "nanosleep" in (task / "wchan").read_text()}
        seen = Counter({name: seen[name] + 1 for name in sleeping})
        time.sleep(0.02)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def _over_unix(path: Path, method: str, target: str, body: object = None) -> tuple[int, Any]:
    with closing(_UnixConnection(path)) as connection:
        connection.request(method, target, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def _until_answered(path: Path, method: str, target: str, body: object = None) -> tuple[int, Any]:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return _over_unix(path, method, target, body)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL"])
def test_idle_connections_cannot_take_the_descriptors_of_the_database(
    start_daemon: StartDaemon, journal_mode: str
) -> None:
    daemon = start_daemon(prefix=("prlimit", "--nofile=130:130"), TELEMETRY_DB_JOURNAL_MODE=journal_mode)
    assert post(daemon.url, make_run())[0] == 201
    address = urlsplit(daemon.url)
    idle = [socket.create_connection((address.hostname, address.port)) for _ in range(150)]
    try:
        assert attempt(daemon) in (201, 503, None)
        assert daemon.process.poll() is None
    finally:
        for connection in idle:
            connection.close()
    deadline = time.monotonic() + PATIENCE_S  # the event loop stops accepting for a while when descriptors run out
    while attempt(daemon) != 201:
        assert time.monotonic() < deadline
    assert daemon.stop() == 0


def attempt(daemon: Daemon) -> int | None:
    return call(daemon.url, "POST", "/api/v1/runs", make_run(), timeout_s=1)[0]


def test_a_reader_of_somebody_elses_does_not_hold_up_the_stop(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    assert post(daemon.url, make_run())[0] == 201
    with closing(sqlite3.connect(f"file:{daemon.database}?mode=ro", uri=True)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM agent_runs").fetchone()
        assert post(daemon.url, make_run())[0] == 201
        started = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - started < 20, "it waits for no reader"


def test_a_client_that_does_not_read_its_answer_does_not_hold_up_the_stop(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL", TELEMETRY_SHUTDOWN_TIMEOUT_S="4")
    for _ in range(8):
        assert post(daemon.url, make_run(error_details="x" * 2_000_000))[0] == 201
    address = urlsplit(daemon.url)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((address.hostname, address.port))
        client.sendall(b"GET /api/v1/runs HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 200"
        assert daemon.stop() == 0
