"""The spool keeps what it promised, whatever happens in whatever order."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from telemetryd.client import Config
from telemetryd.client.bounds import Bounds, Upkeep, enforce
from telemetryd.client.config import Pace
from telemetryd.client.dead_letters import bury
from telemetryd.client.folder import Entry, entries, summary, waiting
from telemetryd.client.spool import Spool
from telemetryd.client.streams import Stream, is_sent
from tests.client.conftest import states
from tests.conftest import small_file_system


def spool_in(folder: Path, *, file_bytes: int = 1000, fsync: bool = False, sends: bool = True) -> Spool:
    return Spool(folder, sends=sends, fsync=fsync, file_bytes=file_bytes, file_age_s=600)


def drain(stream: Stream, rows: int = 1000) -> list[bytes]:
    """Take everything that a stream has, and note it as sent."""
    lines: list[bytes] = []
    while (window := stream.window(rows, 1 << 20)) is not None:
        lines += [line for line in window.lines if line]
        stream.advance(window)
    return lines


def pick_up(folder: Path) -> list[bytes]:
    """Do what the next process does: take what dead processes left."""
    lines = []
    for name in waiting(folder):
        stream = Stream.take(folder, name)
        if stream is not None:
            lines += drain(stream)
            stream.release()
    return lines


def die(spool: Spool) -> None:
    """Let go of a spool as SIGKILL does: the kernel closes the files, and nothing else happens."""
    spool.after_fork()


# --- Any sequence --------------------------------------------------------------------------------


class SpoolMachine(RuleBasedStateMachine):
    """Processes that append, rotate, send, end and die in any order over one folder."""

    def __init__(self) -> None:
        super().__init__()
        self._temporary = tempfile.mkdtemp()
        self.folder = Path(self._temporary) / "buffer"
        self.spools: dict[int, Spool] = {}
        self.promised: dict[int, list[bytes]] = {}
        self.sent: dict[int, list[bytes]] = {}
        self.count = 0

    processes = Bundle("processes")

    @rule(target=processes, file_bytes=st.sampled_from([1, 40, 10_000]), sends=st.booleans())
    def begin(self, file_bytes: int, sends: bool) -> int:
        self.count += 1
        self.spools[self.count] = spool_in(self.folder, file_bytes=file_bytes, sends=sends)
        self.promised[self.count], self.sent[self.count] = [], []
        return self.count

    @rule(process=processes, lines=st.integers(1, 6), size=st.integers(0, 60))
    def append(self, process: int, lines: int, size: int) -> None:
        for _ in range(lines):
            line = b'{"event_id":"%d-%d","x":"%s"}' % (process, len(self.promised[process]), b"x" * size)
            assert self.spools[process].append(line + b"\n")
            self.promised[process].append(line)

    @rule(process=processes, rows=st.integers(1, 5), times=st.integers(1, 3))
    def send(self, process: int, rows: int, times: int) -> None:
        stream = self.spools[process].stream
        for _ in range(times if stream is not None else 0):
            window = stream.window(rows, 1 << 20)  # type: ignore[union-attr]
            if window is not None:
                assert not window.torn
                self.sent[process] += window.lines
                stream.advance(window)  # type: ignore[union-attr]

    @rule(process=processes)
    def read_without_an_answer(self, process: int) -> None:
        if (stream := self.spools[process].stream) is not None:
            stream.window(3, 1 << 20)

    @rule(process=processes)
    def rotate(self, process: int) -> None:
        self.spools[process]._rotate(wait=True)

    @rule(process=consumes(processes))
    def end(self, process: int) -> None:
        self.spools.pop(process).close()

    @rule(process=consumes(processes), torn=st.binary(max_size=30).filter(lambda text: b"\n" not in text))
    def die(self, process: int, torn: bytes) -> None:
        spool = self.spools.pop(process)
        if spool.name is not None and torn:
            active = list(self.folder.glob(f"{spool.name}.*.active"))
            with active[-1].open("ab") as file:
                file.write(torn)
        die(spool)

    @rule(rows=st.integers(1, 4), windows=st.integers(1, 4))
    def take_over_and_die(self, rows: int, windows: int) -> None:
        for name in waiting(self.folder):
            stream = Stream.take(self.folder, name)
            if stream is None:
                continue
            for _ in range(windows):
                window = stream.window(rows, 1 << 20)
                if window is not None:
                    self.note(window.lines)
                    stream.advance(window)
            stream.forget()

    @rule()
    def take_over(self) -> None:
        self.note(pick_up(self.folder))

    def note(self, lines: list[bytes]) -> None:
        for line in lines:
            self.sent[int(line[13 : line.index(b"-")])].append(line)

    @invariant()
    def everything_promised_is_sent_in_order_once_or_waits(self) -> None:
        for process, promised in self.promised.items():
            sent = self.sent[process]
            assert sent == promised[: len(sent)]

    @invariant()
    def the_living_that_send_are_left_alone(self) -> None:
        for spool in self.spools.values():
            if spool.stream is not None:
                assert Stream.take(self.folder, spool.stream.name) is None

    def teardown(self) -> None:
        try:
            for spool in self.spools.values():
                die(spool)
            self.note(pick_up(self.folder))
            assert self.sent == self.promised
            if self.folder.exists():
                assert set(states(self.folder)) <= {".synced"}
        finally:
            shutil.rmtree(self._temporary)


TestSpoolMachine = SpoolMachine.TestCase
TestSpoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# --- Files ---------------------------------------------------------------------------------------


def test_files_go_from_active_to_ready_to_synced(buffer: Path) -> None:
    spool = spool_in(buffer, file_bytes=25)
    assert not buffer.exists()
    for number in range(4):
        assert spool.append(b'{"event_id":"%d"}\n' % number)
    assert states(buffer) == {".active": 1, ".ready": 2, ".lock": 1}
    assert spool.stream is not None
    assert spool.end() == (2, 0)
    assert len(drain(spool.stream)) == 4
    assert states(buffer) == {".active": 1, ".synced": 2, ".lock": 1}
    spool.close()
    assert states(buffer) == {".synced": 2}


def test_only_the_owner_may_look_into_the_spool(buffer: Path) -> None:
    previous = os.umask(0)
    try:
        spool = spool_in(buffer)
        spool.append(b"{}\n")
        bury(buffer, [b"{}"], 422, "no")
    finally:
        os.umask(previous)
    assert buffer.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in buffer.iterdir()} == {0o600}
    spool.close()


def test_an_ended_process_leaves_its_file_ready_for_the_next(buffer: Path) -> None:
    spool = spool_in(buffer)
    spool.append(b'{"event_id":"a"}\n')
    spool.close()
    assert states(buffer) == {".ready": 1, ".lock": 1}
    spool.append(b'{"event_id":"b"}\n')  # late, from an exit handler
    spool.close()
    assert pick_up(buffer) == [b'{"event_id":"a"}', b'{"event_id":"b"}']
    assert pick_up(buffer) == []
    assert states(buffer) == {".synced": 2}


def test_a_torn_last_line_is_reported_and_left_out(buffer: Path) -> None:
    spool = spool_in(buffer)
    spool.append(b'{"event_id":"a"}\n')
    spool.append(b'{"event_id":"b","x":')
    die(spool)
    (name,) = waiting(buffer)
    stream = Stream.take(buffer, name)
    assert stream is not None
    window = stream.window(10, 1 << 20)
    assert window is not None
    assert window.lines == [b'{"event_id":"a"}']
    stream.advance(window)
    window = stream.window(10, 1 << 20)
    assert window is not None
    assert (window.lines, window.torn) == ([], b'{"event_id":"b","x":')
    stream.advance(window)
    assert stream.window(10, 1 << 20) is None
    stream.release()
    assert states(buffer) == {".synced": 1}


def test_a_line_longer_than_a_chunk_is_read_whole(buffer: Path) -> None:
    spool = spool_in(buffer, file_bytes=1 << 30)
    long = b'{"event_id":"%s"}' % (b"x" * 3_000_000)
    spool.append(long + b"\n")
    spool.append(b"{}\n")
    assert spool.stream is not None
    assert drain(spool.stream) == [long, b"{}"]
    spool.close()


def test_a_window_has_bounds(buffer: Path) -> None:
    spool = spool_in(buffer, file_bytes=1 << 30)
    for _ in range(100):
        spool.append(b"x" * 999 + b"\n")
    assert spool.stream is not None
    window = spool.stream.window(1000, 5000)
    assert window is not None
    assert len(window.lines) == 5
    window = spool.stream.window(3, 5000)
    assert window is not None
    assert len(window.lines) == 3
    spool.close()


def test_the_replaced_clients_finished_files_are_sent_and_its_open_ones_left(buffer: Path) -> None:
    buffer.mkdir()
    (buffer / "telemetry_20251224_100000.jsonl.ready").write_text('{"event_id":"old"}\n')
    (buffer / "telemetry_20251224_110000.jsonl.active").write_text('{"event_id":"still open"}\n')
    (buffer / "notes.txt").write_text("mine")
    assert pick_up(buffer) == [b'{"event_id":"old"}']
    assert states(buffer) == {".synced": 1, ".active": 1, ".txt": 1}


def test_a_lock_that_somebody_looks_at_just_now_is_not_ours(buffer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer.mkdir()
    names = iter([b"\0\0\0\1", b"\0\0\0\2"])
    monkeypatch.setattr(os, "urandom", lambda _: next(names))
    monkeypatch.setattr(time, "strftime", lambda *_: "20251224T100000Z")
    taken = buffer / f"20251224T100000Z-{os.getpid()}-00000001.lock"
    with taken.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        stream = Stream.create(buffer)
    assert stream.name.endswith("-00000002")
    stream.release()


def test_the_position_survives_and_garbage_in_it_counts_as_none(buffer: Path) -> None:
    spool = spool_in(buffer)
    for number in range(3):
        spool.append(b"%d\n" % number)
    assert spool.stream is not None
    window = spool.stream.window(2, 1 << 20)
    assert window is not None
    spool.stream.advance(window)
    name = spool.stream.name
    assert is_sent(buffer, (name, 0, 4))
    assert not is_sent(buffer, (name, 0, 5))
    die(spool)
    stream = Stream.take(buffer, name)
    assert stream is not None
    assert drain(stream) == [b"2"]
    stream.release()
    assert is_sent(buffer, (name, 0, 6))

    (buffer / "x.jsonl.ready").write_text("{}\n")
    (buffer / "x.lock").write_bytes(b"\0\xff garbage")
    assert pick_up(buffer) == [b"{}"]


# --- Threads, processes --------------------------------------------------------------------------


def test_many_threads_append_while_files_change_and_are_sent(buffer: Path) -> None:
    spool = spool_in(buffer, file_bytes=3000)
    each, threads = 1500, 6
    stop = threading.Event()
    sent: list[bytes] = []

    def write(thread: int) -> None:
        for number in range(each):
            assert spool.append(b"%d-%d\n" % (thread, number))

    def send() -> None:
        while not stop.is_set() or not finished():
            if spool.stream is not None:
                sent.extend(drain(spool.stream, 100))

    def finished() -> bool:
        return spool.stream is not None and (spool.stream.number, spool.stream.offset) >= spool.end()

    sender = threading.Thread(target=send)
    sender.start()
    writers = [threading.Thread(target=write, args=(thread,)) for thread in range(threads)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stop.set()
    sender.join()
    assert len(sent) == each * threads
    for thread in range(threads):
        mine = [int(line.partition(b"-")[2]) for line in sent if line.startswith(b"%d-" % thread)]
        assert mine == list(range(each))
    spool.close()
    assert set(states(buffer)) == {".synced"}


def test_a_forked_process_has_a_stream_of_its_own(buffer: Path) -> None:
    spool = spool_in(buffer)
    spool.append(b"parent\n")
    parent = spool.stream
    assert parent is not None
    child = os.fork()
    if child == 0:
        spool.after_fork()
        spool.append(b"child\n")
        os._exit(0 if spool.after == (parent.name, 0, 7) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert spool.append(b"parent again\n")
    assert pick_up(buffer) == [b"child"], "only the child is dead"
    assert drain(parent) == [b"parent", b"parent again"]
    spool.close()


# --- The disk ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "disk", "256k") as path:
        yield path


def test_a_full_disk_keeps_lines_in_memory_and_none_is_torn(small_disk: Path) -> None:
    folder = small_disk / "buffer"
    spool = spool_in(folder, file_bytes=1 << 30)
    lines = [b'{"event_id":"%d","x":"%s"}' % (number, b"x" * 700) for number in range(500)]
    promised = [line for line in lines if spool.append(line + b"\n")]
    assert 0 < len(promised) < len(lines)
    assert spool.holds
    assert spool.stream is not None
    on_disk = drain(spool.stream)
    assert on_disk[: len(promised)] == promised
    held = spool.take_held(10_000)
    assert promised + held == lines, "in order, and nothing is missing"
    spool.give_back(sent=False)
    (folder / "other").unlink(missing_ok=True)
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    time.sleep(0.25)
    assert spool.append(b"after\n")
    assert not spool.holds
    rest = [line for line in drain(spool.stream) if line in (*lines, b"after")]
    assert rest == [*lines[len(promised) :], b"after"]
    spool.close()


def test_a_folder_that_cannot_be_made_costs_no_exception(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    spool = spool_in(tmp_path / "file" / "buffer")
    assert spool.append(b"{}\n") is False
    assert spool.take_held(5) == [b"{}"]
    spool.give_back(sent=True)
    assert not spool.holds
    spool.close()


def test_memory_is_bounded_when_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    spool = spool_in(tmp_path / "file" / "buffer")
    line = b"x" * (1 << 20) + b"\n"
    for _ in range(20):
        spool.append(line)
    assert spool.refused == 13
    assert len(spool.take_held(100)) == 7


def test_each_call_waits_for_the_disk_if_that_is_wanted(buffer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync

    def noted(file: int) -> None:
        synced.append(os.fstat(file).st_size)
        real(file)

    monkeypatch.setattr(os, "fsync", noted)
    spool = spool_in(buffer, fsync=True)
    spool.append(b"one\n")
    spool.append(b"two\n")
    assert [size for size in synced if size in (4, 8)] == [4, 8]
    spool.close()


# --- Bounds --------------------------------------------------------------------------------------


def fill(buffer: Path, lines: int = 10) -> Stream:
    """Make a stream of a dead process with one file a line, each of 100 bytes."""
    spool = spool_in(buffer, file_bytes=100)
    for number in range(lines):
        spool.append(b"%99d\n" % number)
        time.sleep(0.002)
    stream = spool.stream
    assert stream is not None
    die(spool)
    taken = Stream.take(buffer, stream.name)
    assert taken is not None
    return taken


def enforced(buffer: Path, own: Stream | None = None, **bounds: float) -> list[tuple[str, int, str]]:
    dropped: list[tuple[str, int, str]] = []

    def note(entry: Entry, lines: int, reason: str) -> None:
        dropped.append((Path(entry.path).name[-19:-12], lines, reason))

    given = {"max_bytes": 1 << 30, "max_age_s": 1e9, "keep_s": 1e9, **bounds}
    enforce(buffer, Bounds(**given), own, note)  # type: ignore[arg-type]
    return dropped


def test_beyond_the_bound_sent_files_go_first_and_then_the_oldest_with_a_count(buffer: Path) -> None:
    stream = fill(buffer)
    for _ in range(3):
        window = stream.window(1, 1 << 20)
        assert window is not None
        stream.advance(window)
    stream.window(1, 1 << 20)
    stream.release()
    assert summary(buffer) == {"synced": {"files": 3, "bytes": 300}, "ready": {"files": 8, "bytes": 700}}
    assert enforced(buffer, max_bytes=700) == []
    assert states(buffer) == {".ready": 8, ".lock": 1}
    dropped = enforced(buffer, max_bytes=500)
    assert [(lines, reason) for _, lines, reason in dropped] == [(1, "the folder is over its bound")] * 2
    assert [int(line) for line in pick_up(buffer)] == [5, 6, 7, 8, 9]


def test_old_files_are_given_up_with_a_count_and_sent_ones_deleted(buffer: Path) -> None:
    fill(buffer, 3).release()
    old = entries(buffer)[0].path
    os.utime(old, (1, 1))
    assert [lines for _, lines, _ in enforced(buffer, max_age_s=3600)] == [1]
    assert [int(line) for line in pick_up(buffer)] == [1, 2]
    os.utime(entries(buffer)[0].path, (1, 1))
    enforced(buffer, keep_s=3600)
    assert states(buffer) == {".synced": 1}


def test_a_living_processs_files_are_its_own_to_give_up(buffer: Path) -> None:
    spool = spool_in(buffer, file_bytes=100)
    for number in range(5):
        spool.append(b"%99d\n" % number)
    assert enforced(buffer, max_bytes=0) == []
    assert spool.stream is not None
    spool.stream.window(1, 1 << 20)
    assert len(enforced(buffer, spool.stream, max_bytes=0)) == 5
    spool.append(b"new\n")
    assert drain(spool.stream) == [b"new"]
    spool.close()


def test_dead_letters_are_kept_with_their_reason(buffer: Path) -> None:
    bury(buffer, [b'{"event_id":"a"}', b"\xff torn"], 422, [{"loc": ["body"], "msg": "no"}])
    first, second = (buffer / "dead-letter.jsonl").read_text().splitlines()
    assert '"status":422' in first
    assert '"line":{"event_id":"a"}' in first
    assert "\\\\xff torn" in second


def test_the_dead_letter_file_begins_anew_when_it_is_large(buffer: Path) -> None:
    for _ in range(3):
        bury(buffer, [b"{}"], 422, "no", max_bytes=10)
    assert len(list(buffer.glob("dead-letter.*.jsonl"))) == 3


def test_full_dead_letter_files_are_bounded_too_and_go_before_what_is_unsent(buffer: Path) -> None:
    for _ in range(4):
        bury(buffer, [b"{}", b"{}"], 422, "no", max_bytes=10)
    size = next(buffer.glob("dead-letter.*.jsonl")).stat().st_size
    fill(buffer, 2).release()
    assert [lines for _, lines, _ in enforced(buffer, max_bytes=200 + 2 * size)] == [2, 2]
    assert len(list(buffer.glob("dead-letter.*.jsonl"))) == 2
    os.utime(next(buffer.glob("dead-letter.*.jsonl")), (1, 1))
    assert [lines for _, lines, _ in enforced(buffer, max_age_s=3600)] == [2]
    assert len(pick_up(buffer)) == 2


def test_processes_that_begin_a_new_dead_letter_file_at_once_lose_none(buffer: Path) -> None:
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            with contextlib.ExitStack() as stack:
                stack.callback(os._exit, 1)
                for _ in range(300):
                    bury(buffer, [b"{}"], 422, "no", max_bytes=10)
                os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert sum(len(path.read_bytes().splitlines()) for path in buffer.glob("dead-letter*")) == 1200


def test_a_clock_that_is_set_makes_no_file_old(buffer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(buffer, 2).release()
    dropped: list[str] = []
    config = Config(buffer_dir=buffer, pace=Pace(tidy_every_s=0))
    upkeep = Upkeep(config, lambda entry, _lines, _why: dropped.append(entry.path))
    real = time.time
    for jump_s in (40 * 86_400, -40 * 86_400):
        monkeypatch.setattr(time, "time", lambda jump_s=jump_s: real() + jump_s)
        upkeep.due = 0.0
        upkeep.attend(None)
    assert not dropped
    for entry in entries(buffer):
        os.utime(entry.path, (real() - 40 * 86_400,) * 2)
    monkeypatch.setattr(time, "time", real)
    upkeep.due = 0.0
    upkeep.attend(None)
    assert len(dropped) == 2


def test_thousands_of_dead_streams_are_picked_up_in_one_look_each(buffer: Path) -> None:
    buffer.mkdir()
    for number in range(3000):
        (buffer / f"20251231T153045Z-1-{number:08x}.000000.jsonl.ready").write_bytes(b"%d\n" % number)
    began = time.thread_time()
    streams = [Stream.take(buffer, name, numbers) for name, numbers in waiting(buffer).items()][:1000]
    for stream in streams:
        assert stream is not None
        assert len(drain(stream)) == 1
        stream.release()
    assert time.thread_time() - began < 10  # it took minutes when each of them looked through the folder


def test_streams_of_others_are_not_disturbed_by_a_look_around(buffer: Path) -> None:
    spools = [spool_in(buffer) for _ in range(20)]
    for number, spool in enumerate(spools):
        spool.append(b"%d\n" % number)
    assert pick_up(buffer) == []
    for spool in spools[::2]:
        die(spool)
    assert sorted(int(line) for line in pick_up(buffer)) == list(range(0, 20, 2))
    for spool in spools[1::2]:
        with contextlib.suppress(OSError):
            spool.close()
    assert sorted(int(line) for line in pick_up(buffer)) == list(range(1, 20, 2))
