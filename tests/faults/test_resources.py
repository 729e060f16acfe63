"""What the daemon stands on fails, and comes back: 503 meanwhile, never a false 201, and then it goes on by itself.

One daemon for each journal mode goes through all the faults of a table, so each fault also meets what the others left.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.conftest import PATIENCE_S, Daemon, Row, StartDaemon, make_run, small_file_system, wait_until
from tests.faults.conftest import Rounds
from tests.faults.ledger import Ledger
from tests.faults.strace import needs_strace, strace
from tests.faults.told import Told
from tests.http_client import prometheus, wait_for_health
from tests.needs import require_program

_BUSY_MS = 400


@pytest.fixture(scope="module", params=["DELETE", "WAL"])
def lasting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Told]]:
    """A daemon for all the tests of a mode, and what its client was answered; each test adds a fault."""
    daemon = Daemon(
        tmp_path_factory.mktemp("lasting"),
        TELEMETRY_DB_JOURNAL_MODE=request.param,
        TELEMETRY_DB_BUSY_TIMEOUT_MS=str(_BUSY_MS),
    )
    try:
        yield daemon, Told(daemon.url)
        assert daemon.stop() == 0
    finally:
        daemon.close()


def mode(daemon: Daemon) -> str:
    return str(daemon.wait_for_line("Serving")["journal_mode"])


def wait_for_log(daemon: Daemon, since: int, is_wanted: Callable[[Row], bool]) -> Row:
    """Wait for a line of the log after the first `since`: what an earlier fault has left there proves nothing."""
    deadline = time.monotonic() + 60
    while True:
        for line in daemon.lines[since:]:
            if is_wanted(line):
                return line
        assert time.monotonic() < deadline, daemon.lines[since:]
        time.sleep(0.02)


Fault = Callable[[Daemon, Path], AbstractContextManager[Any]]


REFUSED = "Writes are refused until the database is open again and verified"
TAKEN = "The database is open again and verified; writes are taken"


def go_through(
    lasting: tuple[Daemon, Told],
    scratch: Path,
    ledger: Ledger,
    rounds: int,
    fault: Fault,
    *,
    refused: Callable[[Row], bool] = lambda line: line["message"] == REFUSED,
    taken: Callable[[Row], bool] = lambda line: line["message"] == TAKEN,
) -> None:
    """Let a fault come and go so many times; each time the log has to say that it came, and that it went."""
    daemon, told = lasting
    earlier = len(told.acknowledged)
    for number in range(rounds):
        told.send_until(lambda status: status == 201)
        trouble = scratch / str(number)
        trouble.mkdir()
        since = len(daemon.lines)
        with fault(daemon, trouble):
            told.send_until(lambda status: status == 503)
            wait_for_log(daemon, since, refused)
            # Where nothing hinders it from opening the database again it is well for a moment, until the next write.
            healths = []
            for _ in range(10):
                assert told.send() == 503
                status, health = told.health()
                healths.append((status, health["status"]))
            assert healths.count((503, "error")) >= 5, healths
        told.send_until(lambda status: status == 201)
        wait_for_log(daemon, since, taken)
        told.repeat()
        assert told.health()[0] == 200
    assert daemon.process.poll() is None, "it is the same process all the time"
    counted = told.compare(daemon.database)
    counted["acknowledged"] -= earlier
    ledger.record(fault=fault.__doc__ or "", mode=mode(daemon), rounds=rounds, **counted)


def failing(name: str, calls: str, how: str, *options: str) -> Fault:
    """System calls on the database's files that fail as long as strace is attached."""

    @contextmanager
    def fail(daemon: Daemon, scratch: Path) -> Iterator[None]:
        files = [f"{daemon.database}{suffix}" for suffix in ("", "-wal", "-journal")]
        only = [option for file in files for option in ("-P", file)]
        with strace(daemon.process.pid, scratch / "trace", *options, *only, "-e", f"inject={calls}:{how}"):
            yield

    fail.__doc__ = name
    return fail


CALLS = {
    "EIO on write": ("pwrite64,write", "error=EIO"),
    "EIO on fsync": ("fdatasync,fsync", "error=EIO"),
    "file system read-only": ("pwrite64,write,ftruncate,unlink", "error=EROFS"),
    "quota exceeded": ("pwrite64,write", "error=EDQUOT"),
}


@needs_strace
@pytest.mark.parametrize("name", CALLS)
def test_a_system_call_fails(
    lasting: tuple[Daemon, Told], tmp_path: Path, ledger: Ledger, rounds: Rounds, name: str
) -> None:
    go_through(lasting, tmp_path, ledger, rounds(20), failing(name, *CALLS[name]))


@contextmanager
def no_growth(daemon: Daemon, _scratch: Path) -> Iterator[None]:
    """files must not grow"""
    prlimit(daemon, fsize=100)
    try:
        yield
    finally:
        prlimit(daemon, fsize="unlimited")


def test_a_limit_on_the_size_of_files(
    lasting: tuple[Daemon, Told], tmp_path: Path, ledger: Ledger, rounds: Rounds
) -> None:
    """RLIMIT_FSIZE also sends SIGXFSZ, which ends a process that does not ignore it."""
    go_through(lasting, tmp_path, ledger, rounds(20), no_growth)


@needs_strace
def test_a_failed_sync_is_not_tried_again(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """The kernel may report success the second time, although it has dropped the pages."""
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    told = Told(daemon.url)
    assert told.send() == 201
    with strace(daemon.process.pid, tmp_path / "trace", "-e", "inject=fdatasync:error=EIO"):
        assert told.send() == 503
        daemon.wait_for_line(TAKEN)
    failed = [line for line in (tmp_path / "trace").read_text().splitlines() if "fdatasync(" in line and "EIO" in line]
    assert len(failed) == 1, failed
    told.repeat()
    assert daemon.stop() == 0


# --- Files that are not where they were ------------------------------------------------------------


@contextmanager
def moved(daemon: Daemon, scratch: Path) -> Iterator[None]:
    """database moved away, and put back"""
    daemon.database.rename(scratch / "elsewhere")
    try:
        yield
    finally:
        (scratch / "elsewhere").rename(daemon.database)


@contextmanager
def replaced(daemon: Daemon, scratch: Path) -> Iterator[None]:
    """database replaced, and put back"""
    with moved(daemon, scratch):
        shutil.copy(scratch / "elsewhere", daemon.database)
        yield
        daemon.database.rename(scratch / "impostor")


@pytest.mark.parametrize("fault", [moved, replaced])
def test_the_database_is_not_where_it_was(
    lasting: tuple[Daemon, Told], tmp_path: Path, ledger: Ledger, rounds: Rounds, fault: Fault
) -> None:
    def names_the_file(line: Row) -> bool:  # at once, or when it cannot be opened again
        gone = f"{lasting[0].database} was deleted or replaced while in use; put it back"
        return line["level"] in ("CRITICAL", "ERROR") and gone in line.get("reason", "")

    go_through(lasting, tmp_path, ledger, rounds(20), fault, refused=names_the_file)


def test_it_is_noticed_without_a_write(lasting: tuple[Daemon, Told], tmp_path: Path) -> None:
    daemon, told = lasting
    since = len(daemon.lines)
    with moved(daemon, tmp_path):
        wait_for_log(daemon, since, lambda line: line["message"] == REFUSED)
    told.send_until(lambda status: status == 201)


@pytest.mark.parametrize(
    ("lasting", "suffix"),
    [("DELETE", ".lock"), ("WAL", "-wal"), ("WAL", "-shm"), ("WAL", ".lock")],  # only a log has files of its own
    indirect=["lasting"],
)
def test_a_file_next_to_the_database_is_deleted(lasting: tuple[Daemon, Told], ledger: Ledger, suffix: str) -> None:
    """What stands only in a log without a name is written back before the log is let go of."""
    daemon, told = lasting
    for _ in range(20):
        assert told.send() == 201
    since = len(daemon.lines)
    Path(f"{daemon.database}{suffix}").unlink()
    told.send_until(lambda status: status == 503)
    told.send_until(lambda status: status == 201)
    wait_for_log(daemon, since, lambda line: line["message"] == REFUSED and suffix in line["reason"])
    wait_for_log(daemon, since, lambda line: line["message"] == TAKEN)
    told.repeat()
    assert Path(f"{daemon.database}{suffix}").exists()
    ledger.record(fault=f"{suffix} deleted", mode=mode(daemon), rounds=1, **told.compare(daemon.database))


def open_file(daemon: Daemon, target: str) -> Path:
    """Return the link to a file that the daemon has open; others it may close while they are listed."""
    for link in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(link) == target:
                return link
    raise AssertionError(f"{target} is not open")


def test_a_deleted_database_can_still_be_saved(start_daemon: StartDaemon) -> None:
    """Its last descriptors are the daemon's own; a restart would begin an empty one."""
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="DELETE")
    told = Told(daemon.url)
    for _ in range(5):
        assert told.send() == 201
    daemon.database.unlink()
    told.send_until(lambda status: status == 503)
    shutil.copy(open_file(daemon, f"{daemon.database} (deleted)"), daemon.folder / "saved.sqlite")
    assert daemon.stop() == 1
    assert not daemon.database.exists()
    (daemon.folder / "saved.sqlite").rename(daemon.database)
    again = start_daemon(TELEMETRY_DB_JOURNAL_MODE="DELETE")
    told.url = again.url
    told.repeat()
    assert again.stop() == 0
    assert told.compare(daemon.database)["lost"] == 0


def test_a_damaged_page_is_not_written_on(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="DELETE")
    told = Told(daemon.url)
    for _ in range(200):
        assert told.send(output_summary="x" * 500) == 201
    whole = daemon.database.read_bytes()
    with daemon.database.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(len(whole) - 4096))
    with daemon.database.open("r+b") as file:  # the change counter, or the cache hides the damage
        file.seek(24)
        file.write(os.urandom(4))
    told.send_until(lambda status: status == 503)
    time.sleep(1)
    status, health = told.health()
    assert status == 503
    assert "damaged" in health["detail"], health
    assert "telemetryd check" in health["detail"]
    check_it_goes_on_with(whole, daemon, told)


@needs_strace
def test_a_damaged_page_of_a_large_file_is_found_before_it_is_written_on(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """A start does not read a large file; a failure of the disk makes it suspect, and then all of it is read."""
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="DELETE")
    told = Told(daemon.url)
    for _ in range(200):
        assert told.send(output_summary="found by its text") == 201
    for _ in range(2):
        assert told.send(error_details="x" * 9_000_000) == 201
    assert daemon.database.stat().st_size > 16 << 20
    whole = daemon.database.read_bytes()
    page = leaf_page(whole, b"found by its text")
    with daemon.database.open("r+b") as file:
        file.seek(page + 8)
        file.write(b"\xff" * 32)  # where its cells are
    with failing("EIO", *CALLS["EIO on write"])(daemon, tmp_path):
        told.send_until(lambda status: status == 503)
    wait_for_log(daemon, 0, lambda line: "is damaged" in line.get("reason", ""))
    assert [told.send() for _ in range(3)] == [503] * 3
    status, health = told.health()
    assert status == 503
    assert "is damaged" in health["detail"], health
    check_it_goes_on_with(whole, daemon, told)


def check_it_goes_on_with(whole: bytes, daemon: Daemon, told: Told) -> None:
    """Put a file back as it was before it was damaged: writes are taken again, and nothing acknowledged is lost."""
    with daemon.database.open("r+b") as file:
        file.write(whole)
    told.send_until(lambda status: status == 201)
    told.repeat()
    assert daemon.stop() == 0
    assert told.compare(daemon.database)["lost"] == 0


def leaf_page(database: bytes, text: bytes) -> int:
    """Where a leaf page of a table begins that holds a text, somewhere in the middle of the runs."""
    size = int.from_bytes(database[16:18], "big")
    leaves = [at for at in range(0, len(database), size) if database[at] == 13 and text in database[at : at + size]]
    return leaves[len(leaves) // 2]


# --- Other programs ------------------------------------------------------------------------------


@contextmanager
def locked(daemon: Daemon, _: Path) -> Iterator[None]:
    with closing(sqlite3.connect(daemon.database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield


def test_another_program_holds_the_lock(lasting: tuple[Daemon, Told], ledger: Ledger, rounds: Rounds) -> None:
    daemon, told = lasting
    wait_for_health(daemon.url, 200)  # what an earlier test took away is back
    count = rounds(20)
    for _ in range(count):
        with locked(daemon, Path()):
            started = time.monotonic()
            assert told.send() == 503
            assert time.monotonic() - started >= _BUSY_MS / 1000 * 0.9
            assert told.details[-1].startswith("The database is locked by another process")
            assert told.health()[0] == 200, "somebody else's lock passes"
        assert told.send() == 201
        told.repeat()
    ledger.record(
        fault="SQLite's lock held elsewhere", mode=mode(daemon), rounds=count, **told.compare(daemon.database)
    )


def test_a_stop_does_not_wait_for_another_programs_lock(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TELEMETRY_DB_BUSY_TIMEOUT_MS="60000", TELEMETRY_SHUTDOWN_TIMEOUT_S="10")
    told = Told(daemon.url)
    assert told.send() == 201
    with locked(daemon, Path()):
        sender = threading.Thread(target=told.send)
        sender.start()
        wait_until(lambda: told.health()[1]["oldest_waiting_s"] > 0)
        started = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - started < 50
        sender.join()
    assert told.compare(daemon.database)["lost"] == 0


def catches(daemon: Daemon, number: int) -> bool:
    """Whether a process handles a signal by now (proc(5), SigCgt)."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_start_that_waits_for_a_lock_can_be_stopped(start_daemon: StartDaemon, tmp_path: Path) -> None:
    first = start_daemon()
    assert first.url
    assert first.stop() == 0
    with locked(first, Path()):
        second = start_daemon(TELEMETRY_DB_BUSY_TIMEOUT_MS="60000")
        wait_until(lambda: catches(second, signal.SIGTERM))
        time.sleep(1)  # now it waits for the lock
        assert second.process.poll() is None
        started = time.monotonic()
        assert second.stop() == 0
        assert time.monotonic() - started < 50
    third = start_daemon()
    assert third.url
    assert third.stop() == 0


@pytest.mark.slow
def test_another_programs_snapshot_is_reported_and_the_log_shrinks_again(
    start_daemon: StartDaemon, ledger: Ledger
) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    told = Told(daemon.url)
    assert told.send() == 201
    log = Path(f"{daemon.database}-wal")
    large = "x" * 12_000_000
    with closing(sqlite3.connect(f"{daemon.database.as_uri()}?mode=ro", uri=True, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM agent_runs").fetchone()
        while log.stat().st_size < 140 << 20:
            assert told.send(error_details=large) == 201
        warned = "The write-ahead log grows: another program holds a snapshot of the database"
        assert daemon.wait_for_line(warned)["level"] == "WARNING"
        assert told.health()[0] == 200
    for _ in range(10):
        assert told.send(error_details=large) == 201
    daemon.wait_for_line("The write-ahead log is short again")
    assert log.stat().st_size <= 66 << 20
    assert daemon.stop() == 0
    ledger.record(fault="snapshot held by another program", mode="WAL", rounds=1, **told.compare(daemon.database))


# --- Descriptors, memory, time, slowness -----------------------------------------------------------


def prlimit(daemon: Daemon, **limits: int | str) -> None:
    options = [f"--{name.lower()}={value}:" for name, value in limits.items()]
    subprocess.run(["prlimit", f"--pid={daemon.process.pid}", *options], check=True)


@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL"])
def test_descriptors_run_out_and_come_back(
    start_daemon: StartDaemon, ledger: Ledger, rounds: Rounds, journal_mode: str
) -> None:
    """In DELETE mode each transaction opens its journal; that is the write that fails, and not for ever."""
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE=journal_mode)
    told = Told(daemon.url)
    count = rounds(10)
    for _ in range(count):
        told.send_until(lambda status: status == 201, timeout_s=60)
        with closing(http.client.HTTPConnection(urlsplit(daemon.url).netloc, timeout=60)) as kept:
            assert send_over(kept, told) == 201
            in_use = {int(link.name) for link in Path(f"/proc/{daemon.process.pid}/fd").iterdir()}
            free = next(number for number in itertools.count() if number not in in_use)
            used_s = cpu_s(daemon)
            prlimit(daemon, nofile=free)
            assert told.send(timeout_s=1) is None, "there was a descriptor left for a new connection"
            for _ in range(3):
                assert send_over(kept, told) == (201 if journal_mode == "WAL" else 503)
            prlimit(daemon, nofile=free + 1)
            for _ in range(2):
                told.send(timeout_s=1)
            time.sleep(1)
            assert cpu_s(daemon) - used_s < 1.5, "it does not spin while it cannot accept"
        prlimit(daemon, nofile=1024)
        told.send_until(lambda status: status == 201, timeout_s=60)
        told.repeat()
        assert told.health()[0] == 200
    assert daemon.stop() == 0
    ledger.record(fault="descriptors run out", mode=journal_mode, rounds=count, **told.compare(daemon.database))


def send_over(connection: http.client.HTTPConnection, told: Told) -> int:
    """Post one run over a connection that stays open; return the status."""
    run = make_run()
    connection.request("POST", "/api/v1/runs", json.dumps(run), {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.read()
    told.statuses[response.status] += 1
    if response.status == 201:
        told.acknowledged.add(run["event_id"])
    else:
        told.refused[run["event_id"]] = run
    return response.status


def cpu_s(daemon: Daemon) -> float:
    fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_small_limit_on_descriptors_still_serves(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(prefix=("prlimit", "--nofile=64:64"), TELEMETRY_DB_JOURNAL_MODE="WAL")
    assert Told(daemon.url).send() == 201
    assert daemon.stop() == 0


def test_no_single_request_needs_more_memory_than_there_is(start_daemon: StartDaemon, ledger: Ledger) -> None:
    """The largest bodies and pages, with 512 MiB of address space beyond what an idle daemon has."""
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    told = Told(daemon.url)
    assert told.send() == 201
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    size = int(next(line for line in status.splitlines() if line.startswith("VmSize")).split()[1]) << 10
    prlimit(daemon, AS=size + (4 << 20))  # hardly any
    starved = [told.call("POST", "/api/v1/runs", make_run(error_details="x" * 16_000_000), 10)[0] for _ in range(3)]
    assert set(starved) <= {413, 503}
    prlimit(daemon, AS=size + (512 << 20))
    told.send_until(lambda status: status == 201)
    assert told.send(error_details="x" * 16_700_000) in (201, 503)
    values = dict.fromkeys(map(str, range(900_000)), 1)
    statuses = {
        told.call("POST", "/api/v1/runs", make_run(metrics_json=values))[0],
        told.call("POST", "/api/v1/runs/batch", [{} for _ in range(900_000)])[0],
        told.call("POST", "/api/v1/runs/batch", [make_run(host="h" * 1000) for _ in range(9_000)])[0],
        told.call("GET", "/api/v1/runs?limit=1")[0],
    }
    assert statuses <= {200, 413, 422, 503}, statuses
    assert daemon.process.poll() is None
    assert told.send() == 201
    assert not [line for line in daemon.lines if line.get("status") == 500]
    assert daemon.stop() == 0
    ledger.record(fault="memory runs out", mode="WAL", rounds=1, **told.compare(daemon.database))


def test_the_clock_jumps(start_daemon: StartDaemon, tmp_path: Path, ledger: Ledger) -> None:
    """Back by a day and forth by a year: nothing lasts a negative time, no timer sticks, the order is by id."""
    require_program("gcc", "gcc")
    library = tmp_path / "wall_clock.so"
    source = Path(__file__).with_name("wall_clock.c")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    clock = tmp_path / "clock"
    clock.write_text("0")
    daemon = start_daemon(
        LD_PRELOAD=str(library),
        WALL_CLOCK=str(clock),
        TELEMETRY_DB_JOURNAL_MODE="WAL",
        TELEMETRY_DB_BUSY_TIMEOUT_MS="5000",
        TELEMETRY_RATE_LIMIT_ENABLED="true",
        TELEMETRY_RATE_LIMIT_RPM="6000",
    )
    told = Told(daemon.url)
    order = []
    for jump in (0, -86_400, 365 * 86_400, -365 * 86_400, 0):
        jump_to(clock, jump)
        started = time.monotonic()
        for _ in range(5):
            run = make_run()
            assert told.send(run) == 201
            order.append(run["event_id"])
        assert time.monotonic() - started < PATIENCE_S
        assert told.health()[0] == 200
        assert told.call("GET", "/metrics")[0] == 200
        created_at = datetime.fromisoformat(told.call("GET", f"/api/v1/runs/{order[-1]}")[2]["created_at"])
        assert abs(created_at.timestamp() - time.time() - jump) < 60, "the clock did not jump"
    runs = told.call("GET", "/api/v1/runs?limit=1000")[2]
    assert [run["event_id"] for run in sorted(runs, key=lambda run: run["id"])] == order
    assert runs == sorted(runs, key=lambda run: (run["created_at"], run["id"]), reverse=True)
    assert told.call("PATCH", f"/api/v1/runs/{order[-1]}", {"status": "success"})[0] == 200
    check_a_jump_while_a_write_waits(daemon, told, clock, 365 * 86_400, held_s=1.5, answered=201)
    check_a_jump_while_a_write_waits(daemon, told, clock, -86_400, held_s=30, answered=503)
    told.repeat()
    assert min(line["duration_ms"] for line in daemon.lines if "duration_ms" in line) >= 0
    assert daemon.stop() == 0
    ledger.record(fault="clock jumps", mode="WAL", rounds=7, **told.compare(daemon.database))


def jump_to(clock: Path, seconds: int) -> None:
    """Set how wrong the clock is, at one stroke: it is read all the time."""
    clock.with_name("new").write_text(str(seconds))
    clock.with_name("new").replace(clock)


def check_a_jump_while_a_write_waits(
    daemon: Daemon, told: Told, clock: Path, jump: int, *, held_s: float, answered: int
) -> None:
    """Let the clock jump while another program holds the lock: neither the waiting nor what is said of it changes.

    Until 5 s have passed the write is tried again, so it is stored if the lock is held for less, and else refused.
    """
    jump_to(clock, 0)
    statuses: list[int | None] = []
    sender = threading.Thread(target=lambda: statuses.append(told.send()))
    before = len(daemon.lines)
    with locked(daemon, Path()):
        started = time.monotonic()
        sender.start()
        wait_until(lambda: told.health()[1]["oldest_waiting_s"] > 0)
        jump_to(clock, jump)
        time.sleep(0.3)
        asked = time.monotonic()
        assert 0.2 < told.health()[1]["oldest_waiting_s"] <= time.monotonic() - started
        sender.join(held_s - (asked - started))
    sender.join()
    seconds = time.monotonic() - started
    assert statuses == [answered]
    assert (1.4 if answered == 201 else 4.9) < seconds < PATIENCE_S, "it waits as long as the setting says"
    # The line of an earlier POST may have come late, but that one did not wait.
    line = wait_for_log(
        daemon, before, lambda line: line.get("method") == "POST" and not 0 <= line.get("duration_ms", 0) < 1_200
    )
    assert 1_200 <= line["duration_ms"] <= seconds * 1000
    counted = dict(line.rsplit(" ", 1) for line in prometheus(daemon.url).splitlines())
    assert 0 <= float(counted["telemetryd_commit_duration_seconds_sum"]) < 60


@needs_strace
def test_a_slow_disk_makes_groups_larger_not_answers_fail(
    lasting: tuple[Daemon, Told], tmp_path: Path, ledger: Ledger
) -> None:
    daemon, told = lasting
    wait_for_health(daemon.url, 200)  # what an earlier test took away is back
    statuses: list[int | None] = []
    healths: list[tuple[float, float]] = []

    def send() -> None:
        statuses.extend(Told.send(told) for _ in range(5))

    with failing("slow", "fdatasync,fsync", "delay_enter=200000", "-ttt")(daemon, tmp_path):
        threads = [threading.Thread(target=send) for _ in range(20)]
        before = commits(daemon)
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            asked = time.time()
            assert told.health()[0] == 200
            healths.append((asked, time.time()))
            time.sleep(0.02)
    assert statuses == [201] * 100
    assert commits(daemon) - before < 60
    syncs = [float(line.split()[1]) for line in (tmp_path / "trace").read_text().splitlines() if "sync(" in line]
    meanwhile = [asked for asked, answered in healths if any(at < asked and answered < at + 0.2 for at in syncs)]
    assert len(meanwhile) >= 3, "a loop that waits for the disk gives no answer that both begins and ends in a sync"
    ledger.record(fault="fsync takes 200 ms", mode=mode(daemon), rounds=1, **told.compare(daemon.database))


def commits(daemon: Daemon) -> float:
    counted = dict(line.rsplit(" ", 1) for line in prometheus(daemon.url).splitlines())
    return float(counted["telemetryd_commit_duration_seconds_count"])


# --- A file system that is full, or read-only ------------------------------------------------------


def test_a_read_only_file_system_at_the_start_is_one_clear_line(start_daemon: StartDaemon, tmp_path: Path) -> None:
    with small_file_system(tmp_path / "disk", "8m") as disk:
        first = start_daemon(TELEMETRY_DB_PATH=str(disk / "telemetry.sqlite"), TELEMETRY_MIN_FREE_MB="0")
        assert first.url
        assert first.stop() == 0
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        status, errors = start_daemon(
            TELEMETRY_DB_PATH=str(disk / "telemetry.sqlite"), TELEMETRY_MIN_FREE_MB="0"
        ).wait()
        assert (status, len(errors.splitlines())) == (1, 1), errors
        assert str(disk) in errors
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        again = start_daemon(TELEMETRY_DB_PATH=str(disk / "telemetry.sqlite"), TELEMETRY_MIN_FREE_MB="0")
        assert Told(again.url).send() == 201
        assert again.stop() == 0
