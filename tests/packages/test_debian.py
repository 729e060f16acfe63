"""The Debian package, as an operator meets it: built, installed, upgraded, removed and purged on a booted Debian."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import telemetryd
from tests.conftest import make_run, wait_until
from tests.packages.machine import Machine, booted, new_system, run_in
from tests.tools import source
from tests.tools.old_databases import make_old_database

pytestmark = [pytest.mark.slow, pytest.mark.packages, pytest.mark.sqlite]

INSTALL = "apt-get install -y --no-install-recommends -o Dpkg::Options::=--force-confold"
DATABASE = "/var/lib/telemetryd/telemetry.sqlite"
RUNS = "http://localhost:8765/api/v1/runs"
_EPOCH = "1796071685"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built twice where nothing is but what debian/control asks for; both are the same bytes."""
    system = new_system(tmp_path_factory.mktemp("builder") / "system")
    made: list[Path] = []
    for place in ("first", "a/second"):
        checkout = source.extract(system / "build" / place / "telemetryd")
        inside = f"/{checkout.relative_to(system)}"
        run_in(system, "apt-get update -q && apt-get build-dep -y -q --no-install-recommends ./", place=inside)
        umask = "077" if made else "022"
        variables = {"SOURCE_DATE_EPOCH": _EPOCH}
        run_in(system, f"umask {umask}; dpkg-buildpackage --build=binary --no-sign", place=inside, variables=variables)
        [file] = checkout.parent.glob("*.deb")
        made.append(file)
    assert made[0].read_bytes() == made[1].read_bytes()
    kept = tmp_path_factory.mktemp("package") / made[0].name
    shutil.copy(made[0], kept)
    shutil.rmtree(system)
    return kept


@pytest.fixture(scope="module")
def newer(package: Path) -> Path:
    """The package of a later version, whose settings have another comment."""
    version = "4.0.1"
    folder = package.parent / version
    subprocess.run(["dpkg-deb", "--raw-extract", str(package), str(folder)], check=True)
    control = folder / "DEBIAN" / "control"
    control.write_text(re.sub("^Version: .*$", f"Version: {version}", control.read_text(), flags=re.MULTILINE))
    settings = folder / "etc" / "telemetryd" / "telemetryd.env"
    settings.write_text(settings.read_text().replace("# Settings of telemetryd", f"# Settings of telemetryd {version}"))
    built = package.parent / f"telemetryd_{version}.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", str(folder), str(built)], check=True, stdout=subprocess.PIPE
    )
    return built


def install(machine: Machine, package: Path) -> None:
    shutil.copy(package, machine.folder / "var" / package.name)
    machine.run(f"{INSTALL} /var/{package.name}")


def health(machine: Machine) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(
        machine.run("curl -fsS --retry 20 --retry-delay 1 http://localhost:8765/health")
    )
    return answer


def post(machine: Machine, event_id: str) -> None:
    run = json.dumps(make_run(event_id=event_id))
    machine.run(f"curl -fsS http://localhost:8765/api/v1/runs -H 'Content-Type: application/json' -d '{run}'")


def stored(machine: Machine) -> set[str]:
    runs = json.loads(
        machine.run("curl -fsS --retry 20 --retry-delay 1 'http://localhost:8765/api/v1/runs?limit=1000'")
    )
    return {run["event_id"] for run in runs}


@pytest.fixture
def machine(tmp_path: Path, package: Path) -> Iterator[Machine]:
    """A booted Debian with the package installed."""
    system = new_system(tmp_path / "system")
    with booted(system) as machine:
        install(machine, package)
        yield machine
    shutil.rmtree(system)


def test_it_is_installed_and_serves_with_nothing_else_to_do(machine: Machine) -> None:
    assert health(machine)["db_path"] == DATABASE
    assert health(machine)["durable"] is True
    assert machine.run("systemctl is-enabled telemetryd.service telemetryd.socket").split() == ["enabled"] * 2
    assert machine.attempt("systemctl is-enabled telemetryd-backup.timer").stdout.strip() == "disabled"
    assert machine.run("stat -c %U /proc/$(systemctl show -P MainPID telemetryd)").strip() == "telemetry"
    assert machine.run("stat -c '%U %G %a' /var/lib/telemetryd").split() == ["telemetry", "telemetry", "700"]
    assert machine.run("stat -c '%U %G %a' /etc/telemetryd/telemetryd.env").split() == ["root", "telemetry", "640"]
    assert machine.run("telemetryd --version").strip() == f"telemetryd {telemetryd.__version__}"
    assert machine.run("systemctl --failed --no-legend --plain | grep telemetryd || true") == ""
    assert "telemetryd: works on" not in machine.run("systemctl reload telemetryd && telemetryd check 2>&1")


def test_a_command_knows_the_settings_of_the_daemon_and_heeds_the_environment_first(machine: Machine) -> None:
    command = "telemetryd config --json"
    given = {
        user: json.loads(machine.run(f"runuser -u {user} -- env {variable} {command}"))
        for user, variable in (("telemetry", "A=b"), ("root", "TELEMETRY_DB_PATH=/tmp/other.sqlite"), ("nobody", "A=b"))
    }
    assert given["telemetry"]["TELEMETRY_DB_PATH"]["value"] == DATABASE
    assert given["telemetry"]["TELEMETRY_DB_JOURNAL_MODE"]["value"] == "WAL"
    assert given["root"]["TELEMETRY_DB_PATH"]["value"] == "/tmp/other.sqlite"
    assert given["nobody"]["TELEMETRY_DB_JOURNAL_MODE"]["value"] == "DELETE"  # it may not read the file
    post(machine, "seen")
    assert '"runs": 1' in machine.run("runuser -u nobody -- telemetryd stats --url http://localhost:8765 --json")


def test_manual_pages_and_completion_are_those_of_the_commands(machine: Machine) -> None:
    pages = machine.run("ls /usr/share/man/man8").split()
    shown = machine.run("telemetryd --help").partition("Commands:\n")[2]
    commands = [line.split()[0] for line in shown.splitlines() if re.match(r"  [a-z]", line)]
    assert len(commands) > 20
    assert {f"telemetryd-{command}.8.gz" for command in commands} <= set(pages)
    completed = machine.run(
        "bash -c '. /usr/share/bash-completion/completions/telemetryd; complete -p telemetryd >&2;"
        ' COMP_WORDS="telemetryd re" COMP_CWORD=1 _TELEMETRYD_COMPLETE=bash_complete telemetryd\''
    )
    assert {"plain,restore", "plain,reap"} <= set(completed.split())
    assert machine.run("head -1 /usr/share/zsh/vendor-completions/_telemetryd") == "#compdef telemetryd\n"
    assert "complete" in machine.run("cat /usr/share/fish/vendor_completions.d/telemetryd.fish")


def test_an_upgrade_keeps_runs_and_settings_and_refuses_no_connection(machine: Machine, newer: Path) -> None:
    settings = "/etc/telemetryd/telemetryd.env"
    machine.run(f"echo TELEMETRY_API_MAX_CONNECTIONS=77 >> {settings} && systemctl restart telemetryd")
    machine.run("telemetryd tokens create --name ops --scope admin > /root/ops.token")
    post(machine, "before")
    before = machine.run("systemctl show -P MainPID telemetryd")
    run = json.dumps(make_run()).replace('"event_id": "', '"event_id": "during-$i-')
    machine.run(
        f"cat > /root/posting <<'END'\ni=0\nwhile [ ! -e /root/stop ]; do i=$((i + 1))\n"
        f"curl -fsS --max-time 60 {RUNS} -H 'Content-Type: application/json' -d \"{_quoted(run)}\""
        " > /dev/null 2>> /root/errors && echo $i >> /root/done\ndone\ntouch /root/ended\nEND\n"
    )
    machine.run("setsid sh /root/posting > /dev/null 2>&1 < /dev/null &")
    wait_until(lambda: machine.attempt("test -s /root/done").returncode == 0)
    install(machine, newer)
    wait_until(lambda: machine.run("systemctl show -P MainPID telemetryd") != before)
    health(machine)
    machine.run("touch /root/stop; while [ ! -e /root/ended ]; do sleep 0.1; done")
    assert machine.run("cat /root/errors") == ""
    sent = len(machine.run("cat /root/done").split())
    assert sent > 1
    machine.run(f"curl -fsS {RUNS}/before")
    assert json.loads(machine.run("curl -fsS http://localhost:8765/metrics"))["total_runs"] == 1 + sent
    assert "MAX_CONNECTIONS=77" in machine.run(f"cat {settings}")
    assert machine.run(f"stat -c '%U %G %a' {settings}").split() == ["root", "telemetry", "640"]
    assert "4.0.1" in machine.run(f"cat {settings}.dpkg-dist")
    assert "ops" in machine.run("telemetryd tokens list")


def _quoted(run: str) -> str:
    return run.replace('"', '\\"')


def test_an_upgrade_migrates_an_older_database_and_backs_it_up_first(machine: Machine, newer: Path) -> None:
    machine.run("systemctl stop telemetryd && rm /var/lib/telemetryd/telemetry.sqlite*")
    make_old_database(machine.folder / DATABASE[1:], "v7", rows=12)
    machine.run(f"chown telemetry:telemetry {DATABASE}")
    install(machine, newer)
    assert health(machine)["status"] == "ok"
    assert len(stored(machine)) == 12
    assert "telemetry_backup_" in machine.run("ls /var/lib/telemetryd")


def test_what_is_removed_comes_back_and_a_purge_keeps_the_runs_unless_it_is_told_otherwise(
    machine: Machine, package: Path
) -> None:
    post(machine, "precious")
    machine.run("echo TELEMETRY_API_MAX_CONNECTIONS=77 >> /etc/telemetryd/telemetryd.env")
    machine.run("apt-get remove -y telemetryd")
    assert machine.attempt("curl -sS http://localhost:8765/health").returncode != 0
    settings = "/etc/telemetryd/telemetryd.env"
    left = machine.run(f"ls {DATABASE} {settings} /usr/lib/telemetryd 2>/dev/null || true")
    assert left.split() == [settings, DATABASE]
    assert machine.attempt("systemctl cat telemetryd.service").returncode != 0
    install(machine, package)
    assert stored(machine) == {"precious"}
    assert "MAX_CONNECTIONS=77" in machine.run("cat /etc/telemetryd/telemetryd.env")

    machine.run(
        "install -d -o telemetry /var/backups/telemetryd && touch /var/backups/telemetryd/telemetry_backup_x.sqlite"
    )
    assert "the runs in /var/lib/telemetryd are kept" in machine.run("apt-get purge -y telemetryd 2>&1")
    assert machine.run("ls -d /etc/telemetryd /usr/lib/telemetryd 2>/dev/null || true") == ""
    assert machine.run("find /etc/systemd -name 'telemetryd*' | wc -l").strip() == "0"
    install(machine, package)
    assert stored(machine) == {"precious"}

    machine.run(
        "echo telemetryd telemetryd/delete-data boolean true | debconf-set-selections && apt-get purge -y telemetryd"
    )
    assert machine.run("ls /var/lib/telemetryd /var/backups/telemetryd 2>/dev/null || true").split() == [
        "/var/backups/telemetryd:", "telemetry_backup_x.sqlite",
    ]  # fmt: skip


def test_the_nightly_backup_runs_within_its_sandbox_and_a_copy_that_fails_is_seen(machine: Machine) -> None:
    post(machine, "kept")
    machine.run("systemctl enable --now telemetryd-backup.timer && systemctl start telemetryd-backup.service")
    [backup] = machine.run("ls /var/backups/telemetryd").split()
    assert re.fullmatch(r"telemetry_backup_\w+\.sqlite\.zst", backup)
    assert machine.run("stat -c '%U %a' /var/backups/telemetryd").split() == ["telemetry", "700"]
    drop_in = "/etc/systemd/system/telemetryd-backup.service.d"
    machine.run(
        f"mkdir -p {drop_in} && printf '[Service]\\nExecStart=false\\n' > {drop_in}/copy.conf"
        " && systemctl daemon-reload"
    )
    assert machine.attempt("systemctl start telemetryd-backup.service").returncode != 0
    assert machine.run("systemctl is-failed telemetryd-backup.service").strip() == "failed"
