"""Writes the table of docs/reliability.md from the ledger of a run of the fault tests.

Usage: python -m tests.tools.reliability LEDGER
"""

from __future__ import annotations

import os
import platform
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.faults.ledger import Entry, read
from tests.tools.docs import ROOT, fill

PAGE = ROOT / "docs" / "reliability.md"

_HEAD = (
    "| fault | journal | rounds | acknowledged | lost | duplicated | unrecovered | 5xx | measured by |",
    "|---|---|--:|--:|--:|--:|--:|--:|---|",
)


def table(entries: Sequence[Entry]) -> str:
    """Return what was measured, on what, and a row for each entry."""
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(entry.commit for entry in entries))
    minutes = sum(entry.seconds for entry in entries) / 60
    rows = [
        f"| {entry.fault} | {entry.mode} | {entry.rounds:,} | {entry.acknowledged:,} | {entry.lost} "
        f"| {entry.duplicated} | {entry.unrecovered} | {entry.server_errors} | `{entry.command}` |"
        for entry in entries
    ]
    measured = (
        f"Measured on commit {commits} in {minutes:.0f} minutes: {os.cpu_count()} processors, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version}."
    )
    return "\n".join([measured, "", *_HEAD, *rows])


def main(ledger: Path) -> None:
    """Fill in the page."""
    PAGE.write_text(fill(PAGE.read_text("utf-8"), "table", table(read(ledger))), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
