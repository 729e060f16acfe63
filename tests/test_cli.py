from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from telemetryd.cli import main
from tests.conftest import PATIENCE_S
from tests.tools.forks import popen
from tests.tools.old_databases import make_old_database
from tests.tools.process import telemetryd

_CONTEXT = click.Context(main)
NAMES = main.list_commands(_CONTEXT)
COMMANDS = {
    " ".join((*group, name)): command
    for name in NAMES
    if (each := main.get_command(_CONTEXT, name)) is not None
    for group, commands in [((name,), each.commands) if isinstance(each, click.Group) else ((), {name: each})]
    for name, command in commands.items()
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_shows_examples_and_a_json_flag(command: str) -> None:
    described = COMMANDS[command]
    assert "Examples:" in (described.help or "")
    assert "\\b" not in (described.help or "")
    if command not in ("serve", "mcp", "run", "record", "units"):
        assert any("--json" in parameter.opts for parameter in described.params)


def test_the_help_lists_exit_statuses_and_completion() -> None:
    out = telemetryd("--help").stdout
    assert "Exit status: 0 done;" in out
    assert "_TELEMETRYD_COMPLETE=zsh_source" in out
    assert set(NAMES) <= set(out.split())
    assert "..." not in out.partition("Commands:")[2]


def test_a_command_imports_only_what_it_needs() -> None:
    """Half of a command's time would else be spent on modules of the others."""
    code = "import sys, telemetryd.cli; assert not {'aiohttp', 'aiosqlite', 'telemetryd.store'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_completion_is_made() -> None:
    program = Path(sys.executable).with_name("telemetryd")
    environment = {**os.environ, "_TELEMETRYD_COMPLETE": "bash_source"}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=True)
    assert "complete -o nosort -F _telemetryd_completion telemetryd" in done.stdout
    typed = {"_TELEMETRYD_COMPLETE": "bash_complete", "COMP_WORDS": "telemetryd prune --status ca", "COMP_CWORD": "3"}
    done = subprocess.run([program], env={**os.environ, **typed}, capture_output=True, text=True, check=True)
    assert done.stdout == "plain,cancelled\n"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("telemetryd sy", ["plain,sync"]),
        ("telemetryd serve --log-level w", ["plain,WARNING"]),
        ("telemetryd serve --db-journal-mode wa", ["plain,WAL"]),
        ("telemetryd check --db-path te", ["file,te"]),
        ("telemetryd prune --status f", ["plain,failure"]),
    ],
)
def test_values_are_completed(words: str, offered: list[str]) -> None:
    variables = {"_TELEMETRYD_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = CliRunner().invoke(main, env=variables, prog_name="telemetryd")
    assert done.stdout.splitlines() == offered


def test_a_wrong_command_line_ends_with_status_2(tmp_path: Path) -> None:
    for text in ("soon", "90"):  # days were meant, and seconds would delete nearly everything
        assert "duration with its unit" in telemetryd("prune", "--older-than", text, status=2).stderr
    assert "TELEMETRY_API_PORT" in telemetryd("check", status=2, cwd=tmp_path, TELEMETRY_API_PORT="x").stderr
    assert telemetryd("check", status=1, cwd=tmp_path).stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_bars_are_drawn_on_a_terminal_and_never_on_standard_output(tmp_path: Path) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", "v5")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "telemetryd", "migrate", "--json", "--no-backup", "--db-path", str(path)]
    with popen(command, os.environ, stdout=subprocess.PIPE, stderr=theirs) as process:
        out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    drawn = os.read(ours, 65536).decode()
    assert "Reading rows" in drawn
    assert "100%" in drawn
    assert out.startswith("{")
    os.close(ours)
    os.close(theirs)
    assert telemetryd("migrate", "--json", "--db-path", path).stderr == ""
