"""`telemetryd units`: runs of systemd's units from recorded journals, and from a real systemd in a namespace."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from telemetryd.client.unit_journal import UnitJournal
from tests.client.test_processes import environment, runs
from tests.conftest import Daemon, StartDaemon, wait_until
from tests.needs import require_program

RECORDED = Path(__file__).with_name("journal.jsonl")
"""Four units of a systemd 252; the entry on resources is of the form of 254."""
UNITS = (sys.executable, "-m", "telemetryd", "units")
JOURNALCTL = """#!{python}
# Answers from a recorded journal, as journalctl(1) does with these options.
import sys, time
given = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
assert "_PID" in given and "MESSAGE_ID" in given and given["--output"] == "json"
lines = open({journal!r}).read().splitlines()
cursor = given.get("--after-cursor")
if cursor is not None:
    places = [place for place, line in enumerate(lines) if '"__CURSOR": "%s"' % cursor in line]
    if not places:
        sys.exit("Failed to seek to cursor: Invalid argument")
    lines = lines[places[0] + 1 :]
print(*lines, sep="\\n", end="\\n" if lines else "", flush=True)
while "--follow" in given:
    time.sleep(0.1)
"""


class Recorded:
    """Keeps runs as the daemon would."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}

    def record(self, run: Mapping[str, Any]) -> str:
        self.runs.setdefault(run["event_id"], dict(run))
        return str(run["event_id"])

    def write(self, line: Mapping[str, Any]) -> bool:
        self.runs[line["event_id"]] |= line["fields"]
        return True


def entries() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDED.read_text("utf-8").splitlines()]


def by_agent(recorded: Recorded) -> dict[str, dict[str, Any]]:
    return {run["agent_name"]: run for run in recorded.runs.values()}


def read_all(journal: UnitJournal) -> None:
    for entry in entries():
        journal.read(entry)
    journal.settle()


def test_a_recorded_journal_becomes_runs() -> None:
    recorded = Recorded()
    journal = UnitJournal(recorded, lambda unit: unit.startswith("backup-"), {})
    read_all(journal)
    found = by_agent(recorded)
    assert {agent: run["status"] for agent, run in found.items()} == {
        "backup-a": "success",
        "backup-b": "failure",
        "backup-c": "timeout",
        "backup-d": "cancelled",
    }
    assert found["backup-b"]["error_summary"] == "exit-code: exit status 3"
    assert found["backup-b"]["metrics_json"] == {"exit_status": 3, "cpu_s": 0.023456, "max_memory_bytes": 4718592}
    assert found["backup-a"]["duration_ms"] == 344
    assert found["backup-a"]["host"] == "db1"
    assert all(run["start_time"] < run["end_time"] for run in found.values())
    assert journal.state()["open"] == {}


@pytest.mark.parametrize("seed", range(20))
def test_a_restart_at_any_place_changes_nothing(seed: int) -> None:
    """The state is saved with the cursor, and what follows the cursor is read again."""
    whole, parts = Recorded(), Recorded()
    read_all(UnitJournal(whole, lambda unit: True, {}))
    dice, state, saved = random.Random(seed), "{}", 0
    journal = UnitJournal(parts, lambda unit: True, {})
    place, crashes = 0, 0
    while place < len(entries()):
        journal.read(entries()[place])
        place += 1
        if dice.random() < 0.3:
            journal.settle()
            state, saved = json.dumps(journal.state()), place
        if dice.random() < 0.2 and crashes < 10:
            crashes += 1
            journal, place = UnitJournal(parts, lambda unit: True, json.loads(state)), saved
    journal.settle()
    for runs_of in (whole, parts):
        assert len(runs_of.runs) == 4
    wanted = {agent: (run["status"], run["start_time"], run["end_time"]) for agent, run in by_agent(whole).items()}
    assert {
        agent: (run["status"], run["start_time"], run["end_time"]) for agent, run in by_agent(parts).items()
    } == wanted


def test_a_run_that_began_before_it_was_read_is_recorded_at_its_end() -> None:
    recorded = Recorded()
    journal = UnitJournal(recorded, lambda unit: unit == "backup-b.service", {})
    for entry in entries():
        if entry["MESSAGE_ID"] != "7d4958e842da4a758f6c1cdc7b36dcc5":
            journal.read(entry)
    (run,) = recorded.runs.values()
    assert (run["status"], run["start_time"]) == ("failure", run["end_time"])
    assert "duration_ms" not in run


def test_runs_of_an_earlier_boot_end_as_failures() -> None:
    recorded = Recorded()
    journal = UnitJournal(recorded, lambda unit: True, {})
    first = entries()[0]
    journal.read(first)
    again = {**entries()[3], "_BOOT_ID": "0" * 32}
    journal.read(again)
    run = recorded.runs[f"systemd:{first['INVOCATION_ID']}"]
    assert (run["status"], run["error_summary"]) == ("failure", "the machine was restarted")


@pytest.fixture
def journalctl(tmp_path: Path) -> Path:
    """Put a stand-in for journalctl first on the path; return the journal that it reads."""
    journal = tmp_path / "journal.jsonl"
    journal.write_text(RECORDED.read_text("utf-8"), "utf-8")
    program = tmp_path / "bin" / "journalctl"
    program.parent.mkdir()
    program.write_text(JOURNALCTL.format(python=sys.executable, journal=str(journal)))
    program.chmod(0o755)
    return journal


def variables(daemon_url: str, buffer: Path, journal: Path) -> dict[str, str]:
    path = f"{journal.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return environment(daemon_url, buffer, PATH=path, TELEMETRY_FLUSH_TIMEOUT_S="0.2")


def read_once(url: str, buffer: Path, journal: Path, *more: str) -> subprocess.CompletedProcess[str]:
    line = [*UNITS, *more, "--once"]
    return subprocess.run(
        line, env=variables(url, buffer, journal), capture_output=True, text=True, timeout=60, check=False
    )


def test_the_place_is_saved_and_a_cursor_that_is_gone_begins_with_the_boot(
    start_daemon: StartDaemon, buffer: Path, journalctl: Path
) -> None:
    daemon = start_daemon()
    lines = journalctl.read_text().splitlines(keepends=True)
    journalctl.write_text("".join(lines[:5]))
    assert read_once(daemon.url, buffer, journalctl, "backup-*").returncode == 0
    place = json.loads((buffer / "units.json").read_text())
    assert place["cursor"] == json.loads(lines[4])["__CURSOR"]
    journalctl.write_text("".join(lines))
    assert read_once(daemon.url, buffer, journalctl, "backup-*").returncode == 0
    wait_until(lambda: all(run["status"] != "running" for run in runs(daemon.url)) and len(runs(daemon.url)) == 4)
    (buffer / "units.json").write_text(json.dumps({**place, "cursor": "vacuumed"}))
    done = read_once(daemon.url, buffer, journalctl, "backup-*")
    assert (done.returncode, done.stderr) == (
        0,
        "telemetryd units: Failed to seek to cursor: Invalid argument; begins with this boot\n",
    )
    assert len(runs(daemon.url)) == 4
    assert read_once(daemon.url, buffer, journalctl, "other").returncode == 0


def test_a_systemctl_that_does_not_answer_is_not_taken_for_a_no(
    start_daemon: StartDaemon, buffer: Path, journalctl: Path
) -> None:
    daemon = start_daemon()
    systemctl = journalctl.parent / "bin" / "systemctl"
    systemctl.write_text("#!/bin/sh\necho Transport endpoint is not connected >&2\nexit 1\n")
    systemctl.chmod(0o755)
    done = read_once(daemon.url, buffer, journalctl, "--all-timers")
    assert done.returncode == 1
    assert done.stderr.startswith("telemetryd units: systemctl does not say whether a timer starts backup-")
    assert done.stderr.endswith(": Transport endpoint is not connected\n")
    assert not (buffer / "units.json").exists()
    systemctl.write_text("#!/bin/sh\necho nightly.timer\n")
    assert read_once(daemon.url, buffer, journalctl, "--all-timers").returncode == 0
    wait_until(lambda: len(runs(daemon.url)) == 4)


def test_while_the_daemon_is_down_the_place_is_not_saved_and_nothing_is_missing_afterwards(
    start_daemon: StartDaemon, buffer: Path, journalctl: Path
) -> None:
    daemon = start_daemon()
    given = variables(daemon.url, buffer, journalctl)
    daemon.stop(signal.SIGKILL)
    with subprocess.Popen([*UNITS, "backup-*"], env=given) as process:
        wait_until(lambda: any(buffer.glob("*.jsonl.*")))
        time.sleep(1.0)
        assert not (buffer / "units.json").exists()
        process.kill()
    daemon = start_daemon(TELEMETRY_API_PORT=daemon.url.rpartition(":")[2])
    with subprocess.Popen([*UNITS, "backup-*"], env=given) as process:
        wait_until((buffer / "units.json").exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    wait_until(lambda: len(runs(daemon.url)) == 4)
    wait_until(lambda: all(run["status"] != "running" for run in runs(daemon.url)))


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        # As of a machine with many damaged files: more than a pipe holds.
        ("sys.stderr.write('File is corrupted, ignoring file.\\n' * 5000); sys.stderr.flush()", 0, ""),
        (
            "lines = lines[:2]; import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            1,
            "journalctl ended with -9: \n",
        ),
    ],
    ids=["complaining", "killed"],
)
def test_what_journalctl_says_never_stops_it_and_its_death_is_no_success(  # noqa: PLR0917 - one case each
    start_daemon: StartDaemon, buffer: Path, journalctl: Path, more: str, status: int, said: str
) -> None:
    daemon = start_daemon()
    program = journalctl.parent / "bin" / "journalctl"
    program.write_text(program.read_text().replace("cursor = ", f"{more}\ncursor = "))
    done = read_once(daemon.url, buffer, journalctl, "backup-*")
    assert (done.returncode, done.stderr.removeprefix("telemetryd units: ")) == (status, said)


def test_the_place_is_written_through_no_link(start_daemon: StartDaemon, buffer: Path, journalctl: Path) -> None:
    daemon = start_daemon()
    victim = journalctl.parent / "victim"
    victim.write_text("precious")
    state = journalctl.parent / "place.new"
    (journalctl.parent / "place.new.new").symlink_to(victim)
    done = read_once(daemon.url, buffer, journalctl, "backup-*", "--state", str(state))
    assert (done.returncode, victim.read_text()) == (1, "precious")
    assert "Too many levels of symbolic links" in done.stderr
    (journalctl.parent / "place.new.new").unlink()
    assert read_once(daemon.url, buffer, journalctl, "backup-*", "--state", str(state)).returncode == 0
    assert json.loads(state.read_text())["cursor"]
    assert state.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        ((), 2, "Name at least one unit, or give --all-timers."),
        (("x", "--state", "{folder}/broken.json"), 1, "broken.json cannot be read; delete it to begin with this boot"),
        (("x", "--state", "{folder}/list.json"), 1, "list.json cannot be read; delete it to begin with this boot"),
        (("x", "--state", "{folder}/other.json"), 1, "other.json cannot be read; delete it to begin with this boot"),
    ],
)
def test_bad_usage_reads_nothing(
    tmp_path: Path, buffer: Path, arguments: tuple[str, ...], status: int, complaint: str
) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text('{"cursor": "c", "state": []}')
    (tmp_path / "other.json").write_text('{"cursor": "c", "state": {"open": {"i": {"of": "a later release"}}}}')
    line = [*UNITS, *(argument.format(folder=tmp_path) for argument in arguments)]
    done = subprocess.run(
        line, env=environment("http://127.0.0.1:9", buffer), capture_output=True, text=True, check=False
    )
    assert done.returncode == status
    assert complaint in done.stderr


# --- With a real systemd -------------------------------------------------------------------------

BOOT = """set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/room /run/systemd/system /run/lock /run/log/journal
mount --bind "$ROOM" /run/room
for place in /tmp /var/tmp /var/log /var/lib/systemd; do mount -t tmpfs tmpfs $place; done
umount -l /sys/fs/cgroup
mount -t tmpfs tmpfs /sys/fs/cgroup
mkdir /sys/fs/cgroup/systemd
mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
cp /run/room/units/* /run/systemd/system/
container=docker exec /lib/systemd/systemd --system --unit=room.target --log-target=journal
"""
"""Starts a systemd with everything that it could clear or change replaced by file systems of its own."""
TARGET = "[Unit]\nDefaultDependencies=no\nRequires=systemd-journald.socket systemd-journald.service\n"
SERVICE = "[Unit]\nDefaultDependencies=no\n[Service]\n{lines}\n"
SERVICES = {
    "job-good": "Type=oneshot\nExecStart=/bin/true",
    "job-bad": "Type=oneshot\nExecStart=/bin/sh -c 'exit 3'",
    "job-slow": "Type=oneshot\nTimeoutStartSec=1\nExecStart=/bin/sleep 60",
    "job-simple": "ExecStart=/bin/sleep 0.2",
}


@pytest.mark.slow
def test_a_real_systemd_with_both_ways_of_recording_stores_each_run_once(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """`units` follows the journal, which is rotated and vacuumed, while a drop-in records as well; both are killed."""
    require_program("unshare", "util-linux")
    require_program("nsenter", "util-linux")
    require_program("journalctl", "systemd")
    room = tmp_path / "room"
    (room / "units").mkdir(parents=True)
    (room / "units" / "room.target").write_text(TARGET)
    daemon = start_daemon()
    recording = f"Environment=TELEMETRY_BUFFER_DIR=/run/own TELEMETRY_API_URL={daemon.url}\n"
    recording += f"ExecStopPost=-{sys.executable} -m telemetryd record --from-systemd"
    for name, lines in SERVICES.items():
        (room / "units" / f"{name}.service").write_text(SERVICE.format(lines=f"{lines}\n{recording}"))
    namespaces = ("unshare", "--pid", "--fork", "--mount", "--mount-proc", "--ipc", "--uts", "--cgroup", "--kill-child")
    boot = subprocess.Popen(
        [*namespaces, "bash", "-c", BOOT], env={**os.environ, "ROOM": str(room)}, stdin=subprocess.DEVNULL
    )
    try:
        systemd = _first_child(boot.pid)
        inside = ("nsenter", "--target", str(systemd), "--mount", "--pid", "--ipc", "--uts", "--cgroup")

        def within(*command: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
            return subprocess.run([*inside, *command], capture_output=True, timeout=60, check=False, **more)

        wait_until(lambda: within("systemctl", "is-system-running").stdout.strip() in (b"running", b"degraded"))
        given = environment(daemon.url, tmp_path, TELEMETRY_BUFFER_DIR="/run/units")
        for turn in range(3):
            with subprocess.Popen([*inside, *UNITS, "job-*"], env=given) as following:
                for name in SERVICES:
                    within("systemctl", "start", name)
                within("journalctl", "--rotate")
                if turn == 1:
                    within("journalctl", "--vacuum-time=1s")
                wanted = (turn + 1) * len(SERVICES)
                wait_until(lambda wanted=wanted: _ended(daemon) == wanted)  # type: ignore[misc]
                following.kill()
    finally:
        boot.kill()
        boot.wait()
    by_outcome = sorted((run["agent_name"], run["status"]) for run in runs(daemon.url))
    outcomes = {"job-good": "success", "job-bad": "failure", "job-slow": "timeout", "job-simple": "success"}
    assert by_outcome == sorted([*outcomes.items()] * 3)


def _ended(daemon: Daemon) -> int:
    return sum(run["status"] != "running" for run in runs(daemon.url))


def _first_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    wait_until(lambda: bool(children.read_text().split()))
    return int(children.read_text().split()[0])
