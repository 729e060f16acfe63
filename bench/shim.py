"""Builds the library that makes fsync slow."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

from bench.errors import BenchError

_SOURCE: Final = Path(__file__).with_name("slow_fsync.c")


def slow_fsync(folder: Path, milliseconds: int) -> dict[str, str]:
    """Build the shim in a folder; return the environment in which fsync takes so many milliseconds longer.

    Raises:
        BenchError: if there is no C compiler, or it fails.

    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise BenchError("A C compiler is needed for the slow disk. On Debian and Ubuntu: sudo apt-get install gcc")
    library = folder / "slow_fsync.so"
    command = [compiler, "-O2", "-Wall", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0:
        raise BenchError(f"The slow disk cannot be built: {built.stderr.strip()}")
    return {"LD_PRELOAD": str(library), "SLOW_FSYNC_MS": str(milliseconds)}
