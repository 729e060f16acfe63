"""The power goes off at some moment of a recorded load: whatever the disk holds then opens, with all acknowledged."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from telemetryd.errors import DatabaseError
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings
from telemetryd.store import Store
from tests.conftest import Row, StartDaemon
from tests.faults.conftest import Rounds
from tests.faults.ledger import Ledger
from tests.faults.load import Contents, Findings, Load, judge, read
from tests.faults.power_cut import Disk, Image, Kind, Record, Recorder, places_to_cut, write

_NAME = "telemetry.sqlite"
_ANSWERS = 100
"""How many answers each of the two lives of the recorded daemon gives."""

_ANSWER = re.compile(rb"HTTP/1\.1 20[01] .*?X-Request-ID: (load-(\d+)-\d+)\r\n", re.DOTALL)

_CHECKPOINT_OFTEN = (
    "import telemetryd.engine.sqlite.connection\ntelemetryd.engine.sqlite.connection._CHECKPOINT_PAGES = 60\n"
)
_SYNCHRONOUS = """
import telemetryd.engine.sqlite.connection
configure = telemetryd.engine.sqlite.connection._configure_writer
def configure_badly(connection, *modes):
    answer = configure(connection, *modes)
    connection.execute("PRAGMA synchronous = {}")
    return answer
telemetryd.engine.sqlite.connection._configure_writer = configure_badly
"""


@dataclass
class Recording:
    """A daemon started, loaded, killed, started, loaded and stopped; and everything it did to its files."""

    folder: Path
    mode: str
    records: list[Record]
    load: Load


RecordDaemon = Callable[..., Recording]


@pytest.fixture
def record_daemon(start_daemon: StartDaemon, tmp_path: Path) -> RecordDaemon:
    """Return a function that records a daemon under load; `change` is Python that is run in it first."""

    def record(mode: str, change: str = "", **variables: str) -> Recording:
        folder, hook = tmp_path / "data", tmp_path / "hook"
        folder.mkdir()
        hook.mkdir()
        (hook / "sitecustomize.py").write_text(_CHECKPOINT_OFTEN + change)
        recorder = Recorder(folder, tmp_path)
        load = Load(random.randrange(1 << 30), clients=6, summary_bytes=300)
        search = os.pathsep.join(filter(None, [str(hook), os.environ.get("PYTHONPATH")]))
        variables |= {**recorder.environment, "PYTHONPATH": search, "TELEMETRY_DB_JOURNAL_MODE": mode}
        for life, end in enumerate((signal.SIGKILL, signal.SIGTERM), 1):
            daemon = start_daemon(folder=folder, **variables)
            asyncio.run(load.run(daemon.url, life * _ANSWERS))
            daemon.stop(end)
        assert load.acknowledged >= 2 * _ANSWERS
        records = recorder.records()
        disk = Disk()
        for played in records:
            disk.play(played)
        assert disk.live() == recorder.files(), "the recording has a hole"
        return Recording(folder, mode, records, load)

    return record


Open = Callable[[Path], None]
"""Opens the database in a folder as the product does, and closes it; raises `UnrecoveredError` if it cannot."""


class UnrecoveredError(Exception):
    """A database could not be opened."""


class Examiner:
    """Opens images of one recording, and compares them with what was acknowledged at their moment.

    Args:
        recording: what the images are made of.
        folder: where they are put.
        seed: of every choice.
        open_first: lets the product recover each image, before SQLite reads it; None leaves it to SQLite.

    """

    def __init__(self, recording: Recording, folder: Path, seed: int, open_first: Open | None = None) -> None:
        self._recording = recording
        self._folder = folder / "disk"
        self._chance = random.Random(seed)
        self._open_first = open_first
        self._known: dict[int, Contents] = {}
        self.findings = Findings()
        self.distinct: set[int] = set()
        """The different images, by their hashes."""

    def examine(self, images: int) -> None:
        """Cut the power so many times."""
        ways = places_to_cut(self._recording.records, images, self._chance)
        clients = self._recording.load.clients
        runs: list[dict[str, Row]] = [{} for _ in clients]
        done = [0] * len(clients)
        disk = Disk()
        for record in self._recording.records:
            disk.play(record)
            if record.kind is Kind.SEND and (match := _ANSWER.match(record.data)):
                number = int(match[2])
                request = clients[number].answered[done[number]]
                assert request.identity == match[1].decode()
                request.apply(runs[number])
                done[number] += 1
            for way in ways.get(record.place, ()):
                contents = self._contents(disk.cut(way, self._chance))
                found = Findings.of(contents)
                for client, acknowledged, count in zip(clients, runs, done, strict=True):
                    judge(contents.runs, acknowledged, client.request_after(count), found)
                self.findings.add(found, f"cut at {record.place}, {way}")

    def _contents(self, image: Image) -> Contents:
        identity = hash(frozenset(image.items()))
        self.distinct.add(identity)
        if identity not in self._known:
            if len(self._known) > 30:  # the same image comes again soon, or never
                self._known.clear()
            write(image, self._recording.folder, self._folder)
            self._known[identity] = self._read()
        return self._known[identity]

    def _read(self) -> Contents:
        try:
            if self._open_first is not None:
                self._open_first(self._folder)
            with closing(sqlite3.connect(self._folder / _NAME)) as connection:
                return read(connection)
        except UnrecoveredError as error:
            return Contents({}, 0, (str(error),))
        except (sqlite3.Error, UnicodeDecodeError) as error:  # a damaged schema is quoted as it stands in the file
            is_new = str(error) == "no such table: agent_runs"
            return Contents({}, 0, () if is_new else (f"{error}",))

    def record(self, ledger: Ledger, fault: str) -> None:
        """Write down what was found."""
        ledger.record(
            fault=fault,
            mode=self._recording.mode,
            rounds=len(self.distinct),
            acknowledged=sum(client.stored for client in self._recording.load.clients),
            **self.findings.figures(),
        )


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_power_cut(record_daemon: RecordDaemon, fast_folder: Path, rounds: Rounds, ledger: Ledger, mode: str) -> None:
    examiner = Examiner(record_daemon(mode), fast_folder, seed=1)
    examiner.examine(rounds(15_000, least=150))
    examiner.record(ledger, "power cut: what no sync covered is dropped, kept, reordered or torn")


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_power_cut_recovered_by_our_own_opening(
    record_daemon: RecordDaemon, fast_folder: Path, rounds: Rounds, ledger: Ledger, mode: str
) -> None:
    def open_first(folder: Path) -> None:
        settings = Settings.model_validate({"db_path": folder / _NAME, "db_journal_mode": mode})
        try:
            asyncio.run(_open_and_close(settings))
        except DatabaseError as error:
            raise UnrecoveredError(str(error)) from error

    examiner = Examiner(record_daemon(mode), fast_folder, 2, open_first)
    examiner.examine(rounds(3_000, least=50))
    examiner.record(ledger, "power cut, opened as the daemon opens")


async def _open_and_close(settings: Settings) -> None:
    store = await Store.open(settings, Metrics())
    await store.close()


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_power_cut_and_a_start(
    record_daemon: RecordDaemon, start_daemon: StartDaemon, rounds: Rounds, ledger: Ledger, mode: str
) -> None:
    def open_first(folder: Path) -> None:
        daemon = start_daemon(folder=folder, TELEMETRY_DB_JOURNAL_MODE=mode)
        try:
            assert daemon.url
        except AssertionError as error:
            raise UnrecoveredError(str(error)) from error
        finally:
            daemon.close()

    recording = record_daemon(mode)
    examiner = Examiner(recording, recording.folder.parent, 3, open_first)
    examiner.examine(rounds(100, least=2))
    examiner.record(ledger, "power cut, then a start of the daemon")


@dataclass(frozen=True)
class SetUp:
    """One that does not sync when it should."""

    mode: str
    change: str = ""
    synchronous: str = "FULL"
    may_corrupt: bool = False


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(SetUp("WAL", synchronous="NORMAL"), id="WAL-NORMAL"),
        pytest.param(SetUp("WAL", _SYNCHRONOUS.format("OFF"), may_corrupt=True), id="WAL-OFF"),
        pytest.param(SetUp("DELETE", _SYNCHRONOUS.format("OFF"), may_corrupt=True), id="DELETE-OFF"),
        pytest.param(SetUp("DELETE", _SYNCHRONOUS.format("FULL")), id="DELETE-without-directory-sync"),
    ],
)
def test_a_power_cut_shows_what_is_not_synced(record_daemon: RecordDaemon, fast_folder: Path, bad: SetUp) -> None:
    recording = record_daemon(bad.mode, bad.change, TELEMETRY_DB_SYNCHRONOUS=bad.synchronous)
    examiner = Examiner(recording, fast_folder, seed=4)
    for _ in range(6):
        examiner.examine(50)
        if examiner.findings.counts["lost"]:
            break
    assert examiner.findings.counts["lost"] > 0
    if not bad.may_corrupt:
        assert examiner.findings.counts["unrecovered"] == 0
