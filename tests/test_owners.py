"""Whose the files are, and who may read them, after root has run a command."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from telemetryd.cli.transfer import _opened
from telemetryd.engine.sqlite import partials
from telemetryd.engine.sqlite.tools import backup, salvage
from telemetryd.errors import DatabaseError
from tests.conftest import StartDaemon, make_run
from tests.http_client import post
from tests.tools.fill import make_database
from tests.tools.old_databases import make_old_database
from tests.tools.process import telemetryd

SERVICE = 12_345
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


def give_away(*paths: Path) -> None:
    for path in paths:
        os.chown(path, SERVICE, SERVICE)


def wrong(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Return the files that the service could not open, or that others can read."""
    found = {}
    for path in folder.rglob("*"):
        status = path.stat()
        if path.is_file() and (status.st_uid, status.st_gid, status.st_mode & 0o777) != (SERVICE, SERVICE, 0o600):
            found[path.name] = (status.st_uid, status.st_gid, stat.filemode(status.st_mode))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make the folder of a service."""
    folder = tmp_path / "service"
    folder.mkdir()
    give_away(folder)
    return folder


def test_a_file_that_others_could_read_is_private_after_its_migration(tmp_path: Path) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", "v7")
    path.chmod(0o644)
    telemetryd("migrate", "--db-path", path)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}


@only_root
def test_what_root_migrates_backs_up_and_restores_stays_the_services(folder: Path, tmp_path: Path) -> None:
    path = make_old_database(folder / "telemetry.sqlite", "v5", wal=True)
    path.chmod(0o644)
    give_away(path)
    telemetryd("migrate", "--db-path", path)
    backups = folder / "backups"
    backups.mkdir()
    for flags in ([], ["--zstd"]):
        telemetryd("backup", backups, *flags, "--db-path", path)
    for source in backups.iterdir():
        telemetryd("restore", source, "--db-path", path)
    elsewhere = tmp_path / "run.lock"
    telemetryd("check", "--repair", "--db-path", path, "--lock-file", elsewhere)
    assert elsewhere.stat().st_uid == SERVICE
    assert wrong(folder) == {}


@only_root
def test_what_root_serves_exports_and_archives_is_the_services(
    folder: Path, tmp_path: Path, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(folder=folder, TELEMETRY_DB_JOURNAL_MODE="WAL", TELEMETRY_API_UNIX="none")
    post(daemon.url, make_run(created_at="2020-01-01T00:00:00Z"))
    assert {path.name for path in folder.iterdir()} >= {"telemetry.sqlite", "telemetry.sqlite-wal"}
    assert wrong(folder) == {}
    telemetryd("export", folder / "runs.ndjson", "--url", daemon.url)
    telemetryd("export", tmp_path / "roots.ndjson", "--url", daemon.url)
    assert daemon.stop() == 0
    archive = ("prune", "--older-than", "30d", "--archive", folder / "old.ndjson.zst")
    telemetryd(*archive, "--db-path", daemon.database)
    assert {"runs.ndjson", "old.ndjson.zst"} <= {path.name for path in folder.iterdir()}
    assert wrong(folder) == {}
    assert (tmp_path / "roots.ndjson").stat().st_uid == os.geteuid()
    made = folder / "made" / "telemetry.sqlite"
    daemon = start_daemon(folder=folder, TELEMETRY_DB_PATH=str(made), TELEMETRY_API_UNIX="none")
    assert daemon.url
    assert made.parent.stat().st_uid == SERVICE
    assert wrong(folder) == {}


@only_root
def test_what_root_salvages_or_restores_into_an_empty_folder_is_the_services(folder: Path, tmp_path: Path) -> None:
    path = make_database(folder / "telemetry.sqlite", 400)
    path.chmod(0o600)
    give_away(path)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(os.urandom(20_000))
    telemetryd("check", "--repair", "--db-path", path)
    assert list(folder.glob("telemetry.sqlite.before-*"))
    assert wrong(folder) == {}
    for left in folder.iterdir():
        left.unlink()
    telemetryd("restore", make_database(tmp_path / "other.sqlite", 3), "--db-path", path)
    assert wrong(folder) == {}


# --- Another user's folder -----------------------------------------------------------------------


def export(_source: Path, destination: Path) -> None:
    with _opened(str(destination), "ndjson") as out:
        out.write(b"{}\n")


def export_packed(_source: Path, destination: Path) -> None:
    export(_source, destination.with_suffix(".gz"))


def back_up(source: Path, destination: Path) -> None:
    backup.backup(source, destination)


def back_up_packed(source: Path, destination: Path) -> None:
    backup.backup(source, destination, compress=True)


def restore(source: Path, destination: Path) -> None:
    backup.restore(source, destination, datetime.now(UTC))


def repair(source: Path, destination: Path) -> None:
    destination.write_bytes(source.read_bytes())
    salvage.salvage(destination, datetime.now(UTC))


@pytest.mark.parametrize("make", [export, export_packed, back_up, back_up_packed, restore, repair])
@pytest.mark.parametrize(("module", "step"), [(partials, "_make"), (os, "fsync"), (os, "link")])
def test_what_is_put_in_the_place_of_an_unfinished_file_is_neither_written_nor_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path, Path], None], module: Any, step: str
) -> None:
    source = make_database(tmp_path / "telemetry.sqlite", 5)
    folder, victim = tmp_path / "others", tmp_path / "precious"
    folder.mkdir()
    victim.write_bytes(b"precious")
    usual = getattr(module, step)

    def swap(*arguments: Any) -> Any:
        done = usual(*arguments) if step != "link" else None
        for path in folder.glob(".*.partial"):
            path.unlink()
            path.symlink_to(victim)
        return usual(*arguments) if step == "link" else done

    if step == "link" and make is restore:  # into an empty folder it gives no second name
        (folder / "made.sqlite").write_bytes(source.read_bytes())
    monkeypatch.setattr(module, step, swap)
    with pytest.raises(DatabaseError, match="something else in the place of"):
        make(source, folder / "made.sqlite")
    assert victim.read_bytes() == b"precious"
    assert not any(path.is_symlink() for path in folder.iterdir())
