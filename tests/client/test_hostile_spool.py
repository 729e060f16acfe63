"""What somebody else has put into the spool's folder hurts nobody, and holds up nothing that lies next to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from telemetryd.client import Client
from telemetryd.client.bounds import Bounds, enforce
from telemetryd.client.config import Pace
from telemetryd.client.dead_letters import DEAD_LETTERS, bury
from telemetryd.client.folder import entries, waiting
from telemetryd.client.lines import after_of, dead_letter, repair
from telemetryd.client.streams import Stream, is_sent
from tests.client.conftest import MakeClient, flushed, url_of
from tests.client.test_spool import drain
from tests.conftest import Api, StartDaemon, eventually, make_run
from tests.http_client import get
from tests.tools.forks import popen
from tests.tools.process import telemetryd

OLD = 1_700_000_000
SECRET = b"somebody else's file, which stays as it is\n"


def put_folder(path: Path, _other: Path) -> None:
    path.mkdir()


def put_pipe(path: Path, _other: Path) -> None:
    os.mkfifo(path)


def put_link(path: Path, other: Path) -> None:
    path.symlink_to(other)


def put_dangling_link(path: Path, other: Path) -> None:
    path.symlink_to(other.parent / "made-by-us")


def put_hard_link(path: Path, other: Path) -> None:
    path.hardlink_to(other)


Put = Callable[[Path, Path], None]
TRAPS = [put_folder, put_pipe, put_link, put_dangling_link, put_hard_link]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "somebody-elses"
    path.write_bytes(SECRET)
    return path


@pytest.fixture
def pace() -> Pace:
    """Clients look for what is left at once."""
    return Pace(first_look_s=0.01)


@pytest.fixture
def full(buffer: Path, other: Path) -> Path:
    """A spool, next to somebody else's file, in which a dead process has left a line."""
    assert other.exists()
    buffer.mkdir(mode=0o700)
    (buffer / "left.jsonl.ready").write_bytes(orjson.dumps(make_run(event_id="left")) + b"\n")
    return buffer


def check_untouched(other: Path) -> None:
    assert other.read_bytes() == SECRET
    assert not (other.parent / "made-by-us").exists()


async def arrived(api: Api, client: Client, wanted: set[str], seconds: float = 10) -> None:
    """Give the client something to do until these runs are stored."""
    deadline = time.monotonic() + seconds
    while not wanted <= {run["event_id"] for run in await api.list()}:
        assert time.monotonic() < deadline, client.stats()
        client.record(make_run())
        await flushed(client)


@pytest.mark.parametrize("put", TRAPS)
@pytest.mark.parametrize("name", ["trap.jsonl.ready", "trap.lock", DEAD_LETTERS])
async def test_a_trap_holds_up_nothing_and_touches_nothing(
    api: Api, make_client: MakeClient, full: Path, put: Put, name: str
) -> None:
    other = full.parent / "somebody-elses"
    put(full / name, other)
    if name == "trap.lock":
        (full / "trap.jsonl.ready").touch()
    if name != DEAD_LETTERS:
        os.utime(full / "trap.jsonl.ready", (OLD, OLD), follow_symlinks=False)  # the oldest are sent first
    client = make_client(url_of(api))
    client.record(make_run(event_id="own"))
    await flushed(client)
    await arrived(api, client, {"left", "own"})
    check_untouched(other)


@pytest.mark.parametrize("watch", [False, True])
def test_the_command_goes_on_with_the_other_streams_and_says_so(
    start_daemon: StartDaemon, full: Path, other: Path, watch: bool
) -> None:
    url = start_daemon().url
    (full / "trap.jsonl.ready").write_bytes(b"{}\n")
    os.utime(full / "trap.jsonl.ready", (OLD, OLD))
    (full / "trap.lock").symlink_to(other)
    command = [sys.executable, "-m", "telemetryd", "sync", "--buffer-dir", str(full), "--url", url]
    process = popen([*command, *(["--watch"] if watch else [])], os.environ, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while get(url, "/api/v1/runs/left")[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if watch:
        assert process.poll() is None
        process.terminate()
    _, errors = process.communicate(timeout=60)
    assert "trap.lock" in errors
    assert process.returncode == (0 if watch else 1)
    check_untouched(other)


def test_dead_letters_that_cannot_be_written_hold_up_no_other_line_and_are_written_later(
    start_daemon: StartDaemon, full: Path, other: Path
) -> None:
    url = start_daemon().url
    lines = [orjson.dumps(make_run(event_id=f"good-{number}")) for number in range(1100)]
    (full / "left.jsonl.ready").write_bytes(b"\n".join([lines[0], b'{"event_id":"bad"}', *lines[1:], b""]))
    put_link(full / DEAD_LETTERS, other)
    sync = ("sync", "--buffer-dir", full, "--json", "--url", url)
    done = telemetryd(*sync, status=1)
    assert DEAD_LETTERS in done.stderr
    shown = orjson.loads(done.stdout)
    assert (shown["stored"], shown["refused"], shown["aside"], shown["left"]["ready"]["lines"]) == (1100, 0, 1, 1)
    check_untouched(other)
    (full / DEAD_LETTERS).unlink()
    shown = orjson.loads(telemetryd(*sync, status=1).stdout)
    assert (shown["stored"], shown["refused"], shown["left"]) == (0, 1, {})
    assert b"bad" in (full / DEAD_LETTERS).read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_what_root_makes_in_a_spool_is_the_owners(full: Path) -> None:
    os.chown(full, 12_345, 12_345)
    bury(full, [b"{}"], 422, "no")
    stream = Stream.take(full, "left")
    assert stream is not None
    made = {path.name: path.stat().st_uid for path in full.iterdir()}
    stream.release()
    assert made == {"left.jsonl.ready": 0, "left.lock": 12_345, DEAD_LETTERS: 12_345}


@pytest.mark.parametrize("put", TRAPS)
def test_dead_letters_go_into_no_file_of_somebody_else(buffer: Path, other: Path, put: Put) -> None:
    buffer.mkdir()
    put(buffer / DEAD_LETTERS, other)
    with pytest.raises(OSError, match=DEAD_LETTERS):
        bury(buffer, [b"{}"], 422, "no")
    check_untouched(other)


@pytest.mark.parametrize("put", [put_link, put_dangling_link, put_hard_link, put_folder])
def test_a_position_is_written_into_no_file_of_somebody_else(full: Path, other: Path, put: Put) -> None:
    put(full / "left.lock", other)
    with pytest.raises(OSError, match=r"left\.lock"):
        Stream.take(full, "left")
    check_untouched(other)


@pytest.mark.parametrize("put", TRAPS)
def test_the_bounds_concern_files_only(full: Path, other: Path, put: Put) -> None:
    for name in ("a.jsonl.ready", "b.jsonl.synced"):
        put(full / name, other)
    names = {Path(entry.path).name for entry in entries(full)}
    assert "left.jsonl.ready" in names
    given_up: list[str] = []
    enforce(full, Bounds(0, 1, 0), None, lambda entry, _lines, _why: given_up.append(Path(entry.path).name))
    assert "left.jsonl.ready" in given_up
    check_untouched(other)


@pytest.mark.parametrize("position", ["0 -5", "-1 0", f"0 {2**63}", f"{2**70} 0", "0 " + "9" * 50, "\u0661 1"])
def test_a_position_that_cannot_be_counts_as_none(full: Path, position: str) -> None:
    (full / "left.lock").write_text(position)
    stream = Stream.take(full, "left")
    assert stream is not None
    assert len(drain(stream)) == 1
    stream.release()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a\0b", "", ".", "x" * 5000])
def test_a_line_waits_for_no_stream_outside_of_the_folder(full: Path, other: Path, name: str) -> None:
    os.mkfifo(other.parent / "outside.lock")  # to open it would wait for ever
    assert is_sent(full, (name, 0, 5))


@pytest.mark.parametrize(
    "after",
    [["a", "b", "c"], [1, 2, 3], ["a", None, 1], ["a", 1.5, 2], ["a", 1, [2]], ["a", {}, 1], [[], 1, 1]],
    ids=str,
)
def test_what_is_no_place_in_a_stream_is_waited_for_by_nobody(after: object) -> None:
    assert after_of(b'{"op":"update","event_id":"a","fields":{},"after":' + orjson.dumps(after) + b"}") is None


def nested(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


async def test_lines_too_deep_go_to_the_dead_letters_and_block_nobody(
    api: Api, make_client: MakeClient, full: Path
) -> None:
    """orjson reads 1024 levels but writes only 254, and json writes as many as the interpreter's stack has room for."""
    run = orjson.dumps(make_run(event_id="deep"))[:-1]
    deep = [
        run + b',"metrics_json":' + nested(1000) + b"}",
        b'{"op":"update","event_id":"left","fields":{"metrics_json":' + nested(1000) + b"}}",
        b'{"op":"update","event_id":"elsewhere","fields":{"metrics_json":' + nested(1000) + b"}}",
        b'{"op":"event","event_id":"left","event":{"event_type":"x","payload":' + nested(1000) + b"}}",
        run + b',"metrics_json":' + nested(3000) + b"}",
    ]
    start = orjson.dumps(make_run(event_id="left"))
    last = orjson.dumps(make_run(event_id="last"))
    (full / "left.jsonl.ready").write_bytes(b"\n".join([start, *deep, last, b""]))
    client = make_client(url_of(api))
    client.record(make_run())
    await flushed(client)
    await arrived(api, client, {"left", "last"})
    await eventually(lambda: not (full / "left.jsonl.ready").exists())
    assert len((full / DEAD_LETTERS).read_bytes().splitlines()) == len(deep)


def test_a_dead_letter_of_any_depth_is_one_line() -> None:
    for levels in (10, 254, 300, 1000, 1023, 5000):
        assert dead_letter(nested(levels), 422, "no", "now").count(b"\n") == 1


def test_a_line_without_end_is_read_in_bounded_pieces(full: Path) -> None:
    with (full / "left.jsonl.ready").open("wb") as file:
        file.truncate(1 << 40)  # which a crash or somebody else may leave
    stream = Stream.take(full, "left", longest_line=1 << 20)
    assert stream is not None
    window = stream.window(10, 1 << 16)
    assert window is not None
    assert len(window.torn) <= 4 << 20
    stream.release()


def test_a_line_of_many_beginnings_is_fixed_in_bounded_time() -> None:
    began = time.thread_time()
    assert repair(b'{"op":"' * 300_000) is None
    assert time.thread_time() - began < 5


def test_a_name_that_we_would_not_write_is_no_file_of_ours(full: Path) -> None:
    (full / "20251231T153045Z-4711-a1b2c3d4.0000000001.jsonl.ready").write_bytes(b"{}\n")
    for name in waiting(full):
        stream = Stream.take(full, name)
        assert stream is not None
        assert len(drain(stream)) == 1
        stream.release()
