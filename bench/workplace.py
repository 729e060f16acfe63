"""A temporary folder on the benchmark's disk, and the servers that run in it; nothing of either outlives the block."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import wrk
from bench.client import Client
from bench.errors import BenchError

ROOT: Final = Path(__file__).parents[1]
_START_TIMEOUT_S: Final = 60


@dataclass(frozen=True, slots=True)
class Contender:
    """A server that takes the loads: its name in the report, and its command with {port} and {database}."""

    name: str
    command: tuple[str, ...]


_SCRIPT: Final = Path(sys.executable).with_name("telemetryd")
_PROGRAM: Final = (str(_SCRIPT),) if _SCRIPT.exists() else (sys.executable, "-m", "telemetryd")
TELEMETRYD: Final = (*_PROGRAM, "serve", "--host", "127.0.0.1", "--port", "{port}", "--log-level", "INFO")
"""A daemon, wherever its database is."""


def _telemetryd(journal_mode: str) -> Contender:
    flags = ("--db-path", "{database}", "--db-journal-mode", journal_mode, "--db-synchronous", "FULL")
    return Contender(f"telemetryd {journal_mode}", (*TELEMETRYD, *flags))


TELEMETRYD_WAL: Final = _telemetryd("WAL")
TELEMETRYD_DELETE: Final = _telemetryd("DELETE")
LIMIT_HTTP: Final = Contender("limit-http", (sys.executable, "-m", "bench.servers.limit_http", "--port", "{port}"))
LIMIT_HTTP_FSYNC: Final = Contender("limit-http-fsync", (*LIMIT_HTTP.command, "--sync", "{database}"))
BASELINE: Final = Contender(
    "baseline",
    (sys.executable, "-m", "bench.servers.baseline", "--port", "{port}", "--database", "{database}"),
)


@dataclass(frozen=True, slots=True)
class Server:
    """A running contender."""

    process: subprocess.Popen[bytes]
    port: int
    database: Path
    log: Path

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def resident_mib(self) -> float:
        """Return how much memory it holds now."""
        return self._status_mib("VmRSS")

    def highest_mib(self) -> float:
        """Return the most memory that it has held since it started."""
        return self._status_mib("VmHWM")

    def bytes_written_until_stopped(self) -> int:
        """End it in an orderly way; return how many bytes it has written to disks, its last checkpoint included."""
        self.process.terminate()
        # It stays a zombie, whose figures can be read, until somebody waits for it.
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        figures = Path(f"/proc/{self.process.pid}/io").read_text("ascii")
        self.process.wait()
        return int(figures.partition("\nwrite_bytes:")[2].split()[0])

    def kill(self) -> None:
        """End it as a crash would (SIGKILL); what it acknowledged must be in the database nevertheless."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it in an orderly way (SIGTERM)."""
        self.process.terminate()
        self.process.wait(60)

    def _status_mib(self, name: str) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        return int(status.partition(f"{name}:")[2].split()[0]) / 1024


class Workplace:
    """The folder of one run of the benchmark, and what runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count(1)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._loads: list[wrk.Wrk] = []

    @contextmanager
    def corner(self) -> Iterator[Path]:
        """Make a new empty folder for the length of a block."""
        corner = self.folder / f"{next(self._numbers)}"
        corner.mkdir()
        try:
            yield corner
        finally:
            shutil.rmtree(corner, ignore_errors=True)

    @contextmanager
    def serving(
        self, contender: Contender, database: Path, variables: Mapping[str, str] | None = None
    ) -> Iterator[Server]:
        """Run a contender for the length of a block. Its log is a file next to the database."""
        server = self._start(contender, database, variables or {})
        try:
            yield server
        finally:
            server.kill()

    def load(self, server: Server, script: str, connections: int, seconds: float, *arguments: str) -> wrk.Wrk:
        """Start a load of wrk on a server; for `get` the path is the first argument."""
        url, rest = (server.url + arguments[0], ()) if script == "get" else (server.url, arguments)
        load = wrk.start(url, script, connections, seconds, *rest)
        self._loads.append(load)
        return load

    def run(self, module: str, *arguments: str) -> str:
        """Run a module of the benchmark in a process of its own and return what it prints."""
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=self.folder,
            env=_environment({}),
            stdout=subprocess.PIPE,
        )
        self._processes.append(process)
        output, _ = process.communicate()
        if process.returncode != 0:
            raise BenchError(f"{module} failed (exit {process.returncode})")
        return output.decode()

    def close(self) -> None:
        """End whatever still runs."""
        for load in self._loads:
            load.kill()
        for process in self._processes:
            process.kill()
            process.wait()

    def _start(self, contender: Contender, database: Path, variables: Mapping[str, str]) -> Server:
        port = _free_port()
        log = database.with_suffix(".log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [part.format(port=port, database=database) for part in contender.command],
                cwd=database.parent,
                env=_environment(variables),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._processes.append(process)
        server = Server(process, port, database, log)
        _wait_until_it_serves(contender, server)
        return server


@contextmanager
def workplace(parent: Path) -> Iterator[Workplace]:
    """Make a temporary folder inside another one; at the end of the block its processes and it are gone."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="run-", dir=parent, ignore_cleanup_errors=True) as folder:
        place = Workplace(Path(folder).resolve())
        try:
            yield place
        finally:
            place.close()


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    return {**inherited, "PYTHONPATH": str(ROOT), **variables}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_it_serves(contender: Contender, server: Server) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while server.process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, BenchError):
            client = Client(server.port)
            try:
                if client.get("/health")[0] == 200:
                    return
            finally:
                client.close()
        time.sleep(0.02)
    raise BenchError(f"{contender.name} does not serve; its output: {server.log.read_text('utf-8')[-2000:]}")
