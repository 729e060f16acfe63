"""Turns a command line into one call."""

from __future__ import annotations

import io
import os
import sys

import click

import telemetryd
from telemetryd.cli import agents, database, demo, serve, statistics, transfer, upkeep
from telemetryd.cli.alerts import alerts
from telemetryd.cli.follow import follow
from telemetryd.cli.options import NO_FLAG
from telemetryd.cli.regressions import regressions
from telemetryd.cli.tail import tail

__all__ = ["NO_FLAG", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(telemetryd.__version__, message="telemetryd %(version)s")
def main() -> None:
    r"""Run telemetryd, the one daemon that owns a telemetry database, and look after that database.

    \b
    Exit status: 0 done; 1 it could not be done, or `check` found something; standard error says what;
                 2 the command line or a setting is wrong.
    Standard output holds data only; progress is drawn on standard error if that is a terminal.

    \b
    Shell completion:
      eval "$(_TELEMETRYD_COMPLETE=bash_source telemetryd)"      # in ~/.bashrc
      eval "$(_TELEMETRYD_COMPLETE=zsh_source telemetryd)"       # in ~/.zshrc
      _TELEMETRYD_COMPLETE=fish_source telemetryd | source       # in ~/.config/fish/completions/telemetryd.fish
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us; what is opened next must not take its place
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # no text is worth an error, whatever the locale is
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


for command in (
    serve.serve,
    serve.config,
    database.migrate,
    database.backup,
    database.restore,
    database.check,
    upkeep.prune,
    upkeep.reap,
    statistics.stats,
    regressions,
    alerts,
    tail,
    follow,
    transfer.export,
    transfer.import_,
    agents.sync,
    agents.replay,
    demo.demo,
):
    main.add_command(command)

for described in (main, *main.commands.values(), *alerts.commands.values()):
    # Click leaves a paragraph's lines as they are behind a backspace, which a raw docstring cannot hold.
    described.help = (described.help or "").replace("\\b", "\b")
