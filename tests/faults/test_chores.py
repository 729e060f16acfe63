"""SIGKILL and power cuts in the middle of migrate, backup, restore and prune: old or new, never between."""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from telemetryd.errors import DatabaseError
from tests.faults.chores import CHORES, Chore
from tests.faults.conftest import Rounds
from tests.faults.ledger import Ledger
from tests.faults.load import Findings
from tests.faults.power_cut import Disk, Kind, Recorder, Way, places_to_cut, write
from tests.tools.process import telemetryd

each_chore = pytest.mark.parametrize("chore", CHORES, ids=lambda chore: type(chore).__name__.lower())


def look(chore: Chore, folder: Path, runs: int, *, finished: bool) -> Findings:
    """Check the files; a database that cannot be opened is one finding more."""
    findings = Findings()
    try:
        chore.check(folder, runs, findings, finished=finished)
    except (sqlite3.Error, DatabaseError, OSError) as error:
        findings.note("unrecovered", str(error))
    return findings


@each_chore
def test_killed_at_any_moment(tmp_path: Path, rounds: Rounds, ledger: Ledger, chore: Chore) -> None:
    runs, total = 1200, Findings()
    fresh, folder = tmp_path / "fresh", tmp_path / "work"
    fresh.mkdir()
    chore.prepare(fresh, runs)
    shutil.copytree(fresh, folder)
    started = time.monotonic()
    telemetryd(*chore.arguments(folder))
    seconds = time.monotonic() - started
    total.add(look(chore, folder, runs, finished=True), "unharmed")
    full = rounds(250, least=2)
    for number in range(full):
        if number % 3 == 0:  # twice it goes on with what the killed one has left
            shutil.rmtree(folder)
            shutil.copytree(fresh, folder)
        process = subprocess.Popen(
            [sys.executable, "-m", "telemetryd", *chore.arguments(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(random.uniform(0.4, 1.1) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        finished = process.wait() == 0
        total.add(look(chore, folder, runs, finished=finished), f"round {number}")
    telemetryd(*chore.arguments(folder))
    total.add(look(chore, folder, runs, finished=True), "repeated")
    ledger.record(
        fault=f"SIGKILL during {chore.fault}",
        rounds=full,
        acknowledged=runs,
        **total.figures(),
    )


@each_chore
def test_power_cut_at_any_moment(
    tmp_path: Path, fast_folder: Path, rounds: Rounds, ledger: Ledger, chore: Chore
) -> None:
    runs, total, chance = 400, Findings(), random.Random(5)
    folder = tmp_path / "data"
    folder.mkdir()
    chore.prepare(folder, runs)
    recorder = Recorder(folder, tmp_path)
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
