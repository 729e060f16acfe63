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
from tests.conftest import Daemon, Row, StartDaemon
from tests.faults.conftest import Rounds
from tests.faults.ledger import Ledger
from tests.faults.load import Contents, Findings, Load, judge, read
from tests.faults.power_cut import Disk, Image, Kind, Record, Recorder, places_to_cut, write

_NAME = "telemetry.sqlite"
_ANSWERS = 100
"""How many answers the recorded daemon gives in each of its lives, in the long form."""

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


@dataclass(frozen=True)
class SetUp:
    """How a daemon is set up."""

    mode: str
    change: str = ""
    """Python that is run in it first, so that it does not sync when it should."""
    synchronous: str = "FULL"
    may_corrupt: bool = False


@dataclass
class Recording:
    """A daemon started, loaded, killed, started, loaded and stopped; and everything it did to its files."""

    folder: Path
    mode: str
    records: list[Record]
    load: Load


def record(library: Path, place: Path, set_up: SetUp, lives: int, answers: int) -> Recording:
    """Record a daemon that gives so many answers in each of its lives."""
    folder, hook = place / "data", place / "hook"
    folder.mkdir()
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(_CHECKPOINT_OFTEN + set_up.change)
    recorder = Recorder(library, folder, place / "recording")
    load = Load(random.randrange(1 << 30), clients=6, summary_bytes=300)
    search = os.pathsep.join(filter(None, [str(hook), os.environ.get("PYTHONPATH")]))
    variables = {
        **recorder.environment,
        "PYTHONPATH": search,
        "TELEMETRY_DB_JOURNAL_MODE": set_up.mode,
        "TELEMETRY_DB_SYNCHRONOUS": set_up.synchronous,
    }
    for life, end in enumerate((signal.SIGKILL, signal.SIGTERM)[-lives:], 1):
        daemon = Daemon(folder, **variables)  # type: ignore[arg-type]
        try:
            asyncio.run(load.run(daemon.url, life * answers))
            daemon.stop(end)
        finally:
            daemon.close()
    assert load.acknowledged >= lives * answers
    records = recorder.records()
    disk = Disk()
    for played in records:
        disk.play(played)
    assert disk.live() == recorder.files(), "the recording has a hole"
    return Recording(folder, set_up.mode, records, load)


@pytest.fixture(scope="module", params=["WAL", "DELETE"])
def recording(
    request: pytest.FixtureRequest, recorder_library: Path, tmp_path_factory: pytest.TempPathFactory, rounds: Rounds
) -> Recording:
    """A recording in each journal mode, for all tests that do not change the daemon."""
    place = tmp_path_factory.mktemp("recorded")
    return record(recorder_library, place, SetUp(request.param), lives=2, answers=rounds(_ANSWERS, least=40))


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


def test_power_cut(recording: Recording, fast_folder: Path, rounds: Rounds, ledger: Ledger) -> None:
    examiner = Examiner(recording, fast_folder, seed=1)
    examiner.examine(rounds(15_000, least=100))
    examiner.record(ledger, "power cut: what no sync covered is dropped, kept, reordered or torn")


def test_power_cut_recovered_by_our_own_opening(
    recording: Recording, fast_folder: Path, rounds: Rounds, ledger: Ledger
) -> None:
    def open_first(folder: Path) -> None:
        settings = Settings.model_validate({"db_path": folder / _NAME, "db_journal_mode": recording.mode})
        try:
            asyncio.run(_open_and_close(settings))
        except DatabaseError as error:
            raise UnrecoveredError(str(error)) from error

    examiner = Examiner(recording, fast_folder, 2, open_first)
    examiner.examine(rounds(3_000, least=36))
    examiner.record(ledger, "power cut, opened as the daemon opens")


async def _open_and_close(settings: Settings) -> None:
    store = await Store.open(settings, Metrics())
    await store.close()


def test_power_cut_and_a_start(recording: Recording, start_daemon: StartDaemon, rounds: Rounds, ledger: Ledger) -> None:
    def open_first(folder: Path) -> None:
        daemon = start_daemon(folder=folder, TELEMETRY_DB_JOURNAL_MODE=recording.mode)
        try:
            assert daemon.url
        except AssertionError as error:
            raise UnrecoveredError(str(error)) from error
        finally:
            daemon.close()

    examiner = Examiner(recording, recording.folder.parent, 3, open_first)
    examiner.examine(rounds(100, least=2))
    examiner.record(ledger, "power cut, then a start of the daemon")


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(SetUp("WAL", synchronous="NORMAL"), id="WAL-NORMAL"),
        pytest.param(SetUp("WAL", _SYNCHRONOUS.format("OFF"), may_corrupt=True), id="WAL-OFF"),
        pytest.param(SetUp("DELETE", _SYNCHRONOUS.format("OFF"), may_corrupt=True), id="DELETE-OFF"),
        pytest.param(SetUp("DELETE", _SYNCHRONOUS.format("FULL")), id="DELETE-without-directory-sync"),
    ],
)
def test_a_power_cut_shows_what_is_not_synced(
    recorder_library: Path, tmp_path: Path, fast_folder: Path, rounds: Rounds, bad: SetUp
) -> None:
    answers = rounds(_ANSWERS, least=40)
    recording = record(recorder_library, tmp_path, bad, lives=rounds(2), answers=answers)
    examiner = Examiner(recording, fast_folder, seed=4)
    for _ in range(6):
        examiner.examine(50)
        if examiner.findings.counts["lost"]:
            break
    assert examiner.findings.counts["lost"] > 0
    if not bad.may_corrupt:
        assert examiner.findings.counts["unrecovered"] == 0
