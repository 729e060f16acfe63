"""Forks, spawned and short-lived processes, threads and the end of the interpreter, with a real daemon."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import states
from tests.conftest import Daemon, StartDaemon, wait_until
from tests.http_client import get, prometheus
from tests.tools.process import telemetryd


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> Daemon:
    return start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")


def environment(url: str, buffer: Path, **variables: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    return {**clean, "TELEMETRY_API_URL": url, "TELEMETRY_BUFFER_DIR": str(buffer), **variables}


def python(
    program: str, url: str, buffer: Path, *, status: int | None = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a program that uses the default client."""
    head = "import os, sys, time\nfrom telemetryd import client as telemetry\n"
    done = subprocess.run(
        [sys.executable, "-c", head + program],
        env=environment(url, buffer, **variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert status is None or done.returncode == status, done.stdout + done.stderr
    return done


def certificates(url: str) -> int:
    """Return how many runs the daemon has declared dead."""
    found = re.search(r"^telemetryd_death_certificates_total (\d+)", prometheus(url), re.MULTILINE)
    assert found
    return int(found[1])


def runs(url: str, **filters: str) -> list[dict[str, Any]]:
    query = "&".join(f"{name}={value}" for name, value in {"limit": "1000", **filters}.items())
    status, answer = get(url, f"/api/v1/runs?{query}")
    assert status == 200
    assert isinstance(answer, list)
    return answer


def test_the_end_of_the_interpreter_sends_what_is_left(daemon: Daemon, buffer: Path) -> None:
    program = """
import atexit, threading
atexit.register(lambda: telemetry.record({"agent_name": "a", "job_type": "late", "event_id": "late"}))
with telemetry.run("a", "j", event_id="main") as run:
    run.event("x")
def work():
    with telemetry.run("a", "thread", event_id="thread"):
        time.sleep(0.05)
threading.Thread(target=work).start()
"""
    done = python(program, daemon.url, buffer)
    assert done.stderr == ""
    assert {run["event_id"]: run["status"] for run in runs(daemon.url)} == {
        "main": "success",
        "thread": "success",
        "late": "running",
    }
    assert states(buffer) == {".synced": 1}


def test_every_way_to_leave_says_how_it_was(daemon: Daemon, buffer: Path) -> None:
    for how in ("sys.exit(3)", "raise ValueError('x')", "os.kill(os.getpid(), 2)"):
        program = f"with telemetry.run('a', 'j', item_name={how!r}):\n    {how}\n    time.sleep(60)\n"
        assert python(program, daemon.url, buffer, status=None).returncode != 0
        found = [run["status"] for run in runs(daemon.url) if run["item_name"] == how]
        assert found == ["cancelled" if how[0] == "o" else "failure"]


def test_the_end_is_not_held_up_by_a_daemon_that_is_down(buffer: Path, free_port: int) -> None:
    began = time.monotonic()
    python("telemetry.record({'agent_name': 'a', 'job_type': 'j'})", f"http://127.0.0.1:{free_port}", buffer)
    assert time.monotonic() - began < 30
    assert states(buffer) == {".ready": 1, ".lock": 1}


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(daemon: Daemon, buffer: Path, method: str, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(f"""
import multiprocessing, os
from telemetryd import client as telemetry

def work(number):
    with telemetry.run("a", "inner", item_name=str(number)) as run:
        assert telemetry.flush()  # the process is registered now
        run.event("step", number=number)

if __name__ == "__main__":
    with telemetry.run("a", "outer", run_id="the-outer-run") as run:
        os.environ.update(run.environment())
        context = multiprocessing.get_context({method!r})
        workers = [context.Process(target=work, args=(number,)) for number in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
""")
    done = subprocess.run(
        [sys.executable, script],
        env=environment(daemon.url, buffer),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    inner = runs(daemon.url, job_type="inner")
    assert sorted(run["item_name"] for run in inner) == ["0", "1"]
    assert {(run["status"], run["parent_run_id"]) for run in inner} == {("success", "the-outer-run")}
    assert [run["status"] for run in runs(daemon.url, job_type="outer")] == ["success"]
    assert states(buffer).keys() == {".synced"}
    time.sleep(0.3)
    assert certificates(daemon.url) == 0, "no false alarm"


def test_what_a_forked_process_says_of_its_parents_run_comes_after_its_start(
    daemon: Daemon, buffer: Path, free_port: int
) -> None:
    program = """
telemetry.record({"agent_name": "a", "job_type": "before"})
with telemetry.run("a", "j", event_id="shared") as run:
    if os.fork() == 0:
        run.event("from the child")
        run.metrics(child=1)
        telemetry.record({"agent_name": "a", "job_type": "own", "event_id": "own"})
        os._exit(0)
    os.wait()
"""
    python(program, f"http://127.0.0.1:{free_port}", buffer)
    # The child's file first, as if it were the older one.
    files = sorted(buffer.glob("*.jsonl.*"), key=lambda path: path.stat().st_size)
    child = next(path for path in files if b"from the child" in path.read_bytes())
    os.utime(child, (1, 1))
    telemetryd("sync", "--buffer-dir", buffer, "--url", daemon.url)
    status, shared = get(daemon.url, "/api/v1/runs/shared?include=events")
    assert (status, shared["status"], shared["metrics_json"]) == (200, "success", {"child": 1})
    assert [event["event_type"] for event in shared["events"]] == ["from the child"]
    assert len(runs(daemon.url)) == 3
    assert states(buffer).keys() == {".synced"}


def test_a_forked_process_that_leaves_the_block_does_not_end_its_parents_run(daemon: Daemon, buffer: Path) -> None:
    program = """
try:
    with telemetry.run("a", "j", event_id="parents") as run:
        child = os.fork()
        if child == 0:
            sys.exit(5)
        os.waitpid(child, 0)
        run.finish("partial")
finally:
    pass
"""
    python(program, daemon.url, buffer)
    telemetryd("sync", "--buffer-dir", buffer, "--url", daemon.url)
    assert [run["status"] for run in runs(daemon.url)] == ["partial"]


def test_a_fork_while_an_answer_is_being_read_does_not_hang(buffer: Path) -> None:
    program = """
import socket, threading
listening = socket.create_server(("127.0.0.1", 0))
def answer():
    connection, _ = listening.accept()
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 100\\r\\n\\r\\n{")
    begun.set()
    time.sleep(60)
begun = threading.Event()
threading.Thread(target=answer, daemon=True).start()
client = telemetry.Client(f"http://127.0.0.1:{listening.getsockname()[1]}", flush_timeout_s=0.1)
client.record({"agent_name": "a", "job_type": "parent"})
begun.wait()
time.sleep(0.3)
child = os.fork()
if child == 0:
    assert client.record({"agent_name": "a", "job_type": "child"})
    os._exit(0)
deadline = time.monotonic() + 30
while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
    if time.monotonic() > deadline:  # as long as the answer is awaited
        os.kill(child, 9)
        sys.exit("the child hangs")
    time.sleep(0.01)
assert ended[1] == 0
"""
    python(program, "http://127.0.0.1:9", buffer)


def test_a_forked_process_need_not_wait_for_a_lock_of_its_parents(buffer: Path) -> None:
    program = """
import threading
run = telemetry.run("a", "j").start()
held, done = threading.Event(), threading.Event()
def hold():
    with run._lock:
        held.set()
        done.wait(40)
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    began = time.monotonic()
    for number in range(3):
        run.items(succeeded=number)
    os._exit(time.monotonic() - began > 20)
done.set()
assert os.waitpid(child, 0)[1] == 0
"""
    python(program, "http://127.0.0.1:9", buffer, TELEMETRY_FLUSH_TIMEOUT_S="0.1")


def test_many_short_lived_processes_at_once(daemon: Daemon, buffer: Path) -> None:
    program = """
import sys
from telemetryd import client as telemetry
with telemetry.run("a", "short", event_id=sys.argv[1]) as run:
    run.items(succeeded=1)
"""
    count = 8
    processes = [
        subprocess.Popen([sys.executable, "-c", program, f"short-{number}"], env=environment(daemon.url, buffer))
        for number in range(count)
    ]
    assert [process.wait(120) for process in processes] == [0] * count
    telemetryd("sync", "--buffer-dir", buffer, "--url", daemon.url)
    found = runs(daemon.url, job_type="short")
    assert sorted(run["event_id"] for run in found) == sorted(f"short-{number}" for number in range(count))
    assert {(run["status"], run["items_succeeded"]) for run in found} == {("success", 1)}
    assert states(buffer).keys() == {".synced"}


def test_the_next_process_sends_what_dead_ones_left_once(daemon: Daemon, buffer: Path, free_port: int) -> None:
    dead = "telemetry.record({'agent_name': 'a', 'job_type': 'j'})\nos.kill(os.getpid(), 9)"
    for _ in range(3):
        python(dead, f"http://127.0.0.1:{free_port}", buffer, status=-9)
    assert states(buffer) == {".active": 3, ".lock": 3}
    long_lived = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys\nfrom telemetryd import client\nclient.run('a', 'long').start(); sys.stdin.read()",
            ],
            env=environment(daemon.url, buffer),
            stdin=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    wait_until(lambda: len(runs(daemon.url, job_type="j")) == 3)
    time.sleep(1)  # the other one looks around as well
    for process in long_lived:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
    assert len(runs(daemon.url, job_type="j")) == 3
    assert states(buffer) == {".synced": 5}
    requests = [line for line in daemon.lines if line["message"] == "Batch stored"]
    assert sum(line["duplicates"] for line in requests) == 0


def test_a_daemon_that_is_killed_at_random_moments_gets_everything_in_the_end(
    start_daemon: StartDaemon, buffer: Path, free_port: int
) -> None:
    url = f"http://127.0.0.1:{free_port}"
    program = """
for number in range(3000):
    telemetry.record({"agent_name": "a", "job_type": "j", "event_id": f"e-{number}", "status": "success"})
    if number % 50 == 0:
        time.sleep(0.02)
print(telemetry.flush(60), telemetry.stats()["dead"])
"""
    agent = subprocess.Popen(
        [sys.executable, "-c", "import time\nfrom telemetryd import client as telemetry\n" + program],
        env=environment(url, buffer),
        stdout=subprocess.PIPE,
        text=True,
    )
    daemon = None
    for _ in range(3):
        daemon = start_daemon(TELEMETRY_API_PORT=str(free_port), TELEMETRY_DB_JOURNAL_MODE="WAL")
        daemon.wait_for_line("Serving")
        time.sleep(0.15)  # some moment
        daemon.stop(signal.SIGKILL)
    daemon = start_daemon(TELEMETRY_API_PORT=str(free_port), TELEMETRY_DB_JOURNAL_MODE="WAL")
    out, _ = agent.communicate(timeout=120)
    assert out == "True 0\n"
    status, metrics = get(daemon.url, "/metrics")
    assert (status, metrics["total_runs"]) == (200, 3000)


def test_a_flush_that_cannot_succeed_says_so(buffer: Path, free_port: int) -> None:
    program = "telemetry.record({'agent_name': 'a', 'job_type': 'j'})\nprint(telemetry.flush(0.3))"
    done = python(program, f"http://127.0.0.1:{free_port}", buffer)
    assert done.stdout == "False\n"
    assert done.stderr.count("Telemetry cannot be sent now and stays in the spool") == 1


@pytest.mark.parametrize(
    ("variable", "text", "is_sent"),
    [
        ("TELEMETRY_BUFFER_MAX_MB", "much", True),
        ("TELEMETRY_TIMEOUT_S", "-1", True),
        ("TELEMETRY_API_URL", "ftp://x", False),
        ("TELEMETRY_API_AUTH_TOKEN_FILE", "/nowhere/token", False),
    ],
)
def test_a_wrong_variable_is_named_and_costs_neither_an_exception_nor_a_line(
    daemon: Daemon, buffer: Path, variable: str, text: str, is_sent: bool
) -> None:
    program = """
with telemetry.run("a", "j"):
    assert telemetry.record({"agent_name": "a", "job_type": "j"})
print(telemetry.stats()["failures"])
try:
    telemetry.Client()
except ValueError as error:
    print(error)
"""
    wrong: dict[str, Any] = {variable: text}
    done = python(program, daemon.url, buffer, **wrong)
    assert done.stdout.startswith(f"1\n{variable}: ")
    assert done.stderr.count(variable) == 1
    assert len(runs(daemon.url)) == (2 if is_sent else 0)
    telemetryd("sync", "--buffer-dir", buffer, "--url", daemon.url)
    assert len(runs(daemon.url)) == 2


def test_clients_that_nobody_knows_any_more_are_flushed_at_the_end_all_within_one_bound(buffer: Path) -> None:
    program = """
import socket
silent = socket.create_server(("127.0.0.1", 0))
url = f"http://127.0.0.1:{silent.getsockname()[1]}"
for _ in range(8):
    telemetry.Client(url).record({"agent_name": "a", "job_type": "j"})
for _ in range(3):
    telemetry.Client(url, send=False).record({"agent_name": "a", "job_type": "j"})
"""
    began = time.monotonic()
    python(program, "http://127.0.0.1:9", buffer, TELEMETRY_FLUSH_TIMEOUT_S="3")
    assert time.monotonic() - began < 20, "eleven times as long"
    assert states(buffer)[".ready"] >= 3
    assert len([path for path in buffer.iterdir() if path.suffix != ".lock"]) == 11


def test_a_client_that_nobody_knows_any_more_notices_a_fork(buffer: Path) -> None:
    program = """
import gc
run = telemetry.Client(send=False).run("a", "j").start()
telemetry.Client(send=False).record({"agent_name": "a", "job_type": "forgotten"})
gc.collect()
child = os.fork()
if child == 0:
    files = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if int(name) > 2
             and os.path.exists(f"/proc/self/fd/{name}")]
    os._exit(any(file.endswith(".active") for file in files))
assert os.waitpid(child, 0)[1] == 0
"""
    python(program, "http://127.0.0.1:9", buffer)
    assert states(buffer) == {".ready": 2}


def test_memory_stays_flat_while_the_daemon_is_down(buffer: Path, free_port: int) -> None:
    program = """
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
run = {"agent_name": "a", "job_type": "j", "metrics_json": {"tokens": 5}, "status": "success"}
def load(count):
    for _ in range(count):
        telemetry.record(run)
load(5_000)
before = resident()
load(45_000)
print(telemetry.stats()["recorded"], resident() - before)
"""
    done = python(program, f"http://127.0.0.1:{free_port}", buffer, TELEMETRY_FLUSH_TIMEOUT_S="0.1")
    recorded, grown = map(int, done.stdout.split())
    assert recorded == 50_000
    assert sum(file.read_bytes().count(b"\n") for file in buffer.glob("*.jsonl.*")) == recorded
    # The background thread makes full batches once in a while, of a few MiB; the lines have about 15 MiB, of which
    # the names of the host and of the Git branch are a part.
    assert grown < 6 << 20


def test_the_folder_stays_within_its_bound_while_the_daemon_is_down(buffer: Path, free_port: int) -> None:
    program = """
from telemetryd.client import Client, bounds
bounds._EVERY_S = 0.2
client = Client(file_bytes=100_000, max_bytes=1_000_000)
while client.stats()["dropped"] <= 1000:
    client.record({"agent_name": "a", "job_type": "j", "output_summary": "x" * 1000})
    time.sleep(0.0001)
client.close()
print(client.stats()["dropped"], client.stats()["recorded"])
"""
    done = python(program, f"http://127.0.0.1:{free_port}", buffer)
    dropped, recorded = map(int, done.stdout.split())
    assert dropped > 1000
    assert "lines that were not stored are given up" in done.stderr
    kept = [line for path in buffer.glob("*.jsonl.*") for line in path.read_bytes().splitlines()]
    assert len(kept) + dropped == recorded
    assert {json.loads(line)["agent_name"] for line in kept} == {"a"}


def test_a_killed_agents_run_is_closed_at_once_and_a_late_end_wins(daemon: Daemon, buffer: Path) -> None:
    """The client has registered its process, so the daemon sees its death."""
    program = """
from telemetryd import client as telemetry
import os, signal, sys, time
run = telemetry.run("a", "j", event_id="dying").start()
telemetry.flush(60)
print("begun", flush=True)
time.sleep(60)
"""
    agent = subprocess.Popen(
        [sys.executable, "-c", program], env=environment(daemon.url, buffer), stdout=subprocess.PIPE, text=True
    )
    with agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "begun\n"
        deadline = time.monotonic() + 60
        while "telemetryd_processes_watched 1.0" not in prometheus(daemon.url):  # it comes after the flush
            assert time.monotonic() < deadline
            time.sleep(0.02)
        agent.kill()
    deadline = time.monotonic() + 60
    while (run := get(daemon.url, "/api/v1/runs/dying")[1])["status"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert run["status"] == "failure"
    assert run["error_summary"]


def test_a_refused_registration_is_not_repeated_for_ever(start_daemon: StartDaemon, buffer: Path) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL", TELEMETRY_DEATH_CERTIFICATES="false")
    program = """
for number in range(6):
    with telemetry.run("a", "j"):
        assert telemetry.flush(60)
print(telemetry.stats()["dead"])
"""
    assert python(program, daemon.url, buffer).stdout == "0\n"
    daemon.stop()
    asked = [line for line in daemon.lines if line.get("endpoint", "").endswith("/process")]
    assert [line["status"] for line in asked] == [409] * 3


def test_what_a_backup_lacks_comes_back_from_the_spool(start_daemon: StartDaemon, buffer: Path, tmp_path: Path) -> None:
    daemon = start_daemon()
    assert runs(daemon.url) == []
    telemetryd("backup", tmp_path / "early.sqlite", "--db-path", daemon.database)
    python(
        "with telemetry.run('late', 'job') as run:\n    run.event('half')\n    run.items(succeeded=2)",
        daemon.url,
        buffer,
    )
    (before,) = runs(daemon.url)
    daemon.stop(signal.SIGKILL)
    telemetryd("restore", tmp_path / "early.sqlite", "--db-path", daemon.database)
    daemon = start_daemon()
    assert runs(daemon.url) == []
    sent = sorted(buffer.glob("*.synced"))
    for _ in range(2):
        telemetryd("replay", *sent, "--url", daemon.url)
        (after,) = runs(daemon.url)
        differing = {name for name in after if after[name] != before[name]}
        assert differing <= {"id", "created_at", "updated_at"}
        assert len(get(daemon.url, f"/api/v1/runs/{after['event_id']}/events")[1]) == 1


def test_the_tutorial_works_as_pasted(daemon: Daemon, buffer: Path) -> None:
    snippets = python_blocks("docs/tutorial/first-steps.md")
    assert python_blocks("README.md") == snippets[:1]
    program = "\n".join(snippets)
    assert program.count("telemetry.run(") == 2
    python(program, daemon.url, buffer)
    found = {run["job_type"]: run for run in runs(daemon.url)}
    assert found.keys() == {"translate_directory", "nightly", "crawl"}
    assert {run["status"] for run in found.values()} == {"success"}
    translated = found["translate_directory"]
    assert (translated["items_succeeded"], translated["metrics_json"]) == (3, {"tokens": 1200})
    events = get(daemon.url, f"/api/v1/runs/{translated['event_id']}/events")[1]
    assert [event["payload"]["file"] for event in events] == ["a.md", "b.md", "c.md"]
    assert found["crawl"]["parent_run_id"] == found["nightly"]["run_id"]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / page).read_text("utf-8"), re.DOTALL)


def test_the_clients_page_works_as_pasted(daemon: Daemon, buffer: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "client.md").read_text("utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 2
    python("\n".join(snippets), daemon.url, buffer)
    (run,) = runs(daemon.url)
    assert (run["status"], run["items_discovered"], run["items_succeeded"]) == ("partial", 120, 45)
    assert (run["metrics_json"], run["context_json"]) == ({"tokens": 5200}, {"shard": 3})
    assert (run["environment"], run["output_summary"]) == ("prod", "…")
