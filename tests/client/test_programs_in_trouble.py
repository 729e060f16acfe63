"""`telemetryd run` and `record` with odd signals, locks, limits and values: the command runs, and its run says how."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.client.test_processes import environment
from tests.conftest import wait_until

RUN = (sys.executable, "-m", "telemetryd", "run")
RECORD = (sys.executable, "-m", "telemetryd", "record")


@pytest.fixture
def variables(buffer: Path) -> dict[str, str]:
    return environment("http://127.0.0.1:9", buffer, TELEMETRY_SEND="false")


def spooled(buffer: Path) -> dict[str, Any]:
    """Return the run that the spool holds, as its lines leave it."""
    run: dict[str, Any] = {}
    for path in buffer.glob("*.jsonl.*"):
        for line in path.read_text("utf-8").splitlines():
            said = json.loads(line)
            run |= said.get("fields", {}) if said.get("op") == "update" else {} if "op" in said else said
    return run


@pytest.mark.parametrize("number", [signal.SIGRTMIN, signal.SIGRTMIN + 2, signal.SIGRTMAX])
def test_real_time_signals_are_handed_on(variables: dict[str, str], buffer: Path, number: int) -> None:
    """Most of them have no name in Python."""
    program = f"import signal as s; s.pthread_sigmask(0, {{{number}}}); print(flush=True); s.sigwait({{{number}}})"
    line = [*RUN, "--", sys.executable, "-c", program]
    with subprocess.Popen(line, env=variables, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(process.pid, number)
        assert process.wait(30) == 0
    assert spooled(buffer)["status"] == "success"


def test_a_real_time_signal_that_is_blocked_already_stays_so(variables: dict[str, str], buffer: Path) -> None:
    number = signal.SIGRTMIN + 2
    program = f"import signal, sys; sys.exit({number} not in signal.pthread_sigmask(0, ()))"
    line = [*RUN, "--", sys.executable, "-c", program]
    blocked = f"import os, signal\nsignal.pthread_sigmask(0, {{{number}}})\nos.execv({line[0]!r}, {line!r})"
    assert subprocess.run([sys.executable, "-c", blocked], env=variables, check=False).returncode == 0
    assert spooled(buffer)["status"] == "success"


def test_a_hangup_that_nohup_ignores_cancels_nothing(variables: dict[str, str], buffer: Path) -> None:
    line = ["nohup", *RUN, "--", "sh", "-c", "echo; read answer; exit 3"]
    with subprocess.Popen(line, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        process.stdin.close()
        assert process.wait(30) == 3
    assert (spooled(buffer)["status"], spooled(buffer)["error_summary"]) == ("failure", "exit status 3")


def test_a_signal_ends_the_wait_for_a_lock_and_starts_nothing(
    variables: dict[str, str], buffer: Path, tmp_path: Path
) -> None:
    held = [*RUN, "--lock", "one", "--", "sh", "-c", "echo; cat"]
    with subprocess.Popen(held, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdout.readline()
        line = [*RUN, "--agent", "waiting", "--lock", "one", "--lock-wait", "1h", "--", "touch", str(tmp_path / "ran")]
        with subprocess.Popen(line, env=variables, stderr=subprocess.PIPE, text=True) as waiting:
            wait_until(lambda: _blocks(waiting.pid, signal.SIGTERM))
            time.sleep(0.5)
            waiting.terminate()
            assert waiting.wait(10) == 128 + signal.SIGTERM
            assert waiting.stderr is not None
            said = waiting.stderr.read()
        lines = [json.loads(line) for path in buffer.glob("*.jsonl.*") for line in path.read_text().splitlines()]
        (ended,) = [line["fields"] for line in lines if line.get("op") == "update"]
        holder.stdin.close()
    assert said == "telemetryd run: SIGTERM while it waited for the lock one\n"
    assert (ended["status"], ended["error_summary"]) == (
        "cancelled",
        "not started: SIGTERM while it waited for the lock one",
    )
    assert not (tmp_path / "ran").exists()


def _blocks(pid: int, number: int) -> bool:
    text = Path(f"/proc/{pid}/status").read_text("ascii")
    mask = next(line.split()[1] for line in text.splitlines() if line.startswith("SigBlk:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("plant", "why"),
    [
        (lambda path: path.symlink_to("/nonexistent/victim"), "Too many levels of symbolic links"),
        (lambda path: path.mkdir(), "Is a directory"),
    ],
)
def test_a_lock_that_cannot_be_opened_is_said_in_the_run(
    variables: dict[str, str], buffer: Path, tmp_path: Path, plant: Callable[[Path], None], why: str
) -> None:
    path = buffer / "locks" / "one.lock"
    path.parent.mkdir(parents=True)
    plant(path)
    line = [*RUN, "--lock", "one", "--", "touch", str(tmp_path / "ran")]
    done = subprocess.run(line, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (126, f"telemetryd run: {path}: {why}\n")
    assert not (tmp_path / "ran").exists()
    assert (spooled(buffer)["status"], spooled(buffer)["error_summary"]) == ("failure", f"not started: {path}: {why}")


def test_with_few_descriptors_the_command_runs_and_keeps_its_standard_error(variables: dict[str, str]) -> None:
    for most in range(5, 12):

        def limit(most: int = most) -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

        line = [*RUN, "--tail", "1k", "--", "cat", "/nonexistent"]
        done = subprocess.run(line, env=variables, capture_output=True, preexec_fn=limit, text=True, check=False)
        assert (done.returncode, done.stderr) == (1, "cat: /nonexistent: No such file or directory\n"), most


def test_a_program_that_no_signal_ends_costs_no_processor(variables: dict[str, str], buffer: Path) -> None:
    """Another user's program, or one that waits for a disk: it is asked again, without haste."""
    program = (
        "import os, sys\n"
        "from telemetryd.cli import main\n"
        "asked = []\n"
        "os.kill = os.killpg = lambda pid, number: asked.append(number)\n"
        "try:\n"
        "    main(['run', '--timeout', '0.1s', '--kill-after', '0.1s', '--', 'sleep', '1.5'])\n"
        "finally:\n"
        "    print(len(asked))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert 4 <= int(done.stdout) <= 8
    assert spooled(buffer)["status"] == "timeout"


def test_a_signal_ends_it_while_nobody_reads_its_standard_error(variables: dict[str, str], buffer: Path) -> None:
    line = [*RUN, "--tail", "1k", "--", "sh", "-c", "head -c 100000 /dev/zero | tr '\\0' a >&2; echo; exit 3"]
    with subprocess.Popen(line, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)
        process.terminate()
        assert process.wait(10) == 3
    run = spooled(buffer)
    assert (run["status"], run["metrics_json"]["exit_status"]) == ("failure", 3)
    assert set(run["error_details"]) == {"a"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("73400320", 73400320),
        ("-2.5e3", -2500.0),
        (".5", 0.5),
        ("100000000000000000000", 1e20),
        ("9" * 5000, "9" * 5000),
        ("nan", "nan"),
        ("1e999", "1e999"),
        ("1_000", "1_000"),
        ("٣", "٣"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_metric_is_a_number_or_the_text_that_was_given(
    variables: dict[str, str], buffer: Path, text: str, value: object
) -> None:
    line = [*RECORD, "--agent", "a", "--metric", f"figure={text}"]
    assert subprocess.run(line, env=variables, check=False).returncode == 0
    assert spooled(buffer)["metrics_json"] == {"figure": value}


def test_an_exit_status_that_is_none_costs_no_run(variables: dict[str, str], buffer: Path) -> None:
    given = {"SERVICE_RESULT": "exit-code", "INVOCATION_ID": "i", "EXIT_CODE": "exited", "EXIT_STATUS": "9" * 5000}
    assert subprocess.run([*RECORD, "--from-systemd"], env={**variables, **given}, check=False).returncode == 0
    assert spooled(buffer)["status"] == "failure"
