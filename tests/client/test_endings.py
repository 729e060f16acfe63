"""The end of the interpreter, and green threads: nothing hangs, nothing raises, and what was recorded is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from telemetryd.client import Client, context
from tests.conftest import StartDaemon
from tests.http_client import get
from tests.needs import require_package

LATE = """
from telemetryd import client

class Late:
    def __del__(self):
        try:
            {body}
        except BaseException as error:
            print("raised", repr(error), flush=True)
        else:
            print("through", flush=True)

late = Late()
late.itself = late  # so that it is collected when the modules are gone
"""
RECORD = "print(client.record({'event_id': 'late', 'agent_name': 'a', 'job_type': 'j'}), client.flush(30))"
BLOCK = """
            with client.run("a", "j", event_id="late") as run:
                run.metrics(tokens=1)
                run.update(context_json='{"a": 1}')
                run.event("step")
                raise ArithmeticError("of the agent")
"""
OWN_CLIENT = """
            own = client.Client(send=False, file_bytes=10)
            for _ in range(3):
                own.record({"event_id": "late", "agent_name": "a", "job_type": "j"})
            own.close()
"""


WRONG = """
            client.record({"event_id": "late", "agent_name": "a", "job_type": "j", "items_failed": [1]})
            with client.run("a", "j", product={"a": 1}) as run:
                run.metrics('{"tokens": 1}')
"""


def run(code: str, buffer: Path, url: str = "http://127.0.0.1:9", folder: Path | None = None) -> str:
    """Run an agent to its end, and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    environment |= {"TELEMETRY_API_URL": url, "TELEMETRY_BUFFER_DIR": str(buffer)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=50, check=True)
    return done.stdout


def lines(buffer: Path) -> list[bytes]:
    return [line for path in buffer.glob("*.jsonl.*") for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize(
    ("body", "told", "count"),
    [
        (RECORD, "late False\nthrough\n", 1),
        (BLOCK, "raised ArithmeticError('of the agent')\n", 5),
        (OWN_CLIENT, "through\n", 3),
    ],
    ids=["a first record", "a block left by an exception", "a client that only writes"],
)
def test_at_the_end_of_the_interpreter_nothing_hangs_and_all_is_written(
    buffer: Path, body: str, told: str, count: int
) -> None:
    assert run(LATE.format(body=body), buffer) == told
    assert len(lines(buffer)) == count


@pytest.mark.parametrize(("body", "count"), [(RECORD, 1), (WRONG, 4)], ids=["a record", "wrong values"])
def test_at_the_end_of_the_interpreter_neither_a_checkout_nor_a_wrong_value_costs_a_run(
    tmp_path: Path, buffer: Path, body: str, count: int
) -> None:
    git = tmp_path / "checkout" / ".git"
    git.mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "config").write_text('[remote "origin"]\n\turl = https://h/site.git\n')
    run(LATE.format(body=body), buffer, folder=git.parent)
    written = [orjson.loads(line) for line in lines(buffer)]
    assert len(written) == count
    assert written[0]["event_id"] == "late"
    assert (written[0]["git_branch"], written[0]["git_repo"]) == ("main", "https://h/site.git")


def test_a_run_that_ends_after_its_client_has_said_how(buffer: Path) -> None:
    body = 'early.fail(ValueError("x"))'
    code = LATE.format(body=body) + 'early = client.run("a", "j").start(); late.early = early\n'
    assert run(code, buffer) == "through\n"
    # Two streams, whose names do not tell which was first.
    told = [orjson.loads(line).get("fields", {}).get("status") for line in lines(buffer)]
    assert sorted(told, key=str) == [None, "failure"]


GREEN = {
    "gevent": "from gevent import monkey; monkey.patch_all()\n",
    "eventlet": "import eventlet; eventlet.monkey_patch()\n",
}
ONE = """
from telemetryd import client
client.record({"event_id": "one", "agent_name": "a", "job_type": "j"})
"""
WITH_A_CHILD = """
import os
from telemetryd import client
with client.run("a", "j", event_id="one"):
    print(client.flush(60))
child = os.fork()
with client.run("a", "j", event_id="two" if child else "three"):
    pass
if child:
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize(
    ("code", "stored"), [(ONE, ["one"]), (WITH_A_CHILD, ["one", "two", "three"])], ids=["one", "fork"]
)
@pytest.mark.parametrize("kind", GREEN)
def test_green_threads_end_and_send_like_any_other(
    start_daemon: StartDaemon, buffer: Path, kind: str, code: str, stored: list[str]
) -> None:
    require_package(kind)
    url = start_daemon().url
    run(GREEN[kind] + code, buffer, url)
    assert [get(url, f"/api/v1/runs/{event_id}")[0] for event_id in stored] == [200] * len(stored)


COOPERATIVE = """
import threading, time
from telemetryd import client
from telemetryd.client import signals

class Turns(threading.Event):
    "An event whose waiter gets its turn only when the other thread waits for something, as with green threads."
    def wait(self, timeout=None):
        told = super().wait(timeout)
        time.sleep(0.5)
        return told

signals.threading = type("threading", (), {**vars(threading), "Event": Turns})
turns = []
from telemetryd.client.worker import Worker
real = Worker._turn
Worker._turn = lambda self: (turns.append(1), real(self))
client.record({"event_id": "one", "agent_name": "a", "job_type": "j"})
client.flush(5)
print(len(turns) < 50)
"""


def test_the_worker_waits_though_the_thread_that_was_woken_is_still_there(
    start_daemon: StartDaemon, buffer: Path
) -> None:
    """The same without gevent: a waiter that leaves late must not keep the worker busy."""
    assert run(COOPERATIVE, buffer, start_daemon().url) == "True\n"


def test_what_cannot_be_found_out_of_git_costs_no_run(buffer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> dict[str, str]:
        raise ImportError("sys.meta_path is None, Python is likely shutting down")

    monkeypatch.setattr(context, "git_fields", fail)
    client = Client(buffer_dir=buffer, send=False)
    assert client.record({"event_id": "one", "agent_name": "a", "job_type": "j"}) == "one"
    client.close()
    assert [orjson.loads(line)["event_id"] for line in lines(buffer)] == ["one"]
