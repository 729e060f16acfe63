"""SQL for commands: executes each, and updates the totals in the same transaction."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain, count, groupby
from operator import itemgetter
from typing import Any, Final

import orjson

from telemetryd.engine import stats_log
from telemetryd.engine.budget import Budget
from telemetryd.engine.columns import DAY, HOUR, MINUTE, PROCESS
from telemetryd.engine.sqlite.statements import (
    alerts,
    confirmations,
    derived,
    full_text,
    labels,
    removal,
    replica,
    rollups,
    thinning,
    updates,
)
from telemetryd.engine.sqlite.statements.recounting import Tally
from telemetryd.engine.sqlite.statements.removal import Removal
from telemetryd.engine.sqlite.statements.sequence import STAND
from telemetryd.engine.sqlite.statements.sequence import Sequence as CommitSequence
from telemetryd.engine.sqlite.statements.updates import FORGET_PROCESS
from telemetryd.model import events
from telemetryd.model.commands import (
    Applied,
    ApplyChanges,
    Command,
    ConfirmDelivery,
    ConfirmPrune,
    CopiedRun,
    Created,
    CreateEvents,
    CreateRuns,
    EndProcess,
    EventsCreated,
    Indexed,
    IndexTexts,
    KeepAlerts,
    ProcessEnded,
    Pruned,
    PruneRuns,
    Reaped,
    ReapRuns,
    RecordAlerts,
    RegisterProcess,
    Registration,
    Removed,
    TooManyLabels,
    TrustClock,
    Updated,
    UpdateRun,
)
from telemetryd.model.events import TIMESTAMP
from telemetryd.model.runs import CREATED_AT, DIGEST, EVENT_ID, START_TIME, STORED, digest
from telemetryd.model.stats import FACTS, Facts
from telemetryd.model.values import Row, SqlValue, Status

_ROWS_AT_ONCE: Final = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""How many rows one INSERT may take: each number has its own prepared statement."""


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
    """A table that takes many rows at once: the columns that are given, and the key that no two rows share."""

    table: str
    columns: tuple[str, ...]
    key: str


_USUAL: Final = STORED.index("labels")
"""The first of the fields that few runs have; where no run of a group has one, none of them is bound."""
_NOTHING: Final = (None,) * (len(STORED) - _USUAL)
_RUNS: Final = {
    width: _Target("agent_runs", (*STORED[:width], "updated_at", DIGEST), "event_id") for width in (_USUAL, len(STORED))
}
_EVENTS: Final = _Target("run_events", ("id", "run", *events.STORED), "run, event_key")


@cache
def _insert_into(target: _Target, rows: int, *, numbered: bool = False) -> str:
    """Return the statement that stores so many rows, except those whose key is known already.

    If it is numbered, each row begins with its id; otherwise SQLite gives each the largest id plus one
    (sqlite.org/autoinc.html).
    """
    names = ["id", *target.columns] if numbered else target.columns
    places = f"({', '.join('?' * len(names))})"
    return f"""
        INSERT INTO {target.table} ({", ".join(names)}) VALUES {", ".join([places] * rows)}
        ON CONFLICT ({target.key}) DO NOTHING
    """


_STAND: Final = f"SELECT {STAND}, {rollups.LOGGED}, {derived.IS_PREPARED}"
_EVENT_IDS_BEHIND: Final = "SELECT json_group_array(event_id) FROM agent_runs WHERE id > ?"

_facts_of: Final = itemgetter(*map(STORED.index, FACTS))
_STATUS: Final = FACTS.index("status")
_FIND_RUN: Final = f"SELECT id, run_id, {', '.join(FACTS)} FROM agent_runs WHERE event_id = ?"

_REGISTER: Final = f"""
    INSERT OR REPLACE INTO run_processes (run, registered_at, {", ".join(PROCESS)})
    VALUES (:run, :now, {", ".join(f":{name}" for name in PROCESS)})
"""

_REGISTERED: Final = f"""
    SELECT run, event_id, {", ".join(FACTS)}, {thinning.BYTES}
    FROM run_processes AS p INDEXED BY idx_processes_waiting CROSS JOIN agent_runs ON agent_runs.id = run
    WHERE certified_at IS NULL AND p.pid = :pid AND p.start_time = :start_time AND p.boot_id = :boot_id
        AND p.pid_namespace = :pid_namespace
    LIMIT :limit
"""
_FAIL: Final = f"""
    UPDATE agent_runs SET
        status = 'failure', end_time = max(:ended_at, start_time), updated_at = :now,
        duration_ms = max(0, CAST(round((julianday(:ended_at) - julianday(start_time)) * 86400000) AS INTEGER)),
        error_summary = :error_summary, error_details = :error_details
    WHERE id = :run AND status = 'running'
    RETURNING {", ".join(FACTS)}
"""
_CERTIFY: Final = """
    UPDATE run_processes SET certified_at = :now, error_summary = :error_summary, error_details = :error_details
    WHERE run = :run
"""


def _begin(start_time: str) -> str:
    """Return a moment that is not after a start time, the same one for all of a minute."""
    return min(start_time, f"{start_time[:MINUTE]}:00.000000Z")


def _end(start_time: str) -> str:
    """Return a moment that is not before a start time, the same one for all of a minute."""
    return max(start_time, f"{start_time[:MINUTE]}:59.999999Z")


def _kind(command: Command[Any]) -> object:
    """Return what neighbours have in common that are carried out together."""
    return Removal if isinstance(command, Removal) else type(command)


class Transaction:
    """One open transaction: applies commands and, at its end, brings the totals up to date.

    Python gives the interpreter's lock away for each step of SQLite, and a busy event loop gives it back late; so
    whatever many commands have in common is done in few steps, not row by row.
    """

    def __init__(self, connection: sqlite3.Connection, now: str, tally: Tally | None = None) -> None:
        self._cursor = connection.cursor()
        self._tally = tally
        self._now = now
        self._created: list[Row] = []
        self._deleted: list[Facts] = []
        self._changed: list[tuple[Facts, Facts]] = []
        """What each change found and what it left."""
        last, highest_id, self._logged, is_prepared = self._cursor.execute(_STAND).fetchone()
        if not is_prepared:
            derived.prepare(self._cursor)
        self._sequence = CommitSequence(self._cursor, last, highest_id)
        self._removal: Budget | None = None
        """What all removals of the transaction may take, from the first one on."""

    def apply(self, commands: Sequence[Command[Any]]) -> list[Any]:
        """Run the commands' statements in order and return their outcomes; the totals follow in `finish`.

        Creates that stand next to each other are stored together, as are changes of runs, and removals share a merge of
        the full-text index.
        """
        outcomes: list[Any] = []
        for kind, neighbours in groupby(commands, _kind):
            if kind is CreateRuns:
                outcomes += self._create([command.rows for command in neighbours if isinstance(command, CreateRuns)])
            elif kind is UpdateRun:
                outcomes += self._update(command for command in neighbours if isinstance(command, UpdateRun))
            elif kind is Removal:
                outcomes += self._remove([command for command in neighbours if isinstance(command, Removal)])
            else:
                outcomes += map(self._apply_alone, neighbours)
        return outcomes

    def _apply_alone(self, command: Command[Any]) -> object:
        outcome: object
        match command:
            case CreateEvents():
                outcome = self._create_events(command)
            case RegisterProcess():
                outcome = self._register(command)
            case EndProcess():
                outcome = self._end_process(command)
            case PruneRuns():
                outcome = self._prune(command)
            case ReapRuns():
                outcome = self._reap(command)
            case ApplyChanges():
                outcome = self._apply_changes(command)
            case _:
                outcome = self._apply_to_others(command)
        return outcome

    def _apply_to_others(self, command: Command[Any]) -> object:
        match command:
            case ConfirmPrune() | TrustClock():
                confirmations.apply(self._cursor, command, self._now)
                return None
            case IndexTexts():
                is_begun = full_text.is_begun(self._cursor.connection)
                return Indexed(full_text.index_slice(self._cursor, command)) if is_begun else None
            case RecordAlerts() | ConfirmDelivery() | KeepAlerts():
                return alerts.apply(self._cursor, command, self._now)
        raise TypeError(f"No statement carries out {type(command).__name__}")

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Undo everything that is applied inside the block if the block fails."""
        lists: tuple[list[Any], ...] = (self._created, self._deleted, self._changed)
        lengths = [*map(len, lists)]
        sequence = self._sequence.state()
        self._cursor.execute("SAVEPOINT command")
        try:
            yield
        except Exception:
            if self._cursor.connection.in_transaction:
                self._cursor.execute("ROLLBACK TO command")
            for changes, length in zip(lists, lengths, strict=True):
                del changes[length:]
            self._sequence.restore(sequence)
            raise
        finally:
            if self._cursor.connection.in_transaction:
                self._cursor.execute("RELEASE command")

    def finish(self) -> None:
        """Write the totals and the statistics that the commands changed, and which runs they changed."""
        self._sequence.finish()
        self._report()
        changes = len(self._created) + len(self._deleted) + len(self._changed)
        if not changes:
            return
        summary: stats_log.Summary = {}
        stats_log.summarize(summary, map(_facts_of, self._created))
        stats_log.summarize(summary, self._deleted, -1)
        stats_log.summarize(summary, (old for old, _ in self._changed), -1)
        stats_log.summarize(summary, (new for _, new in self._changed))
        totals: Counter[tuple[str, str, str]] = Counter()
        for (_, agent_name, job_type, status, _), (sums, _) in summary.items():
            totals[agent_name, job_type, status] += sums[0]
        minutes = Counter(str(row[CREATED_AT])[:MINUTE] for row in self._created)
        minutes.subtract(facts[0][:MINUTE] for facts in self._deleted)
        what = derived.Derived(
            totals=[(*key, runs) for key, runs in totals.items()],
            minutes=[*minutes.items()],
            hours=self._spans(HOUR),
            days=self._spans(DAY),
            changes=changes,
            log=stats_log.to_log(summary),
        )
        derived.store(self._cursor, what, self._logged)

    def _report(self) -> None:
        """Report to the recount what this transaction is going to commit."""
        if self._tally is None:
            return
        drawn = self._sequence.last, self._sequence.last_event
        if not self._tally.is_counting:
            self._tally.note(*drawn)
            return
        created = [(_facts_of(row), str(row[START_TIME])) for row in self._created]
        changed = [(new, None) for _, new in self._changed]
        taken = [*((facts, None) for facts in self._deleted), *((old, None) for old, _ in self._changed)]
        self._tally.note(*drawn, [*created, *changed], taken)

    def _spans(self, length: int) -> list[tuple[str, str, str]]:
        """Return for each hour or day in which runs were created bounds of their start times, in whole minutes."""
        spans: dict[str, tuple[str, str]] = {}
        for row in self._created:
            key, start_time = str(row[CREATED_AT])[:length], str(row[START_TIME])
            first, last = spans.get(key, (start_time, start_time))
            spans[key] = (min(first, start_time), max(last, start_time))
        return [(key, _begin(first), _end(last)) for key, (first, last) in spans.items()]

    def _create(self, batches: list[tuple[Row, ...]]) -> list[Created]:
        given = [*chain.from_iterable(batches)]
        width = len(STORED) if any(row[_USUAL:] != _NOTHING for row in given) else _USUAL
        rows = [self._complete(row, width) for row in given]
        before = self._sequence.last
        inserted = self._insert_runs(_RUNS[width], rows)
        if width > _USUAL:  # every new run has a number after the last one that was drawn before
            labels.index_after(self._cursor, before)
        if inserted == len(rows):
            self._take_in(rows)
            return [Created((True,) * len(batch)) for batch in batches]
        # Every new run has a number of the sequence after the last one that was drawn before.
        unseen = set(orjson.loads(self._cursor.execute(_EVENT_IDS_BEHIND, (before,)).fetchone()[0]))
        if len(unseen) != inserted:
            raise sqlite3.InternalError("the new runs are not those after the last number that was drawn")
        self._take_in(
            [row for row in {row[EVENT_ID]: row for row in reversed(rows)}.values() if row[EVENT_ID] in unseen]
        )
        outcomes = []
        for batch in batches:
            new = []
            for row in batch:
                new.append(row[EVENT_ID] in unseen)
                unseen.discard(row[EVENT_ID])  # a repeat in the same group is a duplicate of the first one
            outcomes.append(Created(tuple(new)))
        return outcomes

    def _take_in(self, created: list[Row]) -> None:
        self._created += created
        confirmations.note_arrivals(self._cursor, created, self._now)

    def _insert(self, target: _Target, rows: list[Row]) -> int:
        """Insert as many rows as possible with each statement; return how many were new."""
        inserted = start = 0
        for size in _ROWS_AT_ONCE:
            while len(rows) - start >= size:
                values = [*chain.from_iterable(rows[start : start + size])]
                inserted += self._cursor.execute(_insert_into(target, size), values).rowcount
                start += size
        return inserted

    def _insert_runs(self, target: _Target, rows: list[Row]) -> int:
        """Insert runs as `_insert` does, each with the next number of the sequence as its id."""
        start = inserted = 0
        for size in _ROWS_AT_ONCE:
            while self._sequence.is_ahead and len(rows) - start >= size:
                numbers = count(self._sequence.last + 1)
                values = [*chain.from_iterable((next(numbers), *row) for row in rows[start : start + size])]
                new = self._cursor.execute(_insert_into(target, size, numbered=True), values).rowcount
                if new:
                    self._sequence.created(self._cursor.lastrowid or 0)
                inserted += new
                start += size
        if start < len(rows) and (new := self._insert(target, rows[start:] if start else rows)):
            self._sequence.created(self._cursor.lastrowid or 0)
            inserted += new
        return inserted

    def _complete(self, row: Row, width: int) -> Row:
        """Return a row as it is stored: created now unless it says when, updated now, and with its body's digest."""
        created_at = row[CREATED_AT] or self._now
        return (*row[:CREATED_AT], created_at, *row[CREATED_AT + 1 : width], self._now, digest(row))

    def _update(self, commands: Iterable[UpdateRun]) -> Iterator[Updated | TooManyLabels | None]:
        for outcome, change in updates.update(self._cursor, commands, self._now):
            if change is not None:
                self._sequence.changed(change.run)
                self._note(change.old, change.new)
            yield outcome

    def _note(self, old: Sequence[SqlValue], new: Sequence[SqlValue]) -> None:
        if new != old:
            self._changed.append((tuple(old), tuple(new)))

    def _create_events(self, command: CreateEvents) -> EventsCreated | None:
        found = self._cursor.execute(_FIND_RUN, (command.event_id,)).fetchone()
        if found is None:
            return None
        run = found[0]
        rows = [
            (number, run, *row[:TIMESTAMP], row[TIMESTAMP] or self._now, *row[TIMESTAMP + 1 :])
            for number, row in zip(self._sequence.event_ids(len(command.rows)), command.rows, strict=True)
        ]
        inserted = self._insert(_EVENTS, rows)
        if inserted:  # so an archived run is not deleted with events that came later, and it is not stale
            self._cursor.execute("UPDATE agent_runs SET updated_at = ? WHERE id = ?", (self._now, run))
            self._sequence.changed(run)
        return EventsCreated(inserted)

    def _register(self, command: RegisterProcess) -> Registration:
        found = self._cursor.execute(_FIND_RUN, (command.event_id,)).fetchone()
        if found is None:
            return Registration.NO_RUN
        run, _, *facts = found
        if facts[_STATUS] != Status.RUNNING:
            return Registration.NOT_RUNNING
        self._cursor.execute(_REGISTER, {"run": run, "now": self._now, **asdict(command.process)})
        return Registration.DONE

    def _end_process(self, command: EndProcess) -> ProcessEnded:
        budget = Budget()
        rows = self._cursor.execute(_REGISTERED, {**asdict(command.process), "limit": command.limit})
        found = budget.take(rows)
        failed = []
        for run, event_id, *facts in found:
            if command.death is None or facts[_STATUS] != Status.RUNNING:
                self._cursor.execute(FORGET_PROCESS, (run,))
                continue
            values = {"run": run, "now": self._now, **asdict(command.death)}
            self._note(facts, [*self._cursor.execute(_FAIL, values).fetchall()[0]])
            self._cursor.execute(_CERTIFY, values)
            self._sequence.changed(run)
            failed.append(event_id)
        return ProcessEnded(tuple(failed), budget.is_spent or len(found) == command.limit)

    def _prune(self, command: PruneRuns) -> Pruned:
        pruned, deleted = thinning.prune(self._cursor, self._sequence, command)
        self._deleted += deleted
        return pruned

    def _remove(self, commands: Sequence[Removal]) -> list[Removed | None]:
        self._removal = self._removal or Budget()
        outcomes = []
        for done in removal.remove(self._cursor, self._sequence, commands, self._removal, self._now):
            outcomes.append(done.outcome)
            self._deleted += done.deleted
            if done.changed is not None:
                self._note(*done.changed)
        return outcomes

    def _apply_changes(self, command: ApplyChanges) -> Applied:
        self._deleted += replica.apply_changes(self._cursor, command)
        self._created += [what.row for _, what in command.changes if isinstance(what, CopiedRun)]
        return Applied(len(command.changes), len(command.events))

    def _reap(self, command: ReapRuns) -> Reaped:
        reaped, is_more = thinning.reap(self._cursor, self._sequence, command, self._now)
        self._cursor.executemany(FORGET_PROCESS, [row[:1] for row in reaped])
        for _, *facts in reaped:
            self._note([*facts[:_STATUS], str(Status.RUNNING), *facts[_STATUS + 1 :]], facts)
        return Reaped(len(reaped), is_more)
