"""Walks through the commands of the command line, for the pages that are made of their help."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from telemetryd.cli import main


def contexts(**options: Any) -> Iterator[click.Context]:
    """Yield the context of each command, every group before the commands in it.

    Args:
        **options: what else each context is made with.

    """
    yield from _below(main, "telemetryd", None, options)


def subcommands(context: click.Context) -> Iterator[tuple[str, click.Command]]:
    """Yield the name of each command in a group, and the command; nothing if it is no group."""
    command = context.command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            if (found := command.get_command(context, name)) is not None and not found.hidden:
                yield name, found


def _below(
    command: click.Command, name: str, parent: click.Context | None, options: dict[str, Any]
) -> Iterator[click.Context]:
    context = click.Context(command, info_name=name, parent=parent, **options, **command.context_settings)
    yield context
    for inner, found in subcommands(context):
        yield from _below(found, inner, context, options)
