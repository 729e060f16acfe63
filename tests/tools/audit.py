"""Asks for published advisories on every package of requirements.lock, and says plainly what could not be asked.

Where no advisory service can be reached, the package index still tells two things: whether a release was withdrawn by
its authors (yanked, PEP 592), and whether there is a newer one, which is how an advisory is nearly always fixed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from packaging.utils import canonicalize_name

LOCK: Final = Path(__file__).parents[2] / "requirements.lock"
SOURCES: Final = ("pypi", "osv")
"""pip-audit's advisory services, in the order in which they are asked."""


class Release(NamedTuple):
    """A release as the package index has it."""

    version: str
    is_withdrawn: bool


def ask(source: str) -> Sequence[Mapping[str, Any]] | None:
    """Return what one service says of each package, or None if it does not answer."""
    command = (sys.executable, "-m", "pip_audit", "--vulnerability-service", source, "--timeout", "20")
    asked = subprocess.run(
        [*command, "--format", "json", "--progress-spinner", "off", "--disable-pip", "--requirement", str(LOCK)],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        packages: list[Mapping[str, Any]] = json.loads(asked.stdout)["dependencies"]
    except ValueError:
        return None
    return packages if any("vulns" in package for package in packages) else None


def ask_index(*wanted: str) -> dict[str, Release] | None:
    """Return what pip would install, by name (pip's installation report), or None if it finds no index."""
    command = (sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet")
    asked = subprocess.run(
        [*command, "--disable-pip-version-check", "--report", "-", *wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode != 0:
        return None
    return {
        canonicalize_name(item["metadata"]["name"]): Release(item["metadata"]["version"], item["is_yanked"])
        for item in json.loads(asked.stdout)["install"]
    }


def report(packages: Sequence[Mapping[str, Any]] | None) -> tuple[int, list[str]]:
    """Return the exit status, which is 1 only for an advisory, and what to print."""
    if packages is None:
        return 0, ["audit: NOT DONE: no advisory service could be reached; nothing is known about requirements.lock"]
    found = [
        f"audit: {package['name']} {package['version']}: {advisory['id']}, "
        f"fixed in {', '.join(advisory['fix_versions']) or 'no version yet'}"
        for package in packages
        for advisory in package.get("vulns", ())
    ]
    unknown = [f"audit: not audited: {package['name']}" for package in packages if "vulns" not in package]
    total = len(packages) - len(unknown)
    return int(bool(found)), [*found, *unknown, f"audit: {total} packages audited, {len(found)} advisories"]


def report_index(locked: Mapping[str, Release] | None, newest: Mapping[str, Release] | None) -> tuple[int, list[str]]:
    """Return the exit status, which is 1 only for a release that was withdrawn, and what to print."""
    if locked is None or newest is None:
        return 0, ["audit: NOT DONE: the package index could not be asked for what was withdrawn or is newer"]
    withdrawn = [
        f"audit: {name} {release.version} was withdrawn by its authors; run: make lock"
        for name, release in locked.items()
        if release.is_withdrawn
    ]
    newer = [
        f"audit: {name} {release.version} is locked, {newest[name].version} is the newest"
        for name, release in locked.items()
        if newest[name].version != release.version
    ]
    summary = f"audit: {len(locked)} releases looked up, {len(withdrawn)} withdrawn, {len(newer)} not the newest"
    return int(bool(withdrawn)), [*withdrawn, *newer, summary]


def main() -> int:
    """Ask everybody, print what they say, and return the exit status."""
    answers = (ask(source) for source in SOURCES)
    status, lines = report(next((answer for answer in answers if answer is not None), None))
    locked = ask_index("--require-hashes", "--requirement", str(LOCK))
    names = re.findall(r"^([a-z0-9-]+)==", LOCK.read_text("utf-8"), re.MULTILINE) if locked is not None else []
    index_status, index_lines = report_index(locked, ask_index(*names) if names else None)
    print("\n".join([*lines, *index_lines]))  # noqa: T201 - the tool's own output
    return status | index_status


if __name__ == "__main__":
    sys.exit(main())
