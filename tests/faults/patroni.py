"""Three PostgreSQL servers under Patroni and one etcd, all on loopback, by the files in examples/patroni."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg

from tests.conftest import choose_port
from tests.postgres_cluster import as_ordinary_user, binaries

EXAMPLES: Final = Path(__file__).parents[2] / "examples" / "patroni"
PATRONI: Final = "patroni[etcd3,psycopg3]>=4.1,<5"
PASSWORD: Final = "of-the-tests"
_SOCKETS: Final = "/var/run/postgresql"
_PATIENCE_S: Final = 300.0
_LOOK_EVERY_S: Final = 0.2
_SETTLED: Final = frozenset({"running", "streaming"})


@contextlib.contextmanager
def installed() -> Iterator[Path]:
    """Install Patroni into an environment of its own, and give its Python.

    The system's Python runs it, outside of our folder: the user of the servers may not read root's home.
    """
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
    with tempfile.TemporaryDirectory(prefix="telemetryd-patroni-") as folder:
        Path(folder).chmod(0o755)
        subprocess.run([python, "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/pip", "install", "--quiet", "--disable-pip-version-check", PATRONI]
        subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
        yield Path(folder) / "bin" / "python"


@dataclass
class Node:
    """One server: Patroni, and the PostgreSQL that it runs.

    Args:
        name: what Patroni calls it.
        folder: where its data and its log are.
        port: where PostgreSQL listens.
        rest: where Patroni's own API listens.
        process: Patroni, if it runs.

    """

    name: str
    folder: Path
    port: int
    rest: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        """Where the database is."""
        return self.folder / "data"

    def postmaster(self) -> int:
        """Return the process that all sessions are children of."""
        return int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])

    def processes(self) -> list[int]:
        """Return every process of this server."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "cwd").resolve().is_relative_to(self.folder):
                    found.append(int(entry.name))
        return found

    def signal(self, number: int) -> None:
        """Send a signal to every process at once, as far as that goes."""
        for process in sorted(self.processes()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def kill(self) -> None:
        """End everything, as if the machine lost its power; none of its processes is left."""
        while self.processes():
            self.signal(signal.SIGKILL)
            time.sleep(0.01)
        if self.process is not None:
            self.process.wait()
            self.process = None

    def log(self) -> str:
        """Return the end of what Patroni has said."""
        return (self.folder / "patroni.log").read_text()[-3000:]


class PatroniCluster:
    """etcd and three servers.

    Args:
        folder: where everything is; its path is short, because sockets are in it.
        python: runs Patroni.
        mode: Patroni's `synchronous_mode`.

    """

    def __init__(self, folder: Path, python: Path, mode: str) -> None:
        self.folder, self._python, self._mode = folder, python, mode
        self._etcd_ports = choose_port(), choose_port()
        self.etcd: subprocess.Popen[bytes] | None = None
        self.nodes = [Node(f"db{i}", folder / f"db{i}", choose_port(), choose_port()) for i in (1, 2, 3)]
        text = (EXAMPLES / "patroni.yml").read_text()
        assert _SOCKETS in text
        assert "synchronous_mode: quorum" in text
        text = text.replace(_SOCKETS, str(folder)).replace("synchronous_mode: quorum", f"synchronous_mode: {mode}")
        (folder / "patroni.yml").write_text(text)

    # --- Starting and ending -------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything, and make the database and its user."""
        self.start_etcd()
        first, *others = self.nodes
        self.start_node(first)
        self.until(lambda: self.primary() is first, "a primary")
        for node in others:
            self.start_node(node)
        self.until_whole()
        with self.superuser() as connection:
            connection.execute(f"CREATE ROLE telemetryd LOGIN PASSWORD '{PASSWORD}'".encode())
            connection.execute("CREATE DATABASE telemetry OWNER telemetryd ENCODING 'UTF8' TEMPLATE template0")

    def start_etcd(self) -> None:
        """Start etcd."""
        clients, peers = (f"http://127.0.0.1:{port}" for port in self._etcd_ports)
        command = ["etcd", "--name", "one", "--data-dir", str(self.folder / "etcd")]
        command += ["--listen-client-urls", clients, "--advertise-client-urls", clients, "--listen-peer-urls", peers]
        command += ["--initial-advertise-peer-urls", peers, "--initial-cluster", f"one={peers}"]
        with (self.folder / "etcd.log").open("ab") as log:
            self.etcd = subprocess.Popen(command, stdout=log, stderr=log)
        self.until(lambda: bool(_get(self._etcd_ports[0], "/health")), "etcd")

    def start_node(self, node: Node) -> None:
        """Start Patroni on a server, which starts PostgreSQL."""
        if not node.folder.exists():
            node.folder.mkdir()
            if as_ordinary_user():
                shutil.chown(node.folder, "postgres", "postgres")
        command = [*as_ordinary_user(), str(self._python), "-m", "patroni", str(self.folder / "patroni.yml")]
        with (node.folder / "patroni.log").open("ab") as log:
            node.process = subprocess.Popen(
                command, env=self._environment(node), cwd=node.folder, stdout=log, stderr=log, start_new_session=True
            )

    def _environment(self, node: Node) -> dict[str, str]:
        """Return db1.env with this server's places in it."""
        lines = (EXAMPLES / "db1.env").read_text().splitlines()
        names = [line.partition("=")[0] for line in lines if line and not line.startswith("#")]
        rest, server = f"127.0.0.1:{node.rest}", f"127.0.0.1:{node.port}"
        values = {
            "PATRONI_NAME": node.name,
            "PATRONI_ETCD3_HOSTS": f"127.0.0.1:{self._etcd_ports[0]},127.0.0.1:{self._etcd_ports[0]}",
            "PATRONI_RESTAPI_LISTEN": rest,
            "PATRONI_RESTAPI_CONNECT_ADDRESS": rest,
            "PATRONI_POSTGRESQL_LISTEN": server,
            "PATRONI_POSTGRESQL_CONNECT_ADDRESS": server,
            "PATRONI_POSTGRESQL_DATA_DIR": str(node.data),
            "PATRONI_POSTGRESQL_BIN_DIR": str(binaries()),
            "PATRONI_POSTGRESQL_PGPASS": str(node.folder / "pgpass"),
        }
        given = {
            line.partition("=")[0]: shlex.split(line.partition("=")[2] or "''")[0] for line in lines if "=" in line
        }
        passwords = {name: PASSWORD for name in names if name.endswith("_PASSWORD")}
        users = {name: given[name] for name in names if name.endswith("_USERNAME")}
        environment = {**values, **passwords, **users}
        assert environment.keys() == {*names}, "examples/patroni/db1.env names other settings"
        return {**environment, "PATH": os.environ["PATH"], "HOME": str(node.folder), "LANG": "C.UTF-8"}

    def stop(self) -> None:
        """End everything."""
        for node in self.nodes:
            node.signal(signal.SIGCONT)
            node.kill()
        if self.etcd is not None:
            self.etcd.kill()
            self.etcd.wait()

    # --- Looking --------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The address of the database: every server."""
        places = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"postgresql://telemetryd:{PASSWORD}@{places}/telemetry"

    @contextlib.contextmanager
    def superuser(self) -> Iterator[psycopg.Connection[Any]]:
        """Connect to the primary as its superuser."""
        places = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        url = f"postgresql://postgres:{PASSWORD}@{places}/postgres?target_session_attrs=read-write"
        with psycopg.connect(url, autocommit=True) as connection:
            yield connection

    def members(self) -> list[dict[str, Any]]:
        """Return what Patroni says of its members; nothing if no server answers."""
        for node in self.nodes:
            if (found := _get(node.rest, "/cluster")) is not None:
                return list(found["members"])
        return []

    def primary(self) -> Node | None:
        """Return the server that leads."""
        for member in self.members():
            if member["role"] == "leader" and member["state"] == "running":
                return next(node for node in self.nodes if node.name == member["name"])
        return None

    def need_primary(self) -> Node:
        """Return the server that leads, as soon as one does."""
        self.until(lambda: self.primary() is not None, "a primary")
        node = self.primary()
        assert node is not None
        return node

    def standbys(self) -> list[Node]:
        """Return the other servers."""
        primary = self.need_primary()
        return [node for node in self.nodes if node is not primary]

    def is_whole(self) -> bool:
        """Whether all servers are there, and the primary waits for one."""
        members = self.members()
        return len([member for member in members if member["state"] in _SETTLED]) == len(self.nodes) and any(
            member["role"] in ("sync_standby", "quorum_standby") for member in members
        )

    def until_whole(self) -> None:
        """Wait for that."""
        self.until(self.is_whole, "three members, one of them synchronous")

    def until(self, check: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds."""
        deadline = time.monotonic() + _PATIENCE_S
        while not check():
            logs = "\n".join(f"--- {node.name}\n{node.log()}" for node in self.nodes if node.folder.exists())
            assert time.monotonic() < deadline, f"not in time: {what}; members: {self.members()}\n{logs}"
            time.sleep(_LOOK_EVERY_S)

    def switch_over(self) -> None:
        """Let Patroni make another server the primary, as for its maintenance."""
        primary = self.need_primary()
        ours = http.client.HTTPConnection("127.0.0.1", primary.rest, timeout=60)
        with contextlib.closing(ours):
            ours.request("POST", "/switchover", json.dumps({"leader": primary.name}))
            answer = ours.getresponse()
            assert answer.status in (200, 202), answer.read()


def _get(port: int, path: str) -> dict[str, Any] | None:
    """Return the JSON that something on loopback answers, or None."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=2)) as connection:
        try:
            connection.request("GET", path)
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError):
            return None
        return answer


@contextlib.contextmanager
def running(python: Path, mode: str) -> Iterator[PatroniCluster]:
    """Run a cluster inside the block, and remove it."""
    folder = Path(tempfile.mkdtemp(prefix="telemetryd-ha-"))
    folder.chmod(0o777)  # its sockets are made by another user
    cluster = PatroniCluster(folder, python, mode)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)
