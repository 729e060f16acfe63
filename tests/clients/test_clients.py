"""Generates clients from the OpenAPI document, checks their types, and drives every operation with them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from telemetryd import http
from telemetryd.services import processes
from tests.conftest import Daemon, StartDaemon
from tests.needs import give_up, require_package, require_program
from tests.tools import clients

HERE: Final = Path(__file__).parent
TOKEN: Final = "a-token-of-some-length"
TSCONFIG: Final = {
    "compilerOptions": {
        "strict": True,
        "exactOptionalPropertyTypes": True,
        "noUncheckedIndexedAccess": True,
        "skipLibCheck": True,
        "target": "es2022",
        "module": "nodenext",
        "types": ["node"],
        "outDir": "out",
    },
    "files": ["drive.ts", "schema.d.ts"],
}

Drive = Callable[..., None]


@pytest.fixture
def drive(start_daemon: StartDaemon, tmp_path: Path) -> Drive:
    """Return a function that runs a program with a daemon's address, and checks that it calls every operation."""
    (tmp_path / "backups").mkdir()
    daemon = start_daemon(
        TELEMETRY_API_AUTH_ENABLED="true",
        TELEMETRY_API_AUTH_TOKEN=TOKEN,
        TELEMETRY_BACKUP_DIR=str(tmp_path / "backups"),
        TELEMETRY_DB_JOURNAL_MODE="WAL",
        TELEMETRY_LOG_LEVEL="DEBUG",  # so that every request is logged
    )

    def run(*command: str | Path, **variables: str) -> None:
        pid, machine = os.getpid(), processes.this_machine()
        assert machine is not None
        process = [str(pid), str(processes.start_time(pid)), machine.boot_id]
        clients.run([*command, daemon.url, TOKEN, *process], tmp_path, **variables)
        assert daemon.stop() == 0
        assert called(daemon) == {each.name for each in http.described()}
        assert not [line for line in daemon.lines if line.get("status", 0) >= 500]

    return run


def called(daemon: Daemon) -> set[str]:
    """Return the names of the operations that a daemon has been asked for, by its log."""
    names = {(each.method, each.path): each.name for each in http.described()}
    return {names[line["method"], line["endpoint"]] for line in daemon.lines if "endpoint" in line}


def require_node_modules() -> None:
    """Skip the test if the tools of tests/clients are missing, except in CI."""
    require_program("node", "nodejs")
    if not clients.NODE_MODULES.exists():
        give_up(f"{clients.NODE_MODULES} is missing: npm ci in that folder")


def test_a_generated_python_client_does_everything(drive: Drive, tmp_path: Path) -> None:
    require_package("openapi_python_client")
    package = clients.generate_python(clients.write_document(tmp_path), tmp_path)
    (package / "py.typed").touch()
    shutil.copy(HERE / "drive.py", tmp_path)
    # What the generator writes for every document alike is not for us to check.
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\n[mypy-telemetryd_client.client]\nignore_errors = true\n")
    clients.run([sys.executable, "-m", "mypy", "drive.py", "telemetryd_client"], tmp_path)
    drive(sys.executable, "drive.py", PYTHONPATH=str(tmp_path))


def test_a_generated_typescript_client_does_everything(drive: Drive, tmp_path: Path) -> None:
    require_node_modules()
    clients.generate_typescript(clients.write_document(tmp_path), tmp_path)
    (tmp_path / "node_modules").symlink_to(clients.NODE_MODULES)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "tsconfig.json").write_text(json.dumps(TSCONFIG))
    shutil.copy(HERE / "drive.ts", tmp_path)
    clients.run([clients.program("tsc"), "--project", "."], tmp_path)
    drive("node", "out/drive.js")


@pytest.mark.slow  # `make check` lints the document
def test_the_linters_find_what_is_wrong(tmp_path: Path) -> None:
    require_node_modules()
    document = clients.write_document(tmp_path)
    clients.lint(document)
    content = json.loads(document.read_text())
    for broken in ({**content, "servers": []}, {**content, "tags": []}):  # the one finds redocly, the other spectral
        document.write_text(json.dumps(broken))
        with pytest.raises(RuntimeError, match=r"no-empty-servers|operation-tag-defined"):
            clients.lint(document)
