"""The client writes into no file but its own, and into none that nobody finds, whatever happens to them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telemetryd.client import Client, Config
from telemetryd.client.aside import Aside
from telemetryd.client.bounds import Bounds, enforce, make_room
from telemetryd.client.config import default_buffer_dir
from telemetryd.client.dead_letters import bury
from telemetryd.client.descriptors import Descriptor, LostError
from telemetryd.client.folder import entries, waiting
from telemetryd.client.lines import encode
from telemetryd.client.spool import Spool
from telemetryd.client.streams import Stream
from telemetryd.client.transport import Transport
from tests.client.conftest import MakeClient, flushed, stored, url_of
from tests.client.test_spool import drain, pick_up, spool_in
from tests.client.test_worker import finished
from tests.conftest import Api, StartDaemon
from tests.tools.process import telemetryd

LINE = b"a line of the agent's own\n"


def close_all(client: Client) -> None:
    """Close every descriptor of the client's, as a program does that becomes a daemon."""
    spool = client._spool
    assert spool._file is not None
    numbers = [spool._file.number]
    if spool.stream is not None:
        numbers += [each.number for each in (spool.stream._lock, spool.stream._file) if each is not None]
    worker = client._sender._worker
    if worker is not None and worker._transport._socket is not None:
        numbers.append(worker._transport._socket.number)
    for number in numbers:
        os.close(number)


def reuse(folder: Path, count: int) -> list[tuple[int, Path]]:
    """Open files of the agent's own, which get the numbers that are free."""
    own = []
    for number in range(count):
        path = folder / f"own-{number}"
        path.write_bytes(LINE * 40)
        own.append((os.open(path, os.O_RDWR), path))
    return own


async def test_descriptors_that_the_agent_has_closed_and_used_anew_are_left_alone(
    api: Api, make_client: MakeClient, buffer: Path, tmp_path: Path
) -> None:
    client = make_client(url_of(api))
    client.record(finished("before"))
    await flushed(client)
    close_all(client)
    own = reuse(tmp_path, 8)
    for number in range(3):
        assert client.record(finished(f"after-{number}"))
        await flushed(client)
    await asyncio.to_thread(client.close)
    for number, path in own:
        assert path.read_bytes() == LINE * 40
        os.lseek(number, 0, os.SEEK_CUR)  # it is open
        os.close(number)
    assert {run["event_id"] for run in await api.list()} == {"before", "after-0", "after-1", "after-2"}
    assert not (buffer / "dead-letter.jsonl").exists()


@pytest.mark.parametrize("sends", [True, False])
def test_lines_before_and_after_a_descriptor_was_closed_are_there(buffer: Path, tmp_path: Path, sends: bool) -> None:
    spool = spool_in(buffer, sends=sends)
    assert spool.append(b"1\n")
    assert spool._file is not None
    os.close(spool._file.number)
    own = reuse(tmp_path, 3)
    assert spool.append(b"2\n")
    spool.close()
    assert all(path.read_bytes() == LINE * 40 for _, path in own)
    for number, _ in own:
        os.close(number)
    assert pick_up(buffer) == [b"1", b"2"]


def test_a_stream_whose_lock_the_agent_has_closed_is_locked_again_or_left_to_who_has_it(buffer: Path) -> None:
    spool = spool_in(buffer)
    spool.append(b"1\n2\n")
    stream = spool.stream
    assert stream is not None
    assert stream._lock is not None
    os.close(stream._lock.number)
    window = stream.window(1, 100)
    assert window is not None
    assert window.lines == [b"1"]
    stream.advance(window)
    os.close(stream._lock.number)
    ((number, _),) = reuse(buffer.parent, 1)
    other = Stream.take(buffer, stream.name)
    os.close(number)
    assert other is not None
    assert (other.number, other.offset) == (0, 2)
    with pytest.raises(LostError):
        stream.window(1, 100)
    spool.leave_stream()
    assert spool.append(b"3\n")
    assert spool.name != stream.name
    assert drain(other) == [b"2"]
    other.release()
    spool.close()
    assert pick_up(buffer) == [b"3"]


def test_a_closed_connection_is_not_spoken_to(start_daemon: StartDaemon, tmp_path: Path) -> None:
    transport = Transport(Config(url=start_daemon().url))
    assert transport.request("GET", "/health").status == 200
    assert transport._socket is not None
    os.close(transport._socket.number)
    ((number, path), *more) = reuse(tmp_path, 2)
    assert transport.request("GET", "/health").status == 200
    transport.close()
    for each, its_path in ((number, path), *more):
        assert its_path.read_bytes() == LINE * 40
        os.close(each)


def test_a_descriptor_knows_its_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    descriptor = Descriptor(os.open(path, os.O_RDWR | os.O_CREAT))
    assert descriptor.check() == descriptor.number
    assert descriptor.is_at(path)
    path.unlink()
    assert (descriptor.is_ours(), descriptor.has_name(), descriptor.is_at(path)) == (True, False, False)
    descriptor.close()
    descriptor.close()
    with pytest.raises(LostError):
        descriptor.check()


# --- The folder ----------------------------------------------------------------------------------


def delete(folder: Path) -> None:
    shutil.rmtree(folder)


def move_away(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def replace(folder: Path) -> None:
    move_away(folder)
    folder.mkdir()


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize("sends", [True, False])
@pytest.mark.parametrize("lose", [delete, move_away, replace, empty])
def test_lines_outlive_their_folder(
    buffer: Path, lose: Callable[[Path], None], sends: bool, caplog: pytest.LogCaptureFixture
) -> None:
    spool = spool_in(buffer, sends=sends)
    assert spool.append(b"1\n")
    assert spool.append(b"2\n")
    if spool.stream is not None:
        window = spool.stream.window(1, 100)
        assert window is not None
        spool.stream.advance(window)
    lose(buffer)
    spool._next_look = 0.0  # a second later
    assert spool.append(b"3\n")
    spool.close()
    assert pick_up(buffer) == ([b"2", b"3"] if sends else [b"1", b"2", b"3"])
    assert "deleted or taken away" in caplog.text


def test_the_end_of_the_process_saves_lines_whose_folder_is_gone(buffer: Path) -> None:
    spool = spool_in(buffer)
    assert spool.append(b"1\n")
    delete(buffer)
    spool.close()
    assert pick_up(buffer) == [b"1"]


def test_a_folder_that_cannot_be_made_again_is_reported_and_memory_keeps_the_lines(
    buffer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = spool_in(buffer)
    assert spool.append(b"1\n")
    delete(buffer)
    buffer.write_text("a file")
    assert not spool.append(b"2\n"), "not safe"
    assert "lines are kept in memory" in caplog.text
    buffer.unlink()
    spool._next_try = 0.0
    assert spool.append(b"3\n")
    spool.close()
    assert pick_up(buffer) == [b"1", b"2", b"3"]


async def test_a_client_whose_folder_is_deleted_sends_what_it_had_and_what_comes(
    api: Api, make_client: MakeClient, buffer: Path
) -> None:
    client = make_client(url_of(api))
    client.record(finished("before"))
    await flushed(client)
    delete(buffer)
    client.record(finished("after"))
    await flushed(client)
    await stored(api, 2)


@pytest.mark.parametrize("sends", [True, False])
def test_a_first_line_larger_than_the_memory_behind_the_spool_is_kept(buffer: Path, sends: bool) -> None:
    large = b"x" * (9 << 20)
    spool = spool_in(buffer, sends=sends, file_bytes=100 << 20)
    assert spool.append(large + b"\n")
    assert spool.append(b"2\n")
    spool.close()
    (name,) = waiting(buffer)
    stream = Stream.take(buffer, name)
    assert stream is not None
    assert drain(stream) == [large, b"2"]
    stream.release()


def test_what_neither_disk_nor_memory_takes_is_counted(buffer: Path) -> None:
    buffer.write_text("a file where the folder should be")
    spool = Spool(buffer, fsync=False, file_bytes=1000, file_age_s=600)
    assert not spool.append(b"small\n")
    assert not spool.append(b"x" * (9 << 20) + b"\n")
    assert (spool.refused, spool._held_bytes) == (1, 6)


# --- What is deleted -----------------------------------------------------------------------------

LOCKS = ["poetry.lock", "yarn.lock", "x.lock", ".lock", "20250101T000000Z-1-aaaaaaaa.lock", "left.lock"]
CONTENTS = [b"# This file is automatically @generated by Poetry\n" * 20, b"4711\n", b"\xff\0\xfe", b"0 1 2\n"]


@pytest.mark.parametrize("content", CONTENTS, ids=["poetry", "pid", "bytes", "numbers"])
def test_somebody_elses_lock_files_stay_as_they_are(buffer: Path, content: bytes) -> None:
    buffer.mkdir()
    (buffer / "left.jsonl.ready").write_bytes(b"1\n")
    for name in LOCKS:
        (buffer / name).write_bytes(content)
    assert pick_up(buffer) == [b"1"]
    assert pick_up(buffer) == []
    assert {name: (buffer / name).read_bytes() for name in LOCKS} == dict.fromkeys(LOCKS, content)


def test_our_own_lock_files_are_cleaned_up(buffer: Path) -> None:
    buffer.mkdir()
    ours = "20250101T000000Z-1-aaaaaaaa.lock"
    for content in (b"", b"0000000001 00000000000000000000\n"):
        (buffer / ours).write_bytes(content)
        assert pick_up(buffer) == []
        assert not (buffer / ours).exists()
    (buffer / "left.jsonl.ready").write_bytes(b"1\n")
    assert pick_up(buffer) == [b"1"]
    assert [path.name for path in buffer.iterdir()] == ["left.jsonl.synced"]


def test_an_empty_lock_file_of_another_name_may_be_anybodys(buffer: Path) -> None:
    buffer.mkdir()
    (buffer / "yarn.lock").touch()
    assert waiting(buffer) == {}


FOREIGN = ["data.jsonl.synced", "data.jsonl.ready", "dead-letter.20250101T000000Z-abcd.jsonl", "notes.jsonl.active"]


def test_the_bounds_cost_nobody_else_a_file(buffer: Path) -> None:
    buffer.mkdir()
    for name in FOREIGN:
        (buffer / name).write_bytes(b"1,2,3\n")
    run = encode(finished("e"))
    ours = {"old.jsonl.synced": run, "20250101T000000Z-1-aaaaaaaa.000000.jsonl.synced": b"torn\n"}
    for name, content in ours.items():
        (buffer / name).write_bytes(content)
    bury(buffer, [b"{}"], 422, "no")
    (buffer / "dead-letter.jsonl").rename(buffer / "dead-letter.20250101T000001Z-abcd.jsonl")
    enforce(buffer, Bounds(0, 1, 0), None, lambda *_: None, now=time.time() + 10**6)
    make_room(buffer, OSError(28, "No space left on device"))
    assert sorted(path.name for path in buffer.iterdir()) == sorted(FOREIGN)


def test_a_file_that_was_sent_takes_nobody_elses_place(buffer: Path) -> None:
    buffer.mkdir()
    (buffer / "data.jsonl.synced").write_bytes(b"1,2,3\n")
    (buffer / "data.jsonl.ready").write_bytes(b"1\n")
    with pytest.raises(FileExistsError):
        pick_up(buffer)
    assert (buffer / "data.jsonl.synced").read_bytes() == b"1,2,3\n"


# --- A position that nobody can have reached -----------------------------------------------------


@pytest.mark.parametrize("position", ["0 999999", "0 3", "7 0", "5 1", "0 -5", "9" * 20 + " 0"])
def test_a_position_that_does_not_fit_its_file_marks_no_line_as_sent(buffer: Path, position: str) -> None:
    buffer.mkdir()
    stem = "20250101T000000Z-1-aaaaaaaa"
    (buffer / f"{stem}.000000.jsonl.ready").write_bytes(b"12\n34\n")
    (buffer / f"{stem}.lock").write_text(position)
    if position == "0 3":  # a place where a line begins: it is believed
        assert pick_up(buffer) == [b"34"]
    else:
        assert pick_up(buffer) == [b"12", b"34"]


def test_sync_sends_what_a_wrong_position_would_leave_out(start_daemon: StartDaemon, buffer: Path) -> None:
    buffer.mkdir()
    stem = "20250101T000000Z-1-aaaaaaaa"
    (buffer / f"{stem}.000000.jsonl.ready").write_bytes(encode(finished("e")))
    (buffer / f"{stem}.lock").write_text("0000000000 00000000000000999999\n")
    done = telemetryd("sync", "--buffer-dir", buffer, "--json", "--url", start_daemon().url)
    assert orjson.loads(done.stdout)["stored"] == 1
    assert [entry.state for entry in entries(buffer)] == [".synced"]


def test_sync_says_in_a_sentence_that_it_may_not_look(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    hidden = tmp_path / "hidden" / "buffer"
    hidden.mkdir(parents=True)
    hidden.chmod(0o000)
    nobody = ["setpriv", "--reuid", "65534", "--clear-groups", "--bounding-set", "-all", "--"]
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not there")
    command = [sys.executable, "-m", "telemetryd", "sync", "--buffer-dir", str(hidden)]
    done = subprocess.run([*nobody, *command], capture_output=True, text=True, timeout=60, check=False, cwd="/")
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    assert "Traceback" not in done.stderr


# --- The default folder --------------------------------------------------------------------------


@pytest.mark.parametrize("home", ["/", "", "relative", "/nowhere/at/all", None])
def test_a_home_that_is_none_is_looked_up_as_if_it_were_not_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str | None
) -> None:
    import pwd

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    if home is None:
        monkeypatch.delenv("HOME", raising=False)
    else:
        monkeypatch.setenv("HOME", home)
    listed = pwd.struct_passwd(("u", "x", os.getuid(), 0, "", str(tmp_path), ""))
    monkeypatch.setattr(os, "access", lambda path, _: str(path).startswith(str(tmp_path)))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: listed)
    assert default_buffer_dir() == tmp_path / ".local/state/telemetryd/buffer"

    def unknown(_: int) -> pwd.struct_passwd:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert default_buffer_dir() == Path(f"/var/tmp/telemetryd-{os.getuid()}/buffer")


def test_a_home_of_ones_own_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert default_buffer_dir() == tmp_path / ".local/state/telemetryd/buffer"
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert default_buffer_dir() == Path("/state/telemetryd/buffer")


# --- Anything in the folder ----------------------------------------------------------------------

OWN_STEM = "20250101T000000Z-1-aaaaaaaa"
STEMS = st.sampled_from([OWN_STEM, "aside-" + OWN_STEM, "data", "aside-x", "x\udcff"])
NUMBERS = st.sampled_from(["", ".000000", ".000001", ".9999999999"])
STATES = st.sampled_from([".jsonl.ready", ".jsonl.synced", ".jsonl.active", ".lock", ".jsonl", ".tmp", ""])
CSV = b"1,2,3\n4,5,6\n"
POSITIONS = [b"", b"0 5\n", b"7 0", b"-1 -1", b"9" * 5000]
BYTES = st.sampled_from([*POSITIONS, b"\n", b"\0" * 100, b"torn", CSV, encode(finished("e"))])
THINGS = st.dictionaries(
    st.builds("{}{}{}".format, STEMS, NUMBERS, STATES),
    st.tuples(st.just("file"), BYTES) | st.tuples(st.sampled_from(["folder", "pipe", "link", "nowhere"]), st.just(b"")),
    max_size=6,
)


def put(path: Path, kind: str, content: bytes) -> None:
    if kind == "file":
        path.write_bytes(content)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/etc/passwd" if kind == "link" else "/nowhere/at/all")


def taken(folder: Path) -> list[bytes]:
    """Send everything that can be sent; a stream that cannot costs the others nothing."""
    found: list[bytes] = []
    for name in waiting(folder):
        with contextlib.suppress(OSError):
            stream = Stream.take(folder, name)
            if stream is not None:
                try:
                    found += drain(stream)
                finally:
                    stream.release()
    return found


@settings(deadline=None, max_examples=60)
@given(things=THINGS)
def test_whatever_lies_in_the_folder_hurts_nobody_and_is_not_hurt(things: dict[str, tuple[str, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, (kind, content) in things.items():
            put(folder / name, kind, content)
        (folder / "good.jsonl.ready").write_bytes(b"good\n")
        assert b"good" in taken(folder)
        Aside(folder).look()
        with contextlib.suppress(OSError):
            enforce(folder, Bounds(0, 1, 0), None, lambda *_: None, now=time.time() + 10**6)
        for name, (kind, content) in things.items():
            if kind != "file":
                assert os.path.lexists(folder / name)
            elif name.endswith((".tmp", ".jsonl")) or (name.endswith(".lock") and len(content) > 64):
                assert (folder / name).read_bytes() == content
