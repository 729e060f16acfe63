"""Runs the guide's commands as written; what differs from the guide's machine is in four small programs on the PATH."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from tests.conftest import Daemon
from tests.needs import require_program

DATABASE = "D:/agent-metrics/db/telemetry.sqlite"
"""The guide's path; next to the daemon's working directory it is an ordinary relative one."""
LOG = "daemon.log"
TEE = ("bash", "-c", f'exec "$@" > >(exec tee -a {LOG})', "bash")
"""Puts the daemon's raw log into a file on its way (the guide's own `| tee`), without a process in front of it."""

_PACKAGES = {"bash": "bash", "curl": "curl", "jq": "jq", "uuidgen": "uuid-runtime", "awk": "mawk"}

_PROGRAMS = {
    # the guide's address → ours; the head of the answer goes aside for its status
    "curl": 'exec {curl} --noproxy "*" --silent --show-error --dump-header {folder}/head '
    '"${{@//localhost:8765/{address}}}"',
    # the guide's container → our daemon's log (with --since too: all of it is younger)
    "docker-compose": '[ "$1" = logs ] && exec cat {folder}/{log}',
    # the guide's path inside its container → the same database
    "sqlite3": 'if [ "$1" = /data/telemetry.sqlite ]; then shift; set -- {database} "$@"; fi\n'
    'exec {python} {sqlite3_shell} "$@"',
    "mail": "cat >> {folder}/mail",
}


@dataclass(frozen=True, slots=True)
class Ran:
    """How a script went."""

    status: int
    out: str
    errors: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


class Shell:
    """A bash in the daemon's folder."""

    def __init__(self, daemon: Daemon, address: str | None = None) -> None:
        self.daemon = daemon
        self.folder = folder = daemon.folder
        self.address = address = address or daemon.url.removeprefix("http://")
        self._programs = folder / "programs"
        self._programs.mkdir(exist_ok=True)
        values = {
            "address": address,
            "curl": shutil.which("curl"),
            "database": DATABASE,
            "folder": shlex.quote(str(folder)),
            "log": LOG,
            "python": shlex.quote(sys.executable),
            "sqlite3_shell": shlex.quote(str(Path(__file__).with_name("sqlite3_shell.py"))),
        }
        for name, script in _PROGRAMS.items():
            program = self._programs / name
            program.write_text(f"#!/usr/bin/env bash\n{script.format(**values)}\n")
            program.chmod(0o755)

    def run(self, script: str, *, status: int = 0) -> Ran:
        """Run a script and check its exit status; every program that it needs must be installed."""
        for program, package in _PACKAGES.items():
            if program in script or program in ("bash", "curl"):
                require_program(program, package)
        environment = {**os.environ, "PATH": f"{self._programs}{os.pathsep}{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == status, f"exit {done.returncode} of: {script}\n{done.stdout}{done.stderr}"
        return Ran(done.returncode, done.stdout, done.stderr)

    def curl(self, script: str, status: int = 200) -> Any:
        """Run a script that ends in a curl; check the HTTP status of that, and return what it printed, decoded."""
        (self.folder / "head").unlink(missing_ok=True)
        out = self.run(script).out
        first, *rest = (self.folder / "head").read_text().splitlines()
        assert first.split()[:2] == ["HTTP/1.1", str(status)], f"{first}: {out}"
        assert any(line.lower().startswith("content-type: application/json") for line in rest), rest
        return json.loads(out)

    def forget(self) -> None:
        """Empty the database and the log, which one daemon then goes on with (cheaper than a new one for each test)."""
        self.log()
        tables = ["agent_runs", "run_totals", "run_minutes"]
        if self.daemon.database_url is None:
            with closing(sqlite3.connect(self.folder / DATABASE)) as connection, connection:
                for table in tables:
                    connection.execute(f"DELETE FROM {table}")
        else:
            self.daemon.execute(f"TRUNCATE {', '.join(tables)}, run_deltas")
        os.truncate(self.folder / LOG, 0)  # tee appends
        self.mail()

    @contextmanager
    def unreadable(self) -> Iterator[None]:
        """Keep queries waiting inside the block, as another program would."""
        if self.daemon.database_url is not None:
            with psycopg.connect(self.daemon.database_url) as holder:
                holder.execute("LOCK TABLE agent_runs IN ACCESS EXCLUSIVE MODE")
                yield
            return
        with closing(sqlite3.connect(self.folder / DATABASE, isolation_level=None)) as locker:
            locker.execute("BEGIN EXCLUSIVE")
            yield
            locker.execute("ROLLBACK")

    def post(self, runs: list[dict[str, Any]]) -> None:
        """Put runs into the database, over HTTP."""
        (self.folder / "body").write_text(json.dumps(runs))
        answer = self.curl(
            "curl -X POST http://localhost:8765/api/v1/runs/batch -H 'Content-Type: application/json' -d @body"
        )
        assert answer == {"inserted": len(runs), "duplicates": 0, "errors": [], "total": len(runs)}

    def stored(self, event_id: str) -> Any:
        return self.curl(f"curl http://localhost:8765/api/v1/runs/{event_id}")

    def log(self) -> list[str]:
        """Return the raw log lines of everything that was asked before; the log is written off the event loop."""
        mark = uuid.uuid4().hex
        self.run(f"curl -H 'X-Request-ID: {mark}' http://localhost:8765/not-in-the-guide")
        deadline = time.monotonic() + 60
        while mark not in (text := (self.folder / LOG).read_text()):
            assert time.monotonic() < deadline, "the request did not get into the log"
            time.sleep(0.01)
        return text.splitlines()

    def mail(self) -> str:
        """Return the mails that were sent since the last look."""
        box = self.folder / "mail"
        text = box.read_text() if box.exists() else ""
        box.unlink(missing_ok=True)
        return text
