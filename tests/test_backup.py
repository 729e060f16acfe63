from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from backports import zstd

from telemetryd.engine.sqlite.ownership import Ownership
from telemetryd.engine.sqlite.partials import forget_leftovers, partial_file
from telemetryd.engine.sqlite.tools import backup, migrate, reuse, rotation
from tests.conftest import Daemon, StartDaemon, make_run, wait_until
from tests.faults.hot_journal import cut_off_growing
from tests.tools.fill import make_database
from tests.tools.process import telemetryd


def rows(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return int(connection.execute("SELECT count(*) FROM agent_runs").fetchone()[0])


@contextmanager
def posting(daemon: Daemon) -> Iterator[list[float]]:
    """Post run after run in a thread; give the seconds each took."""
    stop, seconds = threading.Event(), []
    url = daemon.url

    def post() -> None:
        while not stop.is_set():
            request = urllib.request.Request(
                f"{url}/api/v1/runs", json.dumps(make_run()).encode(), {"Content-Type": "application/json"}
            )
            started = time.perf_counter()
            with urllib.request.urlopen(request) as response:
                assert response.status == 201
            seconds.append(time.perf_counter() - started)

    thread = threading.Thread(target=post)
    thread.start()
    try:
        yield seconds
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_a_live_database_is_copied_while_runs_come_in(start_daemon: StartDaemon, tmp_path: Path, mode: str) -> None:
    make_database(tmp_path / "telemetry.sqlite", 5_000)
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE=mode)
    with posting(daemon) as seconds:
        wait_until(lambda: len(seconds) > 5)
        done = json.loads(telemetryd("backup", tmp_path / "copy.sqlite", "--json", "--db-path", daemon.database).stdout)
    assert 5_000 < done["rows"] < 5_000 + len(seconds)
    assert rows(tmp_path / "copy.sqlite") == done["rows"]
    assert oct((tmp_path / "copy.sqlite").stat().st_mode)[-3:] == "600"
    if mode == "WAL":
        assert not done["blocked_writes"]
    assert daemon.stop() == 0


def test_backups_rotate_and_are_compressed(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 500)
    folder = tmp_path / "backups"
    folder.mkdir()
    (folder / "telemetry_backup_of_mine.sqlite").touch()
    for day in ("20250101", "20250102", "20250103"):
        shutil.copyfile(path, folder / f"telemetry_backup_{day}_000000.sqlite")
    done = json.loads(telemetryd("backup", folder, "--keep", "2", "--zstd", "--json", "--db-path", path).stdout)
    left = sorted(file.name for file in folder.iterdir())
    assert left == [
        "telemetry_backup_20250103_000000.sqlite",
        Path(done["path"]).name,
        "telemetry_backup_of_mine.sqlite",
    ]
    assert done["path"].endswith(".sqlite.zst")
    out = telemetryd("restore", done["path"], "--db-path", tmp_path / "new.sqlite").stdout
    assert "500 runs" in out or "500 rows" in out
    assert rows(tmp_path / "new.sqlite") == 500


def test_a_backup_never_replaces_a_file(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 5)
    assert "exists already" in telemetryd("backup", path, "--db-path", path, status=1).stderr
    assert telemetryd("backup", tmp_path / "x" / "y", "--db-path", path, status=1).stderr
    assert telemetryd("backup", tmp_path, "--db-path", tmp_path / "none", status=1).stderr
    assert telemetryd("backup", tmp_path / "new", "--keep", "2", "--db-path", path, status=2).stderr


def test_a_damaged_source_gives_no_backup(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 2000)
    damage(path)
    assert "damaged" in telemetryd("backup", tmp_path / "copy.sqlite", "--db-path", path, status=1).stderr
    assert [file.name for file in tmp_path.iterdir() if "copy" in file.name] == []


def test_restore_keeps_the_old_file_and_refuses_while_a_daemon_runs(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 20)
    copy = tmp_path / "copy.sqlite"
    telemetryd("backup", copy, "--db-path", path)
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    with posting(daemon) as seconds:
        wait_until(lambda: len(seconds) > 5)
    assert f"PID {daemon.process.pid}" in telemetryd("restore", copy, "--db-path", path, status=1).stderr
    daemon.process.kill()  # what is in the log only must stay with the old file
    daemon.process.wait()
    done = json.loads(telemetryd("restore", copy, "--json", "--db-path", path).stdout)
    assert rows(path) == done["rows"] == 20
    assert rows(Path(done["old_file"])) > 20
    daemon = start_daemon()
    assert daemon.url
    assert daemon.stop() == 0


def test_a_restore_through_a_symbolic_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    path = make_database(tmp_path / "disk" / "real.sqlite", 20)
    other = make_database(tmp_path / "other.sqlite", 30)
    link = tmp_path / "telemetry.sqlite"
    link.symlink_to(path)
    telemetryd("restore", other, "--db-path", link)
    assert link.is_symlink()
    assert rows(path) == 30


def test_each_of_two_restores_in_one_second_keeps_the_file_it_replaces(tmp_path: Path) -> None:
    path, source = make_database(tmp_path / "telemetry.sqlite", 20), make_database(tmp_path / "source.sqlite", 10)
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    kept = [backup.restore(source, path, moment)[1] for _ in range(2)]
    assert [file.name.partition(".before-")[2] for file in kept] == ["20260102_000000", "20260102_000000.2"]
    assert [rows(file) for file in kept] == [20, 10]


def test_a_bad_backup_is_not_restored(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 20)
    bad = make_database(tmp_path / "bad.sqlite", 2000)
    damage(bad)
    assert "damaged" in telemetryd("restore", bad, "--db-path", path, status=1).stderr
    (tmp_path / "noise").write_bytes(b"no database" * 1000)
    refusal = telemetryd("restore", tmp_path / "noise", "--db-path", path, status=1).stderr
    assert refusal == f"telemetryd: {tmp_path / 'noise'} is not a SQLite database; nothing was changed\n"
    (tmp_path / "torn.zst").write_bytes(b"(\xb5/\xfd torn")
    assert telemetryd("restore", tmp_path / "torn.zst", "--db-path", path, status=1).stderr
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as other:
        other.execute("CREATE TABLE t (x)")
    assert "no table agent_runs" in telemetryd("restore", tmp_path / "other.sqlite", "--db-path", path, status=1).stderr
    assert rows(path) == 20
    assert not list(tmp_path.glob("*.before-*"))
    assert not list(tmp_path.glob(".*partial*"))


def damage(path: Path) -> None:
    """Overwrite pages in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(os.urandom(40_000))


def test_a_restore_killed_between_its_steps_can_be_repeated(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 20)
    os.link(path, path.with_name("telemetry.sqlite.before-20250101_000000"))
    source = tmp_path / "source.sqlite"
    source.write_bytes(make_database(tmp_path / "other.sqlite", 30).read_bytes())
    telemetryd("restore", source, "--db-path", path)
    assert rows(path) == 30
    assert path.stat().st_nlink == 1


def test_unfinished_backups_go_after_a_day(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 5)
    old = [tmp_path / f".telemetry_backup_{number}.sqlite.0000000{number}.partial" for number in range(3)]
    shutil.copyfile(path, old[0])
    old[0].with_name(f"{old[0].name}-journal").touch()
    old[1].write_bytes(zstd.compress(path.read_bytes())[:5000])
    old[2].write_text('{"id": 1, "event_id": "e"')
    others = [tmp_path / name for name in (".mine.partial", ".a.b.01234567.partial", ".big.download.89abcdef.partial")]
    for other in others:
        other.write_bytes(b"" if other is others[1] else b"somebody else's")
    fresh = tmp_path / ".telemetry_backup_9.sqlite.00000009.partial"
    shutil.copyfile(path, fresh)
    for file in (*old, *others):
        os.utime(file, (1, 1))
    backup.backup(path, tmp_path / "copy.sqlite")
    kept = {"telemetry.sqlite", "copy.sqlite", fresh.name, *(other.name for other in others)}
    assert {file.name for file in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("hours", [-25, 25])
def test_a_disk_whose_clock_is_another_one_takes_no_unfinished_file_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 50)
    copy = backup._copy

    def copy_and_wait(source: Path, target: Path, watch: backup.Watch) -> tuple[bool, int | None]:
        done = copy(source, target, watch)
        there = target.stat().st_mtime + hours * 3600
        os.utime(target, (there, there))
        return done

    monkeypatch.setattr(backup, "_copy", copy_and_wait)
    assert backup.backup(path, tmp_path / "copy.sqlite.zst", compress=True).rows == 50


def test_what_a_restore_left_is_distinguished_from_the_files_of_others(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 5)
    left = [f".telemetry.sqlite.restored.01234567.partial{suffix}" for suffix in ("", "-wal")]
    others = [".telemetry.sqlite.csv.01234567.partial", ".telemetry.sqlite.partial", ".telemetry.sqlite.x.partial-wal"]
    for name in (*left, *others):
        (tmp_path / name).write_text("x")
    forget_leftovers(path)
    assert {file.name for file in tmp_path.iterdir()} == {"telemetry.sqlite", *others}


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("compress", [False, True])
def test_a_clock_that_is_set_back_costs_no_backup(tmp_path: Path, compress: bool) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 5)
    folder = tmp_path / "backups"
    folder.mkdir()
    ahead, behind = datetime(2026, 1, 9, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
    made = []
    for moment in (ahead, ahead, behind, behind, behind):  # also several within one second
        made.append(backup.back_up_into(folder, path, moment, compress=compress).path)
        removed = rotation.rotate(folder, path, 2, made[-1])
        assert made[-1] not in removed
        assert names_in(folder) == sorted(path.name for path in made[-2:])
    os.utime(made[-1], (1, 1))
    assert rotation.rotate(folder, path, 1, made[-2]) == []  # neither the one just made nor a later one


def test_only_backups_that_are_ours_rotate(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 5)
    folder = tmp_path / "backups"
    folder.mkdir()
    theirs = {
        "telemetry_backup_20250101_000000.sqlite": b"",
        "telemetry_backup_20250102_000000.sqlite": b"SQLite format 3\0 of the replaced service".ljust(200, b"\0"),
        "telemetry_backup_20250103_000000.sqlite.zst": b"something else",
        "other_backup_20250101_000000.sqlite": path.read_bytes(),
    }
    for name, content in theirs.items():
        (folder / name).write_bytes(content)
    (folder / "telemetry_backup_20250104_000000.sqlite").symlink_to(path)
    shutil.copyfile(path, folder / "telemetry_backup_20250105_000000.sqlite")  # of a version that wrote no number
    done = backup.back_up_into(folder, path, datetime(2024, 1, 1, tzinfo=UTC))
    assert [gone.name for gone in rotation.rotate(folder, path, 1, done.path)] == [
        "telemetry_backup_20250105_000000.sqlite"
    ]
    assert names_in(folder) == sorted([*theirs, "telemetry_backup_20250104_000000.sqlite", done.path.name])


def test_backups_of_one_second_all_succeed(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 5)
    folder = tmp_path / "backups"
    folder.mkdir()
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    with ThreadPoolExecutor(4) as threads:
        done = [*threads.map(lambda _: backup.back_up_into(folder, path, moment, compress=True), range(4))]
    assert names_in(folder) == sorted({made.path.name for made in done})
    assert len(done) == len(names_in(folder)) == 4
    assert all(made.rows == 5 for made in done)


def test_a_marked_backup_is_restored_without_its_mark(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 5)
    made = backup.back_up_into(tmp_path, path, datetime(2026, 1, 2, tzinfo=UTC), compress=True).path
    backup.restore(made, tmp_path / "new.sqlite", datetime(2026, 1, 3, tzinfo=UTC))
    with closing(sqlite3.connect(tmp_path / "new.sqlite")) as connection:
        assert connection.execute("SELECT count(*) FROM backup_mark").fetchone() == (0,)


def test_a_snapshot_of_an_owned_database_needs_no_lock(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 5)
    owner = Ownership(path, None)
    owner.acquire()
    try:
        assert backup.backup(path, tmp_path / "copy.sqlite").rows == 5
    finally:
        owner.release()


def test_a_restored_older_database_asks_for_migration(tmp_path: Path) -> None:
    old = make_database(tmp_path / "old.sqlite", 5)
    with closing(sqlite3.connect(old)) as connection:
        connection.execute(f"PRAGMA user_version = {migrate.current_version() - 1}")
    assert "telemetryd migrate" in telemetryd("restore", old, "--db-path", tmp_path / "telemetry.sqlite").stdout


def test_a_commit_that_was_cut_off_is_undone_before_the_copy(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 300)
    cut_off_growing(path)
    assert backup.backup(path, tmp_path / "copy.sqlite").rows == 300
    assert rows(tmp_path / "copy.sqlite") == 300


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_what_a_crash_left_next_to_the_source_is_restored_with_it(tmp_path: Path, mode: str) -> None:
    source = make_database(tmp_path / "copied.sqlite", 300)
    if mode == "WAL":
        with closing(sqlite3.connect(source)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("DELETE FROM agent_runs WHERE id > 200")
            connection.commit()
            crashed = tmp_path / "crashed"
            crashed.mkdir()
            for suffix in ("", "-wal"):
                (crashed / f"copied.sqlite{suffix}").write_bytes(Path(f"{source}{suffix}").read_bytes())
        source = crashed / "copied.sqlite"
    else:
        cut_off_growing(source)
    before = {path: path.read_bytes() for path in source.parent.glob("copied.sqlite*")}
    telemetryd("restore", source, "--db-path", tmp_path / "telemetry.sqlite")
    assert rows(tmp_path / "telemetry.sqlite") == (200 if mode == "WAL" else 300)
    assert {path: path.read_bytes() for path in source.parent.glob("copied.sqlite*")} == before
    assert not [path for path in tmp_path.iterdir() if "restored" in path.name]


def test_a_database_in_use_is_not_a_source(tmp_path: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    assert daemon.url
    refused = telemetryd("restore", daemon.database, "--db-path", tmp_path / "other.sqlite", status=1)
    assert "telemetryd backup" in refused.stderr
    assert not (tmp_path / "other.sqlite").exists()


def test_a_bad_source_is_called_by_its_own_name(tmp_path: Path) -> None:
    source = tmp_path / "photo.sqlite"
    source.write_bytes(b"SQLite format 3\0" + b"not a database" * 100)
    refused = telemetryd("restore", source, "--db-path", tmp_path / "telemetry.sqlite", status=1).stderr
    assert str(source) in refused
    assert ".partial" not in refused
    assert "check --repair --db-path" in refused  # without it, that would be the database and not the backup


def test_a_compressed_backup_is_known_by_its_content(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 30)
    telemetryd("backup", tmp_path / "monday.backup", "--zstd", "--db-path", path)
    telemetryd("restore", tmp_path / "monday.backup", "--db-path", tmp_path / "other.sqlite")
    assert rows(tmp_path / "other.sqlite") == 30


def test_a_name_that_ends_in_zst_is_compressed(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 30)
    telemetryd("backup", tmp_path / "copy.sqlite.zst", "--db-path", path)
    assert (tmp_path / "copy.sqlite.zst").read_bytes().startswith(b"\x28\xb5\x2f\xfd")
    telemetryd("restore", tmp_path / "copy.sqlite.zst", "--db-path", tmp_path / "other.sqlite")
    assert rows(tmp_path / "other.sqlite") == 30
    (tmp_path / "folder.zst").mkdir()
    telemetryd("backup", tmp_path / "folder.zst", "--db-path", path)
    assert [file.suffix for file in (tmp_path / "folder.zst").iterdir()] == [".sqlite"]


def test_a_folder_that_is_missing_does_not_become_a_file(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 5)
    refused = telemetryd("backup", f"{tmp_path}/backups/", "--db-path", path, status=1).stderr
    assert f"The directory {tmp_path}/backups does not exist" in refused
    assert not (tmp_path / "backups").exists()


def test_every_path_in_the_report_is_absolute(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 3)
    (tmp_path / "kept").mkdir()
    shutil.copyfile(path, tmp_path / "kept" / "telemetry_backup_20250101_000000.sqlite")
    done = telemetryd("backup", "kept", "--keep", "1", "--json", "--db-path", path, cwd=tmp_path)
    assert json.loads(done.stdout)["removed"] == [str(tmp_path / "kept" / "telemetry_backup_20250101_000000.sqlite")]


def test_what_killed_commands_left_goes_with_the_next_of_the_same_name(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 5)
    content, folder = path.read_bytes(), tmp_path / "backups"
    folder.mkdir()
    old = bytearray(content)
    old[68:72] = bytes(4)  # as that of a database of the replaced service
    killed = {
        ".telemetry_backup_20260101_000000.sqlite.00000001.partial": content,
        ".telemetry_backup_20260101_000000.sqlite.00000001.partial-journal": b"",
        ".telemetry_backup_20260101_000001.sqlite.00000002.partial": bytes(old),
        ".telemetry_backup_20260101_000002_2.sqlite.00000003.partial": bytes(8192),  # its first page is written last
        ".telemetry_backup_20260101_000003.sqlite.zst.packed.00000004.partial": zstd.compress(content)[:50],
    }
    others = {
        ".telemetry_backup_20260101_000004.sqlite.00000005.partial": b"somebody else's",
        ".other_backup_20260101_000004.sqlite.00000005.partial": content,
        ".telemetry_backup_20260101_000005.sqlite.00000006.partial": b"",  # another one may have just begun
        ".telemetry_backup_20260101_000005.sqlite.partial": content,
    }
    for name, bytes_there in (killed | others).items():
        (folder / name).write_bytes(bytes_there)
    done = backup.back_up_into(folder, path, datetime(2026, 1, 2, tzinfo=UTC), compress=True)
    assert set(names_in(folder)) == {done.path.name, *others}


@pytest.mark.parametrize(
    "begin", [b'{"id":1,"event_id":"e"', b"\xef\xbb\xbfid,event_id,run_id", b"PAR1\x15", zstd.compress(b"x" * 999)[:9]]
)
def test_what_a_killed_export_or_archive_left_goes_with_the_next(tmp_path: Path, begin: bytes) -> None:
    destination = tmp_path / "runs"
    (tmp_path / ".runs.01234567.partial").write_bytes(begin)
    (tmp_path / ".other.01234567.partial").write_bytes(begin)
    with partial_file(destination):
        assert not (tmp_path / ".runs.01234567.partial").exists()
    assert names_in(tmp_path) == [".other.01234567.partial"]


def test_what_is_being_made_is_no_leftover(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 5)
    script = (
        "import sys; from pathlib import Path; from telemetryd.engine.sqlite.partials import partial_file\n"
        "with partial_file(Path(sys.argv[1])) as partial:\n"
        "    path = partial.path; path.write_bytes(Path(sys.argv[2]).read_bytes())\n"
        "    print(path.name, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "copy.sqlite"), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        name = other.stdout.readline().strip()
        backup.backup(path, tmp_path / "copy.sqlite")
        assert name in names_in(tmp_path)
        other.kill()
    (tmp_path / "copy.sqlite").unlink()
    backup.backup(path, tmp_path / "copy.sqlite")
    assert name not in names_in(tmp_path)


def test_an_equal_backup_is_found_and_a_different_one_is_not(tmp_path: Path) -> None:
    path = make_database(tmp_path / "telemetry.sqlite", 500)
    assert reuse.find(tmp_path, path) is None
    made = backup.back_up_into(tmp_path, path, datetime(2026, 1, 2, tzinfo=UTC))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")  # says nothing of what it holds
    found = reuse.find(tmp_path, path)
    assert found is not None
    assert (found.path, found.rows) == (made.path, 500)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE agent_runs SET status = 'partial' WHERE id = 400")
    assert reuse.find(tmp_path, path) is None
