"""What `check --repair` saves of a damaged file, and what it says of the rest."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest

from telemetryd.engine.sqlite.tools import rescue
from telemetryd.engine.sqlite.tools import salvage as tool
from telemetryd.engine.sqlite.tools.btree import TableFile
from telemetryd.engine.sqlite.tools.salvage import Saved, salvage
from telemetryd.errors import DatabaseError
from tests.tools.damages import KINDS, damage, readable
from tests.tools.fill import make_database
from tests.tools.process import telemetryd

RUNS = 250
TABLES = ("agent_runs", "run_events")
NOW = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a database in which each run has an event."""
    path = make_database(tmp_path_factory.mktemp("original") / "telemetry.sqlite", RUNS)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "INSERT INTO run_events (run, event_key, event_type, timestamp, payload) "
            "SELECT id, 'key', 'step', created_at, json_object('text', printf('%0200d', id)) FROM agent_runs"
        )
    return path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """Copy it."""
    return Path(shutil.copyfile(original, tmp_path / "telemetry.sqlite"))


def ids(path: Path, table: str) -> set[int]:
    with closing(sqlite3.connect(path)) as connection:
        return {row[0] for row in connection.execute(f"SELECT id FROM {table} NOT INDEXED")}


def leaves(path: Path, name: str) -> list[int]:
    with closing(sqlite3.connect(path)) as connection:
        sql = "SELECT pageno FROM dbstat WHERE name = ? AND pagetype = 'leaf' ORDER BY path"
        return [row[0] for row in connection.execute(sql, (name,))]


def zero(path: Path, *pages: int) -> None:
    with path.open("r+b") as file:
        for page in pages:
            file.seek((page - 1) * 4096)
            file.write(bytes(4096))


def saved_of(done: tool.Salvage, table: str) -> Saved:
    return next(saved for saved in done.tables if saved.table == table)


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_be_read_by_its_number_is_saved(
    original: Path, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """Thirty damages in the short form; a page of another table may give rows that are none of this one."""
    is_short = request.config.getoption("--rounds-scale") < 0.1
    numbers = {table: sorted(ids(original, table)) for table in TABLES}
    path = tmp_path / "telemetry.sqlite"
    total = missed = 0
    for seed in range(5 if is_short else 50):
        shutil.copyfile(original, path)
        damage(path, kind, Random(seed))
        can = {table: readable(path, table, numbers[table]) for table in TABLES}
        try:
            done = salvage(path, NOW)
        except DatabaseError:
            assert not can["agent_runs"], seed
            continue
        for table in TABLES:
            kept, saved = ids(path, table), saved_of(done, table)
            expected = can[table] if table == "agent_runs" else can[table] & ids(path, "agent_runs")
            total += len(expected)
            missed += len(expected - kept)
            assert saved.saved == len(kept), (seed, saved)
            assert saved.lost is None or len(kept) == RUNS or saved.lost > 0, (seed, saved)
    assert missed <= total // 100
    assert total > RUNS


def test_rows_between_many_damages_are_saved_and_each_table_says_what_is_lost(path: Path) -> None:
    gone = {table: leaves(path, table)[1::3] for table in TABLES}
    zero(path, *(page for pages in gone.values() for page in pages))
    numbers = list(range(1, RUNS + 1))
    can = {table: readable(path, table, numbers) for table in TABLES}
    assert all(0 < len(found) < RUNS for found in can.values())
    report = json.loads(telemetryd("check", "--repair", "--json", "--db-path", path).stdout)
    assert ids(path, "agent_runs") == can["agent_runs"]
    assert ids(path, "run_events") == can["run_events"] & can["agent_runs"]
    told = {table["table"]: table for table in report["tables"]}
    for table in TABLES:
        saved = len(ids(path, table))
        expected = {"table": table, "there": RUNS, "is_estimate": False, "saved": saved, "lost": RUNS - saved}
        assert told[table] == expected
        assert f"table {table}: {saved} of {RUNS} rows saved, {RUNS - saved} lost" in report["repaired"]
    assert (report["saved"], report["lost"]) == (len(can["agent_runs"]), RUNS - len(can["agent_runs"]))


def test_a_file_whose_end_is_gone_is_read_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a table gives NULL for a number, or an error; no place is read again and again."""
    statements: list[str] = []
    open_damaged = tool._open_damaged

    def open_and_count(path: Path) -> sqlite3.Connection:
        connection = open_damaged(path)
        connection.set_trace_callback(statements.append)
        return connection

    monkeypatch.setattr(tool, "_open_damaged", open_and_count)
    zero(path, leaves(path, "idx_events_key")[0], leaves(path, "idx_events_time")[0])
    os.truncate(path, (leaves(path, "run_events")[-2] - 1) * 4096)
    steps: list[tuple[str, int, int]] = []
    done = salvage(path, NOW, lambda *step: steps.append(step))
    assert done.runs.saved == RUNS
    events = saved_of(done, "run_events")
    assert events.is_estimate
    assert events.there is not None
    assert abs(events.there - RUNS) < RUNS // 10
    assert str(events) == (
        f"table run_events: {events.saved} rows saved; how many were lost is not certain, an estimate by the pages "
        f"that are left is {events.lost}"
    )
    assert ("Saving rows", RUNS, RUNS) in steps
    assert len(statements) < 2 * RUNS


def rewrite_keys(path: Path, keys: Callable[[int], int]) -> None:
    """Give the page above the leaves of the runs other keys, each of nine bytes, which SQLite takes as well."""
    with closing(sqlite3.connect(path)) as connection:
        root = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'agent_runs'").fetchone()[0]
    below = leaves(path, "agent_runs")
    page = bytearray(4096)
    page[:12] = b"\5\0\0" + (len(below) - 1).to_bytes(2, "big") + bytes(3) + below[-1].to_bytes(4, "big")
    for place, leaf in enumerate(below[:-1]):
        key = keys(place) % 2**64
        varint = bytes(128 | key >> shift & 127 for shift in range(57, 7, -7)) + bytes([key & 255])
        start = 4096 - 13 * (place + 1)
        page[start : start + 13] = leaf.to_bytes(4, "big") + varint
        page[12 + 2 * place : 14 + 2 * place] = start.to_bytes(2, "big")
    page[5:7] = start.to_bytes(2, "big")
    with path.open("r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(page)


LIES: dict[str, Callable[[int], int]] = {
    "every second leaf claims the whole range": lambda place: 2**62 * (place % 2),
    "each leaf ends before all rows": lambda place: place - 2**62,
    "each leaf begins after all rows": lambda place: place + 2**62,
    "each leaf ends before the one before it": lambda place: RUNS - place,
}


def test_keys_that_lie_cost_a_bounded_number_of_reads_and_no_run(path: Path, tmp_path: Path) -> None:
    """The steps of SQLite's machine are counted, which do not depend on the load."""
    original = tmp_path / "original.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE agent_runs SET output_summary = printf('%01500d', id)")
    shutil.copyfile(path, original)

    def read(path: Path) -> tuple[int, int, set[object]]:
        steps: list[None] = []
        with path.open("rb") as file, closing(tool._open_damaged(path)) as source:
            source.set_progress_handler(lambda: steps.append(None), 1)
            pages = TableFile(file.fileno(), 4096)
            schema, _ = rescue.read_schema(source, pages)
            table = rescue.look(source, next(entry for entry in schema if entry.name == "agent_runs"))
            rows = [row[0] for rows in rescue.read(source, pages, table) for row in rows]
        return len(steps), len(rows), set(rows)

    whole, _, expected = read(original)
    assert len(leaves(original, "agent_runs")) > RUNS // 4
    for name, keys in LIES.items():
        shutil.copyfile(original, path)
        rewrite_keys(path, keys)
        steps, given, found = read(path)
        assert found == expected, name
        assert given == RUNS, name
        assert steps < 10 * whole, name
    cut = path.with_name("cut.sqlite")
    shutil.copyfile(path, cut)
    os.truncate(cut, max(leaves(original, "agent_runs")) * 4096 - 1000)
    with closing(tool._open_damaged(cut)) as source:
        expected = {row[0] for row in source.execute("SELECT * FROM agent_runs NOT INDEXED") if row[0]}
    assert len(expected) > RUNS - 5
    assert read(cut)[2] >= expected, "SQLite takes zeros for the rest of a page"
    assert salvage(path, NOW).runs.saved == RUNS


@pytest.mark.parametrize("content", [b"\0", b"\xff", b"\r\0\0"])
def test_a_first_page_without_a_schema_is_one_sentence_and_changes_nothing(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(100)
        file.write((content * 3996)[:3996])
    before = path.read_bytes()
    told = telemetryd("check", "--repair", "--db-path", path, status=1).stderr
    assert len(told.splitlines()) == 1
    assert "it is as before: restore a backup (telemetryd restore)" in told
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.glob(".*")] == []


def test_a_database_of_which_no_run_can_be_read_is_left_as_it_is(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        root = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'agent_runs'").fetchone()[0]
    zero(path, root)
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match=r"No run of .* can be read; it is as before"):
        salvage(path, NOW)
    assert path.read_bytes() == before


def table_sql(path: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


def test_tables_of_every_kind_are_read_around_the_damage(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript("""
            CREATE TABLE mine (rowid TEXT, twice AS (length(note) * 2), note TEXT);
            CREATE TABLE other (name TEXT PRIMARY KEY, note TEXT) WITHOUT ROWID;
            INSERT INTO mine (rowid, note) SELECT 'row ' || id, printf('%0300d', id) FROM agent_runs;
            INSERT INTO other SELECT printf('%05d', id), printf('%0300d', id) FROM agent_runs;
            INSERT INTO unconverted_values SELECT id, 'status', 'unknown', printf('%0300d', id) FROM agent_runs;
        """)
    middle = {name: leaves(path, name)[9] for name in ("mine", "other", "unconverted_values")}
    zero(path, *middle.values(), leaves(path, "agent_runs")[0])
    done = salvage(path, NOW)
    runs = len(ids(path, "agent_runs"))
    for name in middle:
        saved = saved_of(done, name)
        assert saved.saved == table_sql(path, f"SELECT count(*) FROM {name}")[0][0]
        assert RUNS - 40 < saved.saved < RUNS
    assert saved_of(done, "unconverted_values").saved < runs
    assert table_sql(path, "SELECT count(*) FROM mine WHERE twice = 600") == [(saved_of(done, "mine").saved,)]


def test_an_event_that_is_no_json_any_more_is_kept_as_text(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("UPDATE run_events SET payload = '{broken' WHERE id = 5")
    zero(path, leaves(path, "run_events")[-1])
    salvage(path, NOW)
    assert table_sql(path, "SELECT payload FROM run_events WHERE id = 5") == [('{"value":"{broken"}',)]
