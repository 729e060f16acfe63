"""The nightly backup unit, its drop-ins and the restore drill, with a folder as the other machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.needs import require_program
from tests.test_operations import Room, blocks_of, room
from tests.tools import oneshot

__all__ = ["room"]

pytestmark = pytest.mark.sqlite
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "how-to" / "backups.md"

_SYSTEMCTL = f"""#!/bin/bash
case "$*" in
    daemon-reload | "enable --now telemetryd-backup.timer") ;;
    "start telemetryd-backup.service")
        cd {ROOT} && exec {sys.executable} -m tests.tools.oneshot "$ROOM/telemetryd-backup.service" \\
            "$ROOM/systemd/telemetryd-backup.service.d" "$ROOM" ;;
    *) exec "$ROOM/bin/systemctl-of-the-daemon" "$@" ;;
esac
"""


@pytest.fixture
def machine(room: Room) -> Room:
    """The room of the handbook, with the nightly unit and a folder that stands for the other machine."""
    for program in ("restic", "rclone"):
        require_program(program, program)
    bin_ = room.folder / "bin"
    (bin_ / "systemctl").rename(bin_ / "systemctl-of-the-daemon")
    (bin_ / "systemctl").write_text(_SYSTEMCTL)
    (bin_ / "install").write_text((bin_ / "install").read_text().replace("|| exit 2", '|| exec /usr/bin/install "$@"'))
    for name in ("systemctl", "install"):
        (bin_ / name).chmod(0o755)
    examples = room.folder / "examples"
    (room.folder / "copies").mkdir()
    room.places = {
        "/var/backups/telemetryd": str(room.folder / "nightly"),
        "/usr/share/doc/telemetryd/examples": str(examples),
        "/etc/systemd/system": str(room.folder / "systemd"),
        "/etc/telemetryd": str(room.folder / "settings"),
        "/srv/copies": str(room.folder / "copies"),
        "-o telemetry -g telemetry": "-o telemetry",
        **room.places,
    }
    room.environment |= {"TMPDIR": str(room.folder), "HOME": str(room.folder)}
    for source in (*(ROOT / "examples" / "backup").iterdir(), ROOT / "telemetryd-backup.service"):
        target = room.folder / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text()
        for there, here in room.places.items():
            text = text.replace(there, here)
        target.write_text(text)
        target.chmod(source.stat().st_mode)
    room.run("systemctl start")
    post = room.run("curl -fsS http://localhost:8765/api/v1/runs -H 'Content-Type: application/json' -d '" + _RUN + "'")
    assert post.returncode == 0, post.stderr
    return room


_RUN = '{"event_id": "a", "run_id": "r", "start_time": "2026-01-01T00:00:00Z", "agent_name": "a", "job_type": "j"}'


def test_every_command_of_the_page_works_and_what_is_fetched_is_what_was_stored(machine: Room) -> None:
    for block in blocks_of(PAGE, "bash"):
        done = machine.run(block)
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
    assert {path.suffix for path in (machine.folder / "copies" / "files").iterdir()} == {".sqlite", ".zst"}
    assert machine.run("curl -fsS http://localhost:8765/api/v1/runs | jq -r '.[].event_id'").stdout == "a\n"
    assert not list(machine.folder.glob("telemetryd-drill.*"))


def test_the_drill_fails_if_there_is_no_copy_or_only_an_old_or_a_damaged_one(machine: Room) -> None:
    drill = "/usr/share/doc/telemetryd/examples/backup/restore-drill"
    assert "no backup was fetched" in machine.run(f"{drill} true").stderr
    assert machine.run(f"{drill} false").returncode == 1
    assert machine.run("mkdir /srv/copies/files && telemetryd backup /srv/copies/files").returncode == 0
    fetch = f"{drill} cp -a /srv/copies/files/. ."
    assert machine.run(fetch).returncode == 0
    [copy] = (machine.folder / "copies" / "files").iterdir()
    whole = copy.read_bytes()
    copy.write_bytes(whole[: len(whole) // 2])
    assert machine.run(fetch).returncode == 1
    copy.write_bytes(whole)
    os.utime(copy, (time.time() - 27 * 3600,) * 2)
    done = machine.run(fetch)
    assert (done.returncode, "older than 26 hours" in done.stderr) == (1, True)
    assert machine.run(f"MAX_AGE_HOURS=30 {fetch}").returncode == 0


def test_a_copy_that_fails_fails_the_unit_and_nothing_after_it_runs(machine: Room) -> None:
    drop_ins = machine.folder / "drop-ins"
    drop_ins.mkdir()
    (drop_ins / "copy.conf").write_text("[Service]\nExecStart=\nExecStart=false\nExecStart=touch %C/ran\n")
    with pytest.raises(subprocess.CalledProcessError):
        oneshot.run(machine.folder / "telemetryd-backup.service", drop_ins, machine.folder)
    assert not (machine.folder / "ran").exists()


@pytest.mark.parametrize("example", ["restic.conf", "rclone.conf", "postgresql.conf"])
def test_a_drop_in_adds_only_settings_that_systemd_knows(example: str, tmp_path: Path) -> None:
    require_program("systemd-analyze", "systemd")
    place = tmp_path / "telemetryd-backup.service.d"
    place.mkdir()
    (place / "copy.conf").write_text((ROOT / "examples" / "backup" / example).read_text())
    for name in ("telemetryd-backup.service", "telemetryd-backup.timer"):
        text = (
            (ROOT / name)
            .read_text()
            .replace("ExecStart=telemetryd", f"ExecStart={Path(sys.executable).with_name('telemetryd')}")
        )
        (tmp_path / name).write_text(text)
    conf = (place / "copy.conf").read_text()
    for program in ("telemetryd", "pg_dump", "restic", "rclone"):  # which need not be here
        conf = conf.replace(f"ExecStart={program} ", "ExecStart=true ")
    (place / "copy.conf").write_text(conf)
    analyze = [
        "systemd-analyze",
        "verify",
        str(tmp_path / "telemetryd-backup.timer"),
        str(tmp_path / "telemetryd-backup.service"),
    ]
    done = subprocess.run(analyze, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
