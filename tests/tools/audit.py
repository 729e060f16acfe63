"""Asks for published advisories on every package of requirements.lock, and says plainly what could not be asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

LOCK: Final = Path(__file__).parents[2] / "requirements.lock"
SOURCES: Final = ("pypi", "osv")
"""pip-audit's advisory services, in the order in which they are asked."""


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


def report(packages: Sequence[Mapping[str, Any]] | None) -> tuple[int, list[str]]:
    """Return the exit status, which is 1 only for an advisory, and what to print."""
    if packages is None:
        return 0, ["audit: NOT DONE: no advisory service could be reached; nothing is known about requirements.lock"]
    found = [
        f"audit: {package['name']} {package['version']}: {advisory['id']}, "
        f"mended in {', '.join(advisory['fix_versions']) or 'no version yet'}"
        for package in packages
        for advisory in package.get("vulns", ())
    ]
    unknown = [f"audit: not audited: {package['name']}" for package in packages if "vulns" not in package]
    total = len(packages) - len(unknown)
    return int(bool(found)), [*found, *unknown, f"audit: {total} packages audited, {len(found)} advisories"]


if __name__ == "__main__":
    answers = (ask(source) for source in SOURCES)
    status, lines = report(next((answer for answer in answers if answer is not None), None))
    print("\n".join(lines))  # noqa: T201 - the tool's own output
    sys.exit(status)
