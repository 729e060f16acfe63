"""What the commands of programs need, which must start fast: nothing here loads the server."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from telemetryd.durations import parse_duration

EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2

F = TypeVar("F", bound=Callable[..., Any])


class Suggesting(click.Group):
    """A group of commands that says which one may be meant by a name that is none."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is asked for."""
        name, known = args[0], self.list_commands(ctx)
        if name not in known and not name.startswith("-"):
            similar = difflib.get_close_matches(name, known, cutoff=0.5)
            hint = f"Did you mean {' or '.join(similar)}?" if similar else f"See {ctx.command_path} --help."
            ctx.fail(f"There is no command {name!r}. {hint}")
        return super().resolve_command(ctx, args)


class DurationType(click.ParamType[float]):
    """A duration such as 90d, 12h, 30m, 45s or 2w, in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the seconds."""
        try:
            return parse_duration(value)
        except ValueError as error:
            self.fail(f"{value!r} {error}", param, ctx)


class SizeType(click.ParamType[int]):
    """A number of bytes such as 16k or 1M."""

    name = "size"
    _FORM: Final = re.compile(r"(\d{1,9})\s*([kKmM]?)(?:i?B)?", re.ASCII)
    _FACTORS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20}
    _MOST: Final = 1 << 20

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes."""
        match = self._FORM.fullmatch(str(value).strip())
        size = int(match[1]) * self._FACTORS[match[2].lower()] if match else self._MOST + 1
        if size > self._MOST:
            self.fail(f"{value!r} must be a number of bytes, such as 4096 or 16k, at most 1M", param, ctx)
        return size


class PairType(click.ParamType[tuple[str, str]]):
    """A key and a value with an equals sign between them."""

    name = "pair"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Return both."""
        key, sign, text = str(value).partition("=")
        if not key or not sign:
            self.fail(f"{value!r} must be a key and a value: team=search", param, ctx)
        return key, text
