"""Debian systems in folders (debootstrap), to build in, to install into, and to boot with systemd (systemd-nspawn)."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.needs import give_up, require_program

ROOT: Final = Path(__file__).parents[2]
RELEASE: Final = os.environ.get("DEBIAN", "bookworm")
"""Which release of Debian the packages are built for and tried on."""
_CACHE: Final = ROOT / "build" / "debian"
"""Where a new system is kept for the next run: to make one takes a minute and a half."""
_PACKAGES: Final = (
    "ca-certificates",
    "curl",
    "dbus",
    "libsqlite3-0",
    "media-types",
    "python3",
    "python3-venv",
    "systemd-sysv",
)
_AUTHORITIES: Final = Path("/etc/ssl/certs/ca-certificates.crt")
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def new_system(folder: Path) -> Path:
    """Make a minimal Debian in a folder, with what a machine has before telemetryd is installed.

    What this machine says of package indexes (PIP_…, its authorities) holds there too: it may reach them by a proxy.
    """
    if os.geteuid() != 0:
        give_up("a Debian in a folder needs root")
    require_program("debootstrap", "debootstrap")
    kept = _CACHE / f"{RELEASE}.tar"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        made = kept.with_suffix(".new")
        _check(["debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", RELEASE, str(made)])
        _check(["tar", "--create", "--one-file-system", "--file", f"{kept}.part", "--directory", str(made), "."])
        _check(["rm", "-rf", str(made)])
        Path(f"{kept}.part").rename(kept)
    folder.mkdir(parents=True)
    _check(["tar", "--extract", "--same-permissions", "--file", str(kept), "--directory", str(folder)])
    if _AUTHORITIES.exists():
        (folder / _AUTHORITIES.relative_to("/")).write_bytes(_AUTHORITIES.read_bytes())
    (folder / "etc/hosts").write_text("127.0.0.1 localhost\n")  # an installer's work, of which there was none
    (folder / "etc/resolv.conf").write_text(Path("/etc/resolv.conf").read_text())
    return folder


def _check(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def run_in(folder: Path, script: str, *, variables: Mapping[str, str] | None = None, place: str = "/") -> str:
    """Run a shell script in a system that is not booted, with the network of this machine; return what it printed."""
    handed_on = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    environment = {
        "PATH": _PATH,
        "HOME": "/root",
        "DEBIAN_FRONTEND": "noninteractive",
        **handed_on,
        **(variables or {}),
    }
    words = [f"{name}={value}" for name, value in environment.items()]
    inner = f"cd {shlex.quote(place)} && {script}"
    return _check(["chroot", str(folder), "env", "-i", *words, "sh", "-ec", inner])


class Machine:
    """A booted system with a network of its own."""

    def __init__(self, folder: Path, leader: int) -> None:
        self.folder = folder
        self._leader = leader

    def attempt(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a shell script as root."""
        entering = ["nsenter", "--target", str(self._leader), "--all", "env", "-i", f"PATH={_PATH}", "HOME=/root"]
        command = [*entering, "DEBIAN_FRONTEND=noninteractive", "sh", "-ec", script]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    def run(self, script: str) -> str:
        """Run a shell script as root, which has to succeed; return what it printed."""
        done = self.attempt(script)
        if done.returncode != 0:
            journal = self.attempt("journalctl --no-pager -n 40 -o cat").stdout
            raise AssertionError(f"{script}\n{done.stdout}{done.stderr}\njournal:\n{journal}")
        return done.stdout


@contextlib.contextmanager
def booted(folder: Path, *flags: str, command: Sequence[str] = ("--boot",)) -> Iterator[Machine]:
    """Boot a system, or run one command as a container would; end it afterwards."""
    require_program("systemd-nspawn", "systemd-container")
    log = folder.with_suffix(".log")
    starting = [
        "systemd-nspawn",
        "--quiet",
        "--register=no",
        "--keep-unit",
        "--private-network",
        "--directory",
        str(folder),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*starting, *flags, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        machine = Machine(folder, _leader(process, log))
        if "--boot" in command:
            _wait_for_boot(machine, log)
        yield machine
    finally:
        _end(process)


def _leader(process: subprocess.Popen[bytes], log: Path) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for child in children.read_text().split():
            if Path(f"/proc/{child}/ns/pid").readlink() != Path("/proc/self/ns/pid").readlink():
                return int(child)
        time.sleep(0.05)
    raise AssertionError(log.read_text(errors="replace")[-4000:])


def _wait_for_boot(machine: Machine, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        state = machine.attempt("systemctl is-system-running").stdout.strip()
        if state in ("running", "degraded"):
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text(errors="replace")[-4000:])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)  # systemd-nspawn hands it on as an orderly halt
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
