"""Commands on a database that is on PostgreSQL: migrate and check; its server has tools for the rest."""

from __future__ import annotations

import click

from telemetryd.cli.basics import EXIT_FAILURE
from telemetryd.cli.options import failing, print_json
from telemetryd.engine.factory import bring_up_to_date, count_wrong
from telemetryd.errors import DatabaseError
from telemetryd.settings import Settings, without_password


def refuse(settings: Settings) -> None:
    """Stop what only works on a SQLite file.

    Raises:
        DatabaseError: if the settings name a database on PostgreSQL.

    """
    if settings.db_url is not None:
        raise DatabaseError(
            "TELEMETRY_DB_URL names a database on PostgreSQL, which has tools of its own for this: pg_dump or "
            "pgBackRest for backups, pg_amcheck for damage"
        )


def migrate(settings: Settings, *, dry_run: bool, as_json: bool) -> None:
    """Bring the schema up to date, and say so."""
    with failing():
        before, after = bring_up_to_date(settings, dry_run=dry_run)
    if as_json:
        print_json({"database": _name(settings), "from": before, "to": after, "dry_run": dry_run})
    elif before == after:
        click.echo(f"{_name(settings)} has schema version {after} already; nothing to do")
    else:
        would = "would be brought" if dry_run else "was brought"
        click.echo(f"{_name(settings)} {would} from schema version {before} to {after}")


def check(settings: Settings, *, repair: bool, as_json: bool) -> int:
    """Compare what is counted with the runs, and say what was found; return the exit status."""
    with failing():
        wrong = count_wrong(settings, repair=repair)
    if as_json:
        print_json({"database": _name(settings), "wrong_counts": wrong, "repaired": bool(wrong and repair)})
    elif wrong and repair:
        click.echo(f"repaired: {wrong} counts of {_name(settings)} differed from what the runs add up to")
    elif wrong:
        click.echo(f"{_name(settings)}: {wrong} counts differ from what the runs add up to; telemetryd check --repair")
    else:
        click.echo(f"{_name(settings)}: every count is what the runs add up to")
    return EXIT_FAILURE if wrong and not repair else 0


def _name(settings: Settings) -> str:
    return "" if settings.db_url is None else without_password(settings.db_url.get_secret_value())
