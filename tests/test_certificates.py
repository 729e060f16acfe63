"""Death certificates: real processes, killed, watched by a real daemon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from telemetryd.engine.factory import count_wrong
from telemetryd.engine.sqlite.tools.check import Severity, examine
from telemetryd.model.commands import Death
from telemetryd.model.processes import Process
from telemetryd.services import certificates, processes
from telemetryd.settings import Settings, Sync
from tests.conftest import PATIENCE_S, Daemon, StartDaemon, make_run, wait_until
from tests.http_client import call, get, post, prometheus
from tests.tools.process import telemetryd

pytestmark = pytest.mark.skipif(processes.this_machine() is None, reason="processes cannot be watched here")

Spawn = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Return a function that starts a process, one that sleeps or a Python program; what is left of it is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def start(code: str = "", prefix: tuple[str, ...] = (), **options: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", code] if code else ["sleep", "600"]
        process = subprocess.Popen([*prefix, *command], **options)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def identity(pid: int) -> dict[str, Any]:
    """What a client tells of a process."""
    machine = processes.this_machine()
    assert machine is not None
    return {"pid": pid, "start_time": processes.start_time(pid), "boot_id": machine.boot_id}


def new_run(url: str, **fields: Any) -> str:
    run = make_run(**fields)
    assert post(url, run)[0] == 201
    return f"/api/v1/runs/{run['event_id']}"


def register(url: str, path: str, body: object, status: int = 201) -> Any:
    answer = call(url, "POST", f"{path}/process", body)
    assert answer[0] == status, answer
    return answer[1]


def wait_until_closed(url: str, path: str, seconds: float = 60) -> dict[str, Any]:
    """Wait until a run is not running any more."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        run: dict[str, Any] = get(url, path)[1]
        if run["status"] != "running":
            return run
        time.sleep(0.02)
    raise AssertionError("the run is still running")


def stays_running(url: str, *paths: str, seconds: float = 1.0) -> None:
    time.sleep(seconds)
    assert [get(url, path)[1]["status"] for path in paths] == ["running"] * len(paths)


def test_a_killed_process_fails_its_runs_within_a_second(start_daemon: StartDaemon, spawn: Spawn) -> None:
    daemon = start_daemon()
    url = daemon.url
    agent, other = spawn(), spawn()
    paths = [new_run(url, start_time="2025-12-24T10:00:00Z") for _ in range(3)]
    for path in paths:
        assert register(url, path, identity(agent.pid)) == {
            "event_id": path.rpartition("/")[2],
            "pid": agent.pid,
            "watched": True,
        }
        register(url, path, identity(agent.pid))  # harmless
    alive = new_run(url)
    register(url, alive, identity(other.pid))
    assert "telemetryd_processes_watched 2.0" in prometheus(daemon.url)
    totals = get(url, "/metrics")[1]["agents"]
    agent.kill()
    killed = time.monotonic()
    agent.wait()
    runs = [wait_until_closed(url, path) for path in paths]
    assert time.monotonic() - killed < 20  # a second, and what a busy machine adds
    for run in runs:
        assert run["status"] == "failure"
        assert run["error_summary"] in (
            f"Process {agent.pid} was killed by SIGKILL before it finished the run",
            f"Process {agent.pid} ended without finishing the run",  # where the kernel does not tell how
        )
        assert f"Death certificate of process {agent.pid}" in run["error_details"]
        assert run["end_time"] <= run["updated_at"]
        assert abs(run["duration_ms"] - milliseconds(run["start_time"], run["end_time"])) <= 1
    stays_running(url, alive, seconds=0.2)
    assert get(url, "/metrics")[1]["agents"] == totals
    failed = get(url, "/api/v1/runs?status=failure")[1]
    assert len(failed) == 3
    assert "telemetryd_processes_watched 1.0" in prometheus(daemon.url)
    assert "telemetryd_death_certificates_total 3.0" in prometheus(daemon.url)
    assert daemon.stop() == 0
    check_database(daemon)


def milliseconds(start: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds() * 1000


def check_database(daemon: Daemon) -> None:
    """The totals are right, and no row belongs to a run that is gone."""
    for table in ("run_events", "run_processes"):
        assert daemon.execute(f"SELECT count(*) FROM {table} WHERE run NOT IN (SELECT id FROM agent_runs)") == [(0,)]
    if daemon.database_url is None:
        assert [finding for finding in examine(daemon.database) if finding.severity is not Severity.NOTE] == []
    else:
        assert count_wrong(Settings(db_url=SecretStr(daemon.database_url), db_sync=Sync.NONE), repair=False) == 0


def stored(daemon: Daemon, sql: str) -> list[Any]:
    return [*daemon.execute(sql)]


def test_a_process_that_nobody_waits_for_has_ended_all_the_same(start_daemon: StartDaemon, spawn: Spawn) -> None:
    daemon = start_daemon()
    url = daemon.url
    child = "import os, time; pid = os.fork(); print(pid, flush=True) if pid else None; time.sleep(600)"
    parent = spawn(child, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    path = new_run(url)
    register(url, path, identity(pid))
    os.kill(pid, signal.SIGKILL)  # a zombie: its parent sleeps
    run = wait_until_closed(url, path)
    assert run["error_summary"] == f"Process {pid} ended without finishing the run"
    late = new_run(url)
    assert "can be watched" in register(url, late, identity(pid), 409)["detail"]
    stays_running(url, late, seconds=0.1)


@pytest.mark.parametrize(
    ("code", "said"), [("raise SystemExit(3)", "status 3"), ("import os; os._exit(0)", "status 0")]
)
def test_an_exit_without_a_finish_is_a_failure(start_daemon: StartDaemon, spawn: Spawn, code: str, said: str) -> None:
    url = start_daemon().url
    agent = spawn(f"input()\n{code}", stdin=subprocess.PIPE)
    path = new_run(url)
    register(url, path, identity(agent.pid))
    agent.communicate(b"\n")
    run = wait_until_closed(url, path)
    assert run["status"] == "failure"
    assert said in run["error_summary"] or run["error_summary"].endswith("ended without finishing the run")


def test_a_run_that_was_finished_gets_no_certificate(start_daemon: StartDaemon, spawn: Spawn) -> None:
    daemon = start_daemon()
    url = daemon.url
    agent = spawn()
    finished, beaten, cancelled = new_run(url), new_run(url), new_run(url)
    for path in (finished, beaten, cancelled):
        register(url, path, identity(agent.pid))
    call(url, "PATCH", finished, {"status": "success", "output_summary": "well"})
    call(url, "PATCH", cancelled, {"status": "cancelled"})
    call(url, "PATCH", beaten, {"status": "running", "items_succeeded": 3})  # a heartbeat keeps the registration
    before = [get(url, path)[1] for path in (finished, cancelled)]
    agent.kill()
    assert wait_until_closed(url, beaten)["items_succeeded"] == 3
    assert [get(url, path)[1] for path in (finished, cancelled)] == before
    assert stored(daemon, "SELECT count(*) FROM run_processes WHERE certified_at IS NULL") == [(0,)]


def test_a_finish_that_comes_while_the_process_ends_is_not_overtaken(start_daemon: StartDaemon, spawn: Spawn) -> None:
    url = start_daemon().url
    agent = spawn()
    path = new_run(url)
    register(url, path, identity(agent.pid))
    agent.kill()
    call(url, "PATCH", path, {"status": "success"})
    time.sleep(1.0)
    run = get(url, path)[1]
    assert (run["status"], run["error_summary"]) == ("success", None)


@pytest.mark.parametrize(
    ("patch", "summary", "details"),
    [
        ({"status": "success"}, None, None),
        ({"status": "failure", "error_summary": "my own words"}, "my own words", None),
        ({"status": "partial", "error_details": "my own words"}, None, "my own words"),
        ({"status": "running"}, None, None),
    ],
)
def test_a_late_finish_wins(
    start_daemon: StartDaemon, spawn: Spawn, patch: dict[str, str], summary: str | None, details: str | None
) -> None:
    daemon = start_daemon()
    url = daemon.url
    agent = spawn()
    path = new_run(url)
    register(url, path, identity(agent.pid))
    agent.kill()
    before = wait_until_closed(url, path)
    call(url, "PATCH", path, {"items_succeeded": 5})  # no finish, so what the certificate says stands
    assert get(url, path)[1]["error_summary"] == before["error_summary"]
    call(url, "PATCH", path, patch)
    run = get(url, path)[1]
    assert (run["status"], run["error_summary"], run["error_details"]) == (patch["status"], summary, details)
    assert run["end_time"] == before["end_time"]
    call(url, "PATCH", path, {"status": "failure", "error_summary": before["error_summary"]})
    call(url, "PATCH", path, {"status": "success"})  # what an agent says itself is never cleared
    assert get(url, path)[1]["error_summary"] == before["error_summary"]
    assert daemon.stop() == 0
    assert stored(daemon, "SELECT count(*) FROM run_processes") == [(0,)]
    check_database(daemon)


def test_words_that_somebody_changed_stay(start_daemon: StartDaemon, spawn: Spawn) -> None:
    url = start_daemon().url
    agent = spawn()
    path = new_run(url)
    register(url, path, identity(agent.pid))
    agent.kill()
    wait_until_closed(url, path)
    call(url, "PATCH", path, {"error_summary": "an operator's note"})
    call(url, "PATCH", path, {"status": "success"})
    run = get(url, path)[1]
    assert (run["error_summary"], run["error_details"]) == ("an operator's note", None)


def test_what_is_not_that_very_process_is_refused(start_daemon: StartDaemon, spawn: Spawn) -> None:
    daemon = start_daemon()
    url = daemon.url
    threads = (
        "import threading, time; t = threading.Thread(target=time.sleep, args=(600,), daemon=True); t.start(); "
        "print(t.native_id, flush=True); time.sleep(600)"
    )
    agent, dead = spawn(threads, stdout=subprocess.PIPE), spawn("pass")
    assert agent.stdout is not None
    thread = int(agent.stdout.readline())
    gone = identity(dead.pid)
    dead.wait()
    good = identity(agent.pid)
    path = new_run(url)
    for wrong in (
        {**good, "boot_id": "39af8825-0000-0000-0000-d9bc8f995a4a"},
        {**good, "start_time": good["start_time"] - 1},
        gone,
        identity(thread),
        {**good, "pid": 2**31 - 1},
    ):
        assert set(register(url, path, wrong, 409)) == {"detail"}
    assert register(url, "/api/v1/runs/nobody", good, 404) == {"detail": "Run not found: nobody"}
    bodies: list[Any] = [{}, [], *({**good, **wrong} for wrong in ({"pid": 0}, {"pid": "1"}, {"start_time": -1}))]
    for body in [*bodies, {**good, "boot_id": ""}]:
        detail = register(url, path, body, 422)["detail"]
        assert all(item["loc"][0] == "body" for item in detail)
    ended = new_run(url, status="success")
    assert register(url, ended, good, 409) == {"detail": "The run is not running"}
    assert register(url, path, {**good, "mood": "fine"})["warnings"] == ["Unknown field ignored: mood"]
    agent.kill()
    wait_until_closed(url, path)


def test_a_refusal_does_not_tell_which_processes_there_are(start_daemon: StartDaemon, spawn: Spawn) -> None:
    """A client that may write runs, from a container or another machine too, must not list our processes with it."""
    daemon = start_daemon()
    url, agent, boot = daemon.url, spawn(), identity(os.getpid())["boot_id"]
    path = new_run(url)
    guesses = [1, 2, os.getpid(), agent.pid, 2**31 - 1]
    for pid in guesses:
        refused = register(url, path, {"pid": pid, "start_time": 0, "boot_id": boot}, 409)
        assert refused == {"detail": f"No process {pid} that started at 0 can be watched here"}
    assert daemon.stop() == 0
    causes = {line["error_cause"] for line in daemon.lines if line["message"].startswith("Error in")}
    assert f"There is no process {2**31 - 1} here" in causes, "the operator's log knows more"
    assert f"Process {agent.pid} has ended, or is not the one that started at 0" in causes


def test_who_names_no_running_run_takes_no_place(start_daemon: StartDaemon, spawn: Spawn) -> None:
    """Else one client could fill the table with processes that have nothing to do, and keep the others out."""
    agent, strangers = spawn(), [spawn() for _ in range(3)]
    daemon = start_daemon(TELEMETRY_WATCHED_PROCESSES="1")
    url = daemon.url
    path, ended = new_run(url), new_run(url, status="success")
    for stranger in strangers:
        register(url, "/api/v1/runs/nobody", identity(stranger.pid), 404)
        register(url, ended, identity(stranger.pid), 409)
    register(url, path, identity(agent.pid))
    register(url, "/api/v1/runs/nobody", identity(agent.pid), 404)  # which costs the run nothing
    agent.kill()
    wait_until_closed(url, path)


def test_a_process_in_another_pid_namespace_is_refused(start_daemon: StartDaemon, spawn: Spawn) -> None:
    unshare = ("unshare", "--pid", "--fork", "--mount-proc")
    probe = subprocess.run([*unshare, "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("no PID namespace can be made here")
    url = start_daemon().url
    code = (
        "import os, time; stat = open('/proc/self/stat').read().rpartition(')')[2].split(); "
        "print(os.getpid(), stat[19], flush=True); time.sleep(600)"
    )
    inner = spawn(code, unshare, stdout=subprocess.PIPE)
    assert inner.stdout is not None
    pid, start_time = map(int, inner.stdout.readline().split())
    assert pid < 10
    path = new_run(url)
    register(url, path, {**identity(os.getpid()), "pid": pid, "start_time": start_time}, 409)
    inner.kill()
    stays_running(url, path)


def test_it_can_be_off_and_is_bounded(start_daemon: StartDaemon, spawn: Spawn, tmp_path: Path) -> None:
    first, second = spawn(), spawn()
    daemon = start_daemon(TELEMETRY_WATCHED_PROCESSES="1")
    url = daemon.url
    paths = [new_run(url) for _ in range(3)]
    register(url, paths[0], identity(first.pid))
    register(url, paths[1], identity(first.pid))
    assert "TELEMETRY_WATCHED_PROCESSES" in register(url, paths[2], identity(second.pid), 409)["detail"]
    for path in paths[:2]:
        call(url, "PATCH", path, {"status": "success"})
    wait_until(lambda: call(url, "POST", f"{paths[2]}/process", identity(second.pid))[0] == 201)  # soon there is room
    assert daemon.stop() == 0
    off = start_daemon(TELEMETRY_DEATH_CERTIFICATES="false")
    assert "off" in register(off.url, paths[2], identity(second.pid), 409)["detail"]
    second.kill()
    second.wait()
    stays_running(off.url, paths[2])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_after_a_restart_it_looks_again(start_daemon: StartDaemon, spawn: Spawn, number: signal.Signals) -> None:
    daemon = start_daemon()
    url = daemon.url
    dies, lives, finishes = spawn(), spawn(), spawn()
    paths = [new_run(url) for _ in range(3)]
    for path, agent in zip(paths, (dies, lives, finishes), strict=True):
        register(url, path, identity(agent.pid))
    call(url, "PATCH", paths[2], {"status": "success"})
    daemon.stop(number)
    for agent in (dies, finishes):
        agent.kill()
        agent.wait()
    daemon = start_daemon()
    url = daemon.url
    run = wait_until_closed(url, paths[0])
    assert run["error_summary"] == f"Process {dies.pid} ended without finishing the run"
    assert "when it started" in run["error_details"]
    stays_running(url, paths[1], seconds=0.3)
    assert get(url, paths[2])[1]["error_summary"] is None
    lives.kill()
    assert wait_until_closed(url, paths[1])["status"] == "failure"
    assert daemon.stop() == 0
    check_database(daemon)


def test_a_reboot_is_distinguished_from_a_move(start_daemon: StartDaemon, spawn: Spawn) -> None:
    daemon = start_daemon()
    url = daemon.url
    agent = spawn()
    rebooted, moved, confined, reused = (new_run(url, start_time="2020-01-01T00:00:00Z") for _ in range(4))
    for path in (rebooted, moved, confined, reused):
        register(url, path, identity(agent.pid))
    assert daemon.stop() == 0
    ids = {
        path: f"(SELECT id FROM agent_runs WHERE event_id = '{path.rpartition('/')[2]}')"
        for path in (rebooted, moved, confined, reused)
    }
    daemon.execute(f"UPDATE run_processes SET boot_id = 'earlier' WHERE run = {ids[rebooted]}")
    daemon.execute(f"UPDATE run_processes SET boot_id = 'other', machine = 'other' WHERE run = {ids[moved]}")
    daemon.execute(f"UPDATE run_processes SET pid_namespace = 'pid:[1]' WHERE run = {ids[confined]}")
    daemon.execute(f"UPDATE run_processes SET start_time = start_time - 1 WHERE run = {ids[reused]}")
    daemon = start_daemon()
    url = daemon.url
    run = wait_until_closed(url, rebooted)
    assert run["error_summary"] == f"The machine was rebooted before process {agent.pid} finished the run"
    assert abs(datetime.fromisoformat(run["end_time"]).timestamp() - processes.booted_at()) < 5
    run = wait_until_closed(url, reused)  # its pid belongs to another process now, which is alive
    assert run["error_summary"] == f"Process {agent.pid} ended without finishing the run"
    stays_running(url, moved, confined)
    assert daemon.stop() == 0
    # On a database that daemons share, those of other machines may be alive: their own daemons look after them.
    left = 0 if daemon.database_url is None else 2
    assert stored(daemon, "SELECT count(*) FROM run_processes WHERE certified_at IS NULL") == [(left,)]
    check_database(daemon)


def test_a_run_that_is_reopened_is_watched_once_it_is_registered_anew(start_daemon: StartDaemon, spawn: Spawn) -> None:
    url = start_daemon().url
    agent, heir = spawn(), spawn()
    finished, certified = new_run(url), new_run(url)
    for path in (finished, certified):
        register(url, path, identity(agent.pid))
    call(url, "PATCH", finished, {"status": "success"})
    agent.kill()
    wait_until_closed(url, certified)
    for path in (finished, certified):
        call(url, "PATCH", path, {"status": "running"})
    stays_running(url, finished, certified, seconds=0.6)  # the agent knows better than the certificate
    for path in (finished, certified):
        register(url, path, identity(heir.pid))
    heir.kill()
    assert {wait_until_closed(url, path)["status"] for path in (finished, certified)} == {"failure"}


def test_a_certificate_waits_for_room_in_the_queue(start_daemon: StartDaemon, spawn: Spawn) -> None:
    daemon = start_daemon(TELEMETRY_QUEUE_MAX="1")
    url = daemon.url
    agents = [spawn() for _ in range(5)]
    paths = [new_run(url) for _ in agents]
    for path, agent in zip(paths, agents, strict=True):
        register(url, path, identity(agent.pid))
    with ThreadPoolExecutor(8) as senders:
        began = time.monotonic()
        refused = threading.Event()

        def send() -> None:
            while time.monotonic() - began < (0.5 if refused.is_set() else PATIENCE_S):
                if post(url, make_run())[0] == 503:
                    refused.set()

        sending = [senders.submit(send) for _ in range(8)]
        for agent in agents:
            agent.kill()
        for sent in sending:
            sent.result()
        assert refused.is_set(), "the queue was never full"
    assert {wait_until_closed(url, path)["status"] for path in paths} == {"failure"}
    assert daemon.stop() == 0
    check_database(daemon)


@pytest.mark.sqlite
def test_a_restored_backup_alarms_nobody(start_daemon: StartDaemon, spawn: Spawn, tmp_path: Path) -> None:
    daemon = start_daemon()
    url = daemon.url
    agent = spawn()
    path = new_run(url)
    register(url, path, identity(agent.pid))
    telemetryd("backup", tmp_path / "saved.sqlite", "--db-path", daemon.database)
    call(url, "PATCH", path, {"status": "success"})
    assert daemon.stop() == 0
    agent.kill()
    agent.wait()
    telemetryd("restore", tmp_path / "saved.sqlite", "--db-path", daemon.database)
    daemon = start_daemon()
    stays_running(daemon.url, path)


def test_many_processes_that_are_killed_at_once(start_daemon: StartDaemon, spawn: Spawn) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    url = daemon.url
    brood = (
        "import os, time\n"
        "pids = []\n"
        "for _ in range(40):\n"
        "    pid = os.fork()\n"
        "    if not pid: time.sleep(600); os._exit(0)\n"
        "    pids.append(pid)\n"
        "print(*pids, flush=True)\n"
        "time.sleep(600)"
    )
    parent = spawn(brood, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    paths = []
    for pid in pids:
        path = new_run(url)
        register(url, path, identity(pid))
        paths.append(path)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    parent.kill()
    assert {wait_until_closed(url, path)["status"] for path in paths} == {"failure"}
    assert daemon.stop() == 0
    check_database(daemon)


def test_a_stale_run_that_was_reaped_and_a_run_that_was_deleted_leave_nothing(
    start_daemon: StartDaemon, spawn: Spawn, tmp_path: Path
) -> None:
    daemon = start_daemon(TELEMETRY_STALE_AFTER="1s", TELEMETRY_PRUNE_AFTER="3650d")
    url = daemon.url
    agent = spawn()
    path = new_run(url)
    register(url, path, identity(agent.pid))
    assert wait_until_closed(url, path)["status"] == "cancelled"
    agent.kill()
    assert daemon.stop() == 0
    assert stored(daemon, "SELECT count(*) FROM run_processes") == [(0,)]


@pytest.fixture
def small_group() -> Iterator[Path]:
    """Make a control group with room for 40 MiB; return its folder."""
    for root, limit in (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")):
        if not Path(root, "cgroup.procs").exists():  # another version of control groups
            continue
        group = Path(root, f"telemetryd-test-{os.getpid()}")
        try:
            group.mkdir()
            (group / limit).write_text("40M")
        except OSError:
            continue
        yield group
        with suppress(FileNotFoundError):
            group.rmdir()
        return
    pytest.skip("no memory control group can be made here")


@pytest.mark.parametrize("removed", [False, True], ids=["the group stays", "systemd removes the group at once"])
def test_a_process_that_the_kernel_kills_for_lack_of_memory(
    start_daemon: StartDaemon, spawn: Spawn, small_group: Path, removed: bool
) -> None:
    url = start_daemon().url
    eat = (
        f"open('{small_group}/cgroup.procs', 'w').write('0'); print(flush=True); input()\n"
        "held = []\n"
        "while True: held.append(bytearray(1 << 20))"
    )
    agent = spawn(eat, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert agent.stdout is not None
    assert agent.stdin is not None
    agent.stdout.readline()
    path = new_run(url)
    register(url, path, identity(agent.pid))
    agent.stdin.write(b"\n")
    agent.stdin.flush()
    agent.wait()
    if removed:
        time.sleep(0.3)  # the daemon looks at once, long before it certifies
        small_group.rmdir()
    run = wait_until_closed(url, path)
    assert run["error_summary"] == f"Out of memory: process {agent.pid} ended before it finished the run"
    assert f"/{small_group.name} rose from 0 to 1" in run["error_details"]


@pytest.mark.parametrize(
    ("lines", "path"),
    [
        ("0::/system.slice/a.service\n", "/system.slice/a.service"),
        ("4:memory:/jobs/a:b\n1:cpu:/other\n0::/\n", "/jobs/a:b"),
        ("5:cpuset,memory,pids:/jobs\n0::/\n", "/jobs"),
        ("1:name=memory:/x\n0::/../outside\n", None),
        ("", None),
    ],
)
def test_the_group_that_bounds_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, path: str | None
) -> None:
    monkeypatch.setattr(processes, "PROC", tmp_path)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cgroup").write_text(lines)
    assert processes.cgroup(7) == path


def test_an_out_of_memory_kill_is_reported_where_the_control_group_counts_it(tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    counts = tmp_path / "agents" / "memory.events.local"
    counts.write_text("low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\noom_group_kill 0\n")
    assert processes.oom_kills("/agents", tmp_path) == 1
    assert processes.oom_kills("/nowhere", tmp_path) is None
    process = Process(7, 8, "boot", "machine", "pid:[1]", "/agents", 1)
    moment = "2026-01-01T00:00:00.000000Z"

    def describe(process: Process, code: int | None) -> Death:
        return certificates.describe(process, moment, code, processes.oom_kills(process.cgroup, tmp_path))

    assert "Out of memory" not in describe(process, -9).error_summary
    counts.write_text("oom 2\noom_kill 2\n")
    death = describe(process, -9)
    assert death.error_summary == "Out of memory: process 7 ended before it finished the run"
    assert "rose from 1 to 2" in death.error_details
    assert "Out of memory" in describe(process, None).error_summary
    assert "status 1" in describe(process, 1).error_summary  # it ended by itself
    unknown = Process(7, 8, "boot", "machine", "pid:[1]", "/agents", None)
    assert "SIGKILL" in describe(unknown, -9).error_summary
