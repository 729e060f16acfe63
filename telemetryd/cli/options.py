"""What the commands share: flags from the settings, progress bars, output, exit codes."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, Union, get_args, get_origin

import click
import orjson
from click.shell_completion import CompletionItem

from telemetryd.cli.basics import EXIT_FAILURE, EXIT_USAGE, F
from telemetryd.configuration import LoadedSettings, load
from telemetryd.errors import ConfigurationError, TelemetrydError, sentence
from telemetryd.ops.logs import printable
from telemetryd.settings import OF_POSTGRES, Settings, flag, variable

NO_FLAG: Final = frozenset({"api_auth_token"})
"""A token on a command line could be read by every user of the machine."""


_UNITS: Final = {
    "ms": "MS",
    "s": "SECONDS",
    "bytes": "BYTES",
    "days": "DAYS",
    "after": "DURATION",
    "host": "ADDRESS",
    "hosts": "NAMES",
}


def _kind(name: str) -> Any:
    """Return a setting's type, without the None of an optional one."""
    annotation = Settings.model_fields[name].annotation
    if get_origin(annotation) in (types.UnionType, Union):
        annotation = next(kind for kind in get_args(annotation) if kind is not types.NoneType)
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _metavar(name: str) -> str | None:
    """Say what stands after a setting's flag; nothing after a switch."""
    kind = _kind(name)
    if kind is bool:
        return None
    if issubclass(kind, StrEnum):
        return f"[{'|'.join(kind)}]"
    return "PATH" if kind is Path else _UNITS.get(name.rpartition("_")[2], "N")


def _complete(name: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Return what a shell may offer after a setting's flag: its words, or files."""
    kind = _kind(name)

    def offer(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
        if issubclass(kind, StrEnum):
            return [CompletionItem(str(word)) for word in kind if word.lower().startswith(begun.lower())]
        return [CompletionItem(begun, type="file")] if kind is Path else []

    return offer


def settings_flags(*names: str, **helps: str) -> Callable[[F], F]:
    """Give a command one flag for each of these settings; for every setting if none is named.

    Args:
        *names: the settings' fields.
        **helps: what a setting means to this command, if that is something else than to the daemon.

    """
    chosen = names or tuple(Settings.model_fields)

    def decorate(function: F) -> F:
        for name in reversed(chosen):
            setting = Settings.model_fields[name]
            if name not in NO_FLAG:
                shown = setting.get_default(call_default_factory=True)
                default = "none" if shown is None else str(shown).lower() if isinstance(shown, bool) else shown
                text = f"{helps.get(name, setting.description)}  [{variable(name)}; default: {default}]"
                declaration = f"{flag(name)}/--no-{flag(name)[2:]}" if _kind(name) is bool else flag(name)
                function = click.option(
                    declaration, name, default=None, help=text, metavar=_metavar(name), shell_complete=_complete(name)
                )(function)
        return function

    return decorate


json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def load_for(flags: Mapping[str, Any]) -> LoadedSettings:
    """Return the settings of a command that works on a database.

    If a flag or a variable says which, a `.env` file that cannot be read is another program's, and does not matter.

    Raises:
        ConfigurationError: if some cannot be used.

    """
    is_file = flags.get("db_path") is not None  # then it is not the one that a variable names
    is_named = is_file or any(os.environ.get(variable(name)) for name in ("db_path", "db_url"))
    names = [name for name in Settings.model_fields if name not in {"db_url", *OF_POSTGRES}] if is_file else None
    return load(flags, names=names, needs_dotenv=not is_named)


def load_settings(flags: dict[str, Any], *, of_daemon: bool = False) -> LoadedSettings:
    """Return the settings, those of a daemon or what `load_for` returns; or end the process with every problem."""
    with failing():
        return load(flags) if of_daemon else load_for(flags)


def fail(text: str) -> NoReturn:
    """End the process with one sentence on standard error."""
    complain(text)
    sys.exit(EXIT_FAILURE)


def complain(text: str) -> None:
    """Print one sentence on standard error, whatever is in the file or the answer that it is about."""
    click.echo(printable(f"telemetryd: {text}"), err=True)


@contextmanager
def failing() -> Iterator[None]:
    """Turn an error of ours into one sentence on standard error and exit status 1; 2 for each wrong setting."""
    try:
        yield
    except ConfigurationError as error:
        for problem in error.problems:
            complain(problem)
        sys.exit(EXIT_USAGE)
    except TelemetrydError as error:
        fail(sentence(error))


def print_json(value: object) -> None:
    """Print data as JSON; a name of a file that is not UTF-8 keeps its other bytes as escaped surrogates."""
    try:
        text = orjson.dumps(value, option=orjson.OPT_INDENT_2, default=str).decode()
    except orjson.JSONEncodeError:  # orjson writes no surrogates
        text = json.dumps(value, indent=2, default=str)
    click.echo(text)


class Progress:
    """Draws a bar for each phase of a long work, on standard error, if that is a terminal."""

    def __init__(self) -> None:
        self._visible = sys.stderr.isatty()
        self._phase = ""
        self._bar: Any = None
        self._done = 0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Take note of how far a phase is."""
        if not self._visible:
            return
        if phase != self._phase:
            self.close()
            self._bar = click.progressbar(length=total, label=f"{phase:<18}", file=sys.stderr).__enter__()
            self._phase, self._done = phase, 0
        if done > self._done:
            self._bar.update(done - self._done)
            self._done = done

    def close(self) -> None:
        """End the last bar's line."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


@contextmanager
def progress() -> Iterator[Progress]:
    """Draw progress inside the block."""
    drawn = Progress()
    try:
        yield drawn
    finally:
        drawn.close()


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 line, 2 lines."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def size(count: int) -> str:
    """Return a number of bytes for people: 1.5 GiB."""
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "bytes" else f"{value:.1f} {units[0]}"
