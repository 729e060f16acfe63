"""The steps of the Dockerfile, executed on a Debian with Python, since no image can be pulled here."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import make_run, wait_until
from tests.packages.machine import ROOT, booted, new_system, run_in
from tests.tools import source

pytestmark = [pytest.mark.slow, pytest.mark.packages, pytest.mark.sqlite]

_KNOWN = {
    "FROM",
    "WORKDIR",
    "COPY",
    "RUN",
    "ENV",
    "USER",
    "VOLUME",
    "EXPOSE",
    "STOPSIGNAL",
    "HEALTHCHECK",
    "ENTRYPOINT",
    "CMD",
}


@dataclass
class Stage:
    """What one FROM of the Dockerfile has led to."""

    system: Path
    place: str = "/"
    variables: dict[str, str] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)
    """The arguments of the instructions that only say how the image is to be run."""


def instructions() -> Iterator[tuple[str, str]]:
    """Yield the instructions of the Dockerfile, each on one line."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if line:
            word, _, rest = line.partition(" ")
            assert word in _KNOWN
            yield word, rest.strip()


def context(folder: Path) -> Path:
    """Return what .dockerignore lets through of the last commit."""
    whole, kept = source.extract(folder / "whole"), folder / "context"
    kept.mkdir()
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            (whole / line[1:]).rename(kept / line[1:])
    return kept


def build(folder: Path) -> Stage:
    """Execute the steps; return the last stage."""
    stages: dict[str, Stage] = {}
    stage = None
    for word, rest in instructions():
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            assert image.startswith("python:3.")  # whose Python is called python, and lies in /usr/local/bin
            stage = stages[name] = Stage(new_system(folder / (name or "last")))
            run_in(stage.system, "ln -s /usr/bin/python3 /usr/local/bin/python")
            continue
        assert stage is not None
        if word == "WORKDIR":
            stage.place = rest
            (stage.system / rest[1:]).mkdir(parents=True, exist_ok=True)
        elif word == "RUN":
            run_in(stage.system, rest, place=stage.place, variables=stage.variables)
        elif word == "ENV":
            stage.variables |= {
                name: re.sub(r"\$PATH$", _PATH, value) for name, value in (part.split("=", 1) for part in rest.split())
            }
        elif word == "COPY":
            copied = re.fullmatch(r"(?:--from=(\w+) )?(\S+) (\S+)", rest)
            assert copied is not None
            origin = stages[copied[1]].system / copied[2][1:] if copied[1] else context(folder / "sent")
            target = stage.system / (stage.place if copied[3] == "." else copied[3])[1:]
            shutil.copytree(origin, target, symlinks=True, dirs_exist_ok=True)
        else:
            stage.said[word] = rest
    assert stage is not None
    return stage


_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def test_the_steps_of_the_image_lead_to_a_daemon_that_is_healthy_on_a_read_only_root(tmp_path: Path) -> None:
    image = build(tmp_path)
    data, user = tmp_path / "data", image.said["USER"]
    assert image.said["VOLUME"] == "/data"
    shutil.copytree(image.system / "data", data)
    shutil.copystat(image.system / "data", data)
    subprocess.run(["chown", "--reference", str(image.system / "data"), str(data)], check=True)
    program = shlex.join([*json.loads(image.said["ENTRYPOINT"]), *json.loads(image.said["CMD"])])
    environment = " ".join(f"{name}={value}" for name, value in image.variables.items())
    # As compose.yaml runs it: no capability, a root that is read-only, and room in /tmp alone.
    flags = ["--read-only", f"--bind={data}:/data", "--tmpfs=/tmp", "--drop-capability=all", "--no-new-privileges=yes"]
    entered = f"cd {image.place} && setpriv --reuid {user} --regid {user} --clear-groups env -i {environment}"
    with booted(image.system, *flags, "--as-pid2", command=["sleep", "infinity"]) as machine:
        machine.run(f"({entered} sh -c 'echo $$ > /data/pid; exec {program}' > /data/log 2>&1 &)")
        probe = json.loads(re.sub(r"^.*?CMD ", "", image.said["HEALTHCHECK"]))
        check = f"{entered} {shlex.join(probe)}"
        wait_until(lambda: machine.attempt(check).returncode == 0)
        run = json.dumps(make_run(event_id="in-a-container"))
        machine.run(f"curl -fsS http://localhost:8765/api/v1/runs -H 'Content-Type: application/json' -d '{run}'")
        assert machine.run(f"{entered} telemetryd backup /data").strip()
        assert machine.attempt("touch /usr/x").returncode != 0
        machine.run("kill $(cat /data/pid)")
        wait_until(lambda: machine.attempt(check).returncode != 0)
        assert '"Stopped"' in (data / "log").read_text()
