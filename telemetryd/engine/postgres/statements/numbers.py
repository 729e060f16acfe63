"""The commit sequence: what a group of commands changed gets numbers right before its COMMIT, in the commits' order.

Sequences of PostgreSQL are not in the order of the commits. So numbers of changes and ids of events, which subscribers
continue after, are drawn under a lock that is held until the COMMIT is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from telemetryd.engine.postgres.connection import STANDBYS, Plain
from telemetryd.engine.postgres.statements.arrays import by_column
from telemetryd.model import events
from telemetryd.settings import Sync

REMEMBERED: Final = 1_000_000
"""Deletions are remembered for so many changes; a subscriber that is further behind has to start anew."""
_FORGOTTEN_AT_ONCE: Final = 5_000

NEWEST: Final = """greatest(
    (SELECT coalesce(max(seq), 0) FROM run_changes),
    (SELECT coalesce(max(seq), 0) FROM run_deletions),
    (SELECT coalesce(max(greatest(floor, horizon)), 0) FROM change_feed)
)"""
"""SQL for the last number that was drawn."""

_TAKE_TURN: Final = "SELECT telemetryd_take_turn(%s)"
_CHECK_STANDBY: Final = "SELECT telemetryd_require_standby(true)"
_CHECK_DISK: Final = "SELECT telemetryd_require_disk()"
_CHANGED: Final = """
    INSERT INTO run_changes (run, seq)
    SELECT run, nextval('numbers') FROM (
        SELECT run FROM unnest(%s::bigint[]) WITH ORDINALITY AS given (run, place) ORDER BY place
    ) AS changed
    ON CONFLICT (run) DO UPDATE SET seq = excluded.seq
"""
_DELETED: Final = """
    INSERT INTO run_deletions (seq, event_id)
    SELECT nextval('numbers'), event_id FROM (
        SELECT event_id FROM unnest(%s::text[]) WITH ORDINALITY AS given (event_id, place) ORDER BY place
    ) AS deleted
"""
_COLUMNS: Final = ("run", *events.STORED)
_HAPPENED: Final = f"""
    INSERT INTO run_events (id, {", ".join(_COLUMNS)})
    SELECT nextval('event_numbers'), {", ".join(_COLUMNS[:-1])}, payload::json FROM (
        SELECT * FROM unnest(%s::bigint[]{", %s::text[]" * len(events.STORED)}) WITH ORDINALITY
            AS given ({", ".join(_COLUMNS)}, place)
        ORDER BY place
    ) AS happened
"""
_REDACTED: Final = """
    UPDATE run_events SET payload = NULL, id = nextval('event_numbers') WHERE id = ANY (%s::bigint[])
"""
# A transaction that has written nothing does not wait for the standby, and would call a run stored whose own commit is
# not there yet (RecordTransactionCommit in PostgreSQL's xact.c).
_WRITE_SOMETHING: Final = "SELECT pg_logical_emit_message(true, 'telemetryd', '')"

_FORGET: Final = f"""
    WITH forgotten AS (
        DELETE FROM run_deletions WHERE seq IN (
            SELECT seq FROM run_deletions WHERE seq <= {NEWEST} - %s ORDER BY seq LIMIT {_FORGOTTEN_AT_ONCE}
        )
        RETURNING seq
    ), last AS (SELECT max(seq) AS seq FROM forgotten)
    UPDATE change_feed SET horizon = greatest(horizon, last.seq) FROM last WHERE last.seq IS NOT NULL
    RETURNING horizon
"""


def forget_deletions(plain: Plain) -> bool:
    """Forget some deletions that lie further back than `REMEMBERED` changes; return whether there were any."""
    return plain.execute(_FORGET, (REMEMBERED,)).fetchone() is not None


class Numbers:
    """What one open transaction has to get numbers for."""

    def __init__(self, plain: Plain, sync: Sync) -> None:
        self._plain = plain
        self._sync = sync
        self._changed: dict[int, None] = {}
        self._deleted: list[str] = []
        self._events: list[tuple[Any, ...]] = []
        self._redacted: dict[int, None] = {}

    def changed(self, run: int) -> None:
        """Take note that a run is new or has changed; of several changes in one transaction the last one counts."""
        self._changed.pop(run, None)
        self._changed[run] = None

    def deleted(self, runs: Iterable[int], event_ids: Iterable[str]) -> None:
        """Take note of deletions."""
        for run in runs:
            self._changed.pop(run, None)
            self.forget_events(run)
        self._deleted += event_ids

    def forget_events(self, run: int) -> None:
        """Forget the events of a run that is deleted, and that wait for their ids."""
        self._events = [event for event in self._events if event[0] != run]

    def happened(self, run: int, rows: Iterable[tuple[Any, ...]]) -> None:
        """Take note of new events of a run, in the order of `events.STORED`."""
        self._events += ((run, *row) for row in rows)

    def redacted(self, events: Iterable[int]) -> None:
        """Take note of events that lose their payload: each gets the id of a new one, so that followers take it."""
        self._redacted.update(dict.fromkeys(events))

    def take_turn(self) -> None:
        """Wait until nobody else draws numbers."""
        self._plain.execute(_TAKE_TURN, (self._sync in STANDBYS,))

    def _draw_for_events(self) -> None:
        if self._events:
            self._plain.execute(_HAPPENED, by_column(self._events))
            self._events = []
        if self._redacted:
            self._plain.execute(_REDACTED, ([*self._redacted],))
            self._redacted = {}

    def check_promises(self) -> None:
        """See, after the COMMIT, that a standby was still asked for, and the disk: to take that back lets all pass."""
        if self._sync in STANDBYS:
            self._plain.execute(_CHECK_STANDBY)
        if self._sync is not Sync.NONE:
            self._plain.execute(_CHECK_DISK)

    def draw(self, *, has_written: bool) -> None:
        """Draw every number; only in our turn, and right before COMMIT."""
        is_new = bool(self._events or self._redacted)
        self._draw_for_events()
        if self._changed:
            self._plain.execute(_CHANGED, ([*self._changed],))
        if self._deleted:
            self._plain.execute(_DELETED, (self._deleted,))
        if not (has_written or is_new or self._changed or self._deleted):
            self._plain.execute(_WRITE_SOMETHING)
