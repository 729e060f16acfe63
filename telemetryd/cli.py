"""Turns a command line into one call."""

from __future__ import annotations

import asyncio
import json
import sys
import types
from collections.abc import Callable
from typing import Any, Final, TypeVar, get_args, get_origin

import click

import telemetryd
from telemetryd import daemon
from telemetryd.errors import ConfigurationError, DatabaseError, sentence
from telemetryd.logs import logging_to
from telemetryd.settings import LoadedSettings, Settings, load, variable

try:
    import uvloop
except ImportError:  # Windows, or an interpreter that it does not support: slower, not worse
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
else:
    new_event_loop = uvloop.new_event_loop

EXIT_USAGE: Final = 2
NO_FLAG: Final = frozenset({"api_auth_token"})
"""A token on a command line could be read by every user of the machine."""

F = TypeVar("F", bound=Callable[..., Any])


def flag(name: str) -> str:
    """Return the flag of a setting: api_port → --port, db_path → --db-path."""
    return "--" + name.removeprefix("api_").replace("_", "-")


def _is_switch(name: str) -> bool:
    annotation = Settings.model_fields[name].annotation
    kinds = get_args(annotation) if get_origin(annotation) is types.UnionType else (annotation,)
    return bool in kinds


def _settings_flags(function: F) -> F:
    """Give a command one flag for each setting."""
    for name, setting in reversed(Settings.model_fields.items()):
        if name not in NO_FLAG:
            shown = setting.get_default(call_default_factory=True)
            default = "none" if shown is None else str(shown).lower() if isinstance(shown, bool) else shown
            text = f"{setting.description}  [{variable(name)}; default: {default}]"
            declaration = f"{flag(name)}/--no-{flag(name)[2:]}" if _is_switch(name) else flag(name)
            option = click.option(declaration, name, default=None, help=text)
            function = option(function)
    return function


def _load(flags: dict[str, Any]) -> LoadedSettings:
    try:
        return load(flags)
    except ConfigurationError as error:
        for problem in error.problems:
            click.echo(f"telemetryd: {problem}", err=True)
        sys.exit(EXIT_USAGE)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(telemetryd.__version__, message="telemetryd %(version)s")
def main() -> None:
    """Run telemetryd, the one daemon that owns a telemetry database.

    \b
    Exit status: 0 done; 1 the database or the address cannot be used, or the writer died;
                 2 the command line or a setting is wrong.
    """


@main.command()
@_settings_flags
def serve(**flags: Any) -> None:
    """Serve the API until SIGTERM or SIGINT.

    \b
    Examples:
      telemetryd serve
      telemetryd serve --port 8766 --db-path /var/lib/telemetryd/telemetry.sqlite
      TELEMETRY_DB_JOURNAL_MODE=WAL telemetryd serve --log-level debug
    """
    loaded = _load(flags)
    settings = loaded.settings
    with logging_to(sys.stdout, settings.log_level, settings.log_format):
        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                status = runner.run(daemon.serve(loaded))
        except DatabaseError as error:
            click.echo(f"telemetryd: {sentence(error)}", err=True)
            status = daemon.EXIT_FAILURE
        except OSError as error:
            place = error.filename or f"{settings.api_host}:{settings.api_port}"
            click.echo(f"telemetryd: cannot listen on {place}: {error.strerror or error}", err=True)
            status = daemon.EXIT_FAILURE
    sys.exit(status)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_settings_flags
def config(as_json: bool, **flags: Any) -> None:
    """Print every setting with its value and where it came from; the token is masked.

    \b
    Examples:
      telemetryd config
      telemetryd config --json | jq '.TELEMETRY_DB_PATH.value'
    """
    shown = _load(flags).shown()
    if as_json:
        click.echo(json.dumps(shown, indent=2))
        return
    width = max(map(len, shown))
    for name, entry in shown.items():
        value = "" if entry["value"] is None else entry["value"]
        click.echo(f"{name:<{width}} = {value}  # {entry['origin']}")
