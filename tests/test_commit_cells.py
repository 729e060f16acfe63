"""The cells of commits are what the runs add up to, whatever has been done to these."""

from __future__ import annotations

import signal
import sqlite3
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telemetryd.engine import commit_log, stats_log
from telemetryd.engine.sqlite.files import APPLICATION_ID
from telemetryd.engine.sqlite.statements import commit_cells, regressions, rollups
from telemetryd.engine.sqlite.statements.commands import Transaction
from telemetryd.engine.sqlite.statements.commit_cells import fetch_cells
from telemetryd.engine.sqlite.tools import integrity, migrate
from telemetryd.engine.sqlite.tools.legacy import migrate_file
from telemetryd.engine.sqlite.tools.salvage import salvage
from telemetryd.model.commands import (
    ApplyChanges,
    Command,
    CopiedRun,
    CreateRuns,
    Death,
    DeleteRun,
    EndProcess,
    PruneRuns,
    ReapRuns,
    RedactRun,
    RegisterProcess,
    UpdateRun,
)
from telemetryd.model.commit_cells import SLOT_S, Cell
from telemetryd.model.processes import Process
from telemetryd.model.runs import STORED, parse_run
from telemetryd.model.sketches import bin_of
from telemetryd.model.stats import FACTS
from telemetryd.model.values import Row, SqlValue, Status, format_timestamp
from tests.conftest import StartDaemon, make_run
from tests.http_client import call
from tests.tools.old_databases import LAYOUTS, make_old_database
from tests.tools.process import telemetryd

ALL = -(10**6), 10**6
NOW = datetime(2026, 1, 3, 12, 30, tzinfo=UTC)
# Slots begin at 0, 6, 12 and 18 o'clock, whatever day it is, also before 1970.
MOMENTS = [format_timestamp(NOW - timedelta(hours=hours)) for hours in (0, 0.5, 0.52, 6.5, 6.51, 13, 30)]
MOMENTS += ["1969-12-31T23:59:59.900000Z", "1970-01-01T00:00:00.000000Z"]
COMMITS = [None, "", "abc1234", "def5678", "c" * 64, "c" * 65]
PROCESS = Process(17, 1, "boot", "machine", "namespace")
DEATH = Death(MOMENTS[0], "gone", "SIGKILL")


def brute_force(rows: Iterable[tuple[str, str, str, str, int, str | None]]) -> list[Cell]:
    """Return the cells of runs, given as created_at, agent_name, job_type, status, duration_ms and git_commit_hash."""
    cells: dict[tuple[str, str, str, int], list[int]] = defaultdict(lambda: [0] * 5)
    for created_at, agent_name, job_type, status, duration_ms, commit in rows:
        if status == "running":
            continue
        slot, second = divmod((datetime.fromisoformat(created_at) - datetime(1970, 1, 1, tzinfo=UTC)), SLOT)
        cell = cells[agent_name, job_type, commit if commit and len(commit) <= 64 else "", slot]
        cell[0] += 1
        cell[1] += status != "success"
        cell[2] += status == "success" and duration_ms > 0
        cell[3] += bin_of(duration_ms) if status == "success" and duration_ms > 0 else 0
        cell[4] += int(second.total_seconds())
    return sorted(Cell(*key, *sums) for key, sums in cells.items())


SLOT = timedelta(seconds=SLOT_S)
SELECT = "SELECT created_at, agent_name, job_type, status, duration_ms, git_commit_hash FROM agent_runs"


def assert_right(connection: sqlite3.Connection) -> None:
    assert sorted(fetch_cells(connection, *ALL)) == brute_force(connection.execute(SELECT))
    assert rollups.count_wrong(connection) == 0


EVENT_IDS = st.sampled_from([f"event-{number}" for number in range(10)])
RUNS = st.fixed_dictionaries(
    {
        "event_id": EVENT_IDS,
        "created_at": st.sampled_from(MOMENTS),
        "agent_name": st.sampled_from("ab"),
        "job_type": st.sampled_from("jk"),
        "status": st.sampled_from([str(status) for status in Status]),
        "duration_ms": st.sampled_from([0, 1, 70, 71, 5_000, 2**63 - 1]),
        "git_commit_hash": st.sampled_from(COMMITS),
    }
)


def row(run: dict[str, Any]) -> Row:
    return parse_run({"run_id": "r", "start_time": run["created_at"], **run}).row


def as_read(value: SqlValue) -> SqlValue:
    """Return a value as it comes from a database, in which a boolean is a number."""
    return int(value) if isinstance(value, bool) else value


def copied(runs: list[dict[str, Any]], gone: str | None, number: int) -> ApplyChanges:
    """Return changes as a copy takes them over: runs under numbers of their own, and a deletion."""
    unique = {run["event_id"]: run for run in runs}
    changes: list[tuple[int, CopiedRun | str]] = [
        (number + place, CopiedRun(number + place, (*map(as_read, row(run)),), MOMENTS[0]))
        for place, run in enumerate(unique.values())
    ]
    if gone is not None:
        changes.append((number + len(changes), gone))
    return ApplyChanges(tuple(changes), (), "abcdefabcdef", number + len(changes), 0)


COMMANDS: st.SearchStrategy[Command[Any]] = st.one_of(
    st.builds(lambda runs: CreateRuns(tuple(map(row, runs))), st.lists(RUNS, min_size=1, max_size=8)),
    st.builds(
        UpdateRun,
        EVENT_IDS,
        st.fixed_dictionaries(
            {"output_summary": st.just("x")},
            optional={
                "status": st.sampled_from([str(status) for status in Status]),
                "duration_ms": st.sampled_from([0, 1, 70, 9_000]),
                "git_commit_hash": st.sampled_from(["abc1234", "fff0000"]),
            },
        ),
    ),
    st.builds(RegisterProcess, EVENT_IDS, st.just(PROCESS)),
    st.just(EndProcess(PROCESS, DEATH, 5)),
    st.builds(lambda moment: PruneRuns(moment, 3), st.sampled_from(MOMENTS)),
    st.builds(DeleteRun, EVENT_IDS),
    st.builds(
        RedactRun, EVENT_IDS, st.sampled_from([("host",), ("git_commit_hash", "git_repo")]), st.just(True), st.just(9)
    ),
    st.builds(lambda moment: ReapRuns(moment, 3), st.sampled_from(MOMENTS)),
)
GROUPS = st.lists(
    st.one_of(
        st.lists(COMMANDS, min_size=1, max_size=6),
        st.tuples(st.lists(RUNS, max_size=4), st.one_of(st.none(), EVENT_IDS)),
        st.sampled_from(["add up", "begin anew"]),
    ),
    max_size=10,
)


def commit(connection: sqlite3.Connection, *commands: Command[Any], undo_last: bool = False) -> None:
    connection.execute("BEGIN")
    transaction = Transaction(connection, MOMENTS[0])
    transaction.apply(commands[: len(commands) - undo_last])
    if undo_last:
        with suppress(ZeroDivisionError), transaction.savepoint():
            transaction.apply(commands[-1:])
            raise ZeroDivisionError
    transaction.finish()
    connection.execute("COMMIT")


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "telemetry.sqlite", isolation_level=None)) as opened:
        opened.execute("PRAGMA synchronous = OFF")
        migrate.create(opened, MOMENTS[0])
        yield opened


@settings(max_examples=60)
@given(GROUPS, st.booleans())
def test_cells_are_those_of_the_runs_after_any_commands(groups: list[Any], undo_last: bool) -> None:
    """Creates, changes, deletions, prunes, redactions and copied changes, some undone, added up at any time."""
    number = 1_000
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(sqlite3.connect(Path(folder) / "x", isolation_level=None)) as opened,
    ):
        opened.execute("PRAGMA synchronous = OFF")
        migrate.create(opened, MOMENTS[0])
        for group in groups:
            if isinstance(group, list):
                commit(opened, *group, undo_last=undo_last)
            elif isinstance(group, tuple):
                commit(opened, copied(group[0], group[1], number))
                number += 10
            elif group == "add up":
                rollups.fold(opened.cursor())
            else:
                integrity.recount_totals(opened)
        assert_right(opened)
        rollups.fold(opened.cursor())
        assert_right(opened)
        folded = opened.execute("SELECT * FROM run_commits").fetchall()
        rollups.rebuild(opened)
        assert opened.execute("SELECT * FROM run_commits").fetchall() == folded
        opened.execute("DELETE FROM agent_runs")
        rollups.rebuild(opened)
        assert opened.execute("SELECT count(*) FROM run_commits").fetchone() == (0,)


def test_a_query_asks_for_some_slots_with_what_is_not_added_up_yet(connection: sqlite3.Connection) -> None:
    runs = [make_run(created_at=moment, status="success", git_commit_hash="abc1234") for moment in MOMENTS]
    commit(connection, CreateRuns(tuple(row(run) for run in runs[::2])))
    rollups.fold(connection.cursor())
    commit(connection, CreateRuns(tuple(row(run) for run in runs[1::2])))
    cells = brute_force(connection.execute(SELECT))
    slots = sorted({cell.slot for cell in cells})
    for first in slots:
        for end in (*slots, slots[-1] + 1):
            expected = [cell for cell in cells if first <= cell.slot < end]
            assert sorted(fetch_cells(connection, first, end)) == expected


def test_of_a_pair_with_a_commit_for_each_run_the_newest_cells_are_read(
    connection: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_log, "MAX_CELLS", 10)
    start = datetime(2026, 1, 1, tzinfo=UTC)
    runs = [
        make_run(created_at=format_timestamp(start + number * SLOT), agent_name=agent, git_commit_hash=f"{number:07}")
        for number in range(30)
        for agent in ("a", "b")[: 1 + (number % 5 == 0)]
    ]
    finished = [row({**run, "status": "success"}) for run in runs]
    commit(connection, CreateRuns(tuple(finished[:-4])))
    rollups.fold(connection.cursor())
    commit(connection, CreateRuns(tuple(finished[-4:])))
    cells = [*fetch_cells(connection, *ALL)]
    assert sorted(cell.commit for cell in cells if cell.agent_name == "a") == [f"{n:07}" for n in range(20, 30)]
    assert sorted(cell.commit for cell in cells if cell.agent_name == "b") == [f"{n:07}" for n in range(0, 30, 5)]


def test_a_text_that_is_no_time_or_no_commit_counts_somewhere() -> None:
    """A row that somebody has changed by hand stops nobody."""
    summary: stats_log.Summary = {}
    given = dict.fromkeys(FACTS, 0) | {"agent_name": "a", "job_type": "j", "status": "success"}
    facts = {**given, "created_at": "one day", "git_commit_hash": "x" * 10_000}
    stats_log.summarize(summary, [tuple(facts[name] for name in FACTS)])
    assert commit_log.cells_of(summary) == {("a", "j", "", 0): (1, 0, 0, 0, 0)}
    assert len(stats_log.to_log(summary)) < 100


def test_no_query_sorts(connection: sqlite3.Connection) -> None:
    """Cells are read in the order of their table, the runs of a finding by walks that are merged."""
    stretch = {"agent_name": "a", "job_type": "j", "start": MOMENTS[6], "end": MOMENTS[0]}
    asked: list[tuple[str, Any]] = [(commit_cells.READ, ALL)]
    asked += [(regressions.RUNS.format(order=order), stretch) for order in ("ASC", "DESC")]
    for statement, values in asked:
        steps = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", values)]
        assert not any("TEMP B-TREE" in step for step in steps), steps
        assert not any(step.startswith(("SCAN run_commits", "SCAN agent_runs")) for step in steps), steps


@pytest.mark.parametrize(
    "harm",
    [
        *(f"UPDATE run_commits SET {name} = {name} + 1 WHERE slot = (SELECT max(slot) FROM run_commits)"
          for name in commit_log.SUMS),
        "DELETE FROM run_commits WHERE git_commit_hash = 'abc1234'",
        "INSERT INTO run_commits VALUES (7, 'a', 'j', 'abc1234', 1, 1, 0, 0, 5)",
        "UPDATE agent_runs SET git_commit_hash = 'fff0000' WHERE id = 3",
        "DELETE FROM run_stats_log",
    ],
)  # fmt: skip
def test_check_finds_and_repairs_a_wrong_cell(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "telemetry.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        migrate.create(connection, MOMENTS[0])
        runs = [
            make_run(created_at=moment, status="success", duration_ms=500, git_commit_hash="abc1234")
            for moment in MOMENTS
        ]
        commit(connection, CreateRuns(tuple(map(row, runs[:5]))))
        rollups.fold(connection.cursor())
        commit(connection, CreateRuns(tuple(map(row, runs[5:]))))
        connection.execute(harm)
        assert rollups.count_wrong(connection) > 0
    assert "totals differ" in telemetryd("check", "--db-path", path, status=1).stdout
    assert "totals counted again" in telemetryd("check", "--repair", "--db-path", path).stdout
    with closing(sqlite3.connect(path)) as connection:
        assert_right(connection)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_migrated_database_has_cells(tmp_path: Path, layout: str) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", layout)
    migrate_file(path, MOMENTS[0])
    with closing(sqlite3.connect(path)) as connection:
        assert_right(connection)


def make_of_version_21(path: Path, runs: list[dict[str, Any]]) -> None:
    """Make a database as the version before wrote it, with a log that knows no commits."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for step in migrate.steps():
            if step.version <= 21:
                for statement in step.statements():
                    connection.execute(statement)
                values = (step.version, step.description, MOMENTS[0])
                connection.execute("INSERT INTO schema_migrations VALUES (?, ?, ?)", values)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 21")
        columns = ", ".join((*STORED, "updated_at"))
        places = ", ".join("?" * (len(STORED) + 1))
        connection.executemany(
            f"INSERT INTO agent_runs ({columns}) VALUES ({places})", [(*row(run), MOMENTS[0]) for run in runs]
        )
        old = '["2026-01-03T12","a","j","success",[1,0,0,0,0,0],[]]'
        connection.execute("INSERT INTO run_stats_log (total, changes) VALUES (1, ?)", (old,))


def test_the_version_before_is_counted_anew(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    make_of_version_21(
        path, [make_run(created_at=moment, status="failure", git_commit_hash="abc1234") for moment in MOMENTS]
    )
    migrate_file(path, MOMENTS[0])
    with closing(sqlite3.connect(path)) as connection:
        assert_right(connection)
        assert connection.execute("SELECT sum(runs), sum(failures) FROM run_commits").fetchone() == (9, 9)


def test_a_salvaged_database_has_cells(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        migrate.create(connection, MOMENTS[0])
        runs = [make_run(created_at=moment, status="success", git_commit_hash="abc1234") for moment in MOMENTS]
        commit(connection, CreateRuns(tuple(map(row, runs))))
    salvage(path, NOW)
    with closing(sqlite3.connect(path)) as connection:
        assert_right(connection)
        assert connection.execute("SELECT sum(runs) FROM run_commits").fetchone() == (9,)


def write_until_killed(url: str, attempt: int) -> int:
    """Send batches, changes and deletions; return after how many batches nobody answered any more."""
    for number in count():
        runs = [
            make_run(
                event_id=f"{attempt}-{number}-{each}",
                created_at=MOMENTS[each % len(MOMENTS)],
                status="running" if each % 3 else "failure",
                git_commit_hash=f"{each % 40:07x}",
            )
            for each in range(1_000)
        ]
        name = f"/api/v1/runs/{attempt}-{number}"
        answers = (
            call(url, "POST", "/api/v1/runs/batch", runs),
            call(url, "PATCH", f"{name}-1", {"status": "success", "duration_ms": 7}),
            call(url, "DELETE", f"{name}-3"),
        )
        if any(status is None for status, _ in answers):
            return number
    raise AssertionError


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_cells_are_right_after_a_kill(start_daemon: StartDaemon, mode: str) -> None:
    """The daemon is killed while it writes, and adds up ten thousand changes now and then."""
    for attempt in range(3):
        daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE=mode)
        url = daemon.url
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(write_until_killed, url, attempt)
            while len(daemon.execute("SELECT run FROM run_changes LIMIT 4")) < 4 and not writing.done():
                time.sleep(0.05)
            time.sleep(0.7 * attempt)
            daemon.stop(signal.SIGKILL)
            writing.result(60)
        with closing(sqlite3.connect(daemon.database)) as connection:
            assert connection.execute("SELECT count(*) > 0 FROM agent_runs").fetchone() == (1,)
            assert_right(connection)
