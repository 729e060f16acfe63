"""Measures how much later a command starts under `telemetryd run` than without (`python -m bench.start`)."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import click

_BESIDES: Final = 3
"""Starts that are not counted: the first ones read files that the others find in memory."""


def started_after_s(prefix: list[str], environment: dict[str, str]) -> float:
    """Return how long a command takes until it begins, by what it says of that moment itself."""
    begun = time.time()
    done = subprocess.run([*prefix, "date", "+%s.%N"], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout) - begun


def main() -> None:
    """Measure in turns, and print both medians and their difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=30)
    starts = parser.parse_args().starts
    program = str(Path(sys.executable).parent / "telemetryd")
    prefixes: dict[str, list[str]] = {"without": [], "with telemetryd run": [program, "run", "--"]}
    taken: dict[str, list[float]] = {name: [] for name in prefixes}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TELEMETRY_BUFFER_DIR": folder, "TELEMETRY_SEND": "false"}
        for turn in range(starts + _BESIDES):
            for name, prefix in prefixes.items():
                seconds = started_after_s(prefix, environment)
                if turn >= _BESIDES:
                    taken[name].append(seconds)
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    for name, median in medians.items():
        click.echo(f"{name}: {median * 1000:.1f} ms")
    click.echo(f"later by: {(medians['with telemetryd run'] - medians['without']) * 1000:.1f} ms (median of {starts})")


if __name__ == "__main__":
    main()
