"""The commands that rewrite files, and what has to be true of the files at every moment of each."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Protocol

from telemetryd.engine.sqlite.tools import backup, migrate
from telemetryd.errors import DatabaseError
from tests.faults.load import Findings, damage
from tests.tools.fill import make_database
from tests.tools.old_databases import make_old_database

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

NAME = "telemetry.sqlite"


class Chore(Protocol):
    """A command, the files that it is given, and the check of what it left."""

    fault: str

    def prepare(self, folder: Path, runs: int) -> None:
        """Make the files that the command is given, with so many runs."""

    def arguments(self, folder: Path) -> list[str]:
        """Return what stands after `telemetryd` on the command line."""

    def check(self, folder: Path, runs: int, findings: Findings, *, finished: bool) -> None:
        """Look at the files after the command was cut off, or (`finished`) after it has said that all is done."""


def _current(path: Path, findings: Findings) -> set[str]:
    """Return the event ids of a database of the current schema, and note what is wrong with it."""
    with closing(sqlite3.connect(path)) as connection:
        for problem in damage(connection):
            findings.note("unrecovered", f"{path.name}: {problem}")
        names = [row[0] for row in connection.execute("SELECT event_id FROM agent_runs NOT INDEXED")]
    if len(names) != len(set(names)):
        findings.note("duplicated", path.name, len(names) - len(set(names)))
    return set(names)


def _expect(is_so: bool, what: str, findings: Findings) -> None:
    if not is_so:
        findings.note("unrecovered", what)


class Migrate:
    """The old layout or the current one, with every run."""

    fault = "migrate"

    def prepare(self, folder: Path, runs: int) -> None:
        make_old_database(folder / NAME, "v5", rows=runs)

    def arguments(self, folder: Path) -> list[str]:
        return ["migrate", "--no-backup", "--db-path", str(folder / NAME)]

    def check(self, folder: Path, runs: int, findings: Findings, *, finished: bool) -> None:
        path = folder / NAME
        with closing(sqlite3.connect(path)) as connection:
            names = {row[1] for row in connection.execute("PRAGMA table_info(agent_runs)")}
            is_new = connection.execute("PRAGMA user_version").fetchone()[0] == migrate.current_version()
            stored = {row[0] for row in connection.execute("SELECT run_id FROM agent_runs")}
            if is_new:
                migrate.check_schema(connection, path)
            else:
                finding = connection.execute("PRAGMA integrity_check").fetchone()[0]
                _expect(finding == "ok", f"integrity_check: {finding}", findings)
        if lost := {f"run-{number}" for number in range(runs)} - stored:
            findings.note("lost", f"{len(lost)} runs", len(lost))
        _expect(("event_id" in names) is is_new, "neither old nor new", findings)
        _expect(is_new or not finished, "old again after migrate has succeeded", findings)
        if is_new:
            _current(path, findings)


class Backup:
    """The source as it was, and no backup or a whole one."""

    fault = "backup"

    def prepare(self, folder: Path, runs: int) -> None:
        make_database(folder / NAME, runs)

    def arguments(self, folder: Path) -> list[str]:
        return ["backup", str(folder / "copy.sqlite"), "--db-path", str(folder / NAME)]

    def check(self, folder: Path, runs: int, findings: Findings, *, finished: bool) -> None:
        if len(_current(folder / NAME, findings)) != runs:
            findings.note("lost", "runs of the source")
        copy = folder / "copy.sqlite"
        if copy.exists():
            try:
                _expect(backup.verify(copy).rows == runs, "a backup without some of the runs", findings)
            except DatabaseError as error:
                findings.note("unrecovered", f"half a backup: {error}")
            copy.unlink()  # so that the command can be repeated
        elif finished:
            findings.note("lost", "the backup, after backup has succeeded")


class Restore:
    """The old database or the restored one; once it is restored, the old one is kept, with what its log held."""

    fault = "restore"

    def prepare(self, folder: Path, runs: int) -> None:
        make_database(folder / NAME, runs)
        crashed = make_database(folder / "crashed.sqlite", runs + 7)
        with closing(sqlite3.connect(crashed)) as connection, connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            connection.execute("UPDATE agent_runs SET updated_at = created_at")
            connection.commit()
            for suffix in ("", "-wal"):  # as a killed daemon leaves it
                shutil.copyfile(f"{crashed}{suffix}", folder / f"old{suffix}")
        for path in folder.glob("crashed.sqlite*"):
            path.unlink()
        (folder / NAME).rename(folder / "backup.sqlite")
        (folder / "old").rename(folder / NAME)
        (folder / "old-wal").rename(folder / f"{NAME}-wal")

    def arguments(self, folder: Path) -> list[str]:
        return ["restore", str(folder / "backup.sqlite"), "--db-path", str(folder / NAME)]

    def check(self, folder: Path, runs: int, findings: Findings, *, finished: bool) -> None:
        stored = len(_current(folder / NAME, findings))
        _expect(stored in (runs, runs + 7), f"{stored} runs are neither the old nor the restored ones", findings)
        if stored == runs:
            kept = [len(_current(path, findings)) for path in folder.glob(f"{NAME}.before-*") if _is_whole_name(path)]
            if runs + 7 not in kept:
                findings.note("lost", f"the old database; kept aside are {kept}")
        elif finished:
            findings.note("lost", "the restored database, after restore has succeeded")


def _is_whole_name(path: Path) -> bool:
    return not path.name.endswith(("-wal", "-shm", "-journal"))


class Prune:
    """Every run is in the database, or in a whole archive, or in both; at the end not in both."""

    fault = "prune --archive"

    def prepare(self, folder: Path, runs: int) -> None:
        make_database(folder / NAME, runs)

    def arguments(self, folder: Path) -> list[str]:
        number = len(list(folder.glob("archive-*.zst")))
        archive = str(folder / f"archive-{number}.zst")
        return ["prune", "--older-than", "60d", "--archive", archive, "--db-path", str(folder / NAME)]

    def check(self, folder: Path, runs: int, findings: Findings, *, finished: bool) -> None:
        kept = _current(folder / NAME, findings)
        archived: set[str] = set()
        for archive in folder.glob("archive-*.zst"):
            try:
                with zstd.open(archive, "rb") as packed:
                    archived |= {json.loads(line)["event_id"] for line in packed}
            except (EOFError, zstd.ZstdError, json.JSONDecodeError) as error:
                findings.note("unrecovered", f"half an archive: {error}")
        if lost := runs - len(kept | archived):
            findings.note("lost", f"{lost} runs are neither in the database nor in an archive", lost)
        if finished and kept & archived:
            findings.note("lost", "what prune has deleted is back")


CHORES: tuple[Chore, ...] = (Migrate(), Backup(), Restore(), Prune())
