"""Runs the command line as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def telemetryd(
    *arguments: str | Path, status: int = 0, timeout_s: float = 60, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `telemetryd …` without the settings of this shell, and check its exit status."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    done = subprocess.run(
        [sys.executable, "-m", "telemetryd", *map(str, arguments)],
        env=environment | variables,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == status, f"exit {done.returncode}: {done.stdout}{done.stderr}"
    return done
