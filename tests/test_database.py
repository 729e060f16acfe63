"""Who owns the file, what its modes are, and what is synced before an answer."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from telemetryd.engine.sqlite.file_lock import FileLock
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings
from telemetryd.store import Store
from tests.conftest import StartDaemon, make_run
from tests.faults.strace import completed, needs_strace, strace
from tests.http_client import call, post
from tests.tools.process import telemetryd


def one_line(errors: str) -> str:
    """What stands on stderr, which must be one line and no traceback."""
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("telemetryd: ")
    return lines[0]


# --- One owner -----------------------------------------------------------------------------------


def test_a_second_daemon_is_refused_whatever_its_lock_file_and_name_of_the_database(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    owner = start_daemon(TELEMETRY_LOCK_FILE=str(tmp_path / "a.lock"))
    run = make_run()
    assert post(owner.url, run)[0] == 201
    before = _files(tmp_path)
    (tmp_path / "link.sqlite").symlink_to(owner.database)
    (tmp_path / "sub").symlink_to(tmp_path)
    contenders = [
        start_daemon(**variables)
        for variables in (
            {},
            {"TELEMETRY_LOCK_FILE": str(tmp_path / "a.lock")},
            {"TELEMETRY_LOCK_FILE": str(tmp_path / "b.lock")},
            {"TELEMETRY_DB_PATH": str(tmp_path / "link.sqlite")},
            {"TELEMETRY_DB_PATH": str(tmp_path / "sub" / "telemetry.sqlite")},
            {"TELEMETRY_DB_PATH": "telemetry.sqlite"},  # tmp_path is the working directory
        )
    ]
    for contender in contenders:
        status, errors = contender.wait()
        assert status == 1
        assert f"PID {owner.process.pid})" in one_line(errors)
    assert before == {name: value for name, value in _files(tmp_path).items() if name in before}
    assert post(owner.url, run)[0] == 200


def test_one_lock_file_for_two_databases_lets_only_one_daemon_run(start_daemon: StartDaemon, tmp_path: Path) -> None:
    lock = str(tmp_path / "common.lock")
    owner = start_daemon(TELEMETRY_LOCK_FILE=lock)
    assert owner.url
    other = start_daemon(TELEMETRY_LOCK_FILE=lock, TELEMETRY_DB_PATH=str(tmp_path / "other.sqlite"))
    status, errors = other.wait()
    assert status == 1
    assert f"PID {owner.process.pid})" in one_line(errors)
    assert not (tmp_path / "other.sqlite").exists()


def test_a_hard_link_does_not_make_a_second_owner(start_daemon: StartDaemon, tmp_path: Path) -> None:
    owner = start_daemon()
    assert post(owner.url, make_run())[0] == 201
    link = tmp_path / "hard.sqlite"
    os.link(owner.database, link)
    before = link.read_bytes()
    status, errors = start_daemon(TELEMETRY_DB_PATH=str(link)).wait()
    assert status == 1
    assert f"2 hard links (also {owner.database}, which PID {owner.process.pid} owns);" in one_line(errors)
    assert link.read_bytes() == before
    assert post(owner.url, make_run())[0] == 201


def test_a_lock_file_left_by_a_killed_daemon_is_no_obstacle_and_is_never_deleted(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    locks = [tmp_path / "telemetry.sqlite.lock", tmp_path / "configured.lock"]
    variables = {"TELEMETRY_LOCK_FILE": str(locks[1])}
    daemon = start_daemon(**variables)
    run = make_run()
    assert post(daemon.url, run)[0] == 201
    inodes = [lock.stat().st_ino for lock in locks]
    daemon.stop(signal.SIGKILL)
    assert [lock.read_text() for lock in locks] == [f"{daemon.process.pid}\n"] * 2

    again = start_daemon(**variables)
    assert post(again.url, run)[0] == 200
    assert [lock.read_text() for lock in locks] == [f"{again.process.pid}\n"] * 2
    assert again.stop() == 0
    assert [lock.stat().st_ino for lock in locks] == inodes


_TWENTY = """
import gc, os, signal, sys
import telemetryd.cli.serve, telemetryd.daemon  # once for all of them
from telemetryd.cli import main
gc.freeze()  # or each collection would copy the pages that the forks share
ready, go = os.pipe()
pids = []
for number in range(20):
    pid = os.fork()
    if pid == 0:
        os.close(go)
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}{os.getpid()}", os.O_CREAT | os.O_WRONLY), descriptor)
        os.environ["TELEMETRY_LOCK_FILE"] = f"{number % 3}.lock"
        os.read(ready, 1)  # until the parent closes its end
        main(["serve", "--log-format", "json"])
    pids.append(pid)
os.close(go)
ended = [os.wait() for _ in range(19)]
(winner,) = set(pids) - {pid for pid, _ in ended}
print(winner, *(f"{pid}:{os.waitstatus_to_exitcode(status)}" for pid, status in ended), flush=True)
sys.stdin.read()
os.kill(winner, signal.SIGTERM)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(winner, 0)[1]))
"""


def test_of_twenty_starts_at_once_exactly_one_runs(tmp_path: Path) -> None:
    (tmp_path / "telemetry.sqlite.lock").write_text("123456789\n")
    script = subprocess.Popen(
        [sys.executable, "-c", _TWENTY],
        cwd=tmp_path,
        env={**os.environ, "TELEMETRY_DB_PATH": "telemetry.sqlite", "TELEMETRY_API_PORT": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with script:  # its standard input closes at the end, which tells it to stop the winner
        assert script.stdout is not None
        winner, *losers = script.stdout.readline().split()
        assert len(losers) == 19
        for loser in losers:
            pid, status = loser.split(":")
            assert status == "1"
            assert f"PID {winner})" in one_line((tmp_path / f"err{pid}").read_text())
    assert script.returncode == 0
    lines = [json.loads(line)["message"] for line in (tmp_path / f"out{winner}").read_text().splitlines()]
    assert "Serving" in lines
    assert lines[-1] == "Stopped"


# --- Modes and directories -----------------------------------------------------------------------


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL", "PERSIST"])
def test_files_are_private_whatever_the_umask(start_daemon: StartDaemon, tmp_path: Path, journal_mode: str) -> None:
    folder = tmp_path / "data"
    daemon = start_daemon(
        TELEMETRY_DB_PATH=str(folder / "telemetry.sqlite"),
        TELEMETRY_LOCK_FILE=str(folder / "configured.lock"),
        TELEMETRY_DB_JOURNAL_MODE=journal_mode,
    )
    assert post(daemon.url, make_run())[0] == 201
    beside = {"DELETE": set(), "WAL": {"-wal", "-shm"}, "PERSIST": {"-journal"}}[journal_mode]
    names = {f"telemetry.sqlite{suffix}" for suffix in beside | {"", ".lock", ".sock"}} | {"configured.lock"}
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in folder.iterdir()} == dict.fromkeys(
        names, "0o600"
    )
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_unusable_paths_are_one_clear_line(start_daemon: StartDaemon, tmp_path: Path) -> None:
    (tmp_path / "directory.sqlite").mkdir()
    (tmp_path / "file").write_text("")
    before = _files(tmp_path)
    deep = start_daemon(TELEMETRY_DB_PATH=str(tmp_path / "a" / "b" / "telemetry.sqlite"))
    others = [
        start_daemon(TELEMETRY_DB_PATH=str(tmp_path / "file" / "telemetry.sqlite")),
        start_daemon(TELEMETRY_LOCK_FILE=str(tmp_path / "none" / "lock")),
    ]
    status, errors = deep.wait()
    assert status == 1
    assert f"{tmp_path}/a/b does not exist; if it is the right one, make it: mkdir -p" in one_line(errors)
    for daemon in others:
        status, errors = daemon.wait()
        assert status == 1
        assert str(tmp_path) in one_line(errors)
    assert {**before, "telemetry.sqlite.lock": None}.keys() == {
        **_files(tmp_path),
        "telemetry.sqlite.lock": None,
    }.keys()

    status, errors = start_daemon(TELEMETRY_DB_PATH=str(tmp_path / "directory.sqlite")).wait()
    assert status == 1
    assert "not a regular file" in one_line(errors)


@pytest.mark.parametrize(
    ("suffix", "kind", "journal_mode"),
    [
        ("-journal", "pipe", "DELETE"),
        ("-journal", "socket", "WAL"),
        ("-journal", "directory", "DELETE"),
        ("-wal", "pipe", "WAL"),
        ("-wal", "symbolic link", "WAL"),
        ("-shm", "pipe", "WAL"),
        ("-shm", "hard link", "WAL"),
        ("-journal", "hard link", "DELETE"),
    ],
)
def test_what_is_no_file_in_the_place_of_a_journal_is_one_clear_line_and_hangs_nothing(
    start_daemon: StartDaemon, tmp_path: Path, suffix: str, kind: str, journal_mode: str
) -> None:
    database = tmp_path / "telemetry.sqlite"
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA journal_mode = {journal_mode}")
        migrate.create(connection, "2026-01-01T00:00:00.000000Z")
    side = tmp_path / f"telemetry.sqlite{suffix}"
    make: dict[str, Callable[[], None]] = {
        "pipe": lambda: os.mkfifo(side),
        "socket": lambda: os.mknod(side, stat.S_IFSOCK | 0o600),
        "directory": side.mkdir,
        "symbolic link": lambda: side.symlink_to("precious"),
        "hard link": lambda: side.hardlink_to(precious),
    }
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    make[kind]()
    status, errors = start_daemon(TELEMETRY_DB_JOURNAL_MODE=journal_mode).wait()
    assert status == 1
    assert f"{side} is a {kind}" in one_line(errors)
    for command in (["check"], ["backup", str(tmp_path / "copy.sqlite")], ["migrate"]):
        assert f"{side} is a {kind}" in telemetryd(*command, "--db-path", database, status=1).stderr
    assert precious.read_bytes() == b"precious"


def test_a_database_that_another_program_locks_is_not_called_damaged(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(TELEMETRY_DB_BUSY_TIMEOUT_MS="200")
    assert post(daemon.url, make_run())[0] == 201
    assert daemon.stop() == 0
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
            "c.execute('BEGIN EXCLUSIVE'); print('held', flush=True); sys.stdin.read()",
            str(daemon.database),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        status, errors = start_daemon(TELEMETRY_DB_BUSY_TIMEOUT_MS="200").wait()
    finally:
        holder.communicate(b"")
    assert status == 1
    assert "locked" in one_line(errors)
    assert "damaged" not in errors
    assert post(start_daemon().url, make_run())[0] == 201


# --- What is synced before an answer -------------------------------------------------------------


@needs_strace
@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL"])
def test_syncs_happen_between_commit_and_answer(start_daemon: StartDaemon, tmp_path: Path, journal_mode: str) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE=journal_mode)
    assert post(daemon.url, make_run())[0] == 201
    trace = tmp_path / "trace"
    with strace(daemon.process.pid, trace, "-e", "trace=desc,network,unlink,unlinkat"):
        assert post(daemon.url, make_run())[0] == 201
    kinds = [
        kind
        for call in completed(trace)
        for kind, pattern in {
            "unlink journal": r"unlink(at)?\(.*telemetry\.sqlite-journal",
            "sync directory": rf"f(data)?sync\(\d+<{re.escape(str(tmp_path))}>\) += 0",
            "sync database": r"f(data)?sync\(\d+<\S*telemetry\.sqlite>\) += 0",
            "sync log": r"f(data)?sync\(\d+<\S*telemetry\.sqlite-wal>\) += 0",
            "answer": r"\"HTTP/1\.1 201 ",
        }.items()
        if re.search(pattern, call)
    ]
    if journal_mode == "DELETE":
        assert kinds[-4:] == ["sync database", "unlink journal", "sync directory", "answer"]
    else:
        assert kinds == ["sync log", "answer"]


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.parametrize("content", ["not a lock\n", "SQLite format 3\0and so on", "12345 and more"])
def test_a_file_that_is_no_lock_file_is_refused_and_left_alone(
    start_daemon: StartDaemon, tmp_path: Path, content: str
) -> None:
    (tmp_path / "precious").write_text(content)
    status, errors = start_daemon(TELEMETRY_LOCK_FILE=str(tmp_path / "precious")).wait()
    assert status == 1
    assert "precious is not a lock file" in errors
    assert (tmp_path / "precious").read_text() == content


def test_a_lock_file_that_was_deleted_is_taken_again(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    assert post(daemon.url, make_run())[0] == 201
    (tmp_path / "telemetry.sqlite.lock").unlink()
    line = daemon.wait_for_line("Writes are refused until the database is open again and verified")
    assert "telemetry.sqlite.lock was deleted" in line["reason"]
    daemon.wait_for_line("The database is open again and verified; writes are taken")
    assert (tmp_path / "telemetry.sqlite.lock").exists()
    assert post(daemon.url, make_run())[0] == 201
    assert f"PID {daemon.process.pid}" in one_line(start_daemon().wait()[1]), "nobody else got in between"


def test_nothing_is_acknowledged_while_somebody_else_has_the_lock_file(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon()
    assert post(daemon.url, make_run())[0] == 201
    other = FileLock(tmp_path / "other.lock")
    other.acquire()
    (tmp_path / "other.lock").rename(tmp_path / "telemetry.sqlite.lock")  # as if deleted, and taken by a newcomer
    assert post(daemon.url, make_run())[0] == 503
    line = daemon.wait_for_line("The database could not be opened again")
    assert f"(PID {os.getpid()}) owns this database" in json.dumps(line)
    assert post(daemon.url, make_run())[0] == 503
    other.release()
    daemon.wait_for_line("The database is open again and verified; writes are taken")
    assert post(daemon.url, make_run())[0] == 201
    assert start_daemon().wait()[0] == 1, "it owns the database again"
    assert daemon.stop() == 0


def test_a_database_that_another_program_has_marked_is_not_taken_over(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(tmp_path / "telemetry.sqlite")) as connection:
        connection.execute("PRAGMA application_id = 77")
        connection.execute("PRAGMA user_version = 7")
    before = (tmp_path / "telemetry.sqlite").read_bytes()
    status, errors = start_daemon().wait()
    assert status == 1
    assert "another program" in errors
    assert (tmp_path / "telemetry.sqlite").read_bytes() == before


# --- After an unclean stop -----------------------------------------------------------------------

RECOVERED = "Recovered after an unclean stop"


@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL", "PERSIST"])
def test_after_kill_the_file_is_checked_and_the_log_says_so(start_daemon: StartDaemon, journal_mode: str) -> None:
    mode = {"TELEMETRY_DB_JOURNAL_MODE": journal_mode}
    first = start_daemon(**mode)
    assert post(first.url, make_run())[0] == 201
    first.stop(signal.SIGKILL)
    second = start_daemon(**mode)
    assert second.url
    line = second.wait_for_line(RECOVERED)
    assert (line["level"], line["quick_check"]) == ("WARNING", "ok")
    assert post(second.url, make_run())[0] == 201
    assert second.stop() == 0
    third = start_daemon(**mode)
    assert third.url
    assert RECOVERED not in [line["message"] for line in third.lines], "that stop was in order"
    assert third.stop() == 0


@pytest.mark.parametrize(("journal_mode", "runs"), [("DELETE", 5000), ("WAL", 500)])
def test_damage_found_after_kill_is_one_clear_line_and_nothing_is_served(
    start_daemon: StartDaemon, journal_mode: str, runs: int
) -> None:
    mode = {"TELEMETRY_DB_JOURNAL_MODE": journal_mode}
    first = start_daemon(**mode)
    batch = [make_run(error_details="x" * 3000) for _ in range(runs)]
    for start in range(0, runs, 1000):
        assert call(first.url, "POST", "/api/v1/runs/batch", batch[start : start + 1000])[0] == 200
    assert first.stop() == 0
    size = first.database.stat().st_size
    assert journal_mode == "WAL" or size > 17 << 20, "what every start reads ends at 16 MiB"
    second = start_daemon(**mode)
    assert post(second.url, make_run())[0] == 201
    second.stop(signal.SIGKILL)
    with second.database.open("r+b") as file:
        file.seek(size // 2 & ~4095)
        file.write(os.urandom(3 * 4096))
    status, errors = start_daemon(**mode).wait()
    assert status == 1
    assert "is damaged (" in one_line(errors)
    assert "telemetryd check --repair" in errors
    assert start_daemon(**mode).wait()[0] == 1, "and it stays so: a failed start settles nothing"


async def test_a_file_that_is_too_large_for_it_is_not_read_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(db_path=tmp_path / "telemetry.sqlite")
    await (await Store.open(settings, Metrics())).close()
    (tmp_path / "telemetry.sqlite.lock").write_text("1234567\n")
    monkeypatch.setattr("telemetryd.engine.sqlite.connection._CRASH_CHECK_BYTES", 4096)
    await (await Store.open(settings, Metrics())).close()
    [record] = [record for record in caplog.records if record.message == RECOVERED]
    assert record.__dict__["quick_check"].startswith("skipped")
    assert (tmp_path / "telemetry.sqlite.lock").read_bytes().strip() == b""


def test_a_command_leaves_what_a_crash_left_for_the_next_start(start_daemon: StartDaemon, tmp_path: Path) -> None:
    lock = tmp_path / "telemetry.sqlite.lock"
    first = start_daemon()
    assert post(first.url, make_run())[0] == 201
    assert first.stop() == 0
    assert lock.read_bytes().isspace(), "it keeps its room, which a full disk would not give it again"
    telemetryd("check", "--repair", "--db-path", tmp_path / "telemetry.sqlite")
    assert lock.read_bytes().strip() == b"", "it ended in order"
    second = start_daemon()
    assert second.url
    second.stop(signal.SIGKILL)
    telemetryd("check", "--repair", "--db-path", tmp_path / "telemetry.sqlite")
    third = start_daemon()
    assert third.url
    assert third.wait_for_line(RECOVERED)
