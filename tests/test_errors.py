"""What users read of an error stands in the code, not in docstrings or class names: `python -OO` drops the former."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from telemetryd import errors
from telemetryd.cli import main
from telemetryd.errors import TelemetrydError, UnavailableError, sentence
from tests.conftest import StartDaemon, make_run

_SAY_ALL = """
import json
from telemetryd import errors
kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TelemetrydError)]
print(json.dumps({kind.__name__: errors.sentence(kind.__new__(kind)) for kind in kinds}))
"""


def subclasses(kind: type[TelemetrydError]) -> Iterator[type[TelemetrydError]]:
    yield kind
    for other in kind.__subclasses__():
        yield from subclasses(other)


OURS = [kind for kind in subclasses(TelemetrydError) if kind.__module__ == errors.__name__]


def test_every_error_says_its_sentence_without_docstrings() -> None:
    said = json.loads(
        subprocess.run([sys.executable, "-OO", "-c", _SAY_ALL], capture_output=True, text=True, check=True).stdout
    )
    assert said == {kind.__name__: sentence(kind.__new__(kind)) for kind in OURS}
    assert [text for text in said.values() if not re.fullmatch(r"[A-Z].+ .+\.", text)] == []


@pytest.mark.parametrize("kind", OURS)
def test_no_error_borrows_its_words(kind: type[TelemetrydError]) -> None:
    own = {"message", "error_type", *(("reason",) if issubclass(kind, UnavailableError) else ())}
    assert own <= vars(kind).keys()


def test_no_two_refusals_have_one_label() -> None:
    refusals = list(subclasses(UnavailableError))
    assert len({kind.reason for kind in refusals if issubclass(kind, UnavailableError)}) == len(refusals)


def test_an_exception_of_others_is_named_by_its_text_or_its_type() -> None:
    assert sentence(ValueError("no number")) == "no number"
    assert sentence(KeyError()) == "KeyError"


def ask(url: str, body: object = None, media_type: str = "application/json") -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": media_type})) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_daemon_without_docstrings_says_the_same(start_daemon: StartDaemon, tmp_path: Path) -> None:
    answers, types = [], []
    for optimize in ("", "2"):
        folder = tmp_path / f"optimize-{optimize}"
        folder.mkdir()
        daemon = start_daemon(folder=folder, PYTHONOPTIMIZE=optimize, TELEMETRY_MIN_FREE_MB=str(1024 * 1024))
        runs = f"{daemon.url}/api/v1/runs"
        answers.append(
            [
                ask(f"{runs}/nobody"),
                ask(f"{runs}?limit=many"),
                ask(runs, {}, "text/plain"),
                ask(runs, {}),
                ask(runs, make_run(event_id="one", run_id="one")),
                ask(f"{daemon.url}/openapi.json"),
            ]
        )
        with urllib.request.urlopen(f"{daemon.url}/metrics?format=prometheus") as response:
            assert 'telemetryd_writes_refused_total{reason="low disk"} 1.0' in response.read().decode()
        assert daemon.stop() == 0
        types.append([line["error_type"] for line in daemon.lines if "error_type" in line])
    normal, optimized = answers
    assert optimized == normal
    assert [status for status, _ in normal] == [404, 400, 415, 422, 503, 200]
    assert normal[4][1]["detail"].startswith("The disk is almost full, so no new writes are taken")
    assert (
        types
        == [["RunNotFoundError", "ValidationError", "UnsupportedBodyError", "ValidationError", "LowDiskError"]] * 2
    )


def helps(command: click.Command, context: click.Context) -> Iterator[str]:
    """Return the help of a command and of all below it."""
    yield command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from helps(below, click.Context(below, context, name))


def all_help() -> list[str]:
    return list(helps(main, click.Context(main, info_name="telemetryd", **main.context_settings)))


def test_every_command_has_the_same_help_without_docstrings() -> None:
    code = "import json; from tests.test_errors import all_help; print(json.dumps(all_help()))"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == all_help()
    assert len(all_help()) > 20
