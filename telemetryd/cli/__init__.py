"""Turns a command line into one call."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from importlib import import_module
from keyword import iskeyword
from typing import Any, Final, NoReturn

import click

import telemetryd
from telemetryd.cli.basics import EXIT_FAILURE, Suggesting
from telemetryd.ops.journal import ErrorLines, is_journal

__all__ = ["main"]

_COMMANDS: Final = {
    "serve": "serve",
    "config": "serve",
    "migrate": "database",
    "backup": "database",
    "restore": "database",
    "check": "database",
    "prune": "upkeep",
    "reap": "upkeep",
    "confirm-clock": "upkeep",
    "delete": "removal",
    "redact": "removal",
    "stats": "statistics",
    "regressions": "regressions",
    "alerts": "alerts",
    "mcp": "mcp",
    "tail": "tail",
    "follow": "follow",
    "run": "run",
    "record": "record",
    "units": "units",
    "move": "move",
    "export": "transfer",
    "import": "transfer",
    "sync": "agents",
    "replay": "agents",
    "dead-letters": "dead_letters",
    "tokens": "tokens",
    "demo": "demo",
}
"""Each command with the module that has it."""


class Commands(Suggesting):
    """Imports a command's module only when the command is asked for: all of them together take twice as long."""

    def main(self, *arguments: Any, **options: Any) -> NoReturn:
        """Run the command line; what the system refuses is one sentence, also while the output is written out."""
        _open_streams()
        status: Any = 0
        try:
            super().main(*arguments, **options)
        except SystemExit as end:
            status = end.code
        except OSError as error:
            status = _fail(error)
        try:
            sys.stdout.flush()
        except OSError as error:
            status = status or _fail(error)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter would flush it once more
        sys.exit(status)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is asked for. The daemon survives SIGHUP from here on: its imports take long."""
        if args[0] == "serve":
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, in the order of the alphabet."""
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, None if there is none of that name."""
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"telemetryd.cli.{_COMMANDS[cmd_name]}")
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(module, f"{name}_" if iskeyword(name) else name)
        for described in (command, *(command.commands.values() if isinstance(command, click.Group) else ())):
            described.help = _paragraphs(described.help)
        return command


def _open_streams() -> None:
    """Open what our parent process has closed, so that nothing that is opened next takes its place.

    libuv aborts when a descriptor below 3 of its own is to be closed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - until the process ends
        stream = getattr(sys, name)
        if mode == "w" and isinstance(stream, io.TextIOWrapper):  # no text is worth an error, whatever the locale is
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper) and is_journal(sys.stderr):
        sys.stderr = ErrorLines(sys.stderr.detach(), "utf-8", "backslashreplace", line_buffering=True)


def _fail(error: OSError) -> int:
    """Say what the system has refused, unless nobody reads what we write; return the exit status."""
    if error.errno != errno.EPIPE:
        place = "" if error.filename is None else f"{error.filename}: "
        with contextlib.suppress(OSError):
            click.echo(f"telemetryd: {place}{error.strerror or error}", err=True)
    return EXIT_FAILURE


def _paragraphs(text: str | None) -> str:
    # Click leaves a paragraph's lines as they are after a backspace, which a raw text cannot hold.
    return (text or "").replace("\\b", "\b")


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help=r"""Run telemetryd, the one daemon that owns a telemetry database, and look after that database.

    \b
    Exit status: 0 done; 1 it could not be done, or `check` found something; standard error says what;
                 2 the command line or a setting is wrong.
    Standard output holds data only; progress is drawn on standard error if that is a terminal.

    \b
    Shell completion:
      eval "$(_TELEMETRYD_COMPLETE=bash_source telemetryd)"      # in ~/.bashrc
      eval "$(_TELEMETRYD_COMPLETE=zsh_source telemetryd)"       # in ~/.zshrc
      _TELEMETRYD_COMPLETE=fish_source telemetryd | source       # in ~/.config/fish/completions/telemetryd.fish
    """,
)
@click.version_option(telemetryd.__version__, message="telemetryd %(version)s")
def main() -> None:
    """Hold the commands."""


main.help = _paragraphs(main.help)
