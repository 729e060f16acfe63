"""Compares the totals with the runs, in slices of one short transaction each, and corrects them.

An hour of runs is the unit: all that is kept of it is compared in the transaction that reads its last slice; the cells
of commits are compared when the hours of their slot are done. What the writer itself commits meanwhile is reported to
the `Tally`, as far as the slices have come.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

import orjson

from telemetryd.engine import commit_log, stats_log
from telemetryd.engine.sqlite.statements import commit_cells, rollups
from telemetryd.engine.sqlite.statements.columns import NEWEST, NEWEST_EVENT
from telemetryd.engine.sqlite.statements.sequence import KEEP_NUMBERS, MAKE_FEED
from telemetryd.model.commit_cells import SLOT_HOURS, slot_of
from telemetryd.model.stats import DAY, FACTS, Facts, hour_number

SLICE_ROWS: Final = 1_000
"""Runs that are read in one transaction: a few milliseconds."""
_SLICE_S: Final = 0.005
_ATTEMPTS: Final = 3
_CREATED_AT: Final = FACTS.index("created_at")
_MINUTE: Final = len("2025-12-24T10:00")
_HOUR: Final = len("2025-12-24T10")
_DATE: Final = len("2025-12-24")
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d")

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_HOUR: Final = (datetime(1, 1, 1, tzinfo=UTC) - _EPOCH) // timedelta(hours=1)
_LAST_HOUR: Final = (datetime(9999, 12, 31, 23, tzinfo=UTC) - _EPOCH) // timedelta(hours=1)
"""What a time can say; other numbers of hours are nobody's."""

_SELECT: Final = f"""
    SELECT {", ".join(FACTS)}, start_time FROM agent_runs INDEXED BY idx_runs_created_desc
    WHERE created_at > :after AND created_at < :end ORDER BY created_at LIMIT :limit
"""
_SELECT_AT: Final = f"""
    SELECT {", ".join(FACTS)}, start_time FROM agent_runs INDEXED BY idx_runs_created_desc WHERE created_at = :at
"""
_NEXT: Final = """
    SELECT min(place) FROM (
        SELECT min(created_at) AS place FROM agent_runs WHERE created_at >= :end
        UNION ALL SELECT min(minute) FROM run_minutes WHERE minute >= :end
        UNION ALL SELECT min(hour) FROM run_hours WHERE hour >= :end
        UNION ALL SELECT min(day) || 'T00' FROM run_days WHERE day >= :end
    )
"""
_NEXT_CELL: Final = f"""
    SELECT min(start) FROM (
        SELECT min((
            SELECT min(start) FROM run_stats
            WHERE hours = span.value AND names = level.value AND start > :hour AND start <= :last
        )) AS start
        FROM json_each('{[*stats_log.SPANS]}') AS span CROSS JOIN json_each('{[*stats_log.LEVELS]}') AS level
        UNION ALL SELECT min(slot) * {SLOT_HOURS} FROM run_commits WHERE slot > :slot AND slot <= :last_slot
    )
"""
_NEXT_AGENT: Final = """
    SELECT min(agent_name) FROM (
        SELECT min(agent_name) AS agent_name FROM agent_runs INDEXED BY idx_runs_agent WHERE agent_name > :agent
        UNION ALL SELECT min(agent_name) FROM run_totals WHERE agent_name > :agent
    )
"""
_COUNT: Final = """
    SELECT job_type, status, count(*) FROM agent_runs INDEXED BY idx_runs_agent WHERE agent_name = ? GROUP BY 1, 2
"""
_STRAYS: Final = """
    SELECT value FROM json_each(?) WHERE NOT EXISTS (SELECT 1 FROM agent_runs WHERE id = value)
"""


Timed = tuple[Facts, str | None]
"""What the statistics need to know of a run, and its start time if it may be a new one."""


@dataclass(frozen=True, slots=True)
class _Noted:
    """What a transaction is going to commit."""

    number: int
    event: int
    added: list[Timed]
    taken: list[Timed]


@dataclass(slots=True)
class Found:
    """What a comparison has found."""

    corrected: int = 0
    """Counts that were wrong, and are right now."""
    strays: Counter[str] = field(default_factory=Counter)
    """Rows that belong to runs that are gone, by table; they stay, but for numbers of changes."""


class Tally:
    """The runs of one hour and of its slot, counted as far as the slices have come, whatever is committed meanwhile.

    It also keeps the last numbers that were drawn: another process may delete what holds them.
    """

    def __init__(self) -> None:
        self.number = self.event = 0
        """The last number of the commit sequence, and the last id of an event, that a commit of ours has drawn."""
        self._hour: str | None = None
        self._noted: _Noted | None = None
        self._slot: int | None = None
        self._earlier: stats_log.Summary = {}
        """The hours of the slot that are done."""
        self._clear("")

    def _clear(self, position: str) -> None:
        self.position = position
        """The created_at up to which everything is counted."""
        self.summary: stats_log.Summary = {}
        self.minutes: Counter[str] = Counter()
        self.starts: list[str] = []
        """The first and the last start time."""

    @property
    def is_counting(self) -> bool:
        """Whether runs have to be reported to it."""
        return self._slot is not None

    def begin(self, hour: str) -> None:
        """Count an hour, from its beginning; those of its slot that were counted before go on being counted."""
        self._hour = hour
        self._clear(hour)
        if self._slot != slot_of(hour):
            self._slot, self._earlier = slot_of(hour), {}

    def end_hour(self) -> None:
        """Keep what was counted for the slot only."""
        stats_log.add_to(self._earlier, self.summary)
        self._hour = None
        self._clear(self.position)

    def cells(self) -> dict[commit_log.Key, commit_log.Sums]:
        """Return the cells of commits of the hours that are done."""
        return commit_log.cells_of(self._earlier)

    def end(self) -> None:
        """Count nothing."""
        self._hour = self._slot = None
        self._earlier = {}
        self._clear("")

    def count(self, runs: Iterable[Timed], position: str) -> None:
        """Count runs that come after the position, up to a new one."""
        self.position = position
        self._add(runs, 1)

    def note(self, number: int, event: int, added: Iterable[Timed] = (), taken: Iterable[Timed] = ()) -> None:
        """Take note of what a transaction is going to commit."""
        self._noted = _Noted(number, event, [*added], [*taken])

    def forget(self) -> None:
        """Forget what was noted: that transaction was not committed."""
        self._noted = None

    def confirm(self) -> None:
        """Count what was noted: it is committed."""
        noted, self._noted = self._noted, None
        if noted is None:
            return
        self.number, self.event = max(self.number, noted.number), max(self.event, noted.event)
        for runs, sign in ((noted.added, 1), (noted.taken, -1)):
            self._add(filter(self._is_of_hour, runs), sign)
            stats_log.summarize(self._earlier, (facts for facts, _ in filter(self._is_of_earlier, runs)), sign)

    def _is_of_hour(self, run: Timed) -> bool:
        created_at: str = run[0][_CREATED_AT]
        return created_at[:_HOUR] == self._hour and created_at <= self.position

    def _is_of_earlier(self, run: Timed) -> bool:
        """Return whether a run belongs to an hour of the slot that is done, or that had no runs when its turn came."""
        created_at: str = run[0][_CREATED_AT]
        is_done = created_at[:_HOUR] != self._hour and created_at <= self.position
        return is_done and slot_of(created_at) == self._slot

    def _add(self, runs: Iterable[Timed], sign: int) -> None:
        counted = [*runs]
        stats_log.summarize(self.summary, (facts for facts, _ in counted), sign)
        for facts, start in counted:
            self.minutes[facts[_CREATED_AT][:_MINUTE]] += sign
            if start is not None:
                self.starts = [min(start, *self.starts), max(start, *self.starts)] if self.starts else [start, start]


def compare(connection: sqlite3.Connection, tally: Tally, disturbed: Callable[[], int]) -> Iterator[Found]:
    """Compare everything, a slice at each step; take each step in a separate transaction.

    Args:
        connection: the write connection.
        tally: gets whatever is committed between two steps.
        disturbed: how many commits of others were noticed; after one of them, an hour is counted anew.

    """
    found = Found()
    cursor = connection.cursor()
    rollups.fold(cursor)
    hour = ""
    begun = 0
    while (following := _next_hour(cursor, hour)) is not None:
        if not hour or slot_of(hour) != slot_of(following):
            if hour:
                found.corrected += _correct_slot(cursor, tally, hour, is_certain=disturbed() == begun)
            # In the same transaction as the look for it: a run that comes into an earlier hour of the slot is counted.
            tally.begin(following)
            begun = disturbed()
            yield found
        if hour and hour[:_DATE] != following[:_DATE]:
            found.corrected += _correct_day(cursor, hour[:_DATE])
            yield found
        hour = following
        yield from _compare_hour(cursor, tally, hour, found, disturbed)
    if hour:
        found.corrected += _correct_slot(cursor, tally, hour, is_certain=disturbed() == begun)
        found.corrected += _correct_day(cursor, hour[:_DATE])
        yield found
    yield from _compare_totals(cursor, found)
    for table in ("run_changes", "run_events", "run_processes", "unconverted_values"):
        yield from _find_strays(cursor, table, found)


def _next_hour(cursor: sqlite3.Cursor, hour: str) -> str | None:
    """Return the next hour of which there are runs or counts, or None."""
    # After an hour stands a colon in every time of it, and a semicolon comes next.
    after = f"{hour};" if hour else ""
    number = hour_number(hour) if hour else _FIRST_HOUR - 1
    places = []
    while True:
        place = cursor.execute(_NEXT, {"end": after}).fetchone()[0]
        if place is None or _TIME.match(place):
            break
        after = f"{place}\0"  # somebody's text that is no time counts nowhere
    if place is not None:
        places.append(place[:_HOUR])
    after_it = {"hour": number, "slot": number // SLOT_HOURS}
    last = {"last": _LAST_HOUR, "last_slot": _LAST_HOUR // SLOT_HOURS}
    start = cursor.execute(_NEXT_CELL, {**after_it, **last}).fetchone()[0]
    if start is not None:
        moment = _EPOCH + timedelta(hours=start)
        places.append(f"{moment.year:04}-{moment:%m-%dT%H}")
    return min(places, default=None)


def _compare_hour(
    cursor: sqlite3.Cursor, tally: Tally, hour: str, found: Found, disturbed: Callable[[], int]
) -> Iterator[Found]:
    for _ in range(_ATTEMPTS):
        before = disturbed()
        tally.begin(hour)
        while _count_slice(cursor, tally, hour):
            yield found
            if disturbed() != before:
                break
        else:
            found.corrected += rollups.correct_hour(cursor, hour, tally.summary)
            found.corrected += _correct_minutes(cursor, tally, hour)
            found.corrected += _correct_span(cursor, "run_hours", "hour", hour, tally.starts)
            break
    tally.end_hour()
    yield found


def _correct_slot(cursor: sqlite3.Cursor, tally: Tally, hour: str, *, is_certain: bool) -> int:
    """Make the cells of an hour's slot what its runs add up to, unless others have committed since it was begun.

    Then the next comparison does it: there is one after each such commit.
    """
    rollups.fold(cursor)
    corrected = commit_cells.correct(cursor, slot_of(hour), tally.cells()) if is_certain else 0
    tally.end()
    return corrected


def _count_slice(cursor: sqlite3.Cursor, tally: Tally, hour: str) -> bool:
    """Count the next runs of an hour, with all that have the last one's time; return whether there may be more."""
    place = {"after": tally.position, "end": f"{hour};", "limit": SLICE_ROWS}
    rows = cursor.execute(_SELECT, place).fetchall()
    if len(rows) < SLICE_ROWS:
        tally.count([(row[:-1], row[-1]) for row in rows], f"{hour};")
        return False
    last = rows[-1][_CREATED_AT]
    rows = [row for row in rows if row[_CREATED_AT] != last] + cursor.execute(_SELECT_AT, {"at": last}).fetchall()
    tally.count([(row[:-1], row[-1]) for row in rows], last)
    return True


def _correct_minutes(cursor: sqlite3.Cursor, tally: Tally, hour: str) -> int:
    kept = dict(
        cursor.execute("SELECT minute, runs FROM run_minutes WHERE minute >= ? AND minute < ?", (hour, f"{hour};"))
    )
    expected = {minute: runs for minute, runs in tally.minutes.items() if runs > 0}
    wrong = [minute for minute in {*kept, *expected} if kept.get(minute) != expected.get(minute)]
    cursor.executemany("DELETE FROM run_minutes WHERE minute = ?", [(minute,) for minute in wrong])
    right = [(minute, expected[minute]) for minute in wrong if minute in expected]
    cursor.executemany("INSERT INTO run_minutes (minute, runs) VALUES (?, ?)", right)
    return len(wrong)


def _correct_span(cursor: sqlite3.Cursor, table: str, key: str, place: str, starts: list[str]) -> int:
    """See that the span of an hour or a day holds its start times; it may be wider."""
    kept = cursor.execute(f"SELECT first_start, last_start FROM {table} WHERE {key} = ?", (place,)).fetchone()
    if (not starts and kept is None) or (starts and kept and kept[0] <= starts[0] and kept[1] >= starts[-1]):
        return 0
    cursor.execute(f"DELETE FROM {table} WHERE {key} = ?", (place,))
    if starts:
        cursor.execute(f"INSERT INTO {table} VALUES (?, ?, ?)", (place, starts[0], starts[-1]))
    return 1


def _correct_day(cursor: sqlite3.Cursor, date: str) -> int:
    """Make a day what its hours add up to."""
    first, last = cursor.execute(
        "SELECT min(first_start), max(last_start) FROM run_hours WHERE hour >= ? AND hour < ?",
        (f"{date}T", f"{date}U"),
    ).fetchone()
    starts = [] if first is None else [first, last]
    start = hour_number(f"{date}T00")
    return rollups.correct_day(cursor, start // DAY * DAY) + _correct_span(cursor, "run_days", "day", date, starts)


def _compare_totals(cursor: sqlite3.Cursor, found: Found) -> Iterator[Found]:
    """Compare the totals of agents, each of which an index counts."""
    agent = ""
    until = time.monotonic() + _SLICE_S
    while (agent := cursor.execute(_NEXT_AGENT, {"agent": agent}).fetchone()[0]) is not None:
        expected = {(job, status): runs for job, status, runs in cursor.execute(_COUNT, (agent,))}
        totals = cursor.execute("SELECT job_type, status, runs FROM run_totals WHERE agent_name = ?", (agent,))
        kept = {(job, status): runs for job, status, runs in totals}
        if kept != expected:
            found.corrected += sum(kept.get(key) != expected.get(key) for key in {*kept, *expected})
            cursor.execute("DELETE FROM run_totals WHERE agent_name = ?", (agent,))
            right = [(agent, *key, runs) for key, runs in expected.items()]
            cursor.executemany("INSERT INTO run_totals VALUES (?, ?, ?, ?)", right)
        if time.monotonic() > until:
            yield found
            until = time.monotonic() + _SLICE_S
    yield found


def _find_strays(cursor: sqlite3.Cursor, table: str, found: Found) -> Iterator[Found]:
    """Count the rows of runs that are gone. Numbers of their changes are dropped: nothing can be reported."""
    after = -(2**63)
    select = f"SELECT DISTINCT run FROM (SELECT run FROM {table} WHERE run > ? ORDER BY run LIMIT {SLICE_ROWS})"
    while runs := [run for (run,) in cursor.execute(select, (after,))]:
        after = max(runs)
        gone = [run for (run,) in cursor.execute(_STRAYS, (orjson.dumps(runs).decode(),))]
        if gone and table == "run_changes":
            for statement in (MAKE_FEED, KEEP_NUMBERS):
                cursor.execute(statement)
            cursor.executemany("DELETE FROM run_changes WHERE run = ?", [(run,) for run in gone])
            found.corrected += len(gone)
        elif gone:
            count = f"SELECT count(*) FROM {table} WHERE run IN (SELECT value FROM json_each(?))"
            found.strays[table] += cursor.execute(count, (orjson.dumps(gone).decode(),)).fetchone()[0]
        yield found


def last_drawn(connection: sqlite3.Connection) -> tuple[int, int]:
    """Return the last number of the commit sequence, as rows of gone runs show it, and the last id of an event."""
    number, event = connection.execute(f"SELECT max({NEWEST}, {_OF_RUNS}), {NEWEST_EVENT}").fetchone()
    return number, event


_OF_RUNS: Final = ", ".join(
    f"(SELECT coalesce(max(run), 0) FROM {table})"
    for table in ("run_events", "run_processes", "unconverted_values", "run_changes")
)


def forget_numbers(connection: sqlite3.Connection) -> None:
    """Have every subscriber begin anew: it is unknown which runs another program has deleted or changed."""
    connection.execute(MAKE_FEED)
    connection.execute(f"UPDATE change_feed SET floor = {NEWEST} + 1")
    connection.execute("UPDATE change_feed SET horizon = floor")


def keep_drawn(connection: sqlite3.Connection, number: int, event: int) -> None:
    """See that no number is drawn again that was drawn before another process deleted what held it."""
    connection.execute(MAKE_FEED)
    connection.execute("UPDATE change_feed SET floor = max(floor, ?)", (number,))
    connection.execute("UPDATE change_feed SET event_floor = max(event_floor, ?)", (event,))
