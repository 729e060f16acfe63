"""The commit sequence: assigns numbers to a transaction's changes, and stores what they belong to."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from collections.abc import Sequence as Many
from typing import Final

import orjson

from telemetryd.engine.sqlite.statements.columns import NEWEST, NEWEST_EVENT

REMEMBERED: Final = 1_000_000
"""Deletions are remembered for so many changes; a subscriber that is further behind has to start anew."""

_FORGOTTEN_AT_ONCE: Final = 5_000

STAND: Final = f"{NEWEST}, (SELECT coalesce(max(id), 0) FROM agent_runs)"
"""SQL for what a `Sequence` begins with."""
_CHANGED: Final = """
    INSERT INTO run_changes (run, seq) SELECT value, :last + 1 + key FROM json_each(:runs) WHERE true
    ON CONFLICT (run) DO UPDATE SET seq = excluded.seq
"""
_DELETED: Final = "INSERT INTO run_deletions (seq, event_id) SELECT :last + 1 + key, value FROM json_each(:event_ids)"
_LAST_FORGOTTEN: Final = """
    SELECT max(seq) FROM (SELECT seq FROM run_deletions WHERE seq <= :oldest ORDER BY seq LIMIT :limit)
"""
_FORGET: Final = ("DELETE FROM run_deletions WHERE seq <= ?", "UPDATE change_feed SET horizon = ?")

_LAST_EVENT: Final = f"SELECT {NEWEST_EVENT}"

KEEP_EVENT_NUMBERS: Final = f"""
    UPDATE change_feed SET event_floor = {NEWEST_EVENT} WHERE event_floor < {NEWEST_EVENT}
"""
"""Execute this before events are deleted."""
KEEP_NUMBERS: Final = f"UPDATE change_feed SET floor = {NEWEST}"
"""Execute this before rows that hold numbers are deleted outside of a `Transaction`."""
MAKE_FEED: Final = f"""
    INSERT INTO change_feed (epoch, floor, horizon)
    SELECT lower(hex(randomblob(6))), {NEWEST}, {NEWEST} WHERE NOT EXISTS (SELECT 1 FROM change_feed)
"""
"""Execute this where the one row of `change_feed` may be missing: what was deleted is unknown then."""


def forget_deletions(cursor: sqlite3.Cursor, last: int) -> None:
    """Forget some deletions that lie further back than `REMEMBERED` changes; `last` is the newest number."""
    oldest = {"oldest": last - REMEMBERED, "limit": _FORGOTTEN_AT_ONCE}
    (forgotten,) = cursor.execute(_LAST_FORGOTTEN, oldest).fetchone()
    if forgotten is not None:
        for statement in _FORGET:
            cursor.execute(statement, (forgotten,))


class Sequence:
    """The numbers that one open transaction draws; those of changed runs are written down in `finish`.

    Args:
        cursor: is in that transaction.
        last: the last number that was drawn.
        highest_id: the highest id of a run.

    """

    def __init__(self, cursor: sqlite3.Cursor, last: int, highest_id: int) -> None:
        self._cursor = cursor
        self.last = last
        """The last number that was drawn."""
        self._highest_id = highest_id
        self._changed: dict[int, None] = {}
        self._last_event: int | None = None

    @classmethod
    def read(cls, cursor: sqlite3.Cursor) -> Sequence:
        """Return the sequence as the cursor's transaction finds it."""
        return cls(cursor, *cursor.execute(f"SELECT {STAND}").fetchone())

    @property
    def last_event(self) -> int:
        """The last id of an event that this transaction has drawn, or 0."""
        return self._last_event or 0

    @property
    def is_ahead(self) -> bool:
        """Whether SQLite would give a new row an id that was drawn already: it takes the largest plus one."""
        return bool(self.last != self._highest_id)

    def created(self, highest_id: int) -> None:
        """Take note of new runs, whose ids are numbers of the sequence."""
        self.last = self._highest_id = highest_id

    def changed(self, run: int) -> None:
        """Take note that a run has changed; of several changes in one transaction the last one counts."""
        self._changed.pop(run, None)
        self._changed[run] = None

    def deleted(self, runs: Iterable[int], event_ids: Many[str]) -> None:
        """Draw the numbers of deletions at once: one of these event_ids may be created again right after."""
        for run in runs:
            self._changed.pop(run, None)
        if not event_ids:
            return
        self._cursor.execute(_DELETED, {"last": self.last, "event_ids": orjson.dumps(event_ids).decode()})
        self.last += len(event_ids)
        forget_deletions(self._cursor, self.last)

    def event_ids(self, count: int) -> range:
        """Draw ids of new events, from a separate counter; those that turn out to be known leave theirs unused."""
        if self._last_event is None:
            self._last_event = int(self._cursor.execute(_LAST_EVENT).fetchone()[0])
        first = self._last_event + 1
        self._last_event += count
        return range(first, first + count)

    def finish(self) -> None:
        """Write down the numbers of the runs that have changed."""
        if self._changed:
            runs = orjson.dumps([*self._changed]).decode()
            self._cursor.execute(_CHANGED, {"last": self.last, "runs": runs})
            self.last += len(self._changed)
            self._changed = {}

    def state(self) -> tuple[int, int, dict[int, None]]:
        """Return what `restore` needs to undo everything that is noted from now on."""
        return self.last, self._highest_id, self._changed.copy()

    def restore(self, state: tuple[int, int, dict[int, None]]) -> None:
        """Undo what was noted since; the caller has undone it in the database."""
        self.last, self._highest_id, self._changed = state
