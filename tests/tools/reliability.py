"""Writes the table of docs/explanation/reliability.md from the ledger of a run of the fault tests.

Usage: python -m tests.tools.reliability LEDGER
"""

from __future__ import annotations

import os
import platform
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from tests.faults.ledger import Entry, read
from tests.tools.docs import ROOT, fill

PAGE = ROOT / "docs" / "explanation" / "reliability.md"
_DIRTY = "-dirty"

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


def remarks(entries: Sequence[Entry]) -> list[str]:
    """Return what a reader of the table should know of how it was measured."""
    found = [
        f"measured with --rounds-scale {entry.scale:g}, not in its long form: {entry.fault} ({entry.test})"
        for entry in entries
        if entry.scale < 1
    ]
    commits = dict.fromkeys(entry.commit for entry in entries)
    if len(commits) > 1:
        found.append(f"the rows were measured on {len(commits)} commits: {', '.join(commits)}")
    return found


def main(ledger: Path) -> int:
    """Fill in the page, unless a row is of files that no commit holds; return the exit status."""
    entries = read(ledger)
    dirty = [entry for entry in entries if entry.commit.endswith(_DIRTY)]
    for entry in dirty:
        click.echo(f"refused: measured on {entry.commit}: {entry.fault} ({entry.test})", err=True)
    if dirty:
        return 1
    for remark in remarks(entries):
        click.echo(remark, err=True)
    PAGE.write_text(fill(PAGE.read_text("utf-8"), "table", table(entries)), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
