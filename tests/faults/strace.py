"""Attaches strace to a running daemon: to see its system calls, or to make some of them fail."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None and "CI" not in os.environ, reason="strace is not installed"
)


@contextmanager
def strace(pid: int, output: Path, *options: str) -> Iterator[None]:
    """Trace a process and all its threads inside the block; lines go to `output`."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-y", "-s", "64", "-o", str(output), *options, "-p", str(pid)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert tracer.stderr is not None
        line = tracer.stderr.readline()
        if "attached" not in line:
            pytest.skip(f"strace cannot attach here: {line.strip()}")
        yield
    finally:
        if tracer.poll() is None:
            tracer.send_signal(signal.SIGINT)  # strace lets go of the process and ends
        tracer.communicate(timeout=60)


def completed(trace: Path) -> list[str]:
    """The calls of a trace in the order in which they ended; strace tears those apart that overlap."""
    begun: dict[str, str] = {}
    calls = []
    for line in trace.read_text().splitlines():
        thread, call = line.split(maxsplit=1)
        if call.endswith("<unfinished ...>"):
            begun[thread] = call.removesuffix("<unfinished ...>").rstrip()
        elif match := re.match(r"\s*<\.\.\. \w+ resumed>", call):
            calls.append(begun.pop(thread, "") + call[match.end() :])
        else:
            calls.append(call)
    return calls
