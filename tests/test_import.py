"""Files of runs that are hostile, huge or odd: each costs bounded memory, and a record that is wrong only itself."""

from __future__ import annotations

import asyncio
import gzip
import io
import itertools
import json
import os
import re
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from telemetryd.cli import main, stream
from telemetryd.cli.documents import is_document, read_document
from telemetryd.cli.files import read_lines
from telemetryd.errors import UnavailableError
from telemetryd.model import tables
from telemetryd.model.bodies import holds_more_values
from tests.conftest import StartDaemon, make_run
from tests.http_client import get

MIB = 1 << 20


class Endless(io.RawIOBase):
    """A file that is made while it is read."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = next(self._pieces, b"")
        buffer[: len(piece)] = piece
        return len(piece)


def peak(action: Callable[[], object]) -> int:
    """Return how many bytes an action holds at once."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_line_of_any_length_takes_no_more_memory_than_may_be_read_of_it() -> None:
    def pieces() -> Iterator[bytes]:
        yield b"one\n"
        yield from itertools.repeat(b"x" * 8000, 64 * MIB // 8000)
        yield b"\n\ntwo"

    found: list[tuple[int, bytes | None]] = []
    used = peak(lambda: found.extend(read_lines(io.BufferedReader(Endless(pieces())), MIB)))
    assert found == [(1, b"one\n"), (2, None), (3, b"\n"), (4, b"two")]
    assert used < 4 * MIB
    assert [*read_lines(io.BytesIO(b"x" * 10), 10)] == [(1, b"x" * 10)]
    assert [*read_lines(io.BytesIO(b"x" * 10 + b"\n"), 10)] == [(1, None)]


def test_values_are_counted_outside_of_texts_only() -> None:
    assert holds_more_values(b"[" + b"{}," * 11 + b"{}]", 12)
    assert not holds_more_values(b"[" + b"{}," * 11 + b"{}]", 100)
    assert not holds_more_values(orjson.dumps({"csv": '",[{' * 50}), 12)


@pytest.mark.parametrize("command", ["import", "replay"])
def test_a_line_that_is_too_long_is_reported_and_costs_the_others_nothing(
    start_daemon: StartDaemon, tmp_path: Path, command: str
) -> None:
    url = start_daemon().url
    runs = [make_run() for _ in range(3)]
    lines = [
        orjson.dumps(runs[0]),
        orjson.dumps(make_run(error_details="x" * 2 * MIB)),
        orjson.dumps(runs[1]),
        b'{"event_id": "e", "x": [' + b"[]," * 70_000 + b"[]]}",
        orjson.dumps(runs[2]),
    ]
    (tmp_path / "some.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    asked = [command, str(tmp_path / "some.gz"), "--url", url, "--longest-line", "1"]
    result = CliRunner().invoke(main, [*asked, "--json"])
    assert result.exit_code == 1
    assert (
        "some.gz line 2: refused: The line is longer than 1 MiB; --longest-line MIB reads longer ones" in result.stderr
    )
    assert "some.gz line 4: refused: The line holds more than 65,536 JSON values" in result.stderr
    assert "2 lines refused" in result.stderr
    stored = {run["event_id"] for run in get(url, "/api/v1/runs")[1]}
    assert stored == {run["event_id"] for run in runs}
    (tmp_path / "long").write_bytes(lines[1])
    assert CliRunner().invoke(main, [command, str(tmp_path / "long"), "--url", url]).exit_code == 0
    assert len(get(url, "/api/v1/runs")[1]) == 4


def test_what_comes_before_damage_is_stored(start_daemon: StartDaemon, tmp_path: Path) -> None:
    url = start_daemon().url
    second = make_run(error_details=os.urandom(20_000).hex())
    packed = gzip.compress(orjson.dumps(make_run()) + b"\n" + orjson.dumps(second))
    for name, content in (("cut.gz", packed[: len(packed) // 2]), ("broken.gz", packed[:10_000] + b"\xff" * 9000)):
        (tmp_path / name).write_bytes(content)
        result = CliRunner().invoke(main, ["import", str(tmp_path / name), "--url", url, "--json"])
        assert result.exit_code == 1
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert name in json.loads(result.stdout)["problem"]
    assert len(get(url, "/api/v1/runs")[1]) == 1


def test_csv_with_very_many_columns_is_none() -> None:
    wide = b"event_id" + b",x" * 3_000_000 + b"\n"
    with pytest.raises(OSError, match="more than 10,000 columns"):
        next(tables.read_csv(io.BytesIO(wide)))
    rows = list(tables.read_csv(io.BytesIO(b"event_id\nx" + b"," * 100_000 + b"\none\n")))
    assert [number for number, _ in rows] == [2, 3]
    assert rows[1] == (3, {"event_id": "one"})


# --- Parquet -------------------------------------------------------------------------------------


def read(tmp_path: Path, **columns: Any) -> list[tables.Record]:
    path = tmp_path / "some.parquet"
    pq.write_table(pa.table(columns), path, compression="zstd")
    return list(tables.read_parquet(path))


FAR = "start_time: cannot be read: it lies outside of the years 1 to 9999"


@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin", "No/Such_Zone"])
@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_times_of_every_unit_and_zone_are_read_and_far_ones_reported(
    tmp_path: Path, unit: str, zone: str | None
) -> None:
    far = 253_402_300_800_000 * {"ms": 1, "us": 1000, "ns": 36}[unit]  # the year 10000; ns reach the year 2262 only
    kind = pa.timestamp(unit, zone)
    rows = read(tmp_path, event_id=["a", "b", "c", "d"], start_time=pa.array([1_234_567, far, -far, None], kind))
    text = {
        "ms": "1970-01-01T00:20:34.567000Z",
        "us": "1970-01-01T00:00:01.234567Z",
        "ns": "1970-01-01T00:00:00.001234Z",
    }
    assert rows[0] == (1, {"event_id": "a", "start_time": text[unit]})
    assert rows[3] == (4, {"event_id": "d"})
    if unit == "ns":
        assert rows[1] == (2, {"event_id": "b", "start_time": "2259-01-30T18:43:28.000000Z"}) or isinstance(
            rows[1][1], dict
        )
    else:
        assert rows[1:3] == [(2, FAR), (3, FAR)]


@pytest.mark.parametrize(
    ("name", "values", "fault"),
    [
        ("agent_name", [b"\xff"], "invalid start byte"),
        ("duration_ms", [float("inf")], "inf is no number"),
        ("duration_ms", pa.array([2**62 + 1], pa.duration("ns")), "duration"),
        ("product", pa.array([2**40 + 1], pa.time64("ns")), "Nanosecond"),
        ("context_json", pa.array([{"at": 2**62 + 1}], pa.struct([("at", pa.timestamp("ns"))])), "Nanosecond"),
    ],
)
def test_a_cell_that_cannot_be_read_is_reported_with_its_field(
    tmp_path: Path, name: str, values: Any, fault: str
) -> None:
    ((number, reason),) = read(tmp_path, **{"event_id": ["x"], name: values})
    assert number == 1
    assert isinstance(reason, str)
    assert reason.startswith(f"{name}: cannot be read: ")
    assert fault in reason


def test_odd_columns_mean_what_they_can_and_unknown_ones_nothing(tmp_path: Path) -> None:
    ((_, run),) = read(
        tmp_path,
        event_id=pa.array(["x"]).dictionary_encode(),
        agent_name=pa.array([b"bytes"]),
        product=pa.array(["large"], pa.large_string()),
        metrics_json=[{"tokens": 5, "kinds": ["a"]}],
        created_at=pa.array([20_000], pa.date32()),
        duration_ms=[float("nan")],  # pandas says so where a number is missing
        items_failed=[5.0],
        host=pa.nulls(1),
        a_column_of_somebody=pa.array([2**62 + 1], pa.duration("ns")),
    )
    assert run == {
        "event_id": "x",
        "agent_name": "bytes",
        "product": "large",
        "metrics_json": {"tokens": 5, "kinds": ["a"]},
        "created_at": "2024-10-04T00:00:00Z",
        "items_failed": 5.0,
    }
    with pytest.raises(OSError, match="no column that is a field of a run"):
        read(tmp_path, x=[1])


def test_a_long_text_that_is_repeated_is_held_once(tmp_path: Path) -> None:
    text = pa.array(["b" * 2 * MIB])
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), text)
    path = tmp_path / "repeated.parquet"
    pq.write_table(pa.table({"event_id": list(map(str, range(64))), "error_details": repeated}), path)
    before = int(pa.total_allocated_bytes())

    def longest() -> int:
        return max(int(pa.total_allocated_bytes()) - before for _ in tables.read_parquet(path))

    assert longest() < 16 * MIB
    assert peak(longest) < 16 * MIB


def test_lists_with_very_many_values_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "nested.parquet"
    pq.write_table(pa.table({"event_id": ["x"], "metrics_json": [{"many": [0] * 1001}]}), path)
    with pytest.raises(OSError, match="holds more than 1,000 values inside of one column"):
        list(tables.read_parquet(path, most_nested=1000))


# --- The stream ----------------------------------------------------------------------------------


def test_a_message_without_an_end_is_given_up() -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b"id: 1\nevent: run\ndata: {}\n"
        yield b"\nid: 2\n"
        while True:
            yield b"data: x\n" * 1000

    found = []

    async def follow() -> None:
        async for message in stream.read_messages(endless(), longest_bytes=100_000):
            found.append(message.id)

    with pytest.raises(UnavailableError, match="without an end"):
        asyncio.run(follow())
    assert found == ["1"]


FOREIGN = {
    "HTML": (b"<!doctype html><html>please log in</html>\n", "This is HTML or XML"),
    "a database": (b"SQLite format 3\0" + bytes(84), "This is a SQLite database"),
    "ZIP": (b"PK\x03\x04" + b"x" * 60, "This is a ZIP archive"),
    "packed ZIP": (gzip.compress(b"PK\x03\x04" + b"x" * 60), "This is a ZIP archive"),
    "xz": (b"\xfd7zXZ\0" + b"x" * 60, "packed by xz"),
    "UTF-16": ('{"event_id": "x"}'.encode("utf-16"), "UTF-16"),
    "binary": (bytes(range(256)), "a binary file"),
    "prose": (
        b"Dear reader,\nthis is no table.\n",
        "it lacks event_id, run_id, start_time, agent_name, job_type; 2 columns",
    ),
    "semicolons": (b"event_id;run_id;agent_name;job_type;start_time\n1;2;3;4;5\n", "found is a semicolon"),
    "tabs": (b"event_id\trun_id\n1\t2\n", "found is a tab"),
    "no run_id": (b"event_id,agent_name,job_type,start_time\n1,2,3,4\n", "it lacks run_id; 4 columns"),
    "a column twice": (
        b"event_id,run_id,agent_name,job_type,start_time,host,note,note,host\n1,2,3,4,5,6,7,8,9\n",
        "names host more than once",
    ),
    "Latin-1": (
        "event_id,run_id,agent_name,job_type,start_time,Größe\n".encode("latin-1"),
        "Line 1 holds the byte 0xF6",
    ),
    "one column": (b"event_id\n1\n", "no separator was found"),
}


def test_a_file_in_no_form_of_runs_is_refused_with_what_it_seems_to_be(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """Of a log-in page, "0 runs inserted, 0 errors" was said, with exit status 0."""
    url = start_daemon().url
    for name, (data, words) in FOREIGN.items():
        (tmp_path / name).write_bytes(data)
        for command in ("import", "replay"):
            done = CliRunner().invoke(main, [command, str(tmp_path / name), "--url", url])
            assert done.exit_code == 1, name
            assert words in done.stderr, done.stderr
            assert f"telemetryd: {tmp_path / name}: " in done.stderr
    assert get(url, "/api/v1/runs")[1] == []


MALFORMED = [
    (b'[{"a": 1},', 1, "ends in line 1, where an object is expected"),
    (b'[{"a": 1}\n\n', 1, "ends in line 3, where a comma or the end of the array is expected"),
    (b"[", 0, "ends in line 1, where an object is expected"),
    (b'[{"a": 1},\n]', 1, "In line 2 stands b']' where an object is expected"),
    (b'[{"a": 1}\n{"a": 2}]', 1, "In line 2 stands b'{\"a\":' where a comma"),
    (b'[{"a": 1},,{"a": 2}]', 1, "In line 1 stands b',{\"a\":' where an object"),
    (b'{\n"a": 1},\n{"a": 2}', 1, "In line 2 stands b',' where an object"),
    (b'{\n"a": [1}\n]}', 0, "In line 2 stands b'}' where another bracket"),
    (b'{\n"a": "one\ntwo"}', 0, "In line 2 begins a text that does not end, or holds a line break"),
    (b'[{"a": "cut', 0, "In line 1 begins a text that does not end"),
    (b'{"a": 1,\n"runs": [{"a": 1}]', 1, "around the array, which ends in line 2, is no JSON"),
    (b'{"runs": [{"a": 1}]}\n{"a": 2}', 1, "around the array, which ends in line 1, is no JSON"),
    (b'[{"a": 1}]\n[{"a": 2}]', 1, "In line 2 stands b'[{\"a\":' where the end of the file"),
    (b'{\n"a": 1}\x0b', 1, r"In line 2 stands b'\x0b' where an object is expected"),
    (b"[\x0c]", 0, r"In line 1 stands b'\x0c]' where an object is expected"),
    (b"[1]", 0, "In line 1 stands b'1]' where an object is expected"),
    (b'{\n"a": 1}\n]', 1, "In line 3 stands b']' where an object is expected"),
]


@pytest.mark.parametrize(("data", "whole", "fault"), MALFORMED)
def test_a_malformed_document_fails_with_its_line_after_the_objects_before(data: bytes, whole: int, fault: str) -> None:
    """A download that was cut off after a comma was imported without a word."""
    assert is_document(data)
    objects = read_document(io.BytesIO(data), MIB)
    for _ in range(whole):
        assert next(objects)[1].startswith(b"{")
    with pytest.raises(OSError, match=re.escape(fault)):
        next(objects)


def test_an_object_over_many_lines_means_the_same_on_one() -> None:
    """Lines were joined without a blank: 1, line break, 2 was read as 12."""
    data = b'{\r\n"a": 1\r\n2,\n"b": "\\" ]"\n}\n{"a"\n:\n1}'
    assert [*read_document(io.BytesIO(data), MIB)] == [(1, b'{  "a": 1  2, "b": "\\" ]" }'), (6, b'{"a" : 1}')]


def test_only_a_first_line_that_is_no_whole_value_begins_a_document() -> None:
    for begun in (b'{"runs": [{"event_id"', b' [\n{"a"', b'{"a": {\n', b'{"a": 1,\n'):
        assert is_document(begun)
    for line in (b'{"a": "[{"}\n', b'{"a": "torn\n{"runs": [1]}', b'{"a": [1]}\n{"runs": []}\n', b'{"a": {"runs": [1'):
        assert not is_document(line)


def test_json_over_many_lines_is_read_and_each_refusal_names_its_own_line(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """Of equal lines each was reported with the place of the first; of JSON over many lines, each line was refused."""
    url = start_daemon().url

    def imported(data: bytes, *flags: str) -> tuple[int, list[tuple[int, str]], str | None]:
        (tmp_path / "file").write_bytes(data)
        done = CliRunner().invoke(main, ["import", str(tmp_path / "file"), "--url", url, "--json", *flags])
        shown = json.loads(done.stdout)
        return shown["inserted"], [(each["line"], each["reason"]) for each in shown["error_details"]], shown["problem"]

    runs = [make_run(error_summary='a brace } in a "text" \\', context_json={"a": {"b": []}}) for _ in range(3)]
    pretty = json.dumps(runs, indent=2).encode()
    assert imported(pretty) == (3, [], None)
    assert {run["context_json"]["a"]["b"] == [] for run in get(url, "/api/v1/runs")[1]} == {True}
    objects = [json.dumps(make_run(), indent="\t") for _ in range(2)]
    assert imported("\n".join(objects).encode()) == (2, [], None)
    assert imported(json.dumps([make_run(), make_run()]).encode()) == (2, [], None)
    assert imported(b"[]") == (0, [], None)
    good, bad = make_run(), {**make_run(), "status": "odd"}
    lengths = [len(json.dumps(run, indent=1).splitlines()) for run in (good, bad)]
    inserted, refused, _ = imported(json.dumps([bad, good, bad], indent=1).encode())
    assert (inserted, [line for line, _ in refused]) == (1, [2, 2 + sum(lengths)])
    assert "The object that begins in line 2 does not end" in str(imported(b'[\n{"event_id":\n')[2])
    cut = json.dumps([make_run()], indent=1).encode() + b"\n\n oops,\n{}]"
    assert "In line 11 stands b'oops,' where the end of the file is expected" in str(imported(cut)[2])
    assert "longer than 1 MiB" in str(imported(b"[" + b" " * MIB + b"]", "--longest-line", "1")[2])

    wrapped = {"total": 2, "runs": [make_run(error_summary="[}"), make_run()], "next": {"runs": [1]}}
    assert imported(json.dumps(wrapped).encode()) == (2, [], None)
    wrapped["runs"] = [make_run(), make_run()]
    assert imported(json.dumps(wrapped, indent=4).replace("    ", "", 1).encode()) == (2, [], None)
    loose = json.dumps(make_run(), indent=1).replace("{\n", '{ "retries": 0,\n', 1)  # begins with more than a brace
    assert imported(loose.encode()) == (1, [], None)

    lines = [json.dumps(run).encode() if run else b"" for run in (bad, make_run(), bad, None, bad)]
    assert [line for line, _ in imported(b"\n".join(lines))[1]] == [1, 3, 5]

    header = "event_id,run_id,agent_name,job_type,start_time,host\n"
    rows = (
        '1,2,3,4,2025-12-24T10:00Z,"two\nlines"\n',
        '2,2,3,4,2025-12-24T10:00Z,"é\nÄx"\n',
        "3,2,3,4,2025-12-24T10:00Z,h\n",
    )
    mixed = [text.encode("latin-1" if "x" in text else "utf-8") for text in (header, *rows)]
    inserted, refused, _ = imported(b"".join(mixed))
    assert (inserted, len(refused)) == (2, 1)
    assert refused[0][0] == 4
    assert refused[0][1].startswith("Line 4 holds the byte 0xE9 at its place 28, which is no UTF-8: save the file as")


def test_a_byte_order_mark_means_nothing_and_other_columns_are_reported(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    url = start_daemon().url
    mark = b"\xef\xbb\xbf"
    lines = [orjson.dumps(make_run()) for _ in range(3)]
    (tmp_path / "lines").write_bytes(mark + b"\n".join(lines))
    (tmp_path / "packed").write_bytes(gzip.compress(mark + orjson.dumps(make_run())))
    header = b'event_id,run_id,agent_name,job_type,start_time,colour,"a ""b"""\r\n'
    (tmp_path / "table").write_bytes(mark + header + b"x,r,a,j,2025-12-24T10:00:00Z,red,\r\n")
    for name, count in {"lines": 3, "packed": 1, "table": 1}.items():
        done = CliRunner().invoke(main, ["import", str(tmp_path / name), "--url", url])
        assert done.exit_code == 0, done.stderr
        assert done.stdout.startswith(f"{count} run"), name
    assert done.stderr == (
        f"telemetryd: {tmp_path / 'table'}: columns that are no fields of a run are ignored: 'colour', 'a \"b\"'\n"
    )
    assert len(get(url, "/api/v1/runs")[1]) == 5
