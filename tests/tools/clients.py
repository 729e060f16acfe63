"""Checks the OpenAPI document with linters (`python -m tests.tools.clients`), and generates clients from it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from telemetryd import http
from telemetryd.web import openapi

NODE_MODULES: Final = Path(__file__).parents[1] / "clients" / "node_modules"
"""What `npm ci` installs of tests/clients/package-lock.json."""
_QUIET: Final = {"REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true"}
_NO_NDJSON: Final = (
    "WARNING parsing POST /api/v1/runs/batch within runs.\n\nUnsupported content type application/x-ndjson"
)
"""What this generator leaves out: it sends batches as JSON."""


def run(command: Sequence[str | Path], cwd: Path, **variables: str) -> str:
    """Run a program; return what it says.

    Raises:
        RuntimeError: with what it says, if it fails.

    """
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        # tests/conftest.py names a file without certificates of authorities, and httpx insists on some.
        env={name: value for name, value in os.environ.items() if name != "SSL_CERT_FILE"} | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"{command[0]} fails with {finished.returncode}:\n{finished.stdout}")
    return finished.stdout


def program(name: str) -> Path:
    """Return the path of a program that is installed with the clients' tools."""
    return NODE_MODULES / ".bin" / name


def write_document(folder: Path) -> Path:
    """Write the document into a folder; return its path."""
    path = folder / "openapi.json"
    path.write_text(json.dumps(openapi.document(http.described())), "utf-8")
    return path


def lint(document: Path) -> None:
    """Check a document with the default rules of redocly and spectral, of which none may give even a warning.

    Raises:
        RuntimeError: with what they have found.

    """
    folder = document.parent
    said = run([program("redocly"), "lint", document, "--format", "github-actions"], folder, **_QUIET)
    if warnings := re.findall("^::.*", said, re.MULTILINE):
        raise RuntimeError("redocly finds:\n" + "\n".join(warnings))
    (folder / "spectral.yaml").write_text('extends: ["spectral:oas"]\n', "utf-8")
    run([program("spectral"), "lint", "--fail-severity", "hint", "--ruleset", "spectral.yaml", document], folder)


def generate_python(document: Path, folder: Path) -> Path:
    """Generate the Python client as a package in a folder; return the package's path.

    Raises:
        RuntimeError: if it cannot be generated, or something of it is left out.

    """
    package = folder / "telemetryd_client"
    (folder / "python.yaml").write_text("post_hooks: []\n", "utf-8")  # which would only format it
    generator = Path(sys.executable).with_name("openapi-python-client")
    command: list[str | Path] = [generator, "generate", "--path", document, "--output-path", package, "--meta", "none"]
    said = run([*command, "--config", folder / "python.yaml"], folder)
    if re.findall(r"^(?:WARNING|ERROR) .*\n+.*", said, re.MULTILINE) != [_NO_NDJSON]:
        raise RuntimeError(said)
    return package


def generate_typescript(document: Path, folder: Path) -> Path:
    """Generate the types of the TypeScript client in a folder; return the path of the module.

    Raises:
        RuntimeError: if they cannot be generated.

    """
    module = folder / "schema.d.ts"
    run([program("openapi-typescript"), document, "--output", module], folder)
    return module


def main() -> None:
    """Lint the document; without the linters only report that they are missing, except in CI."""
    if not program("redocly").exists():
        reason = f"{NODE_MODULES} is missing: npm ci in that folder (node 20.19 or newer)"
        if os.environ.get("CI"):
            sys.exit(reason)
        print(f"The OpenAPI document is not linted: {reason}")  # noqa: T201 - what the command is for
        return
    with tempfile.TemporaryDirectory() as folder:
        lint(write_document(Path(folder)))


if __name__ == "__main__":
    main()
