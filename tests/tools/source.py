"""Takes the files of the last commit out of the repository, and builds the wheel from them, always the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
_UMASK: Final = 0o022


def extract(folder: Path) -> Path:
    """Put the files into a new folder, with the modes that git knows, and return it."""
    folder.mkdir(parents=True)
    command = ["git", "-c", f"tar.umask={_UMASK:04o}", "archive", "HEAD"]
    archive = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    extracting = ["tar", "--extract", "--same-permissions", "--directory", str(folder)]
    subprocess.run(extracting, input=archive.stdout, check=True)
    return folder


def epoch() -> str:
    """Return when the last commit was made, as SOURCE_DATE_EPOCH says it."""
    command = ["git", "log", "-1", "--format=%ct"]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def build_wheel(target: Path, *flags: str) -> None:
    """Build the wheel into a folder; the umask would otherwise be seen in the modes of its own files."""
    with tempfile.TemporaryDirectory() as folder:
        source = extract(Path(folder, "source"))
        building = [sys.executable, "-m", "build", "--wheel", *flags, "--outdir", str(target), str(source)]
        subprocess.run(building, env={**os.environ, "SOURCE_DATE_EPOCH": epoch()}, umask=_UMASK, check=True)


if __name__ == "__main__":
    build_wheel(Path(sys.argv[1]))
