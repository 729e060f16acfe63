"""What waits for the writer gets an answer, also when the writer dies or stops; without one, these tests end too."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Final

from telemetryd.errors import WriterDeadError
from telemetryd.model.commands import Created
from tests.conftest import eventually
from tests.test_writer import Broken, bench, create

_PATIENCE_S: Final = 30.0
"""A request without an answer waits for ever."""


async def test_each_waiting_request_fails_when_the_writer_dies(tmp_path: Path) -> None:
    async with bench(tmp_path, transaction=Broken) as made:
        waiting = [asyncio.ensure_future(made.writer.submit(create(name))) for name in ("a", "b")]
        done, _ = await asyncio.wait(waiting, timeout=_PATIENCE_S)
        assert {type(future.exception()) for future in done} == {WriterDeadError}, "somebody still waits"
        assert len(done) == len(waiting)


async def test_what_was_taken_is_stored_and_answered_before_the_writer_stops(tmp_path: Path) -> None:
    gate = threading.Event()

    def hold() -> None:
        gate.wait(_PATIENCE_S)

    async with bench(tmp_path, check_place=hold) as made:
        waiting = [asyncio.ensure_future(made.writer.submit(create("first")))]
        await eventually(lambda: made.stored() == {"first"})
        waiting += [asyncio.ensure_future(made.writer.submit(create(f"e{number}"))) for number in range(5)]
        stopping = asyncio.create_task(made.writer.stop())
        await asyncio.sleep(0)
        gate.set()
        done, _ = await asyncio.wait(waiting, timeout=_PATIENCE_S)
        assert len(done) == len(waiting), "what was taken was not committed"
        assert all(future.result() == Created((True,)) for future in done)
        await stopping
