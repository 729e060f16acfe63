"""Runs a systemd service of the type oneshot without systemd, as far as our units need."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

_PREFIXES = "+-:!@"


def read(unit: Path, drop_ins: Path) -> dict[str, list[str]]:
    """Return the values of each setting of [Service]; an empty one clears those before it (systemd.unit(5))."""
    settings: dict[str, list[str]] = defaultdict(list)
    for file in (unit, *sorted(drop_ins.glob("*.conf"))):
        section = file.read_text("utf-8").partition("[Service]\n")[2].partition("\n[")[0]
        for line in section.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.partition("=")
                settings[name] = [*settings[name], value] if value else []
    return settings


def run(unit: Path, drop_ins: Path, room: Path) -> None:
    """Run the commands; %C, %d and the credentials are below a folder.

    Raises:
        CalledProcessError: if one fails; those after it are not run.

    """
    settings = read(unit, drop_ins)
    specifiers = {"%C": str(room), "%d": str(room / "credentials")}

    def filled(text: str) -> str:
        return re.sub("%[Cd]", lambda found: specifiers[found[0]], text)

    (room / "credentials").mkdir(exist_ok=True)
    for credential in settings["LoadCredential"]:
        name, _, source = credential.partition(":")
        (room / "credentials" / name).write_bytes(Path(source).read_bytes())
    environment = dict(os.environ)
    for file in settings["EnvironmentFile"]:
        path = Path(file.removeprefix("-"))
        if path.exists() or not file.startswith("-"):
            environment |= dict(line.split("=", 1) for line in path.read_text("utf-8").splitlines() if "=" in line)
    for assignments in settings["Environment"]:
        environment |= dict(filled(part).split("=", 1) for part in shlex.split(assignments))
    for command in (*settings["ExecStartPre"], *settings["ExecStart"]):
        words = [
            re.sub(r"\$\{(\w+)\}", lambda found: environment[found[1]], filled(word)) for word in shlex.split(command)
        ]
        words[0] = words[0].lstrip(_PREFIXES).removeprefix("/usr/bin/")
        subprocess.run(words, env=environment, check=True)


if __name__ == "__main__":
    run(*map(Path, sys.argv[1:]))
