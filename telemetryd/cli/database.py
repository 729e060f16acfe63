"""The commands that work on the database file: migrate, backup, restore, check."""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import click

import telemetryd.engine.sqlite.tools.backup as backups
import telemetryd.engine.sqlite.tools.check as checks
from telemetryd.cli import shared_database
from telemetryd.cli.basics import EXIT_FAILURE
from telemetryd.cli.options import (
    Progress,
    counted,
    failing,
    json_flag,
    load_settings,
    print_json,
    progress,
    settings_flags,
    size,
)
from telemetryd.engine.sqlite.connection import recover
from telemetryd.engine.sqlite.files import Kind, inspect, is_ours, is_unfinished, undisturbed
from telemetryd.engine.sqlite.ownership import Ownership, refuse_other_name
from telemetryd.engine.sqlite.partials import forget_abandoned, forget_leftovers
from telemetryd.engine.sqlite.tools import foreign, legacy, reuse, rotation
from telemetryd.engine.sqlite.tools.migrate import check_schema, current_version, refuse_unless_usable
from telemetryd.engine.sqlite.tools.salvage import Saved, salvage
from telemetryd.errors import DatabaseError, DatabaseOwnedError
from telemetryd.model.values import format_timestamp, utc_now
from telemetryd.settings import Settings

DATABASE_SETTINGS = ("db_path", "lock_file")


@contextmanager
def owned(settings: Settings) -> Iterator[Path]:
    """Own the database inside the block, so that no daemon runs meanwhile.

    Raises:
        DatabaseOwnedError: if one runs.

    """
    path = settings.db_path.resolve()  # else a new file would take the place of a symbolic link
    ownership = Ownership(path, settings.lock_file)
    try:
        ownership.acquire()
    except DatabaseOwnedError as error:
        raise DatabaseOwnedError(f"{error}; stop it first") from error
    try:
        yield path
        if not ownership.was_dropped:  # what a crash left is still for the daemon's next start to look at
            ownership.mark_clean()
    finally:
        ownership.release()


def _local_now() -> datetime:
    return utc_now().astimezone()


# --- migrate -------------------------------------------------------------------------------------

_RULE = "=" * 70


@click.command(
    help=r"""Bring an older database to the schema of this version.

    It is one transaction: killed at any moment, the file has the old schema or the new one, and the command may be
    repeated. Every run stays. Values that the current schema does not admit are normalised and counted; where that is
    not possible, the original is kept in the table unconverted_values.

    \b
    Examples:
      telemetryd migrate --dry-run
      telemetryd migrate
      telemetryd migrate --no-backup --json --db-path /var/lib/telemetryd/telemetry.sqlite
    """
)
@click.option("--dry-run", is_flag=True, help="Only say what would be done; nothing is touched.")
@click.option("--backup/--no-backup", "with_backup", default=True, help="Make a verified backup first (the default).")
@json_flag
@settings_flags(*DATABASE_SETTINGS)
def migrate(dry_run: bool, with_backup: bool, as_json: bool, **flags: Any) -> None:
    settings = load_settings(flags).settings
    if settings.db_url is not None:
        shared_database.migrate(settings, dry_run=dry_run, as_json=as_json)
        return
    path = settings.db_path.absolute()
    with failing():
        if dry_run:
            _report_migration(path, _preview(path, with_backup=with_backup), dry_run=True, as_json=as_json)
            return
        with owned(settings):
            if not _is_older(path):
                _report_migration(path, None, dry_run=False, as_json=as_json)
                return
            _migrate(path, with_backup=with_backup, as_json=as_json)


def _is_older(path: Path) -> bool:
    """Return whether the database at a path is older than this telemetryd.

    Raises:
        DatabaseError: if there is none, or one of a newer telemetryd or another program.

    """
    state = inspect(path)
    if state.kind is Kind.MISSING:
        raise DatabaseError(f"There is no database at {path}; telemetryd serve makes a new one")
    if state.kind is Kind.EMPTY:
        raise _empty(path)
    if state.kind is Kind.LEGACY or (state.kind is Kind.OURS and state.version < current_version()):
        return True
    refuse_unless_usable(path, state)
    return False


def _preview(path: Path, *, with_backup: bool) -> legacy.Migration | None:
    if is_ours(path) and not _is_older(path):
        return None  # maybe in use, and a copy of it would cost much and show nothing
    with undisturbed(path) as quiet, progress() as drawn:
        return legacy.preview(quiet, path, drawn, with_backup=with_backup) if _is_older(quiet) else None


def _migrate(path: Path, *, with_backup: bool, as_json: bool) -> None:
    saved = None
    recover(path)  # or the backup, which may not write, could not read it
    with progress() as drawn:
        if with_backup:
            forget_abandoned(path.parent, rotation.like(path))
            saved = reuse.find(path.parent, path)
        legacy.refuse_too_little_room(path, with_backup=with_backup and saved is None)
        if with_backup:
            saved = saved or backups.back_up_into(path.parent, path, _local_now(), watch=drawn)
            if not as_json:
                click.echo(f"[OK] Verified backup of {counted(saved.rows, 'row')}: {saved.path}")
        done = legacy.migrate_file(path, format_timestamp(utc_now()), drawn)
    _report_migration(path, done, dry_run=False, as_json=as_json, backup=saved)


def _report_migration(
    path: Path,
    done: legacy.Migration | None,
    *,
    dry_run: bool,
    as_json: bool,
    backup: backups.Backup | None = None,
) -> None:
    if done is not None and as_json:
        print_json(_migration_as_json(path, done, dry_run=dry_run, backup=backup))
    elif done is not None:
        _print_migration(path, done, dry_run=dry_run)
    elif as_json:
        print_json({"database": path, "version": current_version(), "migrated": False, "dry_run": dry_run})
    else:
        click.echo(f"{path} has the current schema version {current_version()}; there is nothing to do.")


def _migration_as_json(
    path: Path, done: legacy.Migration, *, dry_run: bool, backup: backups.Backup | None
) -> dict[str, Any]:
    return {
        "database": path,
        "dry_run": dry_run,
        "migrated": not dry_run,
        "from_version": done.layout.version,
        "recorded_version": done.layout.recorded,
        "version": current_version(),
        "rows": done.rows,
        "steps": done.layout.steps(),
        "kept_tables": done.layout.kept,
        "aside_tables": done.layout.aside,
        **done.counts(),
        "compacted": done.compacted,
        "needs_bytes": done.room.needed if done.room else None,
        "free_bytes": done.room.free if done.room else None,
        "remarks": done.remarks,
        "backup": backup.path if backup else None,
    }


def _print_migration(path: Path, done: legacy.Migration, *, dry_run: bool) -> None:
    layout = done.layout
    recorded = "" if layout.recorded in (None, layout.version) else f" (recorded as {layout.recorded})"
    click.echo(f"{_RULE}\nDATABASE MIGRATION: Schema v{layout.version} → v{current_version()}\n{_RULE}")
    click.echo(f"Database: {path}\nDry run: {dry_run}\nCurrent schema version: {layout.version}{recorded}")
    click.echo(f"Total rows to migrate: {layout.rows}")
    if done.room is not None:
        click.echo(f"Room on the disk: up to {size(done.room.needed)} for a moment, of {size(done.room.free)} free")
    click.echo("")
    if dry_run:
        click.echo("[DRY RUN] Would perform the following changes:")
    for number, step in enumerate(layout.steps(), 1):
        click.echo(f"  {number}. {step}" if dry_run else f"Step {number}: {step}...\n[OK]")
    counts = done.counts()
    for title, name in (("Values normalised", "normalised"), ("Values kept in unconverted_values", "kept_aside")):
        if counts[name]:
            click.echo(f"\n{title}:")
        for line in counts[name]:
            click.echo(f"  {line['values']:>10}  {line['field']}: {line['kind']}")
    for remark in done.remarks:
        click.echo(f"\n{remark}")
    if not dry_run:
        rows = counted(done.rows, "row")
        click.echo(f"\n[SUCCESS] Migration completed successfully! {rows}, schema version {current_version()}")


# --- backup and restore --------------------------------------------------------------------------


@click.command(
    help=r"""Copy the database to DEST while the daemon writes to it.

    The copy is verified before it gets its name, and never replaces a file.
    If DEST is a directory, the file in it is named by the time: telemetry_backup_20251224_100000.sqlite.

    \b
    Examples:
      telemetryd backup /backups/telemetry --keep 7
      telemetryd backup /backups/telemetry --keep 7 --zstd --json
      telemetryd backup before-upgrade.sqlite
    """
)
@click.argument("dest", metavar="DEST", type=click.Path())
@click.option("--keep", type=click.IntRange(1), metavar="N", help="Keep only the newest N backups in DEST.")
@click.option(
    "--zstd", "compress", is_flag=True, help="Compress with Zstandard, as for a DEST that is a file named ….zst."
)
@json_flag
@settings_flags("db_path")
def backup(dest: str, keep: int | None, compress: bool, as_json: bool, **flags: Any) -> None:
    destination = Path(dest)
    settings = load_settings(flags).settings
    with failing():
        shared_database.refuse(settings)
    path = settings.db_path.absolute()
    is_directory = destination.is_dir()
    if keep is not None and not is_directory:
        raise click.UsageError(f"--keep needs a directory, and {destination} is none")
    with failing(), progress() as drawn:
        refuse_missing(path)
        place = destination.absolute()
        if dest.endswith(os.sep) and not is_directory:
            raise DatabaseError(f"The directory {place} does not exist; make it: mkdir -p {place}")
        done = (
            backups.back_up_into(place, path, _local_now(), compress=compress, watch=drawn)
            if is_directory
            else backups.backup(path, place, compress=compress or place.suffix == ".zst", watch=drawn)
        )
        removed = rotation.rotate(place, path, keep, done.path) if keep is not None else []
    if as_json:
        print_json(
            {
                "path": done.path,
                "bytes": done.bytes,
                "rows": done.rows,
                "seconds": round(done.seconds, 3),
                "blocked_writes": done.blocked_writes,
                "removed": removed,
            }
        )
        return
    click.echo(f"{done.path}: {counted(done.rows, 'row')}, {size(done.bytes)}, verified, {done.seconds:.1f} s")
    if done.blocked_writes:
        click.echo("Writes waited for the copy; with TELEMETRY_DB_JOURNAL_MODE=WAL they need not.", err=True)
    for old in removed:
        click.echo(f"Removed {old}")


def _empty(path: Path) -> DatabaseError:
    return DatabaseError(f"{path} is empty: telemetryd serve makes a new database of it, or restore a backup")


def refuse_missing(path: Path, *, by_address: bool = False) -> None:
    """Stop if there is no database, or none in its file, or if a daemon has it open by another name.

    Args:
        path: the database.
        by_address: whether the command could also be given the address of a daemon.

    Raises:
        DatabaseError: then.

    """
    path = path.absolute()
    if not path.is_file():
        other = ", or a running daemon with --url (TELEMETRY_API_URL)" if by_address else ""
        raise DatabaseError(f"There is no database at {path}; name it with --db-path (TELEMETRY_DB_PATH){other}")
    if path.stat().st_size == 0 and not is_unfinished(path):
        raise _empty(path)
    refuse_other_name(path)


@click.command(
    help=r"""Put a backup in the database's place.

    The backup, also a compressed one, is verified first, and the old file is kept next to it. A running daemon must be
    stopped before.

    \b
    Examples:
      systemctl stop telemetryd
      telemetryd restore /backups/telemetry/telemetry_backup_20251224_100000.sqlite
      systemctl start telemetryd
    """
)
@click.argument("source", metavar="SRC", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@json_flag
@settings_flags(*DATABASE_SETTINGS)
def restore(source: Path, as_json: bool, **flags: Any) -> None:
    settings = load_settings(flags).settings
    with failing():
        shared_database.refuse(settings)
        _refuse_in_use(source, settings.db_path)
    with failing(), owned(settings) as path, progress() as drawn:
        forget_leftovers(path)
        content, aside = backups.restore(source, path, _local_now(), drawn, partial(_refuse_harmful, source))
    kept = aside if aside.exists() else None
    needs_migration = not content.ours or content.version < current_version()
    if as_json:
        print_json({"database": path, "rows": content.rows, "old_file": kept, "needs_migration": needs_migration})
        return
    click.echo(f"{path}: {counted(content.rows, 'row')}, verified")
    if kept is not None:
        click.echo(f"The old file is kept as {kept}")
    if needs_migration:
        click.echo("It has an older schema; before the daemon starts, run: telemetryd migrate")


def _refuse_harmful(source: Path, connection: sqlite3.Connection, content: backups.Content) -> None:
    """Stop if what others have put into a database of ours can harm what is stored; a migration drops older ones.

    Raises:
        DatabaseError: then.

    """
    if content.ours:
        is_current = content.version == current_version()
        if is_current:
            check_schema(connection, source)
        foreign.refuse_harmful(connection, source, is_current=is_current)


def _refuse_in_use(source: Path, database: Path) -> None:
    """Stop if a file is no backup but a database at work, of which a plain copy may be torn.

    Raises:
        DatabaseError: then.

    """
    if source.resolve() == database.resolve() or (database.exists() and source.samefile(database)):
        raise DatabaseError(f"{source} is the database itself; give a backup of it")
    if owner := Ownership(source, None).holder():
        raise DatabaseError(f"{source} is in use by {owner}; copy it first: telemetryd backup COPY --db-path {source}")


# --- check ---------------------------------------------------------------------------------------


@click.command(
    help=r"""Examine the database, and repair it on request.

    That is its integrity, schema, totals, foreign keys, and the index of every documented query. Without --repair
    nothing is changed and the daemon may run; only what a crash cut off is undone, as by any program that opens the
    file. Exit status 1 means that something was found, or that it could not be examined.

    \b
    Examples:
      telemetryd check
      telemetryd check --json | jq '.findings'
      systemctl stop telemetryd && telemetryd check --repair
    """
)
@click.option("--repair", is_flag=True, help="Fix indexes and totals; of a damaged file save what can be read.")
@json_flag
@settings_flags(*DATABASE_SETTINGS)
def check(repair: bool, as_json: bool, **flags: Any) -> None:
    settings = load_settings(flags).settings
    if settings.db_url is not None:
        sys.exit(shared_database.check(settings, repair=repair, as_json=as_json))
    with failing(), progress() as drawn:
        refuse_missing(settings.db_path)
        done: dict[str, Any] = {}
        if repair:
            with owned(settings) as path:
                done = _repair(path, drawn)
        path = settings.db_path.absolute()
        findings = checks.examine(path, drawn)
    bad = [finding for finding in findings if finding.severity is not checks.Severity.NOTE]
    if as_json:
        print_json({"database": path, "ok": not bad, "findings": findings, **done})
    else:
        for line in done.get("repaired", []):
            click.echo(f"repaired: {line}")
        for finding in findings:
            click.echo(f"{finding.severity}: {finding.check}: {finding.text} → {finding.advice}")
        if not bad:
            click.echo(f"{path}: ok")
    if bad:
        sys.exit(EXIT_FAILURE)


def _repair(path: Path, drawn: Progress) -> dict[str, Any]:
    """Fix in place what can be; otherwise save what can be read into a new file."""
    forget_leftovers(path)
    if not any(finding.severity is checks.Severity.DAMAGE for finding in checks.examine(path, drawn)):
        return {"repaired": checks.repair(path, drawn)}
    done = salvage(path, _local_now(), drawn)
    lines = [str(table) for table in done.tables if table.there != 0]
    if done.rejected:
        lines.append(
            f"{counted(done.rejected, 'row')} read, but not saved: no longer a run, or with the event_id of another one"
        )
    if not done.is_schema_whole:
        lines.append("part of the schema cannot be read: tables of your own may be missing")
    lines.append(f"the damaged file is kept as {done.aside}")
    return {
        "repaired": lines,
        "saved": done.runs.saved,
        "lost": done.runs.lost,
        "rejected": done.rejected,
        "tables": [_saved_as_json(table) for table in done.tables],
        "old_file": done.aside,
    }


def _saved_as_json(table: Saved) -> dict[str, Any]:
    return {
        "table": table.table,
        "there": table.there,
        "is_estimate": table.is_estimate,
        "saved": table.saved,
        "lost": table.lost,
    }
