"""The commands about tokens: tokens create, list, revoke."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import click

from telemetryd.cli.basics import DurationType, Suggesting
from telemetryd.cli.options import fail, failing, json_flag, print_json, settings_flags
from telemetryd.configuration import load
from telemetryd.model.tokens import LARGEST_LIMIT, Asked, Limits, Scope, Token, make
from telemetryd.model.values import utc_now
from telemetryd.ops import token_file
from telemetryd.settings import Settings, variable

_NAMES: Final = ("db_path", "tokens_file", "api_auth_enabled")
_FOR_EVER: Final = "none"
_LIMIT: Final = click.IntRange(1, LARGEST_LIMIT)
_flags = settings_flags("tokens_file", "db_path", db_path="Database next to which the file is by default.")


@click.group(cls=Suggesting, help="Make, list and revoke tokens.")
def tokens() -> None:
    """Hold the commands about tokens."""


class _Lifetime(DurationType):
    name = "lifetime"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the seconds, infinity for none."""
        return float("inf") if value == _FOR_EVER else super().convert(value, param, ctx)


@tokens.command(
    help=r"""Make a token, and print its secret, which is shown this once only.

    The secret stands alone on standard output, or in its JSON. A daemon that runs takes the token within a second.

    \b
    Scopes:
      ingest  create runs, and change those of agents whose names begin with --agent-prefix
      read    read everything
      admin   everything, also delete, prune and back up

    \b
    Examples:
      telemetryd tokens create --name web --scope ingest --agent-prefix web-
      TOKEN=$(telemetryd tokens create --name dashboard --scope read --expires 90d)
      telemetryd tokens create --name nightly --scope ingest --runs-per-minute 600 --bytes-per-day 100000000
    """
)
@click.option("--name", required=True, help="What the log and /metrics call it.")
@click.option(
    "--scope",
    "scopes",
    required=True,
    multiple=True,
    type=click.Choice([*map(str, Scope)]),
    help="May be given several times.",
)
@click.option("--agent-prefix", default="", metavar="TEXT", help="With ingest: only agents whose names begin with it.")
@click.option(
    "--expires", default="365d", show_default=True, type=_Lifetime(), metavar="DURATION", help="For how long; or none."
)
@click.option("--requests-per-minute", type=_LIMIT, metavar="N", help="Most requests per minute.")
@click.option("--runs-per-minute", type=_LIMIT, metavar="N", help="Most new runs per minute.")
@click.option("--bytes-per-day", type=_LIMIT, metavar="N", help="Most bytes of bodies per day.")
@json_flag
@_flags
def create(
    *,
    name: str,
    scopes: Sequence[str],
    agent_prefix: str,
    expires: float,
    requests_per_minute: int | None,
    runs_per_minute: int | None,
    bytes_per_day: int | None,
    as_json: bool,
    **flags: Any,
) -> None:
    settings = _settings(flags)
    path = settings.tokens_path
    limits = Limits(
        requests_per_minute=requests_per_minute, runs_per_minute=runs_per_minute, bytes_per_day=bytes_per_day
    )
    lifetime = None if expires == float("inf") else timedelta(seconds=expires)
    with failing():
        token, secret = make(Asked(name, tuple(map(Scope, scopes)), agent_prefix, lifetime, limits), utc_now())

    def add(known: tuple[Token, ...]) -> list[Token]:
        if any(each.name == name for each in known):
            fail(f"there is a token {name!r} already; revoke it first, or take another name")
        return [*known, token]

    _change(path, add)
    until = "for ever" if token.expires_at is None else f"until {token.expires_at:%Y-%m-%d %H:%M:%S} UTC"
    _say(f"token {token.id} ({name}) is in {path.absolute()}, valid {until}; its secret is not shown again")
    if not settings.api_auth_enabled:
        _say("authentication is off (TELEMETRY_API_AUTH_ENABLED), so nobody is asked for it yet")
    if as_json:
        print_json({**token.to_json(), "secret": secret})
    else:
        click.echo(secret)


@tokens.command(
    "list",
    help=r"""List the tokens with what each may do; their secrets are stored nowhere.

    \b
    Examples:
      telemetryd tokens list
      telemetryd tokens list --json | jq -r '.[] | select(.expired) | .name'
    """,
)
@json_flag
@_flags
def list_(*, as_json: bool, **flags: Any) -> None:
    path = _settings(flags).tokens_path
    with failing():
        known = token_file.read(path)
    now = utc_now()
    if not known:
        _say(f"there are no tokens in {path.absolute()}")
    if as_json:
        print_json([{**token.to_json(), "expired": token.has_expired(now)} for token in known])
        return
    for token in known:
        click.echo("  ".join(_described(token, expired=token.has_expired(now))))


def _described(token: Token, *, expired: bool) -> list[str]:
    until = (
        "never expires" if token.expires_at is None else f"{'expired' if expired else 'until'} {token.expires_at:%F}"
    )
    shown = [token.id, f"{token.name:<20}", f"{'+'.join(token.scopes):<12}", f"{until:<16}"]
    if token.agent_prefix:
        shown.append(f"agents {token.agent_prefix}*")
    limits = token.limits.model_dump(exclude_none=True)
    return [*shown, *(f"{limit:,} {name.replace('_', ' ')}" for name, limit in limits.items())]


@tokens.command(
    help=r"""Revoke a token, by its name or id.

    A daemon that runs refuses it within a second.

    \b
    Examples:
      telemetryd tokens revoke web
      telemetryd tokens revoke 4f1d09ab
    """
)
@click.argument("token", metavar="NAME|ID")
@json_flag
@_flags
def revoke(*, token: str, as_json: bool, **flags: Any) -> None:
    revoked: list[Token] = []

    def remove(known: tuple[Token, ...]) -> list[Token]:
        revoked.extend(each for each in known if token in (each.name, each.id))
        if not revoked:
            fail(f"there is no token {token!r}; see telemetryd tokens list")
        return [each for each in known if each not in revoked]

    _change(_settings(flags).tokens_path, remove)
    for each in revoked:
        _say(f"token {each.id} ({each.name}) is revoked")
    if as_json:
        print_json([each.to_json() for each in revoked])


def _settings(flags: dict[str, Any]) -> Settings:
    is_named = any(flags.get(name) is not None or os.environ.get(variable(name)) for name in ("db_path", "tokens_file"))
    with failing():
        return load(flags, names=_NAMES, needs_dotenv=not is_named).settings


def _change(path: Path, edit: Callable[[tuple[Token, ...]], Sequence[Token]]) -> None:
    folder = path.absolute().parent
    if not folder.is_dir():
        fail(f"{folder} is not there; start the daemon once, or say with --tokens-file where the tokens are")
    with failing():
        token_file.change(path, edit)


def _say(text: str) -> None:
    click.echo(f"telemetryd: {text}", err=True)
