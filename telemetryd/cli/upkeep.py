"""The commands that thin out the runs: prune, reap."""

import click


@click.command()
def prune() -> None:
    """Not yet."""


@click.command()
def reap() -> None:
    """Not yet."""
