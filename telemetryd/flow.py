"""Flow control: advises writers on batch size and pauses, so that commits stay within a target latency."""

from __future__ import annotations

import math
import time
from typing import Final

HEADER: Final = "Telemetry-Flow"
METHODS: Final = ("POST", "PATCH")
"""Requests whose answers carry the header; answers of 429 and 503 do so as well."""
NEVER: Final = (401, 403)
"""Answers that never carry it: how busy the daemon is concerns nobody who has no right to ask."""

FEWEST_ROWS: Final = 100
"""Below that, a batch costs more for itself than for its rows; beyond it a pause does the rest."""
_FULLNESS: Final = 0.5
"""What part of the queue all that is on its way may need; with three quarters, three times as much was refused."""
_LONGEST_PAUSE_S: Final = 5.0
_IDLE_AFTER_S: Final = 1.0
_FORGET: Final = 0.9
_FIRST_ROW_S: Final = 20e-6
_LEAST_ROW_S: Final = 1e-6
_LEAST_SPREAD: Final = 10.0
_FASTEST_GROWS: Final = 1.05
"""The factor by which the fastest known commit is forgotten with each group."""


class Flow:
    """Learns what a commit costs, by itself and for each row, and shares the rows that fit into the target.

    A commit of n rows takes a + b·n seconds; a and b come from a regression that forgets (each group counts a
    tenth less than the next). So (target - a) / b rows may be on their way at once. If more are, everybody's batch
    shrinks by that ratio, and where a batch cannot shrink any more, a pause thins the requests out. If fewer are, the
    rows that are left are shared by those who send. If a alone takes most of the target or more, rows may take as long
    as a again: smaller batches would halve the latency at best, at any cost. Groups of one size do not separate
    a from b: then a batch that would fit if all the time were its rows' is advised, and the time it takes shows more.

    Args:
        target_s: seconds from a request's arrival in the queue to durable that should not be exceeded.
        full: most rows of a batch.

    """

    def __init__(self, target_s: float, full: int) -> None:
        self._target_s = target_s
        self._full = self._batch = full
        self._idle = _text(full, 0.0)
        self._text = self._idle
        self._until = 0.0
        self._weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0
        self._row_s = _FIRST_ROW_S
        self._group_s = self._mean_s = 0.0
        self._fastest_s = math.inf
        self._latency_s = 0.0
        self._pause_s = 0.0
        self._sizes_differ = False

    def text(self, *, is_idle: bool) -> str:
        """Return the header's value; an idle daemon soon asks for nothing any more."""
        return self._idle if is_idle and time.monotonic() > self._until else self._text

    def measure(self, rows: int, seconds: float, latency_s: float) -> None:
        """Take in a group: its rows, how long its commit took, and how long its oldest command has waited in all."""
        self._weight = self._weight * _FORGET + 1
        self._rows = self._rows * _FORGET + rows
        self._seconds = self._seconds * _FORGET + seconds
        self._rows_rows = self._rows_rows * _FORGET + rows * rows
        self._rows_seconds = self._rows_seconds * _FORGET + rows * seconds
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        variance = self._rows_rows / self._weight - mean_rows * mean_rows
        # Groups of about one size cannot separate a row's cost from the group's; what was learnt before stands.
        self._sizes_differ = variance > max(_LEAST_SPREAD, mean_rows / 10) ** 2
        if self._sizes_differ:
            self._row_s = (self._rows_seconds / self._weight - mean_rows * mean_seconds) / variance
        self._row_s = min(max(self._row_s, _LEAST_ROW_S), mean_seconds / max(mean_rows, 1.0))
        self._mean_s = mean_seconds
        self._group_s = mean_seconds - self._row_s * mean_rows
        self._fastest_s = min(self._fastest_s * _FASTEST_GROWS, seconds)
        if mean_rows > FEWEST_ROWS and self._group_s > self._fastest_s:  # noise; no group takes less than a
            self._group_s = self._fastest_s
            self._row_s = (mean_seconds - self._group_s) / mean_rows
        self._latency_s = latency_s

    def advise(self, commands: int, rows: int, largest: int, fullness: float) -> None:
        """Make the advice for so many commands and rows on their way, the largest command among them, and the queue.

        Args:
            commands: those of the group just committed, and those that wait.
            rows: the rows of both.
            largest: most rows of one command.
            fullness: what part of the queue they would take if all of them waited in it; more than 1 is refused.

        """
        now = time.monotonic()
        if now > self._until:
            self._pause_s = 0.0  # whatever was advised, nobody follows it any more
        self._until = now + _IDLE_AFTER_S
        largest = max(largest, 1)
        left_s = max(self._target_s - self._group_s, self._group_s)
        thinning = 1 + self._pause_s / max(self._latency_s, 1e-6)
        rows, fullness = round(rows * thinning), fullness * thinning  # what there would be without a pause
        pause_s = 0.0
        fitting = left_s / self._row_s
        if rows <= fitting:
            batch = largest + (fitting - rows) / max(commands, 1)
        else:
            batch = max(largest * fitting / rows, FEWEST_ROWS)
            thinned = rows * min(batch / largest, 1.0)
            pause_s = self._latency_s * max(thinned / fitting - 1, 0.0)
        if not self._sizes_differ and largest > FEWEST_ROWS:
            batch = min(batch, largest * self._target_s / max(self._mean_s, 1e-6))
        crowded_s = (fullness / _FULLNESS - 1) * self._latency_s
        self._batch = int(min(max(batch, FEWEST_ROWS), self._full))
        self._pause_s = min(max(pause_s, crowded_s, 0.0), _LONGEST_PAUSE_S)
        self._text = _text(self._batch, self._pause_s)

    def refuse(self) -> None:
        """Advise a writer that found the queue full: at least one commit has to pass."""
        self._until = time.monotonic() + _IDLE_AFTER_S
        self._text = _text(self._batch, max(self._pause_s, self._latency_s, self._target_s))


def _text(batch: int, pause_s: float) -> str:
    return f"batch={batch}, pause={pause_s * 1000:.0f}"
