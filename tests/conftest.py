"""The real app on a real socket with a real SQLite file, and the real daemon as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import hypothesis
import psycopg
import pytest
from aiohttp import web
from aiohttp.test_utils import BaseTestServer, TestClient

from telemetryd.engine.postgres import schema
from telemetryd.engine.sqlite.engine import Reading
from telemetryd.http import make_app
from telemetryd.model.values import utc_now
from telemetryd.ops.metrics import Metrics
from telemetryd.services.certificates import most_processes
from telemetryd.services.upkeep import Upkeep
from telemetryd.settings import JournalMode, Settings, variable
from telemetryd.store import Store
from telemetryd.web.body import BODIES, Bodies
from telemetryd.web.connections import ConnectionBounds, make_runner
from tests.engines import engine_settings, execute
from tests.tools.forks import popen

pytest_plugins = ["tests.engine_plugin"]

# A busy machine is no fault of what is tested.
_UNHURRIED: Final = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
# The short form tries the same examples every time, so that it fails for a change and not for bad luck; the long
# forms (`make test-all`, `make torture`) look for new ones.
hypothesis.settings.register_profile("short", _UNHURRIED, derandomize=True)
hypothesis.settings.register_profile("long", _UNHURRIED)

# Hundreds of processes start here: without bytecode, each would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# How wide our terminal is is nobody's business (xdist sets both for its workers).
for _name in ("COLUMNS", "LINES"):
    os.environ.pop(_name, None)
sys.dont_write_bytecode = False
# None of them speaks TLS to a stranger, and to read the certificates of all authorities takes a tenth of a start.
os.environ["SSL_CERT_FILE"] = os.devnull

Client = TestClient[web.Request, web.Application]
Row = dict[str, Any]
PATIENCE_S: Final = 60.0
"""How long a test waits for what has to come: it costs nothing unless the test fails, and a machine may be busy."""
_numbers = itertools.count()
_chance = random.SystemRandom()
"""Differs between processes that run tests at the same time, whatever hypothesis does to the common generator."""
_SHORT: Final = 0.001
"""Which share of its long form a fault test does in `make test-faults`; each says the least that proves something."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take how long the fault tests go on, and where they write down what they counted (`make torture`)."""
    parser.addoption(
        "--rounds-scale",
        type=float,
        default=_SHORT,
        help=f"the share of its long form that each fault test does [{_SHORT}]",
    )
    parser.addoption("--ledger", type=Path, help="append what each fault test counted to this file, as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    """Choose how property tests look for examples."""
    hypothesis.settings.load_profile("long" if config.getoption("--rounds-scale") > _SHORT else "short")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return how many workers `make test` starts: three for each processor, as half of what tests do is waiting."""
    return min(16, 3 * len(os.sched_getaffinity(0)))


def pytest_collection_finish() -> None:
    """Keep the garbage collector away from what all tests share: walking it takes a sixth of their own time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def default_signals() -> None:
    """Let no child inherit a signal that this process ignores (`make test &`, nohup): it has to die of it.

    A signal with a handler gets its default back in a new program (execve(2)), an ignored one stays ignored. Python
    itself ignores SIGPIPE and SIGXFSZ, and `subprocess` restores both.
    """
    for number in signal.valid_signals():
        if signal.getsignal(number) is signal.SIG_IGN and number not in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, lambda *_: None)


def make_run(**fields: Any) -> Row:
    """A valid run with an event_id of its own; fields given here replace or join the required ones."""
    number = next(_numbers)
    return {
        "event_id": f"event-made-{number}",
        "run_id": f"run-{number}",
        "start_time": "2025-12-24T10:00:00Z",
        "agent_name": "hugo-translator",
        "job_type": "translate_directory",
        **fields,
    }


class DaemonServer(BaseTestServer):
    """The app behind the daemon's own runner, on a free port."""

    def __init__(self, app: web.Application, settings: Settings, bounds: ConnectionBounds | None = None) -> None:
        super().__init__()
        self.app = app
        self._settings = settings
        self._bounds = bounds

    async def _make_runner(self, **_: Any) -> web.BaseRunner:
        return make_runner(self.app, self._settings, most_processes(self._settings), self._bounds)


class Api:
    """An HTTP client of one running app, and what is behind it."""

    def __init__(self, client: Client, store: Store, settings: Settings) -> None:
        self.client = client
        self.store = store
        self.settings = settings

    async def call(self, method: str, path: str, *, status: int | None = None, **options: Any) -> Any:
        """Send a request, check the status if one is given, and return the decoded JSON."""
        async with self.client.request(method, path, **options) as response:
            text = await response.text()
            assert status is None or response.status == status, f"{response.status}: {text}"
            return json.loads(text)

    async def post(self, run: object, status: int = 201, **options: Any) -> Any:
        return await self.call("POST", "/api/v1/runs", json=run, status=status, **options)

    async def batch(self, runs: object, status: int = 200, **options: Any) -> Any:
        return await self.call("POST", "/api/v1/runs/batch", json=runs, status=status, **options)

    async def list(self, status: int = 200, **parameters: Any) -> Any:
        return await self.call("GET", "/api/v1/runs", params=parameters, status=status)

    async def get(self, path: str, status: int = 200, **options: Any) -> Any:
        return await self.call("GET", path, status=status, **options)

    def execute(self, statement: str) -> Sequence[tuple[Any, ...]]:
        """Run SQL as another program would, and return the rows; what is changed is committed."""
        url = self.settings.db_url
        return execute(self.settings.db_path, None if url is None else url.get_secret_value(), statement)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the daemon from committing anything inside the block, as another program would."""
        if self.settings.db_url is not None:
            with psycopg.connect(self.settings.db_url.get_secret_value(), autocommit=True) as connection:
                connection.execute("SELECT pg_advisory_lock(%s, %s)", (schema.CLASS, schema.COMMITS))
                yield
            return
        with contextlib.closing(sqlite3.connect(self.settings.db_path, isolation_level=None)) as file:
            file.execute("BEGIN IMMEDIATE")
            yield
            file.execute("ROLLBACK")


MakeApi = Callable[..., Awaitable[Api]]


def reading(api: Api) -> Reading:
    """SQLite's reading half, for tests of what is inside it."""
    half = api.store._reading
    assert isinstance(half, Reading)
    return half


def exports_of(api: Api) -> Any:
    """The exports of a database, on either engine, for tests of what is inside them."""
    half: Any = api.store._reading
    return half._exports


def readers_of(api: Api) -> Any:
    """The connections that answer queries, on either engine."""
    half: Any = api.store._reading
    return half._readers() if api.settings.db_url is None else half._database.readers()


def bodies_of(api: Api) -> Bodies:
    """What reads the bodies of an app's requests; its bounds can be replaced."""
    assert api.client.app is not None
    return api.client.app[BODIES]


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database as a first start leaves it: to copy it takes much less time than all migrations."""
    path = tmp_path_factory.mktemp("new") / "telemetry.sqlite"

    async def start() -> None:
        await (await Store.open(Settings(db_path=path, db_journal_mode=JournalMode.WAL), Metrics())).close()

    asyncio.run(start())
    return path.read_bytes()


@pytest.fixture
async def make_api(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    engine: str,
    new_database: bytes,
    aiohttp_client: Callable[[DaemonServer], Awaitable[Client]],
) -> AsyncIterator[MakeApi]:
    """Return a function that runs an app; keyword arguments are settings (and `clock`, `bounds` of connections)."""
    stores: list[Store] = []
    clients: list[Client] = []
    databases = contextlib.ExitStack()
    given = databases.enter_context(engine_settings(request, engine, tmp_path))

    async def make(
        *, clock: Callable[[], datetime] = utc_now, bounds: ConnectionBounds | None = None, **values: Any
    ) -> Api:
        # Two readers are the fewest with two lanes; each of more would cost every test a thread and a connection.
        if engine == "sqlite" and "db_path" not in values and not (tmp_path / "telemetry.sqlite").exists():
            (tmp_path / "telemetry.sqlite").write_bytes(new_database)
        settings = Settings(**{**given, "db_readers": 2, **values})
        metrics = Metrics()
        store = await Store.open(settings, metrics, clock, full_text=settings.full_text)
        stores.append(store)
        upkeep = Upkeep(store, settings)
        if settings.full_text:
            await upkeep.index_texts()
        app = make_app(store, settings, metrics, upkeep=upkeep)
        client = await aiohttp_client(DaemonServer(app, settings, bounds))
        clients.append(client)
        return Api(client, store, settings)

    yield make
    for client in clients:
        await client.close()
    for store in stores:
        await store.close()
    databases.close()


@pytest.fixture
async def api(make_api: MakeApi) -> Api:
    """An app with the default settings, except WAL and two readers, which make the tests faster."""
    return await make_api()


class Daemon:
    """The daemon as a process: `python -m telemetryd serve` on a free port."""

    def __init__(
        self,
        folder: Path,
        *flags: str,
        prefix: tuple[str, ...] = (),
        pass_fds: tuple[int, ...] = (),
        **variables: str,
    ) -> None:
        self.folder = folder
        self.database = folder / "telemetry.sqlite"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
        self.database_url = variables.get("TELEMETRY_DB_URL")
        """Where the database is if it is on PostgreSQL."""
        place = {"TELEMETRY_DB_PATH": str(self.database)} if self.database_url is None else {}
        environment |= {**place, "TELEMETRY_API_PORT": "0", **variables}
        self.process = popen(
            [*prefix, sys.executable, "-m", "telemetryd", "serve", "--log-format", "json", *flags],
            environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **({"pass_fds": pass_fds} if pass_fds else {}),
        )
        self.lines: list[dict[str, Any]] = []
        self.raw: list[str] = []
        """The same lines as they were written."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.raw.append(line.removesuffix("\n"))
            self.lines.append(json.loads(line))

    @property
    def url(self) -> str:
        """Where it listens; waits until it does."""
        line = self.wait_for_line("Serving")
        address = line["addresses"][0]
        host = "https://localhost" if address.startswith("https") else "http://127.0.0.1"
        return f"{host}:{address.rpartition(':')[2]}"

    def execute(self, statement: str) -> Sequence[tuple[Any, ...]]:
        """Run SQL on its database as another program would."""
        return execute(self.database, self.database_url, statement)

    def wait_for_line(self, message: str, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """Wait for a log line with this message."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if line["message"] == message:
                    return line
            if self.process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.01)
        raise AssertionError(f"no line {message!r}; exit {self.process.poll()}; log: {self.lines[-5:]}")

    def wait(self, timeout_s: float = PATIENCE_S) -> tuple[int, str]:
        """Wait for the end; return the exit status and what stood on stderr."""
        status = self.process.wait(timeout_s)
        self._reader.join(PATIENCE_S)
        assert self.process.stderr is not None
        errors = self.process.stderr.read()
        return status, errors

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = PATIENCE_S) -> int:
        """Send a signal and wait for the end; return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait(timeout_s)[0]

    def close(self) -> None:
        """Make sure that nothing of it is left."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)
        self._reader.join(PATIENCE_S)
        for stream in (self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError, AttributeError):
                stream.close()  # type: ignore[union-attr]


StartDaemon = Callable[..., Daemon]


@pytest.fixture
def start_daemon(request: pytest.FixtureRequest, engine: str, tmp_path: Path) -> Iterator[StartDaemon]:
    """Return a function that starts a daemon in `tmp_path`; keyword arguments are environment variables."""
    started: list[Daemon] = []
    databases = contextlib.ExitStack()
    place = {}
    if engine != "sqlite":
        given = databases.enter_context(engine_settings(request, engine, tmp_path))
        place = {variable(name): str(value) for name, value in given.items()}

    def start(
        *flags: str,
        folder: Path = tmp_path,
        prefix: tuple[str, ...] = (),
        pass_fds: tuple[int, ...] = (),
        **variables: str,
    ) -> Daemon:
        if place:
            variables.pop("TELEMETRY_DB_JOURNAL_MODE", None)  # which only makes tests faster
        daemon = Daemon(folder, *flags, prefix=prefix, pass_fds=pass_fds, **{**place, **variables})
        started.append(daemon)
        return daemon

    yield start
    for daemon in started:
        daemon.close()
    databases.close()


@contextlib.contextmanager
def small_file_system(path: Path, size: str) -> Iterator[Path]:
    """Mount an empty file system of that size ("4m") on a new directory; skip the test where that is not possible."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on now."""
    return choose_port()


def choose_port() -> int:
    """Return a port that nobody listens on now, and that nobody else is given.

    It is below those that the kernel gives to programs that ask for any (ip(7), `ip_local_port_range`): tests that run
    at the same time ask for hundreds.
    """
    while True:
        port = _chance.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


async def eventually(check: Callable[[], bool | Awaitable[bool]], timeout_s: float = PATIENCE_S) -> None:
    """Wait until a condition holds, which may have to be awaited itself."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not (await held if isinstance(held := check(), Awaitable) else held):
        assert asyncio.get_running_loop().time() < deadline, "it did not come about in time"
        await asyncio.sleep(0.01)


def wait_until(check: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    """Wait until a condition holds, where there is no event loop."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)
