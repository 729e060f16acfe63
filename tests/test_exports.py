from __future__ import annotations

import asyncio
import csv
import gzip
import io
import itertools
import json
import sqlite3
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import orjson
import pyarrow.parquet
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from telemetryd.cli import main
from telemetryd.cli.files import Refusals
from telemetryd.engine.sqlite import connection, exports
from telemetryd.engine.sqlite.exports import Bounds
from telemetryd.engine.sqlite.files import wal_bytes
from telemetryd.engine.sqlite.statements import export as export_rows
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.git_urls import without_credentials
from telemetryd.http import EXPORTER
from telemetryd.model import runs, tables, values
from telemetryd.model.queries import SNAPSHOT, ExportRuns, Format
from telemetryd.model.runs import COLUMNS, STORED
from telemetryd.model.values import Role
from telemetryd.services import exports as streamed
from tests.conftest import PATIENCE_S, Api, MakeApi, StartDaemon, eventually, exports_of, make_run, reading
from tests.contract.wire import JSON
from tests.http_client import call
from tests.test_properties import IS_LONG

PATH = "/api/v1/runs/export"
FULL = {
    **runs.example(runs.NewRun),
    "product": "",
    "error_details": 'He said "no",\r\nand\nleft; ünïcode \N{SNOWMAN}\t\x01',
    "metrics_json": {"tokens": 48211, "deep": [{"a": None}, 1.5e300, -0.0, 9007199254740993]},
    "items_failed": 2**63 - 1,
}


async def export(api: Api, answered: int = 200, **parameters: Any) -> tuple[bytes, Any]:
    async with api.client.get(PATH, params=parameters) as response:
        body = await response.read()
        assert response.status == answered, body
        return body, response.headers


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "export" in path.name]


async def stored(api: Api) -> list[dict[str, Any]]:
    """Return what the list answers, in the order of arrival and without what is derived."""
    found = await api.list(limit=1000)
    return sorted(({name: run[name] for name in COLUMNS} for run in found), key=lambda run: run["id"])


# --- The forms -----------------------------------------------------------------------------------


async def test_ndjson_holds_what_the_list_answers(api: Api) -> None:
    await api.batch([make_run(**{**FULL, "event_id": "full"}), make_run(), make_run(api_posted=True)])
    body, headers = await export(api)
    assert [json.loads(line) for line in body.splitlines()] == await stored(api)
    assert body.endswith(b"}\n")
    assert headers["Content-Type"] == "application/x-ndjson"
    assert (headers["X-Total-Count"], headers[SNAPSHOT]) == ("3", "exact")
    assert 'attachment; filename="runs-' in headers["Content-Disposition"]
    assert headers["X-Request-ID"]


async def test_csv_is_rfc_4180_and_tells_an_empty_text_from_none(api: Api) -> None:
    await api.batch([make_run(**{**FULL, "event_id": "full"}), make_run(item_name="=1+1")])
    body, headers = await export(api, format="csv")
    assert headers["Content-Type"] == "text/csv"
    head, *rows = csv.reader(io.StringIO(body.decode(), newline=""), strict=True)
    assert head == list(COLUMNS)
    first, second = (dict(zip(head, row, strict=True)) for row in rows)
    assert first["error_details"] == FULL["error_details"]
    assert json.loads(first["metrics_json"]) == FULL["metrics_json"]
    assert (first["api_posted"], first["items_failed"]) == ("false", str(2**63 - 1))
    assert second["item_name"] == "=1+1"  # as it is; the docs warn people who open it in a spreadsheet
    read = [fields for _, fields in tables.read_csv(io.BytesIO(body))]
    assert isinstance(read[0], dict)
    assert isinstance(read[1], dict)
    assert read[0]["product"] == ""
    assert "product" not in read[1]


@pytest.mark.sqlite
@pytest.mark.parametrize("encoding", ["UTF-16le", "UTF-16be"])
async def test_a_database_in_utf_16_is_exported_like_any_other(
    make_api: MakeApi, tmp_path: Path, encoding: str
) -> None:
    with closing(sqlite3.connect(tmp_path / "telemetry.sqlite", isolation_level=None)) as connection:
        connection.execute(f"PRAGMA encoding = '{encoding}'")
        migrate.create(connection, "2026-01-01T00:00:00.000000Z")
    api = await make_api()
    await api.batch([make_run(**{**FULL, "event_id": "full"}), make_run(agent_name="ä\N{SNOWMAN}\N{ROCKET}")])
    await api.call("POST", "/api/v1/runs/full/events", json={"event_type": "é", "payload": {"ü": 1}}, status=201)
    all_of_them = await stored(api)
    body, _ = await export(api, include="events")
    found = [json.loads(line) for line in body.splitlines()]
    assert [(run["error_details"], run["metrics_json"]) for run in found] == [
        (run["error_details"], run["metrics_json"]) for run in all_of_them
    ]
    assert [run["agent_name"] for run in found] == [run["agent_name"] for run in all_of_them]
    assert [(event["event_type"], event["payload"]) for event in found[0]["events"]] == [("é", {"ü": 1})]
    body, _ = await export(api, format="csv")
    records = [fields for _, fields in tables.read_csv(io.BytesIO(body))]
    assert records == [{name: value for name, value in run.items() if value is not None} for run in all_of_them]
    body, _ = await export(api, format="parquet", agent_name="ä*")
    (tmp_path / "runs.parquet").write_bytes(body)
    assert pyarrow.parquet.read_table(tmp_path / "runs.parquet")["agent_name"].to_pylist() == ["ä\N{SNOWMAN}\N{ROCKET}"]


@pytest.mark.sqlite
@pytest.mark.parametrize("form", ["csv", "parquet"])
async def test_a_nul_that_an_earlier_migration_kept_breaks_no_line(api: Api, tmp_path: Path, form: str) -> None:
    await api.batch([make_run(product="p,q"), make_run(product="next")])
    with closing(sqlite3.connect(api.settings.db_path)) as connection, connection:
        connection.execute("UPDATE agent_runs SET product = 'p' || char(0) || 'q' WHERE product = 'p,q'")
    body, _ = await export(api, format=form)
    if form == "csv":
        found = [fields["product"] for _, fields in tables.read_csv(io.BytesIO(body)) if isinstance(fields, dict)]
    else:
        (tmp_path / "runs.parquet").write_bytes(body)
        found = pyarrow.parquet.read_table(tmp_path / "runs.parquet")["product"].to_pylist()
    assert found == ["p\0q", "next"]


@pytest.mark.sqlite
async def test_parquet_with_text_that_is_no_utf_8_is_cut(api: Api) -> None:
    await api.batch([make_run(), make_run(product="bad")])
    with closing(sqlite3.connect(api.settings.db_path)) as connection, connection:
        connection.execute("UPDATE agent_runs SET product = CAST(x'ff' AS TEXT) WHERE product = 'bad'")
    with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError)):
        await export(api, format="parquet")


async def test_parquet_is_typed_and_counts_its_rows(api: Api, tmp_path: Path) -> None:
    await api.batch([make_run(**{**FULL, "event_id": "full"}), make_run()])
    body, _ = await export(api, format="parquet")
    (tmp_path / "runs.parquet").write_bytes(body)
    with pyarrow.parquet.ParquetFile(tmp_path / "runs.parquet") as file:
        assert file.metadata.num_rows == 2
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"
        table = file.read()
    assert table.schema.equals(tables.parquet_schema())
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds["created_at"] == "timestamp[us, tz=UTC]"
    assert (kinds["items_failed"], kinds["api_posted"], kinds["agent_name"]) == ("int64", "bool", "string")
    row = table.to_pylist()[0]
    assert (row["product"], row["items_failed"], row["api_posted"]) == ("", 2**63 - 1, False)
    assert table.to_pylist()[1]["product"] is None


@pytest.mark.parametrize("form", ["ndjson", "csv", "parquet"])
async def test_an_empty_export_is_whole_too(api: Api, tmp_path: Path, form: str) -> None:
    body, headers = await export(api, format=form, agent_name="nobody")
    assert headers["X-Total-Count"] == "0"
    if form == "parquet":
        (tmp_path / "empty.parquet").write_bytes(body)
        assert list(tables.read_parquet(tmp_path / "empty.parquet")) == []
    else:
        assert len(body.splitlines()) == (form == "csv")


async def test_events_are_all_there_and_oldest_first(api: Api) -> None:
    await api.batch([make_run(event_id=name) for name in ("none", "many", "last")])
    told = [
        {"event_type": "step", "timestamp": f"2025-12-24T10:{n // 60:02}:{n % 60:02}Z", "payload": {"n": n}}
        for n in range(1500)
    ]
    for part in (told[1000:], told[:1000]):  # not in the order of their times
        await api.call("POST", "/api/v1/runs/many/events", json=part, status=201)
    await api.call("POST", "/api/v1/runs/last/events", json={"event_type": "end"}, status=201)
    body, _ = await export(api, include="events")
    none, many, last = (json.loads(line) for line in body.splitlines())
    assert none["events"] == []
    assert [event["payload"]["n"] for event in many["events"]] == list(range(1500))
    assert [event["event_type"] for event in last["events"]] == ["end"]


# --- The request ---------------------------------------------------------------------------------


async def test_the_filters_are_those_of_the_list(api: Api) -> None:
    await api.batch(
        [
            make_run(event_id=f"{agent}-{job}-{status}-{day}", agent_name=agent, job_type=job, status=status,
                     host="h", duration_ms=9, error_summary="bad",
                     labels={"agent": agent, "day": f"{day}"},
                     metrics_json={"tokens": day}, created_at=f"2025-12-2{day}T10:00:00Z",
                     start_time=f"2025-12-2{day}T09:00:00Z")
            for agent in "ab" for job in "xy" for status in ("failure", "success") for day in range(3)
        ]
    )  # fmt: skip
    asked: dict[str, Any]
    for asked in (
        {"agent_name": "a"},
        {"agent_name": "a", "job_type": "x"},
        {"job_type": "y"},
        {"status": "FAILED", "agent_name": "b"},
        {"created_after": "2025-12-20T10:00:00Z", "status": "success"},
        {"created_before": "2025-12-22T11:00:00+01:00"},
        {"agent_name": "a*,b", "status": "success"},
        {"agent_name": "a,b", "job_type": "x,y", "host": "h"},
        {"host": "h", "created_after": "2025-12-21T10:00:00Z", "min_duration_ms": "5", "error": "BAD"},
        {"metrics.tokens>1": ""},
        {"label.agent": "a", "label.day": "1,2"},
        {"label.day": "0", "agent_name": "b", "created_after": "2025-12-20T09:00:00Z"},
        {"start_time_from": "2025-12-21T09:00:00Z", "start_time_to": "2025-12-21T09:00:00Z"},
    ):
        body, _ = await export(api, 200, **asked)
        expected = {run["event_id"] for run in await api.get("/api/v1/runs", params={"limit": 1000, **asked})}
        assert expected
        assert {json.loads(line)["event_id"] for line in body.splitlines()} == expected, asked


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"format": "xlsx"}, "Invalid format: 'xlsx'; it must be one of ndjson, csv, parquet"),
        ({"format": "csv", "include": "events"}, "only ndjson has room for events"),
        ({"include": "all"}, "Invalid include: 'all'; it must be events"),
        ({"limit": "5"}, "Unknown query parameter 'limit'; known are: event_id"),
        ({"status": "odd"}, "Invalid status: 'odd'"),
    ],
)
async def test_the_answer_to_a_wrong_request_says_what_is_allowed(api: Api, asked: dict[str, str], said: str) -> None:
    body, _ = await export(api, 400, **asked)
    assert said in json.loads(body)["detail"]


async def test_accept_chooses_the_form_and_format_overrules_it(api: Api) -> None:
    for accept, parameters, expected in (
        ("text/csv", {}, "text/csv"),
        ("application/vnd.apache.parquet", {}, "application/vnd.apache.parquet"),
        ("*/*", {}, "application/x-ndjson"),
        ("text/csv", {"format": "ndjson"}, "application/x-ndjson"),
    ):
        async with api.client.get(PATH, params=parameters, headers={"Accept": accept}) as response:
            await response.read()
            assert response.headers["Content-Type"] == expected


async def test_http_1_0_is_refused_since_it_could_not_tell_a_cut(api: Api) -> None:
    async with api.client.get(PATH) as response:
        assert response.status == 200
    reader, writer = await asyncio.open_connection(api.client.host, api.client.port)
    writer.write(f"GET {PATH} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    assert b" 400 " in answer.splitlines()[0]
    assert b"HTTP/1.1" in answer


# --- The snapshot --------------------------------------------------------------------------------

LARGE = "x" * 1_000_000
PLAIN = {"Accept-Encoding": "identity"}
"""Compressed, such texts would fit into the buffers of the sockets."""


async def test_an_export_is_one_snapshot_whatever_is_written_meanwhile(api: Api) -> None:
    await export_while_it_is_written_to(api)


@pytest.mark.sqlite
async def test_so_it_is_with_a_rollback_journal(make_api: MakeApi) -> None:
    await export_while_it_is_written_to(await make_api(db_journal_mode="DELETE"))


async def export_while_it_is_written_to(api: Api) -> None:
    for kind in "ef":
        for number in range(8):
            await api.post(make_run(event_id=f"{kind}{number}", input_summary=LARGE))
    async with api.client.get(PATH, headers=PLAIN) as response:  # far more than the sockets hold
        for number in range(8):
            await api.call("PATCH", f"/api/v1/runs/f{number}", json={"status": "success"}, status=200)
        await api.post(make_run(event_id="late"))
        body = await response.read()
    found = [json.loads(line) for line in body.splitlines()]
    assert [run["event_id"] for run in found] == [f"{kind}{number}" for kind in "ef" for number in range(8)]
    assert {run["status"] for run in found} == {"running"}
    assert response.headers[SNAPSHOT] == "exact"


@pytest.mark.sqlite
async def test_what_takes_too_long_is_copied_in_slices_and_says_so(api: Api) -> None:
    for _ in range(3):
        await api.batch([make_run() for _ in range(1500)])
    with closing(sqlite3.connect(api.settings.db_path)) as opened, opened:  # a migrated database may hold such ids
        opened.execute("UPDATE agent_runs SET id = -id WHERE id <= 7")
    reading(api)._exports.bounds = Bounds(longest_s=0.0)
    body, headers = await export(api)
    assert headers["X-Total-Count"] == "4500"
    first = [json.loads(line)["id"] for line in body.splitlines()]
    assert first == [*range(-7, 0), *range(8, 4501)]


@pytest.mark.sqlite
@pytest.mark.parametrize(("mode", "longest_s"), [("WAL", 60.0), ("DELETE", 0.5), ("PERSIST", 0.5)])
async def test_a_snapshot_is_held_only_so_long(make_api: MakeApi, mode: str, longest_s: float) -> None:
    """In WAL mode it holds back checkpoints, and in the other modes each commit."""
    api = await make_api(db_journal_mode=mode)
    await api.post(make_run())
    assert reading(api)._exports.bounds.longest_s == longest_s


@pytest.mark.sqlite
async def test_the_log_stays_short_while_an_export_is_copied_slowly(
    make_api: MakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot that is held to the end would let it grow with all that is written meanwhile."""
    monkeypatch.setattr(connection, "_CHECKPOINT_PAGES", 500)  # of 4 KiB: two of what is written
    api = await make_api()
    await api.batch([make_run() for _ in range(1000)])
    loop, is_due, logs = asyncio.get_running_loop(), False, list[int]()

    async def write() -> None:
        large = io.BytesIO(orjson.dumps(make_run(error_details=LARGE)))
        await api.call("POST", "/api/v1/runs", data=large, headers=JSON, status=201)
        logs.append(wal_bytes(api.settings.db_path))

    def write_now() -> None:
        asyncio.run_coroutine_threadsafe(write(), loop).result(PATIENCE_S)

    def copy_slice(*arguments: Any) -> tuple[int, int]:
        nonlocal is_due
        write_now()  # between two slices
        is_due = True
        return copy(*arguments)

    def is_over(self: exports._Copying) -> bool:
        nonlocal is_due
        if is_due:
            is_due = False
            write_now()  # in the middle of a slice
        return look(self)

    copy, look = export_rows.copy_slice, exports._Copying.is_over
    monkeypatch.setattr(export_rows, "copy_slice", copy_slice)
    monkeypatch.setattr(exports._Copying, "is_over", is_over)
    reading(api)._exports.bounds = Bounds(longest_s=0.0, slice_rows=100, steps=1_000)
    _, headers = await export(api)
    assert headers[SNAPSHOT] == "sliced"
    assert len(logs) == 20
    assert max(logs) < 6 * len(LARGE)


AT_ONCE = 2


async def test_only_so_many_run_at_once_and_one_that_is_left_makes_room(api: Api, tmp_path: Path) -> None:
    for _ in range(16):
        await api.post(make_run(input_summary=LARGE))
    held = [await api.client.get(PATH, headers=PLAIN) for _ in range(AT_ONCE)]
    async with api.client.get(PATH) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "10"
        assert "As many exports are running" in await response.text()
    for each in held:
        each.close()
    await eventually(lambda: exports_of(api)._running == 0)
    assert (await export(api, agent_name="nobody"))[0] == b""
    assert leftovers(tmp_path) == []


async def test_a_reader_that_is_too_slow_gives_its_place_up(api: Api) -> None:
    assert api.client.app is not None
    api.client.app[EXPORTER].bounds = streamed.ExportBounds(patience_s=0.3, least_bytes_per_s=1e9)
    for _ in range(16):
        await api.post(make_run(input_summary=LARGE))
    held = [await api.client.get(PATH, headers=PLAIN) for _ in range(AT_ONCE)]
    for _ in range(600):
        async with api.client.get(PATH, params={"agent_name": "nobody"}) as response:
            if response.status == 200:
                break
        await asyncio.sleep(0.1)
    assert response.status == 200
    for each in held:
        each.close()


async def test_the_next_chunk_is_made_while_one_is_sent(api: Api) -> None:
    await api.batch([make_run(input_summary="x" * 2000) for _ in range(300)])
    async with exports_of(api).open(ExportRuns()) as copied:
        pieces, made = copied._chunks, list[int]()

        def counted() -> Iterator[bytes]:
            for piece in pieces:
                made.append(len(piece))
                yield piece

        copied._chunks = counted()
        chunks = copied.chunks()
        sent = len(await anext(chunks))
        await eventually(lambda: len(made) == 2)
        await chunks.aclose()
    assert made[0] == sent


@pytest.mark.sqlite
async def test_an_export_that_is_left_in_the_middle_of_a_chunk_ends(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    """What goes wrong in a chunk that nobody takes any more concerns nobody."""
    await api.batch([make_run() for _ in range(300)])
    reading(api)._exports.bounds = Bounds(longest_s=60.0, steps=10)
    async with reading(api)._exports.open(ExportRuns(form=Format.CSV)) as copied:
        chunks = copied.chunks()
        await anext(chunks)
        await chunks.aclose()
    assert reading(api)._exports._running == 0
    assert not [record for record in caplog.records if record.name == "asyncio"]


async def test_an_export_whose_client_left_is_closed_before_the_daemon_ends(api: Api) -> None:
    exports, is_open = exports_of(api), asyncio.Event()

    async def leave() -> None:
        async with exports.open(ExportRuns()):
            is_open.set()
            await asyncio.Event().wait()

    leaving = asyncio.create_task(leave())
    await is_open.wait()
    for _ in range(2):  # the second time while it is being closed
        leaving.cancel()
        await asyncio.sleep(0)
    await asyncio.wait((leaving,))
    assert exports.are_running
    await exports.close()
    assert not exports.are_running


LENGTHS = [*[1] * 200, 30_000, *[1] * 5, *[3_000] * 10, *[1] * 200]


@pytest.mark.sqlite
@pytest.mark.parametrize("form", Format)
async def test_runs_of_any_length_and_id_are_exported(api: Api, tmp_path: Path, form: Format) -> None:
    await api.batch([make_run(output_summary="x" * length) for length in LENGTHS])
    with closing(sqlite3.connect(api.settings.db_path)) as connection, connection:
        connection.execute("UPDATE agent_runs SET id = id - 210")
        connection.execute(f"UPDATE agent_runs SET id = {2**63 - 1} WHERE id = (SELECT max(id) FROM agent_runs)")
    reading(api)._exports.bounds = Bounds(longest_s=60.0, rendered_bytes=20_000)
    body, _ = await export(api, format=form)
    (tmp_path / "runs").write_bytes(body)
    match form:
        case Format.NDJSON:
            read = [*enumerate(map(json.loads, body.splitlines()))]
        case Format.CSV:
            read = [*tables.read_csv(io.BytesIO(body))]
        case Format.PARQUET:
            read = [*tables.read_parquet(tmp_path / "runs")]
    found = [(run["id"], len(run["output_summary"])) for _, run in read if isinstance(run, dict)]
    assert found == [*zip([*range(-209, len(LENGTHS) - 210), 2**63 - 1], LENGTHS, strict=True)]


def test_a_step_renders_many_runs_but_few_long_ones() -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(f"CREATE TABLE runs (id INTEGER PRIMARY KEY, {', '.join(COLUMNS[1:])})")
        connection.executemany("INSERT INTO runs (output_summary) VALUES (?)", [("x" * length,) for length in LENGTHS])
        pieces = [*export_rows.lists(connection, 20_000)]
    rendered = [len(json.loads(piece)["id"]) for piece in pieces]
    assert sum(rendered) == len(LENGTHS)
    assert max(rendered) > 30
    assert len(rendered) < 40
    assert [runs for runs, piece in zip(rendered, pieces, strict=True) if len(piece) > 20_000] == [1]


@pytest.mark.sqlite
async def test_a_copy_never_takes_the_room_that_is_kept_for_new_runs(make_api: MakeApi) -> None:
    api = await make_api(min_free_mb=0)
    await api.post(make_run())
    reading(api)._exports._reserve_bytes = 2**60
    body, _ = await export(api, 503)
    assert "no room for the copy" in json.loads(body)["detail"]


# --- The commands --------------------------------------------------------------------------------


def run_command(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.stderr, result.exception)
    return result


@pytest.fixture
def two_daemons(
    start_daemon: StartDaemon, engine: str, request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[str, str]:
    """Two daemons, each with a database of its own: where to export from, and where to import to."""
    urls = []
    another = {} if engine == "sqlite" else {"TELEMETRY_DB_URL": request.getfixturevalue("postgres_database")}
    for name, place in (("old", {}), ("new", another)):
        (tmp_path / name).mkdir()
        urls.append(start_daemon(folder=tmp_path / name, TELEMETRY_DB_JOURNAL_MODE="WAL", **place).url)
    return urls[0], urls[1]


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
names = texts.filter(lambda text: text.strip() != "")
moments = st.datetimes().map(lambda moment: moment.isoformat() + "Z")
numbers = st.integers(0, 2**63 - 1)
objects = st.dictionaries(
    texts,
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)  # fmt: skip


OF_THEIR_OWN: dict[str, st.SearchStrategy[Any]] = {
    "labels": st.dictionaries(
        st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,62}", fullmatch=True), names.map(lambda text: text[:255]), max_size=4
    ),
    "attempt": st.integers(1, 2**63 - 1),
    "trace_id": st.integers(1, 2**128 - 1).map(lambda number: f"{number:032x}"),
    "span_id": st.integers(1, 2**64 - 1).map(lambda number: f"{number:016x}"),
}


def values_of(name: str) -> st.SearchStrategy[Any]:  # noqa: PLR0911 - one for each kind
    """Anything that a field may hold, from its definition."""
    field = runs.Run.model_fields[name]
    if name in OF_THEIR_OWN:
        return st.none() | OF_THEIR_OWN[name]
    if name in runs.columns(Role.JSON):
        return st.none() | objects
    if name in runs.columns(Role.BOOLEAN):
        return st.booleans()
    if name in tables.TIMESTAMPS:
        return moments if field.is_required() or name == "created_at" else st.none() | moments
    if name not in runs.TEXTS:
        return numbers
    if name == "status":
        return st.sampled_from(list(values.Status))
    if name == "git_commit_source":
        return st.none() | st.sampled_from(list(values.CommitSource))
    if name == "git_repo":
        return st.none() | texts.map(without_credentials)
    return names if field.is_required() else st.none() | texts


whole_runs = st.fixed_dictionaries({name: values_of(name) for name in STORED if name not in ("event_id", "job_type")})
events_of_a_run = st.lists(
    st.fixed_dictionaries({"event_type": names, "timestamp": moments, "payload": st.none() | objects}), max_size=3
)


@settings(
    max_examples=20 if IS_LONG else 12,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(given_runs=st.lists(st.tuples(whole_runs, events_of_a_run), min_size=1, max_size=4), data=st.data())
def test_what_is_exported_and_imported_elsewhere_is_equal(
    two_daemons: tuple[str, str], tmp_path: Path, given_runs: list[Any], data: st.DataObject
) -> None:
    old, new = two_daemons
    form = data.draw(st.sampled_from(["ndjson", "ndjson.zst", "ndjson.gz", "csv", "csv.zst", "parquet"]))
    batch = uuid4().hex
    told = [{**run, "event_id": f"{batch}-{number}", "job_type": batch} for number, (run, _) in enumerate(given_runs)]
    status, answer = call(old, "POST", "/api/v1/runs/batch", told)
    assert (status, answer["inserted"]) == (200, len(told))
    for run, (_, happened) in zip(told, given_runs, strict=True):
        if happened:
            assert call(old, "POST", f"/api/v1/runs/{run['event_id']}/events", happened)[0] == 201
    file = tmp_path / f"{batch}.{form}"
    events = ("--events",) if form.startswith("ndjson") else ()
    out = run_command("export", file, "--url", old, "--job-type", batch, "--json", *events)
    assert (json.loads(out.stdout)["rows"], json.loads(out.stdout)["snapshot"]) == (len(told), "exact")
    for inserted in (len(told), 0):  # and once more: all of them are known then
        done = json.loads(run_command("import", file, "--url", new, "--json").stdout)
        assert (done["inserted"], done["duplicates"], done["errors"]) == (inserted, len(told) - inserted, 0)
    before, after = (everything(url, batch, with_events=bool(events)) for url in (old, new))
    assert before == after


def everything(url: str, job_type: str, *, with_events: bool) -> list[dict[str, Any]]:
    """Return the runs in the order of their arrival, each with all that is not this very database's own."""
    found = call(url, "GET", f"/api/v1/runs?limit=1000&include=events&job_type={job_type}")[1]
    for run in sorted(found, key=lambda run: run["id"]):
        del run["id"], run["updated_at"], run["more_events"]
        for event in run["events"]:
            del event["id"]
        if not with_events:
            del run["events"]
    return sorted(found, key=lambda run: run["event_id"])


def test_import_tells_each_bad_record_with_its_line_and_takes_the_others(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    url = start_daemon().url
    good = [make_run() for _ in range(3)]
    lines = [
        orjson.dumps(good[0]),
        b"",
        b'{"event_id": "x"',
        orjson.dumps(make_run(items_failed=-1)),
        orjson.dumps(good[1]),
    ]
    (tmp_path / "some.ndjson.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    with (tmp_path / "some.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(good[2])
        writer.writerow(good[2].values())
        writer.writerow({**good[2], "event_id": "bad", "run_id": "two\nlines", "start_time": "noon"}.values())
        writer.writerow(["too", "short"])
    result = run_command(
        "import", tmp_path / "some.ndjson.gz", tmp_path / "some.csv", "--url", url, "--json",
        "--rejects", tmp_path / "bad.jsonl", status=1,
    )  # fmt: skip
    done = json.loads(result.stdout)
    assert (done["inserted"], done["duplicates"], done["errors"], done["problem"]) == (3, 0, 4, None)
    places = [(Path(error["file"]).name, error["line"]) for error in done["error_details"]]
    assert sorted(places) == [("some.csv", 3), ("some.csv", 5), ("some.ndjson.gz", 3), ("some.ndjson.gz", 4)]
    assert "some.ndjson.gz line 4: refused (422): items_failed: " in result.stderr
    assert len((tmp_path / "bad.jsonl").read_bytes().splitlines()) == 4


def test_no_refused_line_controls_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Refusals(None).add([b'{"run_id": "\x1b]0;a title\x07\xc2\x9b2J\xff"}'], 422, ["\x1b[2J"])
    assert capsys.readouterr().err.removesuffix("\n").isprintable()


def test_csv_takes_no_more_memory_than_it_holds() -> None:
    fields, memory = None, 0
    tracemalloc.start()
    try:
        ((_, fields),) = tables.read_csv(io.BytesIO(b'event_id\n"' + b'a""' * 1_000_000 + b'"\n'))
        memory = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert fields == {"event_id": 'a"' * 1_000_000}
    assert memory < 50_000_000


def test_csv_whose_quote_is_not_closed_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_RECORD", 100)
    lines = itertools.chain([b'event_id\n"one"\n"two\n'], itertools.repeat(b"line\n"))
    read = tables.read_csv(io.BufferedReader(_Lines(lines)))
    assert next(read) == (2, {"event_id": "one"})
    with pytest.raises(OSError, match="begins in line 3 does not end"):
        next(read)


class _Lines(io.RawIOBase):
    """A file without an end."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        line = next(self._lines)
        buffer[: len(line)] = line
        return len(line)


def test_an_export_that_was_cut_off_leaves_no_file_and_cannot_be_taken_for_whole(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    (tmp_path / "daemon").mkdir()
    daemon = start_daemon(folder=tmp_path / "daemon", TELEMETRY_DB_JOURNAL_MODE="WAL")
    for _ in range(3):
        run = [make_run(input_summary=LARGE) for _ in range(12)]
        assert call(daemon.url, "POST", "/api/v1/runs/batch", run)[0] == 200

    async def cut() -> None:
        async with aiohttp.ClientSession() as session, session.get(f"{daemon.url}{PATH}?format=csv") as response:
            assert response.headers["X-Total-Count"] == "36"
            await asyncio.to_thread(daemon.process.kill)
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()

    asyncio.run(cut())
    result = run_command("export", tmp_path / "r.csv", "--url", "http://127.0.0.1:1", "--retry-for", "0", status=1)
    assert "127.0.0.1:1" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["daemon"]
    assert leftovers(tmp_path / "daemon") == []


def test_a_parquet_file_that_was_cut_off_is_none(start_daemon: StartDaemon, tmp_path: Path) -> None:
    url = start_daemon().url
    assert call(url, "POST", "/api/v1/runs", make_run())[0] == 201
    whole = tmp_path / "whole.parquet"
    assert "1 run written" in run_command("export", whole, "--url", url).stdout
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-9])
    assert "is no whole Parquet file" in run_command("import", tmp_path / "cut.parquet", "--url", url, status=1).stderr
    assert "exists already" in run_command("export", whole, "--url", url, status=1).stderr
    assert "packed by itself" in run_command("export", tmp_path / "a.parquet.gz", "--url", url, status=1).stderr
    assert "Invalid status" in run_command("export", "-", "--url", url, "--status", "odd", status=1).stderr
    assert run_command("export", "-", "--url", url).stdout_bytes.count(b"\n") == 1
    assert (
        call(url, "POST", "/api/v1/runs", make_run(event_id="labelled", labels={"team": "a=b", "env": "x"}))[0] == 201
    )
    for labels, rows in (("team=a=b", 1), ("env=y,x", 1), ("env=y", 0)):
        out = run_command("export", "-", "--url", url, "--label", labels, "--format", "csv").stdout_bytes
        assert out.count(b',"labelled",') == rows == out.count(b"\n") - 1, out
    twice = run_command("export", "-", "--url", url, "--label", "env=x", "--label", "env=y", status=2)
    assert "each label may be given once" in twice.stderr
    assert "--json needs a file" in run_command("export", "-", "--json", "--url", url, status=2).stderr


@given(st.lists(st.lists(st.none() | texts, min_size=2, max_size=2), max_size=5))
def test_csv_is_read_as_it_was_written(rows: list[list[str | None]]) -> None:
    lines = [",".join("" if value is None else '"' + value.replace('"', '""') + '"' for value in row) for row in rows]
    text = "\r\n".join(["product,host", *lines, ""])
    read = [fields for _, fields in tables.read_csv(io.BytesIO(text.encode()))]
    expected = [
        {name: value for name, value in zip(("product", "host"), row, strict=True) if value is not None} for row in rows
    ]
    assert read == expected
