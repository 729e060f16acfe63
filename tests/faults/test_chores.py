"""SIGKILL and power cuts in the middle of migrate, backup, restore and prune: old or new, never between."""

from __future__ import annotations

import random
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest

from telemetryd.errors import DatabaseError
from tests.faults.chores import CHORES, Chore
from tests.faults.conftest import Rounds
from tests.faults.ledger import Ledger
from tests.faults.load import Findings
from tests.faults.power_cut import Disk, Kind, Recorder, Way, calls_to_kill_at, places_to_cut, write
from tests.tools.process import telemetryd

each_chore = pytest.mark.parametrize("chore", CHORES, ids=lambda chore: type(chore).__name__.lower())


@pytest.fixture
def recorder(recorder_library: Path, tmp_path: Path) -> Recorder:
    """Records what is done to the files of a folder that is not there yet."""
    return Recorder(recorder_library, tmp_path / "work", tmp_path / "recording")


def look(chore: Chore, folder: Path, runs: int, *, finished: bool) -> Findings:
    """Check the files; a database that cannot be opened is one finding more."""
    findings = Findings()
    try:
        chore.check(folder, runs, findings, finished=finished)
    except (sqlite3.Error, DatabaseError, OSError) as error:
        findings.note("unrecovered", str(error))
    return findings


def killed(chore: Chore, folder: Path, recorder: Recorder, kill_at: str) -> tuple[bool, int]:
    """Let a chore kill itself at one of its calls; return whether it did, and how many calls it had made."""
    recorder.forget()
    variables = recorder.environment | {"RECORDER_KILL_AT": kill_at}
    done = telemetryd(*chore.arguments(folder), status=(0, -signal.SIGKILL), **variables)  # type: ignore[arg-type]
    return done.returncode != 0, len(recorder.calls())


@each_chore
def test_killed_at_any_moment(tmp_path: Path, recorder: Recorder, rounds: Rounds, ledger: Ledger, chore: Chore) -> None:
    runs, total = rounds(1200, least=300), Findings()
    fresh, folder = tmp_path / "fresh", recorder.folder
    fresh.mkdir()
    chore.prepare(fresh, runs)
    shutil.copytree(fresh, folder)
    telemetryd(*chore.arguments(folder), **recorder.environment)  # type: ignore[arg-type]
    calls = recorder.calls()
    total.add(look(chore, folder, runs, finished=True), "unharmed")
    full = rounds(250, least=4)
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    in_the_middle = 0
    for number, kill_at in enumerate(calls_to_kill_at(calls, full, chance)):
        shutil.rmtree(folder)
        shutil.copytree(fresh, folder)
        is_killed, made = killed(chore, folder, recorder, kill_at)
        in_the_middle += is_killed and 0 < made < len(calls)
        where = f"round {number}, seed {seed}, killed {kill_at} of {len(calls)}"
        total.add(look(chore, folder, runs, finished=not is_killed), where)
        if number % 3 == 0:  # one more goes on with what the killed one has left, and may come to its end
            again = f"after {chance.randint(1, len(calls))}"
            is_killed, _ = killed(chore, folder, recorder, again)
            total.add(look(chore, folder, runs, finished=not is_killed), f"{where}, then {again}")
    telemetryd(*chore.arguments(folder))
    total.add(look(chore, folder, runs, finished=True), "repeated")
    # A run may make a few calls fewer than the one that was counted, never many.
    assert in_the_middle >= 0.95 * full, f"{in_the_middle} of {full} kills, seed {seed}, were in the middle"
    ledger.record(
        fault=f"SIGKILL during {chore.fault}",
        rounds=in_the_middle,
        acknowledged=runs,
        **total.figures(),
    )


@each_chore
def test_power_cut_at_any_moment(
    recorder: Recorder, fast_folder: Path, rounds: Rounds, ledger: Ledger, chore: Chore
) -> None:
    runs, total, chance = 400, Findings(), random.Random(5)
    folder = recorder.folder
    folder.mkdir()
    chore.prepare(folder, runs)
    disk = Disk.holding(recorder.files())
    telemetryd(*chore.arguments(folder), **recorder.environment)  # type: ignore[arg-type]
    records = recorder.records()
    ways = places_to_cut(records, rounds(3000, least=60), chance)
    last = max(record.place for record in records if record.kind is not Kind.CLOSE)
    for record in records:
        if record.kind is Kind.TRUNCATE:  # a rare moment: what is cut off must not be needed any more
            ways[record.place] = [Way.SUBSET] * 16
    ways[last] = [*Way, *Way]  # when it has said that all is done
    image_folder = fast_folder / "disk"
    images = 0
    for record in records:
        disk.play(record)
        for way in ways.get(record.place, ()):
            write(disk.cut(way, chance), folder, image_folder)
            where = f"cut at {record.place} of {last}, {way}"
            total.add(look(chore, image_folder, runs, finished=record.place >= last), where)
            images += 1
            if chance.random() < 0.02:
                telemetryd(*chore.arguments(image_folder))
                total.add(look(chore, image_folder, runs, finished=True), f"{where}, then repeated")
    assert disk.live() == recorder.files(), "the recording has a hole"
    ledger.record(
        fault=f"power cut during {chore.fault}",
        rounds=images,
        acknowledged=runs,
        **total.figures(),
    )
