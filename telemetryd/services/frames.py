"""Frames of the event stream, encoded once for all subscribers: one run, or several together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable
from typing import Final

import orjson

from telemetryd.model import runs
from telemetryd.model.changes import Changes, Cursor

PIECE_BYTES: Final = 64 * 1024
"""What is sent at once at most, so that no more is copied than the client is about to take."""

_SLICE_S: Final = 0.002
"""How long changes are encoded before the event loop gets its turn."""


class Frame:
    """A run as an event of a stream: in memory once, however many subscribers wait for it.

    Several small runs are joined to one frame, which has the number of the last.
    """

    __slots__ = ("holders", "run", "runs", "seq", "text")

    def __init__(self, seq: int, run: int, text: bytes, runs: int = 1) -> None:
        self.seq = seq
        self.run = run
        self.text = text
        self.runs = runs
        self.holders = 0
        """How often it was acquired and not yet released."""

    @staticmethod
    def join(frames: list[Frame]) -> Frame:
        """Return several frames as one."""
        last = frames[-1]
        if len(frames) == 1:
            return last
        return Frame(last.seq, last.run, b"".join(frame.text for frame in frames), len(frames))


class Held:
    """The bytes of all frames that have a holder; each counts once, from its first holder to its last."""

    def __init__(self) -> None:
        self.bytes = 0

    def acquire(self, frame: Frame) -> None:
        """Count a holder of a frame, which releases it as often as it has acquired it."""
        if not frame.holders:
            self.bytes += len(frame.text)
        frame.holders += 1

    def release(self, frame: Frame) -> None:
        """Count a holder no more."""
        frame.holders -= 1
        if not frame.holders:
            self.bytes -= len(frame.text)


def joined(frames: Iterable[Frame]) -> list[Frame]:
    """Return frames joined up to `PIECE_BYTES`."""
    pieces: list[Frame] = []
    together: list[Frame] = []
    size = 0
    for frame in frames:
        size += len(frame.text)
        if together and size > PIECE_BYTES:
            pieces.append(Frame.join(together))
            together, size = [], len(frame.text)
        together.append(frame)
    if together:
        pieces.append(Frame.join(together))
    return pieces


async def encode(changes: Changes, matching: Collection[int], last: int) -> list[Frame]:
    """Return the runs with these ids as events of a stream, in their order, up to a number."""
    frames = []
    turn = time.perf_counter()
    for seq, what in changes.found:
        if seq <= last and isinstance(what, tuple) and what[0] in matching:
            cursor, data = str(Cursor(seq, changes.epoch)).encode(), orjson.dumps(runs.to_json(what))
            text = b"id: %b\nevent: run\ndata: %b\n\n" % (cursor, data)
            frames.append(Frame(seq, int(what[0] or 0), text))
            if time.perf_counter() - turn > _SLICE_S:
                await asyncio.sleep(0)
                turn = time.perf_counter()
    return frames
