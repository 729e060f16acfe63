"""Runs the command line as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.tools.forks import popen


def telemetryd(
    *arguments: str | Path,
    status: int | tuple[int, ...] = 0,
    timeout_s: float = 120,
    cwd: Path | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run `telemetryd …` without the settings of this shell, and check that its exit status is (one of) `status`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    command = [sys.executable, "-m", "telemetryd", *map(str, arguments)]
    pipe = subprocess.PIPE
    with popen(command, environment | variables, cwd=cwd, stdout=pipe, stderr=pipe) as process:
        try:
            out, errors = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
    expected = status if isinstance(status, tuple) else (status,)
    assert process.returncode in expected, f"exit {process.returncode}: {out}{errors}"
    return subprocess.CompletedProcess(command, process.returncode, out, errors)
