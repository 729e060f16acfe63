from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest

from telemetryd.ops.systemd import Notifier, passed_sockets
from tests.conftest import Daemon, StartDaemon

ROOT = Path(__file__).parents[1]


class Manager:
    """What systemd is to a service: a datagram socket that notes what it receives."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + path[1:] if path.startswith("@") else path)
        self.socket.settimeout(60)

    def next(self) -> dict[str, str]:
        while True:
            said = dict(line.split("=", 1) for line in self.socket.recv(4096).decode().splitlines())
            if "EXTEND_TIMEOUT_USEC" not in said:  # a busy machine starts and stops slowly
                return said

    def heard(self, seconds: float) -> list[dict[str, str]]:
        """Collect what is said in the next seconds."""
        deadline, said = time.monotonic() + seconds, []
        while (left := deadline - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                said.append(self.next())
            except TimeoutError:
                break
        self.socket.settimeout(60)
        return said


def get(url: str) -> int:
    with urllib.request.urlopen(f"{url}/health", timeout=60) as response:
        return int(response.status)


@pytest.mark.parametrize("abstract", [False, True])
def test_ready_status_watchdog_and_stopping_are_sent(start_daemon: StartDaemon, tmp_path: Path, abstract: bool) -> None:
    address = f"@telemetryd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    manager = Manager(address)
    daemon = start_daemon(NOTIFY_SOCKET=address, WATCHDOG_USEC="600000")
    assert manager.next() == {"READY": "1", "STATUS": "Serving"}
    assert get(daemon.url) == 200  # it listens when it says so
    said = [manager.next() for _ in range(3)]
    assert all(message == {"WATCHDOG": "1", "STATUS": "Serving, 0 writes waiting"} for message in said)
    assert daemon.stop() == 0
    assert manager.heard(0.5)[-1]["STOPPING"] == "1"
    manager.socket.close()


def test_time_is_asked_for_as_long_as_something_takes(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    with notifier.asking_for_time("Starting", first_s=0.01, every_s=0.01):
        asked = [manager.socket.recv(4096).decode() for _ in range(3)]
    notifier.send(READY=1)
    while (said := manager.socket.recv(4096).decode()) != "READY=1":
        asked.append(said)
    assert set(asked) == {"EXTEND_TIMEOUT_USEC=60000000\nSTATUS=Starting"}
    manager.socket.close()
    with Notifier({}).asking_for_time("Starting"):
        assert not [thread for thread in threading.enumerate() if thread.name == "patience"]


def test_a_start_that_another_program_holds_up_asks_for_time(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    assert daemon.url
    assert daemon.stop() == 0
    manager = Manager(str(tmp_path / "notify"))
    with closing(sqlite3.connect(daemon.database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        daemon = start_daemon(NOTIFY_SOCKET=str(tmp_path / "notify"), TELEMETRY_DB_JOURNAL_MODE="WAL")
        said = manager.socket.recv(4096).decode()
    assert said == "EXTEND_TIMEOUT_USEC=60000000\nSTATUS=Starting"
    assert manager.next() == {"READY": "1", "STATUS": "Serving"}
    assert daemon.stop() == 0
    manager.socket.close()


def test_the_watchdog_starves_while_the_writer_is_stuck(start_daemon: StartDaemon, tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    daemon = start_daemon(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="300000")
    url = daemon.url
    with closing(sqlite3.connect(daemon.database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        thread = threading.Thread(target=post, args=(url,))
        thread.start()
        while not manager.next()["STATUS"].startswith("The writer is stuck"):
            pass
        said = manager.heard(0.8)
        assert all("WATCHDOG" not in message for message in said)
        assert all(message["STATUS"].startswith("The writer is stuck") for message in said)
        other.execute("COMMIT")
    thread.join()
    while "WATCHDOG" not in manager.next():
        pass
    assert daemon.stop() == 0
    manager.socket.close()


def post(url: str) -> None:
    body = b'{"event_id":"a","run_id":"r","start_time":"2026-01-01T00:00:00Z","agent_name":"a","job_type":"j"}'
    request = urllib.request.Request(f"{url}/api/v1/runs", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).close()


def test_a_reload_is_announced_and_one_that_is_refused_stays_visible(start_daemon: StartDaemon, tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    rules = tmp_path / "alerts.toml"
    rules.write_text("")
    daemon = start_daemon("--alerts-file", str(rules), NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="3000000")
    assert manager.next() == {"READY": "1", "STATUS": "Serving"}
    allowed = "every, webhooks, rules"
    problem = f"Not reloaded, all stays as it was: {rules}: x: is no key of a rule file; it may have {allowed}"
    for text, status in (("", "Reloaded"), ("x = 1", problem), ("", "Reloaded")):
        rules.write_text(text)
        before = time.monotonic_ns() // 1000
        daemon.process.send_signal(signal.SIGHUP)
        while "RELOADING" not in (begun := manager.next()):
            assert begun["WATCHDOG"] == "1"
        assert before <= int(begun.pop("MONOTONIC_USEC")) <= time.monotonic_ns() // 1000
        assert begun == {"RELOADING": "1", "STATUS": "Reloading"}
        while "WATCHDOG" in (ended := manager.next()):
            pass
        assert ended == {"READY": "1", "STATUS": status}
        if status == problem:
            assert manager.next() == {"WATCHDOG": "1", "STATUS": f"Serving, 0 writes waiting. {problem}"}
    assert daemon.stop() == 0
    manager.socket.close()


def test_no_value_can_forge_a_message_to_the_manager_or_make_it_too_long(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    notifier.send(STATUS="wrong\nREADY=1\r\nMAINPID=1")
    assert manager.next() == {"STATUS": "wrong READY=1 MAINPID=1"}
    notifier.send(READY=1, STATUS="\U0001f4a3" * 10_000)
    assert manager.next()["READY"] == "1"  # it reads 4096 bytes, as systemd does
    manager.socket.close()


def start_with_socket(folder: Path, *listening: socket.socket) -> Daemon:
    """Start a daemon as systemd would: the sockets as descriptors 3, 4, …, LISTEN_PID its own."""
    holder = f"""
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = "{len(listening)}"
for place, descriptor in enumerate({[s.fileno() for s in listening]}):
    os.dup2(descriptor, 3 + place, inheritable=True)
os.execv(sys.argv[1], sys.argv[1:])
"""
    return Daemon(folder, prefix=(sys.executable, "-c", holder), pass_fds=tuple(s.fileno() for s in listening))


def test_a_passed_socket_is_used_and_a_restart_refuses_nobody(tmp_path: Path) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    daemon = start_with_socket(tmp_path, listening)
    try:
        assert daemon.wait_for_line("Serving")["addresses"][:-1] == [url]
        assert get(url) == 200
        assert daemon.stop() == 0
        answers: list[int] = []
        waiting = [threading.Thread(target=lambda: answers.append(get(url))) for _ in range(5)]
        for thread in waiting:
            thread.start()
        time.sleep(0.3)
        assert answers == []
        daemon.close()
        daemon = start_with_socket(tmp_path, listening)
        for thread in waiting:
            thread.join()
        assert answers == [200] * 5
        assert daemon.stop() == 0
    finally:
        daemon.close()
        listening.close()


def test_a_unix_socket_may_be_passed_as_well(tmp_path: Path) -> None:
    tcp = socket.create_server(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "passed.sock"))
    unix.listen()
    daemon = start_with_socket(tmp_path, tcp, unix)
    try:
        assert len(daemon.wait_for_line("Serving")["addresses"]) == 3
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "passed.sock"))
            client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.")
        assert daemon.stop() == 0
    finally:
        daemon.close()
        tcp.close()
        unix.close()


def test_what_is_meant_for_another_process_is_not_taken() -> None:
    assert passed_sockets({"LISTEN_FDS": "1", "LISTEN_PID": "1"}) == []
    assert passed_sockets({"LISTEN_FDS": "many", "LISTEN_PID": str(os.getpid())}) == []
    assert Notifier({"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}).watchdog_s is None
    environment = {"NOTIFY_SOCKET": "/nonexistent", "WATCHDOG_USEC": "500000"}
    notifier = Notifier(environment)
    assert environment == {}
    assert notifier.watchdog_s == 0.5
    notifier.send(READY=1)  # nobody listens; that is no error


analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@analyze
def test_the_unit_is_hardened() -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=15", str(ROOT / "telemetryd.service")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-300:]


def test_the_unit_does_not_hide_the_agents_from_death_certificates() -> None:
    lines = (ROOT / "telemetryd.service").read_text().splitlines()
    assert "ProtectProc=default" in lines
    assert "ProcSubset=all" in lines
    assert not any(line.startswith("PrivatePIDs=") for line in lines)


def test_the_unit_reloads_only_what_is_right() -> None:
    """systemd runs one command after the other, and stops at the first that fails (systemd.service(5))."""
    lines = (ROOT / "telemetryd.service").read_text().splitlines()
    check, send = (line.removeprefix("ExecReload=") for line in lines if line.startswith("ExecReload="))
    assert "Type=notify" in lines
    assert f"ExecStart={check.removesuffix(' config --check')} serve" in lines
    assert send == '/bin/sh -c "kill -HUP ${MAINPID}"'


@analyze
def test_the_units_are_valid(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("telemetryd")
    for name in ("telemetryd.service", "telemetryd.socket"):
        text = (ROOT / name).read_text().replace("/opt/telemetryd/.venv/bin/telemetryd", str(program))
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, tmp_path.iterdir())], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
