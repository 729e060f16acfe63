"""The statistics are those of the runs, whatever has been done to them."""

from __future__ import annotations

import itertools
import json
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telemetryd.cli.statistics import table
from telemetryd.engine.sqlite.files import APPLICATION_ID
from telemetryd.engine.sqlite.statements import rollups
from telemetryd.engine.sqlite.statements.commands import Transaction
from telemetryd.engine.sqlite.statements.predicates import glob
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.engine.sqlite.tools.legacy import migrate_file
from telemetryd.errors import InvalidRequestError
from telemetryd.model import stats
from telemetryd.model.commands import (
    Command,
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
from telemetryd.model.filters import matches
from telemetryd.model.intervals import wilson
from telemetryd.model.processes import Process as RunProcess
from telemetryd.model.runs import STORED, parse_run
from telemetryd.model.sketches import ERROR
from telemetryd.model.values import MAX_INTEGER, Status, format_timestamp
from tests.conftest import Api, StartDaemon, make_run
from tests.test_properties import IS_LONG
from tests.tools.old_databases import LAYOUTS, make_old_database
from tests.tools.process import telemetryd

NOW = datetime(2026, 1, 3, 12, 30, tzinfo=UTC)
HOUR = timedelta(hours=1)
MOMENTS = [format_timestamp(NOW - hours * HOUR) for hours in (0, 0.9, 1, 13, 14, 24, 37, 60, 61)]
PROCESS = RunProcess(17, 1, "boot", "machine", "namespace")
DEATH = Death(format_timestamp(NOW), "gone", "SIGKILL")
QUERIES = [
    "&".join(["from=2025-12-30T00:00:00Z", "to=2026-01-04T00:00:00Z", *parts])
    for grouped, bucket, filtered in itertools.product(
        ([], ["group_by=agent_name"], ["group_by=status,job_type"], ["group_by=job_type,agent_name,status"]),
        ([], ["bucket=1h"], ["bucket=5h"], ["bucket=1d"]),
        ([], ["agent_name=a", "status=success,failure"], ["agent_name=*b", "job_type=j"], [r"agent_name=\*b,a"]),
    )
    for parts in [[*grouped, *bucket, *filtered]]
] + ["", "from=-37h&to=-1h", "from=-60h&to=-13h&group_by=status", "from=-61h&to=-90m&bucket=1d"]
QUERIES += [
    f"{bounds}&bucket={bucket}&utc_offset={offset}&{parts}"
    for bounds in ("from=2025-12-30T00:00:00Z&to=2026-01-04T00:00:00Z", "from=-61h&to=-90m")
    for bucket, offset in (
        ("1d", "%2B01:00"),
        ("1d", "-05:00"),
        ("1w", "%2B14:00"),
        ("5h", " 02:00"),
        ("13h", "-06:00"),
    )
    for parts in ("group_by=agent_name", "group_by=status&agent_name=*b&job_type=j", "status=success&group_by=job_type")
]


def brute_force(connection: sqlite3.Connection, query: stats.GetStats) -> list[dict[str, Any]]:
    """Answer from the runs themselves, with exact quantiles."""
    names = [row[1] for row in connection.execute("PRAGMA table_info(agent_runs)")]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in connection.execute("SELECT * FROM agent_runs"):
        run = dict(zip(names, row, strict=True))
        hour = (datetime.fromisoformat(run["created_at"]) - datetime(1970, 1, 1, tzinfo=UTC)) // HOUR
        agents, endings = query.filters.equal.get("agent_name", ()), [last for _, last in query.filters.patterns]
        is_agent = run["agent_name"] in agents or any(map(run["agent_name"].endswith, endings))
        if not query.start <= hour < query.end or ((agents or endings) and not is_agent):
            continue
        if any(run[name] not in query.filters.equal.get(name, (run[name],)) for name in ("job_type", "status")):
            continue
        bucket = [] if query.hours is None else [stats.hour_name(hour - (hour + query.ahead) % query.hours)]
        groups.setdefault((*bucket, *(run[name] for name in query.group_by)), []).append(run)
    answer = []
    for key, runs in sorted(groups.items()):
        finished = [run for run in runs if run["status"] != "running"]
        successes = [run for run in finished if run["status"] == "success"]
        durations = sorted(run["duration_ms"] for run in finished)
        labels = [*(["bucket"] if query.hours is not None else []), *query.group_by]
        answer.append(
            {
                **dict(zip(labels, key, strict=True)),
                "runs": len(runs),
                "finished": len(finished),
                "success_rate": round(len(successes) / len(finished), 6) if finished else None,
                "success_rate_interval": interval_of(query, len(successes), len(finished)),
                **{name: sum(run[name] for run in runs) for name in stats.ITEMS},
                "duration_ms": {
                    **{
                        f"p{percent}": durations[percent * (len(durations) - 1) // 100] if durations else None
                        for percent in stats.PERCENTS
                    },
                    "sum": sum(durations),
                },
            }
        )
    return answer


def interval_of(query: stats.GetStats, successes: int, finished: int) -> dict[str, float] | None:
    asked = {*query.filters.equal.get("status", Status)} - {"running"}
    is_chosen_by_outcome = "status" in query.group_by or "success" not in asked or asked == {"success"}
    if is_chosen_by_outcome or not finished:
        return None
    low, high = wilson(successes / finished, finished)
    return {"low": round(low, 6), "high": round(high, 6)}


def assert_equal(found: Sequence[Mapping[str, Any]], exact: Sequence[Mapping[str, Any]]) -> None:
    """Compare answers: quantiles within the stated error, all else exactly (beyond 64 bits as far as JSON goes)."""
    assert len(found) == len(exact)
    for one, other in zip(map(dict, found), map(dict, exact), strict=True):
        times, exact_times = one.pop("duration_ms"), other.pop("duration_ms")
        for percent in stats.PERCENTS:
            quantile, exactly = times.pop(f"p{percent}"), exact_times.pop(f"p{percent}")
            assert (quantile is None) == (exactly is None)
            assert exactly is None or abs(quantile - exactly) <= ERROR * exactly * (1 + 1e-9) + 0.5
        for left, right in ((one, other), (times, exact_times)):
            assert left == {
                name: float(value) if isinstance(value, int) and value > MAX_INTEGER else value
                for name, value in right.items()
            }


def assert_right(connection: sqlite3.Connection, queries: Sequence[str] = QUERIES) -> None:
    for text in queries:
        query = stats.parse(text, NOW)
        assert_equal(rollups.fetch_stats(connection, query), brute_force(connection, query))
    assert rollups.count_wrong(connection) == 0


NUMBERS = st.one_of(st.integers(0, 5), st.integers(0, 10**7), st.integers(0, MAX_INTEGER))
EVENT_IDS = st.sampled_from([f"event-{number}" for number in range(12)])
CREATES = st.builds(
    lambda fields: CreateRuns(tuple(parse_run({"run_id": "r", "start_time": MOMENTS[5], **run}).row for run in fields)),
    st.lists(
        st.fixed_dictionaries(
            {
                "event_id": EVENT_IDS,
                "created_at": st.sampled_from(MOMENTS),
                "agent_name": st.sampled_from(["a", "b", "*b"]),
                "job_type": st.sampled_from(["j", "k"]),
                "status": st.sampled_from([str(status) for status in Status]),
                "duration_ms": NUMBERS,
                **dict.fromkeys(stats.ITEMS, NUMBERS),
            }
        ),
        min_size=1,
        max_size=8,
    ),
)
UPDATES = st.builds(
    UpdateRun,
    EVENT_IDS,
    st.fixed_dictionaries(
        {"output_summary": st.just("x")},
        optional={
            "status": st.sampled_from([str(status) for status in Status]),
            "duration_ms": NUMBERS,
            "items_failed": NUMBERS,
        },
    ),
)
COMMANDS: st.SearchStrategy[Command[Any]] = st.one_of(
    CREATES,
    UPDATES,
    st.builds(RegisterProcess, EVENT_IDS, st.just(PROCESS)),
    st.just(EndProcess(PROCESS, DEATH, 5)),
    st.builds(lambda moment: PruneRuns(moment, 3), st.sampled_from(MOMENTS)),
    st.builds(DeleteRun, EVENT_IDS),
    st.builds(RedactRun, EVENT_IDS, st.just(("end_time", "host")), st.just(True)),
    st.builds(lambda moment, agent: ReapRuns(moment, 3, agent), st.sampled_from(MOMENTS), st.sampled_from(["a", None])),
)
GROUPS = st.lists(st.tuples(st.lists(COMMANDS, min_size=1, max_size=6), st.booleans(), st.booleans()), max_size=8)


@settings(max_examples=40)
@given(GROUPS, st.lists(st.sampled_from(QUERIES), min_size=12, max_size=12))
def test_statistics_are_those_of_the_runs_after_any_commands(
    groups: list[tuple[list[Command[Any]], bool, bool]], queries: list[str]
) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(sqlite3.connect(Path(folder) / "x", isolation_level=None)) as c,
    ):
        c.execute("PRAGMA synchronous = OFF")
        migrate.create(c, MOMENTS[0])
        for commands, undo_last, is_folded in groups:
            c.execute("BEGIN")
            transaction = Transaction(c, format_timestamp(NOW))
            transaction.apply(commands[:-1])
            with suppress(ZeroDivisionError), transaction.savepoint():
                transaction.apply(commands[-1:])
                if undo_last:
                    raise ZeroDivisionError
            transaction.finish()
            if is_folded:
                rollups.fold(c.cursor())
            c.execute("COMMIT")
        assert_right(c, queries)
        c.execute("BEGIN")
        rollups.fold(c.cursor())
        folded = c.execute("SELECT * FROM run_stats ORDER BY 1, 2, 3, 4, 5, 6").fetchall()
        rollups.rebuild(c)
        c.execute("COMMIT")
        assert c.execute("SELECT * FROM run_stats ORDER BY 1, 2, 3, 4, 5, 6").fetchall() == folded
        assert_right(c, queries)


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "telemetry.sqlite", isolation_level=None)) as opened:
        opened.execute("PRAGMA synchronous = OFF")
        migrate.create(opened, MOMENTS[0])
        yield opened


def test_the_log_is_added_up_when_it_is_long(connection: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollups, "FOLD_AT", 400)
    for start in range(0, rollups.FOLD_AT, 100):
        assert connection.execute("SELECT count(*) FROM run_stats").fetchone() == (0,)
        rows = tuple(
            parse_run(make_run(created_at=MOMENTS[number % 9], duration_ms=number, status="success")).row
            for number in range(start, start + 100)
        )
        connection.execute("BEGIN")
        transaction = Transaction(connection, MOMENTS[0])
        transaction.apply([CreateRuns(rows)])
        transaction.finish()
        connection.execute("COMMIT")
    assert connection.execute("SELECT count(*) FROM run_stats_log").fetchone() == (0,)
    assert_right(connection)


def test_a_query_reads_no_more_rows_than_it_returns_groups(
    connection: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tuple(
        parse_run(make_run(created_at=moment, agent_name=agent, job_type=job, status=status)).row
        for moment, agent, job, status in itertools.product(MOMENTS, "ab", "jk", ("success", "failure", "running"))
    )
    connection.execute("BEGIN")
    transaction = Transaction(connection, MOMENTS[0])
    transaction.apply([CreateRuns(rows)])
    transaction.finish()
    rollups.fold(connection.cursor())
    connection.execute("COMMIT")
    by_status = "&group_by=status", "&group_by=job_type,status", "&status=failure"
    queries = [
        stats.parse(f"from=2025-12-30T00:00:00Z&to=2026-01-04T00:00:00Z&bucket={bucket}{parts}", NOW)
        for bucket in ("1h", "6h", "1d")
        for parts in ("", "&group_by=agent_name", "&group_by=job_type", "&group_by=job_type,agent_name", *by_status)
    ]
    groups = [len(rollups.fetch_stats(connection, query)) for query in queries]
    monkeypatch.setattr(stats, "answer", lambda _, cells: [*cells])
    assert [len(rollups.fetch_stats(connection, query)) for query in queries] == groups


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_migrated_database_has_statistics(tmp_path: Path, layout: str) -> None:
    path = make_old_database(tmp_path / "telemetry.sqlite", layout)
    migrate_file(path, MOMENTS[0])
    with closing(sqlite3.connect(path, isolation_level=None)) as opened:
        assert rollups.count_wrong(opened) == 0
        query = stats.parse("from=1970-01-01T00:00:00Z&to=2030-01-01T00:00:00Z", NOW)
        groups = rollups.fetch_stats(opened, query)
        assert [group["runs"] for group in groups] == [20]
        assert_equal(groups, brute_force(opened, query))


def test_a_database_of_an_earlier_version_gets_statistics(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    columns = (*STORED[: STORED.index("labels")], "updated_at")
    insert = f"INSERT INTO agent_runs ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
    with closing(sqlite3.connect(path, isolation_level=None)) as opened:
        for step in migrate.steps():
            if step.version <= 11:
                for statement in step.statements():
                    opened.execute(statement)
                opened.execute("INSERT INTO schema_migrations VALUES (?, ?, '')", (step.version, step.description))
        opened.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        opened.execute("PRAGMA user_version = 11")
        for _ in range(20):
            row = parse_run(make_run(created_at=MOMENTS[3])).row
            opened.execute(insert, (*row[: len(columns) - 1], MOMENTS[3]))
    migrate_file(path, MOMENTS[0])
    with closing(sqlite3.connect(path, isolation_level=None)) as opened:
        assert rollups.count_wrong(opened) == 0
        kept = opened.execute("SELECT sum(runs) FROM run_stats WHERE hours = 1 AND names = 3 AND status = ''")
        assert kept.fetchone() == (20,)


def test_runs_changed_by_hand_do_not_refuse_a_change(connection: sqlite3.Connection) -> None:
    def apply(*commands: Command[Any]) -> None:
        connection.execute("BEGIN")
        transaction = Transaction(connection, MOMENTS[0])
        transaction.apply(commands)
        transaction.finish()
        rollups.fold(connection.cursor())
        connection.execute("COMMIT")

    run = make_run(created_at=MOMENTS[3], status="success", duration_ms=500)
    apply(CreateRuns((parse_run(run).row,)))
    connection.execute("UPDATE agent_runs SET duration_ms = 90000, created_at = 'one day' WHERE id = 1")
    apply(UpdateRun(str(run["event_id"]), {"duration_ms": 70}))
    assert rollups.count_wrong(connection) > 0
    for text in QUERIES:
        rollups.fetch_stats(connection, stats.parse(text, NOW))
    apply(PruneRuns("z", 5))
    rollups.rebuild(connection)
    assert_right(connection)


async def ask(api: Api, expected: int = 200, /, **parameters: str) -> Any:
    return await api.get("/api/v1/stats", status=expected, params=parameters)


async def test_the_answer(api: Api) -> None:
    created = "2026-01-02T03:04:05Z"
    fields = {"created_at": created, "items_discovered": 9, "items_failed": 2}
    for status, duration in (("success", 1000), ("success", 2000), ("failed", 0), ("running", 77)):
        await api.post(make_run(**fields, status=status, duration_ms=duration))
    answer = await ask(
        api, 200, bucket="6h", group_by="agent_name", **{"from": "2026-01-02T03:30:00+01:00", "to": created}
    )
    times = answer["groups"][0].pop("duration_ms")
    assert answer == {
        "from": "2026-01-02T02:00:00Z",
        "to": "2026-01-02T04:00:00Z",
        "bucket": "6h",
        "group_by": ["agent_name"],
        "groups": [
            {
                "agent_name": "hugo-translator",
                "bucket": "2026-01-02T00:00:00Z",
                "runs": 4,
                "finished": 3,
                "success_rate": 0.666667,
                "success_rate_interval": {"low": 0.20766, "high": 0.938508},
                "items_discovered": 36,
                "items_succeeded": 0,
                "items_failed": 8,
                "items_skipped": 0,
            }
        ],
    }
    assert times["sum"] == 3000
    assert times["p50"] == times["p95"] == pytest.approx(1000, rel=ERROR)


async def test_nothing_runs_or_nothing_is_finished(api: Api) -> None:
    assert (await ask(api))["groups"] == []
    await api.post(make_run())
    [group] = (await ask(api))["groups"]
    assert (group["runs"], group["finished"]) == (1, 0)
    assert group["success_rate"] is None
    assert group["success_rate_interval"] is None
    assert group["duration_ms"] == {"p50": None, "p95": None, "p99": None, "sum": 0}


async def test_a_rate_that_the_question_decides_has_no_interval(api: Api) -> None:
    for status in ("success", "failed", "running"):
        await api.post(make_run(status=status))
    for chosen, rate in (("success", 1), ("failure,timeout", 0), ("running,success", 1)):
        [group] = (await ask(api, status=chosen))["groups"]
        assert (group["success_rate"], group["success_rate_interval"]) == (rate, None), chosen
    groups = (await ask(api, group_by="status"))["groups"]
    assert [group["success_rate_interval"] for group in groups] == [None] * 3
    [group] = (await ask(api, status="success,failure"))["groups"]
    assert group["success_rate_interval"] == {"low": 0.094531, "high": 0.905469}


async def test_a_patch_is_counted_when_it_is_acknowledged(api: Api) -> None:
    run = make_run(status="running")
    await api.post(run)
    await api.call(
        "PATCH",
        f"/api/v1/runs/{run['event_id']}",
        json={"status": "success", "duration_ms": 500, "items_succeeded": 3},
        status=200,
    )
    [group] = (await ask(api, group_by="status"))["groups"]
    assert (group["status"], group["runs"], group["items_succeeded"]) == ("success", 1, 3)
    assert group["duration_ms"]["p99"] == pytest.approx(500, rel=ERROR)
    assert group["duration_ms"]["sum"] == 500


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        (
            {"group_by": "agent_name,host"},
            "Invalid group_by: 'agent_name,host'; it must be some of agent_name",
        ),
        ({"group_by": "status,status"}, "each once"),
        ({"group_by": ""}, "Invalid group_by"),
        ({"bucket": "90m"}, "Invalid bucket: '90m'; it must be a number of hours, days or weeks such as 1h"),
        ({"bucket": "0h"}, "Invalid bucket"),
        ({"utc_offset": "+05:30"}, "Invalid utc_offset: '+05:30'; it must be whole hours from -14:00 to +14:00"),
        ({"utc_offset": "+15:00"}, "Invalid utc_offset"),
        ({"from": "yesterday"}, "Invalid from: 'yesterday'; it must be an ISO 8601 date and time such as"),
        ({"to": "-24"}, "Invalid to: '-24'"),
        ({"from": "now", "to": "-1h"}, "Invalid from: 'now'; it must be before to ('-1h')"),
        ({"status": "success,done"}, "Invalid status: 'done'; it must be one of running"),
        ({"agent_name": "a,,b"}, "Invalid agent_name"),
        ({"limit": "5"}, "Unknown query parameter 'limit'; known are: group_by, bucket, utc_offset, from, to"),
    ],
)
async def test_wrong_parameters(api: Api, parameters: dict[str, str], told: str) -> None:
    assert told in (await ask(api, 400, **parameters))["detail"]


async def test_filters_are_those_of_the_list(api: Api) -> None:
    for name in ("a", "a,b", "web-1", "web-2", "*", "web*"):
        await api.post(make_run(agent_name=name, job_type="j*"))
    for parameters in (
        {"agent_name": r"a\,b"},
        {"agent_name": r"\*,web-*"},
        {"agent_name": r"web\*,a"},
        {"agent_name": "*", "job_type": "j*"},
        {"agent_name": "*b*"},
        {"job_type": "*"},
        {"status": "RUNNING,success"},
    ):
        listed = await api.get("/api/v1/runs", params=parameters)
        groups = (await ask(api, group_by="agent_name", **parameters))["groups"]
        assert [group["agent_name"] for group in groups] == sorted(run["agent_name"] for run in listed), parameters
    for moment in ("-1w", "-90m", "-7200s", "2026-01-01T00:00:00 01:00"):
        for path, name in (("/api/v1/stats", "from"), ("/api/v1/runs", "created_after")):
            assert await api.get(path, params={name: moment})
    for moment in ("-1", "-1H", "-1d12h", "yesterday", ""):
        for path, name in (("/api/v1/stats", "from"), ("/api/v1/runs", "created_after")):
            told = (await api.get(path, status=400, params={name: moment}))["detail"]
            assert told.startswith(f"Invalid {name}: {moment!r}; it must be an ISO 8601 date")
    told = (await ask(api, 400, bucket="1s", group_by="host", status="x", **{"from": "y"}))["detail"]
    assert all(f"Invalid {name}: " in told for name in ("bucket", "group_by", "status", "from"))


@settings(max_examples=300 if IS_LONG else 100)
@given(st.lists(st.text("ab?[]", max_size=3), min_size=2, max_size=5), st.text("ab?[]", max_size=9))
def test_a_pattern_matches_as_in_sql(pieces: list[str], text: str) -> None:
    with closing(sqlite3.connect(":memory:")) as opened:
        (expected,) = opened.execute("SELECT ? GLOB ?", (text, glob((*pieces,)))).fetchone()
    assert matches((*pieces,), text) is bool(expected)


def test_no_pattern_takes_long() -> None:
    pattern = (*["", *["a"] * 126, "b"],)
    assert not matches(pattern, "a" * 255)
    assert not matches(pattern, "a" * 125 + "xxb")
    with closing(sqlite3.connect(":memory:")) as opened:
        assert opened.execute("SELECT ? GLOB ?", ("a" * 255, glob(pattern))).fetchone() == (0,)


async def test_times_at_the_ends_of_the_calendar(api: Api) -> None:
    await api.post(make_run(created_at="0001-01-01T00:00:00Z"))
    await api.post(make_run(created_at="9999-12-31T22:59:59Z"))
    whole = {"from": "0001-01-01T00:00:00Z", "to": "9999-12-31T23:59:59Z"}
    for bucket, offset in (("1h", "+00:00"), ("7d", "+14:00"), ("1d", "-14:00"), ("99999w", "+00:00")):
        groups = (await ask(api, 200, bucket=bucket, utc_offset=offset, **whole))["groups"]
        assert sum(group["runs"] for group in groups) == 2
        assert all(datetime.fromisoformat(group["bucket"]) for group in groups)


async def test_an_answer_is_bounded(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stats.MAX_GROUPS == 10_000
    monkeypatch.setattr(stats, "MAX_GROUPS", 1000)
    await api.batch([make_run(agent_name=f"agent-{number}") for number in range(1001)])
    told = (await ask(api, 400, group_by="agent_name"))["detail"]
    assert "more than 1000 groups: ask for a longer bucket" in told
    assert len((await ask(api, group_by="agent_name", agent_name="agent-1*"))["groups"]) == 112
    [group] = (await ask(api))["groups"]
    assert group["runs"] == 1001


def test_the_table_fits_the_terminal() -> None:
    group = {
        "runs": 1234,
        "success_rate": 0.5,
        "success_rate_interval": {"low": 0.4721, "high": 0.5279},
        **dict.fromkeys(stats.ITEMS, 10**6),
        "duration_ms": {"p50": 999, "p95": 61_000, "p99": 7_200_000, "sum": 10**9},
    }
    answer = {
        "from": "2026-01-01T00:00:00Z",
        "to": "2026-01-02T00:00:00Z",
        "bucket": "1h",
        "group_by": ["agent_name", "job_type"],
        "groups": [
            {"bucket": "2026-01-01T05:00:00Z", "agent_name": "x" * 80, "job_type": "translate", **group},
            {"bucket": "2026-01-01T06:00:00Z", "agent_name": "y", "job_type": "z\x1b", **group},
        ],
    }
    lines = table(answer, 128).splitlines()
    assert {len(line) for line in lines[1:]} == {128}
    assert lines[1].split()[:4] == ["bucket", "agent_name", "job_type", "runs"]
    assert "x…" in lines[2]
    assert lines[3].split()[:7] == ["2026-01-01", "06:00", "y", r"z\u001b", "1,234", "50.0%", "47-53%"]
    assert max(map(len, table(answer, 400).splitlines())) < 200
    assert table({**answer, "groups": []}, 80).startswith("No runs were created from 2026-01-01T00:00:00Z to")


@pytest.mark.sqlite
def test_the_command_asks_the_daemon_or_the_database(tmp_path: Path, start_daemon: StartDaemon) -> None:
    place = str(tmp_path / "socket")
    daemon = start_daemon("--unix", place)
    daemon.wait_for_line("Serving")
    asked = ["--db-path", str(daemon.database)]
    run = make_run(status="success", duration_ms=100)
    with closing(sqlite3.connect(daemon.database)) as opened:
        assert opened.execute("SELECT count(*) FROM agent_runs").fetchone() == (0,)
    empty = telemetryd("stats", *asked, "--unix", place)
    assert empty.stdout.startswith("No runs were created")
    daemon.stop()
    with closing(sqlite3.connect(daemon.database, isolation_level=None)) as opened:
        opened.execute("BEGIN")
        transaction = Transaction(opened, format_timestamp(datetime.now(UTC)))
        transaction.apply([CreateRuns((parse_run(run).row,))])
        transaction.finish()
        opened.execute("COMMIT")
    daemon = start_daemon("--unix", place)
    daemon.wait_for_line("Serving")
    shown = telemetryd("stats", *asked, "--unix", place).stdout.splitlines()
    assert shown[2].split()[:3] == ["hugo-translator", "1", "100.0%"]
    answer = json.loads(telemetryd("stats", *asked, "--unix", place, "--json", "--group-by", "status").stdout)
    assert [group["status"] for group in answer["groups"]] == ["success"]
    beside = json.loads(telemetryd("stats", *asked, "--json", "--group-by", "status").stdout)
    assert beside["groups"] == answer["groups"]
    assert "Invalid bucket" in telemetryd("stats", *asked, "--bucket", "5s", status=1).stderr
    daemon.stop()
    direct = json.loads(telemetryd("stats", *asked, "--json", "--group-by", "status").stdout)
    assert direct["groups"] == answer["groups"]
    assert "Invalid bucket" in telemetryd("stats", *asked, "--bucket", "5s", status=1).stderr


def test_a_refused_answer_leaves_no_snapshot_behind(
    connection: sqlite3.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(*rows: tuple[Any, ...]) -> None:
        connection.execute("BEGIN")
        transaction = Transaction(connection, MOMENTS[0])
        transaction.apply([CreateRuns(rows)])
        transaction.finish()
        rollups.fold(connection.cursor())
        connection.execute("COMMIT")

    monkeypatch.setattr(stats, "MAX_GROUPS", 1)
    connection.execute("PRAGMA journal_mode = WAL").fetchall()
    create(*(parse_run(make_run(agent_name=f"agent-{number}")).row for number in range(9)))
    query = stats.parse("group_by=agent_name&from=-7d", NOW)
    with closing(sqlite3.connect(tmp_path / "telemetry.sqlite", isolation_level=None)) as reader:
        with pytest.raises(InvalidRequestError) as refused:
            rollups.fetch_stats(reader, query)
        create(parse_run(make_run()).row)
        assert reader.execute("SELECT count(*) FROM agent_runs").fetchone() == (10,)
        assert refused.value
