"""Runs wrk, a load generator in C, and reads what it tells."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.errors import BenchError

_SCRIPTS: Final = Path(__file__).parent / "lua"
_MARK: Final = "SUMMARY "
INSTALL: Final = (
    "wrk, the load generator, is not installed. On Debian and Ubuntu: sudo apt-get install wrk; on macOS: "
    "brew install wrk. Then run the benchmark again."
)


@dataclass(frozen=True, slots=True)
class Summary:
    """What came of a load. Times are in seconds; a request is `refused` if its status is 400 or more."""

    requests: int
    refused: int
    broken: int
    seconds: float
    p50_s: float
    p99_s: float

    @property
    def acknowledged(self) -> int:
        """How many requests succeeded."""
        return self.requests - self.refused

    @property
    def per_second(self) -> float:
        """How many requests succeeded in a second."""
        return self.acknowledged / self.seconds


def require_wrk() -> None:
    """Make sure that wrk is there.

    Raises:
        BenchError: if it is not; the message says how to install it.

    """
    if shutil.which("wrk") is None:
        raise BenchError(INSTALL)


@dataclass(frozen=True, slots=True)
class Wrk:
    """A running wrk."""

    process: subprocess.Popen[str]

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.communicate()

    def finish(self) -> Summary:
        """Wait for its end and return what it tells.

        Raises:
            BenchError: if it failed, or a request did: such a load measures something else.

        """
        output, errors = self.process.communicate()
        line = next((line for line in output.splitlines() if line.startswith(_MARK)), None)
        if self.process.returncode != 0 or line is None:
            raise BenchError(f"wrk failed (exit {self.process.returncode}): {(errors or output).strip()}")
        summary = Summary(**json.loads(line.removeprefix(_MARK)))
        if summary.refused or summary.broken:
            raise BenchError(
                f"{summary.refused} requests were refused and {summary.broken} connections broke: {summary}"
            )
        return summary


def start(url: str, script: str, connections: int, seconds: float, *arguments: str) -> Wrk:
    """Start a load with one thread; wrk counts in whole seconds, so they are rounded up."""
    command = ["wrk", "-t", "1", "-c", str(connections), "-d", f"{max(1, math.ceil(seconds))}s", "--timeout", "120s"]
    process = subprocess.Popen(
        [*command, "-s", str(_SCRIPTS / f"{script}.lua"), url, "--", *arguments],
        env={**os.environ, "LUA_PATH": f"{_SCRIPTS}/?.lua;;"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return Wrk(process)
