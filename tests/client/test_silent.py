"""A process that does not send (TELEMETRY_SEND=false): others send its lines while it lives; its folder is bounded."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from telemetryd.client import Client
from telemetryd.client.config import Pace
from telemetryd.client.folder import waiting
from telemetryd.client.spool import Spool
from telemetryd.client.streams import Stream, is_sent
from tests.client.conftest import MakeClient, states, url_of
from tests.client.test_spool import drain, pick_up
from tests.conftest import Api, make_run


def silent(buffer: Path, **settings: Any) -> Client:
    return Client("http://127.0.0.1:9", buffer_dir=buffer, send=False, **settings)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_others_send_its_lines_while_it_lives(api: Api, make_client: MakeClient, buffer: Path) -> None:
    alive = silent(buffer, file_bytes=2000)
    other = make_client(url_of(api), pace=Pace(first_look_s=0, look_every_s=0.1))
    other.record(make_run(agent_name="other"))
    count = 0
    for more in (1, 1, 10, 50):
        for _ in range(more):
            alive.record(make_run(agent_name="silent"))
        count += more
        deadline = time.monotonic() + 60
        while len(await api.list(agent_name="silent", limit=1000)) < count:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
    assert other.stats()["duplicates"] == 0
    alive.close()


def test_a_file_that_is_being_written_is_not_finished_by_who_reads_it(buffer: Path) -> None:
    alive = silent(buffer)
    lines = []
    for number in range(5):
        alive.write({"event_id": str(number)})
        lines += pick_up(buffer)
        assert states(buffer) == {".active": 1, ".lock": 1}
    alive.close()
    assert pick_up(buffer) == []
    assert lines == [b'{"event_id":"%d"}' % number for number in range(5)]
    assert states(buffer) == {".synced": 1}


def test_new_files_and_a_reader_that_finishes_whatever_it_can_lose_no_line(buffer: Path) -> None:
    """The writer makes a file, and locks it; in between somebody may find it free, and empty."""
    spool = Spool(buffer, sends=False, fsync=False, file_bytes=1, file_age_s=600)
    stop = threading.Event()
    sent: list[bytes] = []

    def read() -> None:
        while not stop.is_set():
            sent.extend(pick_up(buffer))

    reader = threading.Thread(target=read)
    reader.start()
    count = 2000
    for number in range(count):
        assert spool.append(b"%d\n" % number)
    spool.close()
    stop.set()
    reader.join()
    sent += pick_up(buffer)
    assert [int(line) for line in sent] == list(range(count))
    assert set(states(buffer)) == {".synced"}


def test_threads_that_write_while_the_file_changes_leave_no_descriptor(buffer: Path) -> None:
    spool = Spool(buffer, sends=False, fsync=False, file_bytes=500, file_age_s=600)
    before = descriptors()

    def write(thread: int) -> None:
        for number in range(1000):
            assert spool.append(b"%d-%d\n" % (thread, number))

    writers = [threading.Thread(target=write, args=(thread,)) for thread in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert descriptors() == before + 1
    assert len(pick_up(buffer)) == 4000
    assert states(buffer)[".active"] == 1
    spool.close()


def test_its_files_change_with_age_and_leave_no_descriptor(buffer: Path) -> None:
    alive = silent(buffer, file_age_s=0.02)
    before = descriptors()
    for _ in range(4):
        alive.record(make_run())
        time.sleep(0.03)
    alive.record(make_run())
    assert states(buffer)[".ready"] >= 3
    assert descriptors() <= before + 1
    alive.close()


def test_its_folder_is_bounded_without_anybody_else(buffer: Path) -> None:
    alive = silent(buffer, file_bytes=2000, max_bytes=20_000, pace=Pace(tidy_every_s=0, cost=0))
    for _ in range(500):
        alive.record(make_run())
        for thread in threading.enumerate():
            if thread.name == "telemetryd-client":
                thread.join()
    assert sum(path.stat().st_size for path in buffer.iterdir()) < 30_000
    assert alive.stats()["dropped"] > 300
    assert len(pick_up(buffer)) + alive.stats()["dropped"] == 500
    alive.close()


def test_what_a_forked_process_says_waits_for_a_parent_that_does_not_send(buffer: Path) -> None:
    spool = Spool(buffer, sends=False, fsync=False, file_bytes=1 << 20, file_age_s=600)
    spool.append(b"{}\n")
    (name,) = waiting(buffer)
    assert not is_sent(buffer, (name, 0, 3)), "though there is no lock file yet"
    stream = Stream.take(buffer, name)
    assert stream is not None
    drain(stream)
    stream.release()
    assert is_sent(buffer, (name, 0, 3))
    spool.close()


def test_flush_says_that_nobody_has_acknowledged_it(buffer: Path) -> None:
    alive = silent(buffer)
    assert alive.flush(0.1)
    alive.record(make_run())
    assert not alive.flush(0.1)
    alive.close()


def test_its_death_leaves_nothing_locked(buffer: Path) -> None:
    program = (
        "import os\nfrom telemetryd.client import Client\n"
        f"Client(buffer_dir={str(buffer)!r}, send=False).record({{'agent_name': 'a', 'job_type': 'j'}})\nos._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert states(buffer) == {".active": 1}
    assert len(pick_up(buffer)) == 1
    assert states(buffer) == {".synced": 1}
