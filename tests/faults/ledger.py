"""What each fault test counted: a line of pytest's summary, and of a file that `tests.tools.reliability` tabulates."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the table."""

    test: str
    """The node id of the test, as pytest takes it."""
    scale: float
    """What `--rounds-scale` was."""
    commit: str
    """What was tested; ends in `-dirty` if files differed from the commit. Empty if no file is written."""
    seconds: float
    """How long the test took."""
    fault: str
    mode: str
    rounds: int
    acknowledged: int
    lost: int
    duplicated: int
    unrecovered: int
    server_errors: int

    @property
    def command(self) -> str:
        """What has to be typed to measure this row again."""
        return f"pytest '{self.test}' --rounds-scale {self.scale:g}"

    def __str__(self) -> str:
        return (
            f"{self.fault} ({self.mode}): rounds {self.rounds:,}, acknowledged {self.acknowledged:,}, "
            f"lost {self.lost}, duplicated {self.duplicated}, unrecovered {self.unrecovered}, 5xx {self.server_errors}"
        )


def read(path: Path) -> list[Entry]:
    """Return the entries of a file; of those of the same test and fault only the last."""
    entries = [Entry(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    return list({(entry.test, entry.fault): entry for entry in entries}.values())


def current_commit() -> str:
    """Return the commit of the working tree."""
    described = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(described, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


class _Summary:
    """A plugin of pytest that shows every row at the end of a run."""

    def __init__(self) -> None:
        self.rows: list[str] = []

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("what the fault tests counted")
        for row in self.rows:
            terminalreporter.write_line(row)


class Ledger:
    """Takes down what one test counted; only the summary has it unless a file is given."""

    def __init__(self, path: Path | None, test: str, scale: float, summary: list[str] | None = None) -> None:
        self._path = path
        self._summary = [] if summary is None else summary
        self._test = test
        self._scale = scale
        self._started = time.monotonic()

    @classmethod
    def of(cls, request: pytest.FixtureRequest, test: str = "") -> Ledger:
        """Return the ledger of a test; `test` is what pytest has to be given instead, if not the test alone."""
        option, plugins = request.config.getoption, request.config.pluginmanager
        summary = plugins.get_plugin(_Summary.__name__)
        if summary is None:
            plugins.register(summary := _Summary(), _Summary.__name__)
        return cls(option("--ledger"), test or request.node.nodeid, option("--rounds-scale"), summary.rows)

    def tell(self, line: str) -> None:
        """Add a line to the summary."""
        self._summary.append(line)

    def record(
        self,
        *,
        fault: str,
        rounds: int,
        acknowledged: int,
        mode: str = "both",
        lost: int = 0,
        duplicated: int = 0,
        unrecovered: int = 0,
        server_errors: int = 0,
        notes: Sequence[str] = (),
    ) -> None:
        """Add a row, then fail the test unless everything that has to be zero is.

        Args:
            fault: what was done to the daemon, as the table should say it.
            rounds: how often.
            acknowledged: events (or, for bad input, requests) that were answered.
            mode: the journal mode, or "both" if it plays no part.
            lost: acknowledged events that were gone, or had other values.
            duplicated: events that were there twice.
            unrecovered: rounds after which the database or the daemon did not come back by itself, intact.
            server_errors: 5xx answers that are not the promised 503.
            notes: what to show if the test fails.

        """
        entry = Entry(
            test=self._test,
            scale=self._scale,
            commit="" if self._path is None else current_commit(),
            seconds=round(time.monotonic() - self._started, 1),
            fault=fault,
            mode=mode,
            rounds=rounds,
            acknowledged=acknowledged,
            lost=lost,
            duplicated=duplicated,
            unrecovered=unrecovered,
            server_errors=server_errors,
        )
        self._summary.append(str(entry))
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(entry)) + "\n")
        assert (lost, duplicated, unrecovered, server_errors) == (0, 0, 0, 0), "\n".join([fault, *notes[:20]])
