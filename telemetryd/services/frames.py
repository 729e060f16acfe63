"""Frames of the event stream, encoded once for all subscribers: one run, or several together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Final

import orjson

from telemetryd.model import runs
from telemetryd.model.changes import Changes, Place

PIECE_BYTES: Final = 64 * 1024
"""What a tail sends at once at most, so that no more is copied for it than the client is about to take."""

_SLICE_S: Final = 0.002
"""How long changes are encoded before the event loop gets its turn."""


class Held:
    """How many bytes all frames have that there are."""

    def __init__(self) -> None:
        self.bytes = 0


class Frame:
    """A run as an event of a stream: in memory once, however many tails it waits for, and counted while it is.

    Some small ones that are put together are one, which has the number of the last.
    """

    __slots__ = ("_held", "run", "runs", "seq", "text")

    def __init__(self, held: Held, seq: int, run: int, text: bytes, runs: int = 1) -> None:
        self.seq = seq
        self.run = run
        self.text = text
        self.runs = runs
        self._held = held
        held.bytes += len(text)

    def __del__(self) -> None:
        """Count it no more: the last tail it waited for has let it go."""
        self._held.bytes -= len(self.text)

    @staticmethod
    def join(frames: list[Frame]) -> Frame:
        """Return some as one."""
        last = frames[-1]
        if len(frames) == 1:
            return last
        return Frame(last._held, last.seq, last.run, b"".join(frame.text for frame in frames), len(frames))


class Chunk:
    """Frames that are handed at once to many tails."""

    def __init__(self, frames: list[Frame], pieces: list[Frame] | None = None) -> None:
        self.frames = frames
        self.pieces = frames if pieces is None else pieces
        """The same, as they wait for a tail."""
        self.size = sum(len(frame.text) for frame in frames)

    def joined(self) -> Chunk:
        """Return them put together up to `PIECE_BYTES`: once, for all tails that they are handed to."""
        pieces: list[Frame] = []
        together: list[Frame] = []
        size = 0
        for frame in self.frames:
            size += len(frame.text)
            if together and size > PIECE_BYTES:
                pieces.append(Frame.join(together))
                together, size = [], len(frame.text)
            together.append(frame)
        if together:
            pieces.append(Frame.join(together))
        return Chunk(self.frames, pieces)

    def after(self, seq: int) -> Chunk:
        """Return those that come after a number."""
        if not self.frames or self.frames[0].seq > seq:
            return self
        return Chunk([frame for frame in self.frames if frame.seq > seq])


async def encode(changes: Changes, matching: Collection[int], held: Held) -> list[Frame]:
    """Return the runs with these ids as events of a stream, in their order."""
    frames = []
    turn = time.perf_counter()
    for seq, what in changes.found:
        if isinstance(what, tuple) and what[0] in matching:
            place, data = str(Place(seq, changes.epoch)).encode(), orjson.dumps(runs.to_json(what))
            text = b"id: %b\nevent: run\ndata: %b\n\n" % (place, data)
            frames.append(Frame(held, seq, int(what[0] or 0), text))
            if time.perf_counter() - turn > _SLICE_S:
                await asyncio.sleep(0)
                turn = time.perf_counter()
    return frames
