"""One owner, whatever the database is called: bind mounts, hard links, other containers, and what a close may cost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from telemetryd.engine.sqlite.connection import connect
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings
from telemetryd.store import Store
from tests.conftest import Daemon, StartDaemon, eventually, make_run
from tests.faults.strace import completed, needs_strace, strace
from tests.http_client import call, post
from tests.needs import give_up, require_program
from tests.tools.process import telemetryd

TOKEN = "0123456789abcdef0123456789abcdef"


Mount = Callable[..., None]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Return a function that mounts something at a place, for all processes (`mount … place`)."""
    places: list[Path] = []

    def mount(*options: str | Path, place: Path) -> None:
        if subprocess.run(["mount", *options, place], capture_output=True, check=False).returncode:
            give_up("nothing can be mounted here")
        places.append(place)

    yield mount
    for place in reversed(places):
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def by_another_name(mount: Mount, tmp_path: Path) -> Callable[[Path], Path]:
    """Return a function that makes a database's file stand at a second place, too, which is returned."""

    def bind(database: Path) -> Path:
        name = tmp_path / "elsewhere" / "other.sqlite"
        name.parent.mkdir()
        name.touch()
        mount("--bind", database, place=name)
        return name

    return bind


Bind = Callable[[Path], Path]


def refusal(daemon: Daemon) -> str:
    status, errors = daemon.wait()
    assert status == 1
    [line] = errors.splitlines()
    return line


# --- Other names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL"])
def test_a_bind_mount_of_the_file_does_not_make_a_second_owner(
    start_daemon: StartDaemon, by_another_name: Bind, journal_mode: str
) -> None:
    owner = start_daemon(TELEMETRY_DB_JOURNAL_MODE=journal_mode)
    assert post(owner.url, make_run())[0] == 201
    name = by_another_name(owner.database)
    line = refusal(start_daemon(TELEMETRY_DB_PATH=str(name), TELEMETRY_DB_JOURNAL_MODE=journal_mode))
    assert f"Another telemetryd (PID {owner.process.pid}) owns this database" in line
    assert post(owner.url, make_run())[0] == 201


@pytest.mark.parametrize("killed", ["here", "there"])
def test_after_a_crash_a_file_is_not_used_by_another_name_than_the_one_that_has_its_log(
    start_daemon: StartDaemon, by_another_name: Bind, killed: str
) -> None:
    first = start_daemon()
    assert post(first.url, make_run())[0] == 201
    first.stop()
    there = {"TELEMETRY_DB_PATH": str(by_another_name(first.database))}
    here = {"TELEMETRY_DB_PATH": str(first.database)}
    its, other = (here, there) if killed == "here" else (there, here)

    daemon = start_daemon(**its, TELEMETRY_DB_JOURNAL_MODE="WAL")
    assert post(daemon.url, make_run())[0] == 201
    daemon.stop(signal.SIGKILL)
    line = refusal(start_daemon(**other, TELEMETRY_DB_JOURNAL_MODE="WAL"))
    assert f"was last opened as {its['TELEMETRY_DB_PATH']}" in line

    daemon = start_daemon(**its, TELEMETRY_DB_JOURNAL_MODE="WAL")
    assert len(call(daemon.url, "GET", "/api/v1/runs")[1]) == 2
    daemon.stop()
    daemon = start_daemon(**other, TELEMETRY_DB_JOURNAL_MODE="WAL")
    assert len(call(daemon.url, "GET", "/api/v1/runs")[1]) == 2


def test_after_a_crash_a_database_that_was_moved_with_its_log_is_served(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    assert post(daemon.url, make_run())[0] == 201
    daemon.stop(signal.SIGKILL)
    (tmp_path / "elsewhere").mkdir()
    for file in sorted(daemon.database.parent.glob(daemon.database.name + "*")):
        file.rename(tmp_path / "elsewhere" / file.name)
    another = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")  # in its old place, with a log of its own
    assert post(another.url, make_run())[0] == 201
    moved = start_daemon(TELEMETRY_DB_PATH=str(tmp_path / "elsewhere" / daemon.database.name))
    assert len(call(moved.url, "GET", "/api/v1/runs")[1]) == 1


def test_a_file_that_is_mounted_by_itself_is_warned_of(
    start_daemon: StartDaemon, by_another_name: Bind, tmp_path: Path
) -> None:
    (tmp_path / "telemetry.sqlite").touch()
    daemon = start_daemon(TELEMETRY_DB_PATH=str(by_another_name(tmp_path / "telemetry.sqlite")))
    assert "mount the directory" in daemon.wait_for_line("The database file is mounted by itself")["advice"]


def test_no_command_works_on_the_file_by_another_name(
    start_daemon: StartDaemon, by_another_name: Bind, tmp_path: Path
) -> None:
    owner = start_daemon()
    assert post(owner.url, make_run())[0] == 201
    telemetryd("backup", tmp_path / "good.sqlite", "--db-path", owner.database)
    name = by_another_name(owner.database)
    for command in (
        ["migrate"],
        ["check", "--repair"],
        ["check"],
        ["backup", "copy.sqlite"],
        ["restore", "good.sqlite"],
        ["prune", "--older-than", "1d"],
        ["stats"],
        ["follow", "http://127.0.0.1:1", "--once"],
    ):
        done = telemetryd(*command, "--db-path", name, status=1, cwd=tmp_path)
        assert f"PID {owner.process.pid}" in done.stderr, command
    assert not (tmp_path / "copy.sqlite").exists()
    assert call(owner.url, "GET", "/api/v1/runs")[0] == 200


def test_a_hard_link_made_after_the_start_is_refused_and_does_no_harm(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    owner = start_daemon()
    assert post(owner.url, make_run())[0] == 201
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "hard.sqlite"
    os.link(owner.database, link)
    assert "2 hard links" in refusal(start_daemon(TELEMETRY_DB_PATH=str(link)))
    done = telemetryd("check", "--db-path", link, status=1)
    assert "another name of a database" in done.stderr
    assert post(owner.url, make_run())[0] == 201


def test_the_owner_in_another_container_is_not_called_by_a_pid_that_is_somebody_elses_here(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    owner = start_daemon()
    assert post(owner.url, make_run())[0] == 201
    require_program("unshare", "util-linux")
    container = ("unshare", "--pid", "--fork", "--mount-proc")
    if subprocess.run([*container, "true"], capture_output=True, check=False).returncode:
        give_up("no namespace can be made here")
    line = refusal(start_daemon(prefix=container))
    assert "in another container" in line
    assert "PID" not in line
    name = tmp_path / "other.sqlite"
    name.touch()
    bind = ("sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(owner.database), str(name))  # only there
    line = refusal(start_daemon(prefix=(*container, *bind), TELEMETRY_DB_PATH=str(name)))
    assert "in another container" in line
    assert "PID" not in line


def test_a_lock_file_on_another_file_system_does_not_matter(
    start_daemon: StartDaemon, by_another_name: Bind, tmp_path: Path
) -> None:
    elsewhere = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    lock = elsewhere / f"telemetryd-test-{os.getpid()}.lock"
    try:
        owner = start_daemon(TELEMETRY_LOCK_FILE=str(lock))
        assert post(owner.url, make_run())[0] == 201
        name = by_another_name(owner.database)
        variables = {"TELEMETRY_DB_PATH": str(name), "TELEMETRY_LOCK_FILE": str(tmp_path / "another.lock")}
        assert f"PID {owner.process.pid}" in refusal(start_daemon(**variables))
        assert owner.stop() == 0
    finally:
        lock.unlink(missing_ok=True)


def test_on_an_overlay_the_file_that_is_locked_is_the_one_that_is_written(
    start_daemon: StartDaemon, mount: Mount, tmp_path: Path
) -> None:
    """Opening a file of a lower layer for writing makes another file of it (copy-up)."""
    first = start_daemon()
    assert post(first.url, make_run())[0] == 201
    assert first.stop() == 0
    merged, space = tmp_path / "merged", tmp_path / "space"
    merged.mkdir()
    space.mkdir()
    mount("-t", "tmpfs", "tmpfs", place=space)
    lower, upper, work = (space / name for name in ("lower", "upper", "work"))
    for folder in (lower, upper, work):
        folder.mkdir()
    shutil.copy(first.database, lower)
    mount("-t", "overlay", "overlay", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}", place=merged)
    daemon = start_daemon(TELEMETRY_DB_PATH=str(merged / "telemetry.sqlite"))
    assert post(daemon.url, make_run())[0] == 201
    (merged / "b").touch()
    mount("--bind", merged / "telemetry.sqlite", place=merged / "b")
    assert "Another telemetryd" in refusal(start_daemon(TELEMETRY_DB_PATH=str(merged / "b")))
    daemon.stop()


# --- What a close may cost -----------------------------------------------------------------------


@needs_strace
@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL"])
def test_nobody_but_sqlite_closes_the_database_while_the_daemon_runs(
    start_daemon: StartDaemon, tmp_path: Path, journal_mode: str
) -> None:
    """Any close of any descriptor of the file drops the locks of SQLite (sqlite.org/howtocorrupt.html, section 2.2)."""
    backups = tmp_path / "backups"
    backups.mkdir()
    daemon = start_daemon(
        TELEMETRY_DB_JOURNAL_MODE=journal_mode,
        TELEMETRY_BACKUP_DIR=str(backups),
        TELEMETRY_API_AUTH_ENABLED="true",
        TELEMETRY_API_AUTH_TOKEN=TOKEN,
    )

    def ask(path: str, body: object = None) -> bytes:
        request = urllib.request.Request(
            daemon.url + path,
            None if body is None else json.dumps(body).encode(),
            {"X-API-Key": TOKEN, "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            content: bytes = answer.read()
        return content

    ask("/api/v1/runs", make_run())
    held = _held(daemon)
    trace = tmp_path / "trace"
    with strace(daemon.process.pid, trace, "-e", "trace=open,openat,close"):
        ask("/health")
        ask("/api/v1/admin/backup", {})
        ask("/api/v1/runs/export?format=csv")
        (tmp_path / "telemetry.sqlite.lock").unlink()
        daemon.wait_for_line("The database is open again and verified; writes are taken")
        ask("/api/v1/runs", make_run())
    calls = completed(trace)
    opened = [one for one in calls if re.search(r'open(at)?\(.*"[^"]*/telemetry\.sqlite(-shm)?".* = \d', one)]
    assert len(opened) > 3
    assert [one for one in opened if "O_NOFOLLOW" not in one] == [], "SQLite always asks for it, and we never do"
    assert [one for one in calls if re.search(rf"close\({held}<.*telemetry\.sqlite>", one)] == []
    assert _held(daemon) == held
    assert daemon.stop() == 0


def _held(daemon: Daemon) -> int:
    """The one descriptor of the database that is not SQLite's, which holds the lock on the file itself."""
    folder = Path(f"/proc/{daemon.process.pid}")
    held: list[int] = []
    for descriptor in (folder / "fd").iterdir():
        with suppress(FileNotFoundError):  # closed since
            is_locked = "FLOCK" in (folder / "fdinfo" / descriptor.name).read_text()
            if is_locked and descriptor.readlink() == daemon.database:
                held.append(int(descriptor.name))
    [only] = held
    return only


async def test_a_backup_keeps_its_locks_while_the_database_is_opened_again(tmp_path: Path) -> None:
    settings = Settings(db_path=tmp_path / "telemetry.sqlite")
    store = await Store.open(settings, Metrics())
    with closing(connect(settings.db_path, "ro")) as reading:
        reading.execute("BEGIN")
        reading.execute("SELECT count(*) FROM agent_runs").fetchone()
        groups = store.health().groups
        (tmp_path / "telemetry.sqlite.lock").unlink()
        await eventually(lambda: store.health().groups > groups and store.health().problem is None)
        assert _can_write(settings.db_path) == "database is locked"
        await store.close()
        assert _can_write(settings.db_path) == "database is locked"
        other = telemetryd("check", "--repair", "--db-path", settings.db_path, status=1)
        assert f"PID {os.getpid()}" in other.stderr, "the file is owned until nothing of this process has it open"
    assert _can_write(settings.db_path) == "yes"


def _can_write(path: Path) -> str:
    script = (
        "import sqlite3, sys\nc = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)\n"
        "try: c.execute('BEGIN EXCLUSIVE'); print('yes')\nexcept sqlite3.Error as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    return done.stdout.strip()
