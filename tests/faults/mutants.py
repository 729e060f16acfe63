"""Mutation testing: for each promise a small change of the product that breaks it, and tests that have to notice."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.faults.ledger import ROOT

_COPIED: Final = ("telemetryd", "migrations", "schema", "tests", "bench", "docs", "setup.cfg", "README.md")
_TIMEOUT_S: Final = 600.0
"""Far more than the tests of a mutant take: a test that cannot end has to say so itself."""


@dataclass(frozen=True, slots=True)
class Edit:
    """A text of one file that stands there exactly once, and what takes its place."""

    file: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        """Return the file's text, changed.

        Raises:
            ValueError: if the place is not to be found exactly once, so that the mutant has to be written anew.

        """
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} holds this {text.count(self.old)} times instead of once:\n{self.old}")
        changed = text.replace(self.old, self.new)
        compile(changed, self.file, "exec")
        return changed


@dataclass(frozen=True, slots=True)
class Mutant:
    """A broken product."""

    name: str
    promise: str
    tests: tuple[str, ...]
    """At least one of them has to fail."""
    edits: tuple[Edit, ...]

    def files(self) -> dict[str, str]:
        """Return the files that it changes, as they become."""
        texts: dict[str, str] = {}
        for edit in self.edits:
            texts[edit.file] = edit.apply(texts.get(edit.file) or (ROOT / edit.file).read_text("utf-8"))
        return texts


def _parse(text: str) -> Iterator[Mutant]:
    for block in re.split(r"^mutant: ", text, flags=re.MULTILINE)[1:]:
        head, *hunks = re.split(r"^file: ", block, flags=re.MULTILINE)
        name, *lines = head.splitlines()
        facts = [line.split(": ", 1) for line in lines if line]
        yield Mutant(
            name,
            next(value for key, value in facts if key == "promise"),
            tuple(value for key, value in facts if key == "test"),
            tuple(map(_parse_edit, hunks)),
        )


def _parse_edit(hunk: str) -> Edit:
    file, *lines = hunk.rstrip("\n").splitlines()
    old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] in kept) for kept in (" -", " +"))
    return Edit(file, old, new)


MUTANTS: Final = tuple(_parse(Path(__file__).with_suffix(".diff").read_text("utf-8")))


def copy_product(target: Path) -> None:
    """Copy what the tests need to a folder, in which the package is whole."""
    ignored = shutil.ignore_patterns("__pycache__", "*.sqlite*")
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignored)
        else:
            shutil.copyfile(source, target / name)
    for name in ("migrations", "schema"):  # an installation has them inside of the package
        shutil.copytree(ROOT / name, target / "telemetryd" / name, ignore=ignored)


def run(root: Path, tests: Sequence[str], timeout_s: float = _TIMEOUT_S) -> tuple[int, str]:
    """Run tests in a copy; return pytest's exit status and output.

    Raises:
        TimeoutError: if they did not end in time, which may be the machine's fault and proves nothing.

    """
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    try:
        # Not below `root`: the path of a socket may have 107 characters (unix(7)), and to fail for it proves nothing.
        with tempfile.TemporaryDirectory() as short:
            done = subprocess.run(
                [*command, f"--basetemp={short}/t", *tests],
                cwd=root,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode(errors="replace")
        raise TimeoutError(f"no end within {timeout_s:g} s, so nobody knows whether it is noticed:\n{text}") from error
    return done.returncode, done.stdout + done.stderr


def table() -> str:
    """Return the mutants as a Markdown table."""
    lines = ["| mutant | breaks the promise | noticed by |", "|---|---|---|"]
    for mutant in MUTANTS:
        tests = ", ".join(f"`{test}`" for test in mutant.tests)
        lines.append(f"| {mutant.name} | {mutant.promise} | {tests} |")
    return "\n".join(lines)
