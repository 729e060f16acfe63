"""Runs the commands of tutorial and handbook in their order, in one folder, with stand-ins for systemd and sudo."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from telemetryd import compat
from telemetryd.cli.sample_data import AGENTS
from telemetryd.client.old_variables import WITHOUT_EFFECT
from telemetryd.settings import Settings, variable
from tests.conftest import choose_port
from tests.tools.fork_server import ForkServer
from tests.tools.old_databases import make_old_database

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial" / "first-steps.md"
HANDBOOK = Path(__file__).parents[1] / "docs" / "how-to" / "operations.md"
FROM_3X = Path(__file__).parents[1] / "docs" / "how-to" / "from-3.x.md"
GUIDE = Path(__file__).parent / "guide" / "DEPLOYMENT_GUIDE.md"

_SYSTEMCTL = """#!/bin/bash
pid() { cat "$ROOM/pid" 2>/dev/null; }
stop() {
    if kill "$(pid)" 2>/dev/null; then while kill -0 "$(pid)" 2>/dev/null; do sleep 0.05; done; fi
    rm -f "$ROOM/pid"
}
start() {
    TELEMETRY_LOG_FORMAT=json setsid telemetryd serve >> "$ROOM/log" 2>&1 < /dev/null &
    echo $! > "$ROOM/pid"
    for _ in {1..400}; do curl -fs "http://localhost:$TELEMETRY_API_PORT/health" > /dev/null && return; sleep 0.05; done
    tail -3 "$ROOM/log"; exit 1
}
case $1 in
    start) start ;;
    stop) stop ;;
    restart) stop; start ;;
    reload) telemetryd config --check && kill -HUP "$(pid)" ;;
    status) kill -0 "$(pid)" ;;
    *) exit 2 ;;
esac
"""
_SUDO = '#!/bin/bash\n[ "$1 $2" = "-u telemetry" ] || exit 2\nshift 2\nexec "$@"\n'
_INSTALL = f"""#!/bin/bash
[[ $* == *"-o telemetry "* ]] || exit 2
arguments=" $*"
exec {shutil.which("install")} ${{arguments/ -o telemetry/}}
"""
_SHELL = Path(__file__).parent / "guide" / "sqlite3_shell.py"
_SQLITE3 = f'#!/bin/bash\n[ "$1" = -readonly ] && shift\nexec {sys.executable} {_SHELL} "$1" "$2;"\n'
_ZSTDCAT = (
    f"#!{sys.executable}\nimport shutil, sys\nfrom telemetryd.engine.sqlite.tools.backup import zstd\n"
    "shutil.copyfileobj(zstd.open(sys.argv[1]), sys.stdout.buffer)\n"
)
# systemd's own lines are among those of the service.
_JOURNALCTL = """#!/bin/bash
[ "$*" = "-u telemetryd -o cat" ] || exit 2
echo "Starting telemetryd.service - telemetryd, the single-writer telemetry daemon..."
exec cat "$ROOM/log"
"""
_DOCKER = """#!/bin/bash
[ "$1" = compose ] && shift || exit 2
command=$1 && shift
case $command in
    stop) systemctl stop ;;
    up) [ "$*" = -d ] && systemctl start ;;
    run) [ "$1 $2" = "--rm telemetryd" ] && shift 2 && exec telemetryd "$@" ;;
    exec) [ "$1 $2" = "telemetryd telemetryd" ] && shift 2 && exec telemetryd "$@" ;;
    *) exit 2 ;;
esac
"""
_AGENT = """\
from telemetry import TelemetryClient, TelemetryConfig

client = TelemetryClient(TelemetryConfig.from_env())
with client.track_run("old-agent", "after-the-change") as run:
    run.log_event("checkpoint", {"step": 1})
    run.set_metrics(items_succeeded=2)
"""


@dataclass
class Room:
    """A folder that stands for the machine, and the commands in it."""

    folder: Path
    environment: dict[str, str]
    places: dict[str, str]

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        for there, here in self.places.items():
            script = script.replace(there, here)
        return subprocess.run(
            ["bash", "-c", f"set -euo pipefail\n{script}"],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture
def room(tmp_path: Path, free_port: int) -> Iterator[Room]:
    for name in ("bin", "state", "run"):
        (tmp_path / name).mkdir()
    stand_ins = {
        "install": _INSTALL,
        "systemctl": _SYSTEMCTL,
        "sudo": _SUDO,
        "journalctl": _JOURNALCTL,
        "docker": _DOCKER,
    }
    stand_ins |= {
        name: script for name, script in (("sqlite3", _SQLITE3), ("zstdcat", _ZSTDCAT)) if shutil.which(name) is None
    }
    for name, script in stand_ins.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    make_old_database(tmp_path / "old-v5.sqlite", "v5", rows=40)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")} | {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ROOM": str(tmp_path),
        "TELEMETRY_DB_PATH": str(tmp_path / "state" / "telemetry.sqlite"),
        "TELEMETRY_API_PORT": str(free_port),
        "TELEMETRY_API_UNIX": str(tmp_path / "run" / "telemetryd.sock"),
        "TELEMETRY_DB_JOURNAL_MODE": "WAL",
    }
    places = {
        "/var/lib/telemetryd": str(tmp_path / "state"),
        "/run/telemetryd": str(tmp_path / "run"),
        "/backups": str(tmp_path / "backups"),
        "localhost:8765": f"localhost:{free_port}",
        "8799": str(choose_port()),
    }
    with ForkServer(tmp_path / "bin" / "telemetryd", tmp_path / "forks.sock"):
        yield Room(tmp_path, environment, places)
        if (tmp_path / "pid").exists():
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)


def blocks_of(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def run_blocks(room: Room, page: Path) -> int:
    """Run every bash block of a page, each in a shell of its own; return how many there are."""
    blocks = blocks_of(page, "bash")
    for block in blocks:
        done = room.run(block)
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
    return len(blocks)


def test_the_walk_through_of_the_tutorial_answers_what_it_shows_on_any_port(room: Room) -> None:
    """On a fresh daemon: no curl answers nothing, and where an answer is shown, it is that."""
    port = room.environment["TELEMETRY_API_PORT"]
    assert f"Cannot reach the daemon: http://localhost:{port}" in room.run("telemetryd demo --no-live").stderr
    room.environment["TELEMETRY_DB_JOURNAL_MODE"] = "DELETE"
    room.run("systemctl start")
    section = TUTORIAL.read_text("utf-8").partition("## Walk-through")[2].partition("\n## ")[0]
    assert not [agent.name for agent in AGENTS if agent.name in section]  # or the demo's runs fill its answers
    assert not [agent.name for agent in AGENTS if agent.name.startswith("blog")]
    answered: list[Any] = []
    for kind, block in re.findall(r"^```(bash|json)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
        if kind == "bash":
            done = room.run(block.replace("curl ", "curl -fsSg -w '\\n' "))
            assert done.returncode == 0, done.stderr
            answered = [json.loads(line) for line in done.stdout.splitlines()]
            assert all(answered) or "1 hour ago" in block, block
        else:
            shown = json.loads(block.replace(", …}", "}"))
            answer = answered[-1] if "inserted" not in shown else {name: answered[-1][name] for name in shown}
            varying = {"version", "db_path", "disk_free_bytes", "errors"}
            assert answer.keys() == shown.keys()
            assert {name: answer[name] for name in shown if name not in varying} == {
                name: value for name, value in shown.items() if name not in varying
            }
            assert [text.partition("must be")[0] for text in answer.get("errors", ())] == [
                text.partition("must be")[0] for text in shown.get("errors", ())
            ]


def test_every_command_of_the_handbook_works(room: Room) -> None:
    assert run_blocks(room, HANDBOOK) > 15


def test_a_value_in_single_quotes_reaches_an_operators_command_as_it_is(tmp_path: Path) -> None:
    """As it reaches the daemon by EnvironmentFile= (systemd.exec(5))."""
    (install,) = [block for block in blocks_of(HANDBOOK, "sh") if "useradd" in block]
    (wrapper,) = re.findall(r"<<'END'\n(#!/bin/sh\n.*?)^END$", install, re.MULTILINE | re.DOTALL)
    file = tmp_path / "telemetryd.env"
    file.write_text("TELEMETRY_A=/var/lib/x:1,a@b%c+d\nTELEMETRY_B=' a  b&\"c\" $HOME `id` #d'\n")
    program = wrapper.replace("/etc/telemetryd/telemetryd.env", str(file)).replace(
        "/opt/telemetryd/.venv/bin/telemetryd", "env"
    )
    lines = subprocess.run(["sh", "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()
    given = dict(line.split("=", 1) for line in lines if line.startswith("TELEMETRY_"))
    assert given["TELEMETRY_A"] == "/var/lib/x:1,a@b%c+d"
    assert given["TELEMETRY_B"] == ' a  b&"c" $HOME `id` #d'


def test_by_the_page_on_3x_a_database_a_buffer_an_agent_and_scripts_are_taken_over(room: Room) -> None:
    base = room.folder / "agent-metrics"
    shutil.copytree(Path(__file__).parent / "old_files", base / "telemetry_buffer")
    for name in ("raw", "db"):
        (base / name).mkdir()
    (base / "telemetry_buffer" / "events_20261130.ndjson").rename(base / "raw" / "events_20261130.ndjson")
    make_old_database(base / "db" / "telemetry.sqlite", "v7", rows=40)
    (room.folder / "agent.py").write_text(_AGENT)
    room.places["/agent-metrics"] = str(base)
    room.environment |= {"METRICS_API_URL": f"http://localhost:{room.environment['TELEMETRY_API_PORT']}"}
    room.environment |= {"TELEMETRY_ALLOWED_HOSTS": "local-telemetry-api", "XDG_STATE_HOME": str(room.folder / "home")}
    assert run_blocks(room, FROM_3X) > 9
    runs = [json.loads(line) for line in (room.folder / "since.ndjson").read_text().splitlines()]
    assert len(runs) == 40 + 7
    assert {run["job_type"]: run["status"] for run in runs if run["job_type"] not in ("translate", "unknown")} == {
        "job": "success", "job2": "failure", "job3": "failure", "job4": "cancelled", "job5-running": "running",
        "job6": "success", "after-the-change": "success",
    }  # fmt: skip
    assert (room.folder / "runs-before").read_text() == "40\n"
    assert not (room.folder / "rejected.jsonl").exists()
    with closing(sqlite3.connect(room.folder / "state" / "telemetry.sqlite")) as connection:
        found = connection.execute("SELECT count(*), sum(event_id LIKE 'event-%') FROM agent_runs").fetchone()
        assert found == (47, 40)
        types = connection.execute("SELECT event_type FROM run_events WHERE event_key NOT LIKE 'legacy-%' ORDER BY id")
        assert [row[0] for row in types] == ["start", "checkpoint", "checkpoint"]
    going_back = blocks_of(FROM_3X, "sh")[-1].replace("split -l 500", "split -l 20")
    old = room.environment | {"TELEMETRY_DB_PATH": str(room.folder / "state" / "old.sqlite")}
    for script in ("systemctl start", going_back):  # a daemon without runs stands in for the old service
        done = Room(room.folder, old, room.places).run(script)
        assert done.returncode == 0, done.stderr
    answers = [json.loads(text) for text in re.findall(r"{.*?}(?={|$)", done.stdout)]
    assert [answer["inserted"] for answer in answers] == [20, 20, 7]


def test_the_page_on_3x_names_every_variable_and_every_public_name() -> None:
    text = FROM_3X.read_text("utf-8")
    heeded = {"LOG_LEVEL", "AGENT_OWNER", "METRICS_API_URL", "TELEMETRY_BUFFER_DIR", *WITHOUT_EFFECT}
    assert [name for name in (*heeded, *compat.__all__) if f"`{name}`" not in text] == []
    (compose,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    used = set(re.findall(r"\bTELEMETRY_[A-Z_]+[A-Z]\b", compose))
    assert {"TELEMETRY_ALLOWED_HOSTS"} <= used <= {variable(name) for name in Settings.model_fields}


def test_the_handbook_has_the_guides_sections_in_its_order() -> None:
    def words(title: str) -> str:
        return re.sub(r"\(.*?\)|[^a-z ]", "", title.lower()).strip()

    wanted = [words(title) for title in re.findall(r"^## (.*)$", GUIDE.read_text("utf-8"), re.MULTILINE)]
    ours = [words(title) for title in re.findall(r"^## (.*)$", HANDBOOK.read_text("utf-8"), re.MULTILINE)]
    assert [section for section in ours if section in wanted] == wanted
