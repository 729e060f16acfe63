"""`telemetryd run` and `telemetryd record`: any command, in any surroundings, becomes a run."""

from __future__ import annotations

import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from tests.client.test_processes import environment, runs
from tests.conftest import Daemon, StartDaemon, wait_until
from tests.http_client import get
from tests.needs import require_program

RUN = (sys.executable, "-m", "telemetryd", "run")
Ran = subprocess.CompletedProcess[str]
Wrap = Callable[..., Ran]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    shared = Daemon(tmp_path_factory.mktemp("daemon"), TELEMETRY_DB_JOURNAL_MODE="WAL")
    yield shared
    shared.close()


@pytest.fixture
def agent(request: pytest.FixtureRequest) -> str:
    """Return a name of its own for each test's runs: they share a daemon."""
    return re.sub(r"\W", "-", request.node.name)


@pytest.fixture
def wrap(daemon: Daemon, buffer: Path, agent: str) -> Wrap:
    """Return a function that runs a command as a run, with options before it."""

    def wrapped(
        *command: str, options: tuple[str, ...] = (), variables: Mapping[str, str] | None = None, **more: Any
    ) -> Ran:
        line = [*RUN, "--agent", agent, *options, "--", *command]
        given = {"env": environment(daemon.url, buffer, **(variables or {})), "capture_output": True, "text": True}
        return subprocess.run(line, timeout=60, check=False, **{**given, **more})

    return wrapped


def the_run(daemon: Daemon, agent: str, wanted: int = 1) -> dict[str, Any]:
    wait_until(lambda: len(runs(daemon.url, agent_name=agent)) >= wanted)
    return runs(daemon.url, agent_name=agent)[0]


def test_a_command_keeps_its_streams_and_its_exit_status(daemon: Daemon, wrap: Wrap, agent: str) -> None:
    done = wrap("sh", "-c", "tr a-z A-Z; echo oops >&2; exit 3", input="hello\n", options=("--label", "team=search"))
    assert (done.returncode, done.stdout, done.stderr) == (3, "HELLO\n", "oops\n")
    run = the_run(daemon, agent)
    assert (run["status"], run["job_type"], run["labels"]) == ("failure", "command", {"team": "search"})
    assert (run["error_summary"], run["error_details"]) == ("exit status 3: oops", "oops\n")
    assert run["metrics_json"]["exit_status"] == 3
    assert run["metrics_json"]["cpu_user_s"] >= 0
    assert run["duration_ms"] is not None


@pytest.mark.parametrize(
    ("command", "status", "outcome"),
    [
        (("true",), 0, ("success", None)),
        (("no-such-command",), 127, ("failure", "no-such-command: No such file or directory")),
        (("/etc/passwd",), 126, ("failure", "/etc/passwd: Permission denied")),
        (("sh", "-c", "kill -SEGV $$"), 139, ("failure", "killed by SIGSEGV")),
        (("sh", "-c", "kill -TERM $$"), 143, ("failure", "killed by SIGTERM")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_how_it_ends_is_recorded(  # noqa: PLR0917 - one case each
    daemon: Daemon, wrap: Wrap, agent: str, command: tuple[str, ...], status: int, outcome: tuple[str, str | None]
) -> None:
    done = wrap(*command)
    assert done.returncode == status, done.stderr
    run = the_run(daemon, agent)
    assert (run["status"], run["error_summary"]) == outcome


def test_a_script_without_an_interpreter_is_run_by_a_shell(
    daemon: Daemon, wrap: Wrap, agent: str, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text("echo from $1\n")
    script.chmod(0o755)
    assert wrap(str(script), "here").stdout == "from here\n"
    assert the_run(daemon, agent)["status"] == "success"


def test_after_the_timeout_it_is_ended_and_then_killed(daemon: Daemon, wrap: Wrap, agent: str) -> None:
    done = wrap(
        "sh", "-c", "trap '' TERM; sleep 60 & wait; wait", options=("--timeout", "0.3s", "--kill-after", "0.3s")
    )
    assert done.returncode == 128 + signal.SIGKILL
    run = the_run(daemon, agent)
    assert (run["status"], run["error_summary"]) == ("timeout", "timed out after 0.3 s: killed by SIGKILL")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_signals_are_handed_on_and_those_that_end_it_cancel_the_run(
    daemon: Daemon, buffer: Path, agent: str, number: signal.Signals
) -> None:
    program = f"trap 'echo got; exit 9' {number.name[3:]}; echo ready; while :; do sleep 0.05; done"
    line = [*RUN, "--agent", agent, "--", "sh", "-c", program]
    variables = environment(daemon.url, buffer)
    with subprocess.Popen(line, env=variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.read() == "got\n"
    assert process.returncode == 9
    assert the_run(daemon, agent)["status"] == "cancelled"


def test_the_run_is_there_before_the_command_and_its_children_find_it(
    daemon: Daemon, wrap: Wrap, agent: str, buffer: Path
) -> None:
    """The spool holds the run when the command starts, so a power cut of either leaves a trace."""
    traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    program = 'echo "$TELEMETRY_PARENT_RUN_ID $TRACEPARENT"; cat "$TELEMETRY_BUFFER_DIR"/*.jsonl.*'
    done = wrap("sh", "-c", program, variables={"TRACEPARENT": traceparent, "TELEMETRY_PARENT_RUN_ID": "outer"})
    first, _, spooled = done.stdout.partition("\n")
    run = the_run(daemon, agent)
    assert first == f"{run['run_id']} 00-{run['trace_id']}-{run['span_id']}-01"
    assert f'"event_id":"{run["event_id"]}"' in spooled
    assert (run["trace_id"], run["parent_run_id"]) == (traceparent[3:35], "outer")
    assert run["span_id"] != traceparent[36:52]


@pytest.mark.parametrize(
    "bad", ["00-0-0-01", "ff-" + "1" * 32 + "-" + "2" * 16 + "-01", "00-" + "0" * 32 + "-" + "2" * 16 + "-01"]
)
def test_a_malformed_trace_begins_a_new_one(daemon: Daemon, wrap: Wrap, agent: str, bad: str) -> None:
    wrap("true", variables={"TRACEPARENT": bad})
    assert re.fullmatch(r"(?!0{32}|1{32})[0-9a-f]{32}", the_run(daemon, agent)["trace_id"])


def test_a_tail_keeps_the_last_bytes_and_makes_lines_events(daemon: Daemon, wrap: Wrap, agent: str) -> None:
    done = wrap("sh", "-c", "seq 1 30000 >&2; exit 1", options=("--tail", "1k"))
    assert done.stderr.count("\n") == 30000
    run = the_run(daemon, agent)
    assert len(run["error_details"]) == 1024
    assert run["error_details"].endswith("29999\n30000\n")
    url = f"/api/v1/runs/{run['event_id']}/events?limit=1000"
    wait_until(lambda: len(get(daemon.url, url)[1]) == 1000)
    lines = [event["payload"]["line"] for event in get(daemon.url, url)[1]]
    assert lines == [str(number) for number in range(1, 1001)]


def test_a_process_that_is_left_behind_neither_delays_the_end_nor_dies_of_it(
    daemon: Daemon, wrap: Wrap, agent: str, tmp_path: Path
) -> None:
    left = f"(for i in 1 2 3 4 5 6; do sleep 0.2; echo still >&2 || exit; done; echo alive > {tmp_path}/alive) &"
    began = time.monotonic()
    with (tmp_path / "stderr").open("w") as errors:
        done = wrap("sh", "-c", f"{left} echo done >&2", capture_output=False, stderr=errors)
    assert done.returncode == 0
    assert time.monotonic() - began < 30
    wait_until((tmp_path / "alive").exists)
    assert (tmp_path / "stderr").read_text().count("still") == 6
    assert the_run(daemon, agent)["status"] == "success"


def test_a_lock_keeps_runs_of_the_same_name_apart(
    daemon: Daemon, wrap: Wrap, agent: str, buffer: Path, tmp_path: Path
) -> None:
    line = [*RUN, "--agent", agent, "--lock", "one", "--", "sh", "-c", f"echo > {tmp_path}/begun; cat"]
    with subprocess.Popen(line, env=environment(daemon.url, buffer), stdin=subprocess.PIPE) as holder:
        wait_until((tmp_path / "begun").exists)
        refused = wrap("true", options=("--lock", "one"))
        assert (refused.returncode, refused.stderr) == (75, "telemetryd run: another run holds the lock one\n")
        assert wrap("true", options=("--lock", "other")).returncode == 0
        assert holder.stdin is not None
        holder.stdin.close()
    assert wrap("true", options=("--lock", "one", "--lock-wait", "30s")).returncode == 0
    wait_until(lambda: len(runs(daemon.url, agent_name=agent)) == 4)
    found = sorted((run["status"], run["error_summary"]) for run in runs(daemon.url, agent_name=agent))
    assert found[0] == ("cancelled", "not started: another run holds the lock one")
    assert [status for status, _ in found[1:]] == ["success"] * 3


def test_a_signal_ends_the_wait_for_a_lock(
    daemon: Daemon, wrap: Wrap, agent: str, buffer: Path, tmp_path: Path
) -> None:
    surroundings = environment(daemon.url, buffer)
    line = [*RUN, "--agent", agent, "--lock", "one", "--lock-wait", "1h", "--"]
    with subprocess.Popen([*line, "sh", "-c", f"echo > {tmp_path}/begun; cat"], env=surroundings, stdin=PIPE) as holder:
        wait_until((tmp_path / "begun").exists)
        with subprocess.Popen([*line, "true"], env=surroundings, stderr=PIPE, text=True) as waiting:
            wait_until(lambda: is_locking(waiting.pid))
            waiting.terminate()
            try:
                _, complaint = waiting.communicate(timeout=20)
            finally:
                waiting.kill()
        assert holder.stdin is not None
        holder.stdin.close()
    assert (waiting.returncode, complaint) == (
        143,
        "telemetryd run: SIGTERM while it waited for the lock one\n",
    )
    wait_until(lambda: len(runs(daemon.url, agent_name=agent)) == 2)
    found = {run["error_summary"]: run["status"] for run in runs(daemon.url, agent_name=agent)}
    assert found["not started: SIGTERM while it waited for the lock one"] == "cancelled"


def is_locking(pid: int) -> bool:
    """Return whether a process has the file of the lock open."""
    return any(str(link.readlink()).endswith("/one.lock") for link in Path(f"/proc/{pid}/fd").iterdir())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "Missing argument '-- COMMAND"),
        (("--timeout", "10", "--", "true"), "Invalid value for '--timeout': '10' must be a duration"),
        (("--tail", "2M", "--", "true"), "'2M' must be a number of bytes, such as 4096 or 16k, at most 1M"),
        (("--label", "team", "--", "true"), "'team' must be a key and a value: team=search"),
        (("--lock", "../x", "--", "true"), "--lock: '../x' must be 1 to 100 letters"),
        (("--lock-wait", "1s", "--", "true"), "--lock-wait needs --lock."),
        (("--no-such", "--", "true"), "No such option"),
    ],
)
def test_bad_usage_runs_nothing(buffer: Path, tmp_path: Path, arguments: tuple[str, ...], complaint: str) -> None:
    marked = [*arguments[:-1], "touch", str(tmp_path / "ran")] if arguments else []
    done = subprocess.run(
        [*RUN, *marked], env=environment("http://127.0.0.1:9", buffer), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert complaint in done.stderr
    assert not (tmp_path / "ran").exists()
    assert not buffer.exists()


def test_while_the_daemon_is_down_the_run_waits_in_the_spool_without_a_word(
    start_daemon: StartDaemon, buffer: Path
) -> None:
    down = environment("http://127.0.0.1:9", buffer, TELEMETRY_FLUSH_TIMEOUT_S="0.2")
    done = subprocess.run(
        [*RUN, "--agent", "offline", "--", "echo", "hi"], env=down, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "hi\n", "")
    daemon = start_daemon()
    synced = subprocess.run(
        [sys.executable, "-m", "telemetryd", "sync"],
        env=environment(daemon.url, buffer),
        capture_output=True,
        check=False,
    )
    assert synced.returncode == 0, synced.stderr
    (run,) = runs(daemon.url)
    assert (run["agent_name"], run["status"]) == ("offline", "success")


def test_without_a_home_a_terminal_or_standard_streams(
    daemon: Daemon, buffer: Path, agent: str, tmp_path: Path
) -> None:
    """As cron and containers start programs; the spool's default folder needs no home either."""
    line = [*RUN, "--agent", agent, "--", "sh", "-c", f"echo here > {tmp_path}/out"]
    variables = {"TELEMETRY_API_URL": daemon.url, "PATH": os.environ["PATH"], "TELEMETRY_BUFFER_DIR": str(buffer)}
    closed = "import os, sys\nos.closerange(0, 3)\nos.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", closed, *line], env=variables, start_new_session=True, check=False)
    assert done.returncode == 0
    assert (tmp_path / "out").read_text() == "here\n"
    assert the_run(daemon, agent)["status"] == "success"


def test_as_the_first_process_of_a_container_it_reaps_orphans_and_hands_signals_on(
    daemon: Daemon, buffer: Path, agent: str
) -> None:
    require_program("unshare", "util-linux")
    container = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if subprocess.run([*container, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to make a PID namespace")
    # The orphan's parent ends first, so the orphan becomes a child of process 1 and would stay a zombie.
    program = (
        "(sleep 0.1 & exit 0); sleep 0.5; grep -c '^State:.*Z' /proc/[0-9]*/status | grep -c ':1$';"
        " trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    )
    line = [*container, *RUN, "--agent", agent, "--", "sh", "-c", program]
    with subprocess.Popen(line, env=environment(daemon.url, buffer), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        assert process.stdout.readline() == "ready\n"
        (first,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGTERM)
        process.wait(30)
    assert process.returncode == 7
    assert the_run(daemon, agent)["status"] == "cancelled"


def test_on_a_terminal_the_command_keeps_the_terminal(daemon: Daemon, buffer: Path, agent: str) -> None:
    """Its standard error stays a terminal, it may read from it, and Ctrl-C reaches it once."""
    program = (
        "test -t 2 && test -t 0 && read line && echo read:$line; trap 'echo int; exit 5' INT; echo ready;"
        " while :; do sleep 0.05; done"
    )
    pid, ours = pty.fork()
    if pid == 0:
        os.execve(RUN[0], [*RUN, "--agent", agent, "--", "sh", "-c", program], environment(daemon.url, buffer))
    try:
        os.write(ours, b"line\n")
        seen = b""
        while b"ready" not in seen:
            seen += os.read(ours, 4096)
        assert b"read:line" in seen
        os.write(ours, b"\x03")
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # EIO: the terminal's last process has ended
                break
            if not piece:
                break
            seen += piece
    finally:
        os.close(ours)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    assert seen.count(b"int") == 1
    assert the_run(daemon, agent)["status"] == "cancelled"


def test_it_loads_nothing_of_the_server(buffer: Path) -> None:
    code = """
import sys
from telemetryd.cli import main
import telemetryd.client.programs as programs
programs.execute = lambda *_: print(*sorted(sys.modules)) or 0
sys.argv = ["telemetryd", "run", "--", "true"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment("http://127.0.0.1:9", buffer),
        capture_output=True,
        text=True,
        check=False,
    )
    loaded = set(done.stdout.split())
    assert "telemetryd.client.client" in loaded, done.stderr
    assert not loaded & {"pydantic", "aiohttp", "sqlite3", "telemetryd.settings", "telemetryd.model", "asyncio"}


@pytest.mark.parametrize("command", [("record", "--agent", "later"), ("run", "--agent", "later", "--", "true")])
def test_a_short_command_sends_what_earlier_ones_have_left(
    daemon: Daemon, buffer: Path, agent: str, command: tuple[str, ...]
) -> None:
    """Where only cron jobs and units report, no other process would."""
    record = [sys.executable, "-m", "telemetryd", "record", "--agent", agent]
    for _ in range(3):
        subprocess.run(record, env=environment("http://127.0.0.1:9", buffer), check=True)
    assert runs(daemon.url, agent_name=agent) == []
    later = [sys.executable, "-m", "telemetryd", *command]
    done = subprocess.run(later, env=environment(daemon.url, buffer), check=True, capture_output=True, text=True)
    assert done.stderr == ""
    assert len(runs(daemon.url, agent_name=agent)) == 3
    assert list(buffer.glob("*.ready")) == []


def test_what_is_left_holds_up_no_command(buffer: Path, agent: str, free_port: int) -> None:
    """A daemon that takes the connection and says nothing is waited for by the bound, once for all that is left."""
    record = [sys.executable, "-m", "telemetryd", "record", "--agent", agent]
    for _ in range(3):
        subprocess.run(record, env=environment("http://127.0.0.1:9", buffer), check=True)
    with socket.create_server(("127.0.0.1", free_port)):
        began = time.monotonic()
        subprocess.run(record, env=environment(f"http://127.0.0.1:{free_port}", buffer), check=True)
    assert time.monotonic() - began < 8
    assert list(buffer.glob("*.synced")) == []


def test_the_examples_of_the_pages_work_as_pasted(daemon: Daemon, buffer: Path, tmp_path: Path) -> None:
    """The commands of README and how-to, the crontab's line with a command that is here, and the unit's line."""
    folder = Path(__file__).parents[2]
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "telemetryd").write_text(f'#!/bin/sh\nexec {sys.executable} -m telemetryd "$@"\n')
    (bin_folder / "telemetryd").chmod(0o755)
    systemd = {"SERVICE_RESULT": "success", "EXIT_CODE": "exited", "EXIT_STATUS": "0", "INVOCATION_ID": "cd" * 16}
    given = environment(daemon.url, buffer, PATH=f"{bin_folder}{os.pathsep}{os.environ['PATH']}", **systemd)
    ran = 0
    for page in ("README.md", "docs/how-to/commands-and-units.md"):
        text = (folder / page).read_text("utf-8")
        blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines() if line.startswith("telemetryd r")]
        assert (
            "PATH=/usr/local/bin:/usr/bin:/bin\n15 3 * * *  telemetryd run" in text
        )  # cron's own lacks /usr/local/bin
        for line in re.findall(r"^(?:15 3 \* \* \*  |ExecStopPost=-)(.*)$", text, re.MULTILINE):
            lines.append(line.replace("/usr/local/bin/backup.sh", "true"))
        for line in lines:
            done = subprocess.run(["sh", "-c", line], env=given, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            ran += 1
    assert ran == 8
    (program,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    subprocess.run([sys.executable, "-c", program], env=given, check=True, capture_output=True)
    wait_until(lambda: len(runs(daemon.url, agent_name="importer")) == 1)
