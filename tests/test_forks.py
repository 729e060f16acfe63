"""The forks that stand for `python -m telemetryd …` in most tests are processes like any other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import StartDaemon
from tests.tools.forks import popen

COMMAND = [sys.executable, "-m", "telemetryd"]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def test_a_fork_is_a_child_of_the_test_with_a_place_and_an_end_of_its_own(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon()
    assert daemon.url
    assert "tests.tools.forks" in command_line(daemon.process.pid)
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    assert f"PPid:\t{os.getpid()}\n" in status
    assert Path(f"/proc/{daemon.process.pid}/cwd").resolve() == tmp_path
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL


@pytest.mark.parametrize("arguments", [("--version",), ("serve", "--nonsense"), ("backup",)])
def test_a_fork_says_what_the_command_says(arguments: tuple[str, ...], tmp_path: Path) -> None:
    def run(prefix: list[str]) -> tuple[str, str, int]:
        pipe = subprocess.PIPE
        with popen(
            [*prefix, *COMMAND, *arguments], dict(os.environ), cwd=tmp_path, stdout=pipe, stderr=pipe
        ) as process:
            out, errors = process.communicate()
        return out, errors, process.returncode

    assert run([]) == run(["env"])


@pytest.mark.parametrize("variable", ["PYTHONUTF8", "LD_BIND_NOW", "LC_ALL", "PYTHONPATH"])
def test_who_needs_an_interpreter_of_its_own_gets_one(variable: str, tmp_path: Path) -> None:
    value = {"LD_BIND_NOW": "", "PYTHONUTF8": "0"}.get(variable, "C")
    with popen([*COMMAND, "--version"], {**os.environ, variable: value}, stdout=subprocess.PIPE) as process:
        assert type(process) is subprocess.Popen
        assert process.communicate()[0].startswith("telemetryd ")
