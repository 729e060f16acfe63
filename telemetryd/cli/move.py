"""The command that moves a database from one engine to the other: move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from telemetryd.cli.database import owned
from telemetryd.cli.options import counted, failing, json_flag, print_json, progress, settings_flags
from telemetryd.configuration import load
from telemetryd.engine import factory
from telemetryd.engine.moving import Moved, Side, Watch, compare
from telemetryd.engine.moving import move as move_all
from telemetryd.errors import DatabaseError
from telemetryd.settings import OF_POSTGRES, Settings, without_password

_IS_URL: Final = ("postgresql://", "postgres://")
_OF_SERVERS: Final = tuple(sorted(OF_POSTGRES - {"db_commit_timeout_s", "db_poll_ms"}))


@click.command(
    help=r"""Move a database: from a SQLite file to PostgreSQL, or back.

    Runs, events, labels, ids, the numbers of changes and their epoch, alerts and what waits to be delivered, registered
    processes: all of it is kept, so that subscribers and followers go on where they were. Whatever is counted or
    indexed is made anew. Then both sides are read, and their digests compared. No daemon may run meanwhile; to move
    without that, see `telemetryd follow`.

    The target is new: a file that is not there yet, or a database without runs. It is there as a whole or not at all:
    killed at any moment, the command may be repeated. The source is not changed.

    \b
    Examples:
      telemetryd move --from telemetry.sqlite --to postgresql://telemetryd@db1,db2/telemetry
      telemetryd move --from postgresql://telemetryd@db1,db2/telemetry --to telemetry.sqlite --json
    """
)
@click.option("--from", "source", required=True, metavar="FILE|URL", help="What is moved.")
@click.option("--to", "target", required=True, metavar="FILE|URL", help="Where to.")
@json_flag
@settings_flags("lock_file", *_OF_SERVERS)
def move(source: str, target: str, *, as_json: bool, **flags: Any) -> None:
    if source.startswith(_IS_URL) == target.startswith(_IS_URL):
        raise click.UsageError("One of --from and --to is a file, the other one an address: postgresql://…")
    with failing():
        places = _settings(source, flags), _settings(target, flags)
        with progress() as drawn:
            done = _move(*places, drawn)
    names = [_name(place) for place in places]
    if as_json:
        print_json(
            {
                "from": names[0],
                "to": names[1],
                "was_there": done.was_there,
                "seconds": round(done.seconds, 3),
                "tables": {name: {"rows": found.rows, "digest": found.text} for name, found in done.tables.items()},
            }
        )
        return
    runs = counted(done.runs, "run")
    if done.was_there:
        click.echo(f"{names[1]} holds all of {names[0]} already ({runs}); their digests are the same")
        return
    pace = round(done.runs / done.seconds)
    click.echo(f"{runs} moved in {done.seconds:.1f} s ({pace} a second); the digests of both sides are the same")
    click.echo(f"From now on let daemons serve {names[1]}, and none {names[0]}")


def _move(source: Settings, target: Settings, watch: Watch) -> Moved:
    with _reading(source) as original:
        if not factory.is_filled(target):
            with factory.make_by_moving(target) as new:
                return move_all(original, new, watch)
        with _reading(target) as other:
            done = compare(original, other, watch)
        if done is None:
            raise DatabaseError(
                f"{_name(target)} is there, and does not hold what {_name(source)} holds; give the move a file that is "
                "not there yet, or a database without runs"
            )
        return done


@contextmanager
def _reading(settings: Settings) -> Iterator[Side]:
    if settings.db_url is None:
        with owned(settings), factory.read_to_move(settings) as side:
            yield side
        return
    with factory.read_to_move(settings) as side:
        yield side


def _settings(place: str, flags: dict[str, Any]) -> Settings:
    """Return the settings of one side.

    Raises:
        ConfigurationError: if some cannot be used.

    """
    if place.startswith(_IS_URL):
        given = {name: flags[name] for name in _OF_SERVERS}
        return load({"db_url": place, **given}, names=("db_url", *OF_POSTGRES), needs_dotenv=False).settings
    given = {"db_path": Path(place), "lock_file": flags["lock_file"]}
    return load(given, names=("db_path", "lock_file"), needs_dotenv=False).settings


def _name(settings: Settings) -> str:
    url = settings.db_url
    return str(settings.db_path) if url is None else without_password(url.get_secret_value())
