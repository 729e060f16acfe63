"""The scenario of migration: a database of the replaced service, brought to the current schema."""

from __future__ import annotations

import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Final

from bench.errors import BenchError
from bench.figures import Figure, Unit, at_most
from bench.scenario import Bench, thousands
from telemetryd.engine.sqlite.tools.migrate import current_version
from tests.tools.old_databases import make_old_database

_TARGET_S: Final = 60


def migrate(bench: Bench) -> list[Figure]:
    """`telemetryd migrate` of v5 runs, with its verified backup."""
    rows = bench.options.export
    with bench.place.corner() as corner:
        bench.say(f"making a v5 database of {rows:,} runs")
        old = make_old_database(corner / "v5.sqlite", "v5", rows, neighbours=False)
        found = bench.alternate(Unit.SECONDS, {"migrate": lambda: _migrate(bench, old, rows)}, bench.options.few)
    name = f"telemetryd migrate of {thousands(rows)} v5 runs"
    return [Figure(name, Unit.SECONDS, found["migrate"], target=at_most(_TARGET_S, Unit.SECONDS))]


def _migrate(bench: Bench, old: Path, rows: int) -> float:
    with bench.place.corner() as corner:
        database = corner / "telemetry.sqlite"
        shutil.copyfile(old, database)
        started = time.perf_counter()
        bench.place.run("telemetryd", "migrate", "--db-path", str(database))
        seconds = time.perf_counter() - started
        with closing(sqlite3.connect(database)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            count = connection.execute("SELECT count(*) FROM agent_runs").fetchone()[0]
    if (version, count) != (current_version(), rows):
        raise BenchError(f"After the migration of {rows} runs there are {count}, with schema version {version}")
    return seconds
