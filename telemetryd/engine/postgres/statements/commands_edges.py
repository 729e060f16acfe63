"""Merges the changes of a database of another machine into this one, which has ids and numbers of its own.

A run is the same wherever it was sent to, by its event_id; of two states the one that was changed last stands. Rows are
waited for in the order of all commands; the place of the source comes before them, which only its relays wait for.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Final

from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements import commands_thinning as thinning
from telemetryd.engine.postgres.statements.arrays import arrays, by_column, creating, selected
from telemetryd.engine.postgres.statements.deltas import Deltas
from telemetryd.engine.postgres.statements.numbers import Numbers
from telemetryd.model import events
from telemetryd.model.changes import Cursor, write_known
from telemetryd.model.commands import Applied, CopiedRun, MergeChanges
from telemetryd.model.runs import AGENT_NAME, CREATED_AT, STORED
from telemetryd.model.stats import FACTS, Facts

_BEGIN: Final = """
    INSERT INTO followed_feeds (source, epoch, seq, begun, last_event, known, taken_at)
    VALUES (%s, '', 0, 0, 0, '[]', %s) ON CONFLICT DO NOTHING
"""
_PLACE: Final = "SELECT epoch, seq, last_event FROM followed_feeds WHERE source = %s FOR UPDATE"
_COME: Final = """
    UPDATE followed_feeds SET epoch = %s, seq = %s, begun = %s, last_event = %s, known = %s, taken_at = %s
    WHERE source = %s
"""
_GIVEN: Final = (*STORED, "updated_at")
_CREATE: Final = creating(_GIVEN)
_KEPT: Final = frozenset({"event_id", "created_at"})
"""What a run keeps from the first place that has it: labels and arrivals are found by it."""
_CHANGED: Final = tuple(name for name in _GIVEN if name not in _KEPT)
_CHANGE: Final = f"""
    UPDATE agent_runs AS r
    SET ({", ".join(_CHANGED)}) = ROW({", ".join(f"given.{column}" for column in selected(_CHANGED).split(", "))})
    FROM unnest({arrays(("id", *_GIVEN))}) AS given ({", ".join(("id", *_GIVEN))}) WHERE r.id = given.id
"""
_HOLD: Final = f"""
    SELECT event_id, id, updated_at, {", ".join(FACTS)} FROM agent_runs
    WHERE event_id = ANY (%s::text[]) OR id = ANY (%s::bigint[])
    ORDER BY event_id FOR NO KEY UPDATE
"""
_OF_SOURCE: Final = "SELECT number, run FROM followed_runs WHERE source = %s AND number = ANY (%s::bigint[])"
_CLAIMED: Final = """
    SELECT run, bool_or(source = %s), bool_or(source <> %s) FROM followed_runs WHERE run = ANY (%s::bigint[])
    GROUP BY run
"""
_OUR_OWN: Final = """
    INSERT INTO followed_runs (source, number, run)
    SELECT '', run, run FROM unnest(%s::bigint[]) AS given (run)
    WHERE NOT EXISTS (SELECT 1 FROM followed_runs AS f WHERE f.run = given.run)
    ON CONFLICT DO NOTHING
"""
_CLAIM: Final = """
    INSERT INTO followed_runs (source, number, run) SELECT %s, * FROM unnest(%s::bigint[], %s::bigint[])
    ON CONFLICT (source, number) DO UPDATE SET run = excluded.run WHERE followed_runs.run <> excluded.run
"""
_GIVE_UP: Final = "DELETE FROM followed_runs WHERE source = %s AND run = ANY (%s::bigint[])"
_ARRIVED: Final = """
    INSERT INTO run_arrivals (created_at, run, agent_name, arrived_at)
    SELECT * FROM unnest(%s::text[], %s::bigint[], %s::text[], %s::text[]) ON CONFLICT DO NOTHING
"""
_KNOWN_EVENTS: Final = """
    SELECT e.run, e.event_key, e.id, e.payload IS NULL FROM unnest(%s::bigint[], %s::text[]) AS given (run, event_key)
    JOIN run_events AS e USING (run, event_key)
"""
_EVENT: Final = ("run", *events.COLUMNS)
_KEY: Final = _EVENT.index("event_key")
_PAYLOAD: Final = _EVENT.index("payload")
_stored_of: Final = itemgetter(*map(_EVENT.index, events.STORED))
_facts_of: Final = itemgetter(*map(STORED.index, FACTS))
_AT: Final = FACTS.index("created_at")


def merge(plain: Plain, numbers: Numbers, deltas: Deltas, command: MergeChanges, now: str) -> Applied:
    """Take over a page of changes, and how far that goes; nothing if another relay has come elsewhere meanwhile."""
    with plain.pipeline():
        plain.execute(_BEGIN, (command.source, now))
        found = plain.execute(_PLACE, (command.source,))
    ((epoch, seq, last_event),) = found.fetchall()
    stands = Cursor(seq, epoch) if epoch else None
    if (stands, last_event) != (command.stood, command.stood_event):
        return Applied(0, 0)
    _Merge(plain, numbers, deltas, command).carry_out()
    known = write_known(command.known)
    place = command.epoch, command.last, command.begun, command.last_event, known, now, command.source
    plain.execute(_COME, place)
    return Applied(len(command.changes), len(command.events))


class _Held:
    """A run that nobody else can change until our COMMIT."""

    def __init__(self, run: int, updated_at: str, facts: Facts, *, is_new: bool) -> None:
        self.run, self.updated_at, self.facts, self.is_new = run, updated_at, facts, is_new


class _Merge:
    """One page on its way into the database."""

    def __init__(self, plain: Plain, numbers: Numbers, deltas: Deltas, command: MergeChanges) -> None:
        self._plain, self._numbers, self._deltas = plain, numbers, deltas
        self._source = command.source
        self._events: Sequence[tuple[Any, ...]] = command.events
        self._runs = {what.event_id: what for _, what in command.changes if isinstance(what, CopiedRun)}
        self._deleted = [*dict.fromkeys(what for _, what in command.changes if isinstance(what, str))]
        self._held: dict[str, _Held] = {}
        self._number_of: dict[int, int] = {}
        """The ids here of runs by their ids there."""

    def carry_out(self) -> None:
        """Store it all."""
        again = {*self._deleted}
        self._create([run for name, run in self._runs.items() if name not in again])
        self._hold()
        self._delete()
        while missing := [run for name, run in self._runs.items() if name not in self._held]:
            self._create(missing)
            self._hold()  # what somebody has made meanwhile; what was deleted meanwhile is missing again
        self._change()
        self._claim()
        self._tell()

    def _create(self, runs: Sequence[CopiedRun]) -> None:
        if not runs:
            return
        new: dict[str, int] = dict(
            self._plain.execute(_CREATE, by_column([(*run.row, run.updated_at) for run in runs]))
        )
        ahead = []
        for run in runs:
            number = new.get(run.event_id)
            if number is None:
                continue
            facts = _facts_of(run.row)
            self._held[run.event_id] = _Held(number, run.updated_at, facts, is_new=True)
            self._deltas.created.append(facts)
            self._numbers.changed(number)
            if str(run.row[CREATED_AT]) > run.updated_at:  # when it arrived there is not reported
                ahead.append((run.row[CREATED_AT], number, run.row[AGENT_NAME], run.updated_at))
        if ahead:
            self._plain.execute(_ARRIVED, by_column(ahead))

    def _hold(self) -> None:
        numbers = {event[0] for event in self._events} - {run.id for run in self._runs.values()}
        if numbers:
            self._number_of = dict(self._plain.execute(_OF_SOURCE, (self._source, [*numbers])))
        names = sorted({*self._runs, *self._deleted} - self._held.keys())
        for event_id, run, updated_at, *facts in self._plain.execute(_HOLD, (names, [*self._number_of.values()])):
            if event_id not in self._held:
                self._held[event_id] = _Held(run, updated_at, tuple(facts), is_new=False)

    def _delete(self) -> None:
        """Delete what no other source has, and what nobody has sent here."""
        found = {self._held[name].run: name for name in self._deleted if name in self._held}
        if not found:
            return
        claims = self._plain.execute(_CLAIMED, (self._source, self._source, [*found])).fetchall()
        mine = [run for run, is_mine, _ in claims if is_mine]
        gone = [run for run, is_mine, has_others in claims if is_mine and not has_others]
        if mine:
            self._plain.execute(_GIVE_UP, (self._source, mine))
        waiting = gone
        while waiting:  # of a run with very many events each turn deletes some
            done = {run for (run,) in thinning.delete(self._plain, [(run,) for run in waiting])}
            waiting = [run for run in waiting if run not in done]
        self._numbers.deleted(gone, [found[run] for run in gone])
        for run in gone:
            self._deltas.deleted.append(self._held.pop(found[run]).facts)

    def _change(self) -> None:
        rows = []
        for event_id, run in self._runs.items():
            held = self._held[event_id]
            if held.is_new or run.updated_at <= held.updated_at:
                continue
            rows.append((held.run, *run.row, run.updated_at))
            facts = _facts_of(run.row)
            new = (*facts[:_AT], held.facts[_AT], *facts[_AT + 1 :])
            self._deltas.change(held.facts, new)
            self._numbers.changed(held.run)
        if rows:
            self._plain.execute(_CHANGE, by_column(rows))

    def _claim(self) -> None:
        """Note which run is which, and of those that were there whether anybody has sent them here."""
        if not self._runs:
            return
        there = [self._held[name].run for name in self._runs if not self._held[name].is_new]
        if there:
            self._plain.execute(_OUR_OWN, (there,))
        ours = {run.id: self._held[name].run for name, run in self._runs.items()}
        self._number_of |= ours
        self._plain.execute(_CLAIM, (self._source, [*ours], [*ours.values()]))

    def _tell(self) -> None:
        """Store the events; one that is there and comes without its payload was redacted there."""
        held = {each.run for each in self._held.values()}
        told: dict[tuple[int, str], tuple[Any, ...]] = {}
        for event in self._events:
            run = self._number_of.get(event[0])
            if run in held:  # else it was deleted here
                told[run, str(event[_KEY])] = event
        if not told:
            return
        known = self._plain.execute(_KNOWN_EVENTS, by_column([*told])).fetchall()
        redacted = []
        for run, key, number, is_empty in known:
            event = told.pop((run, key))
            if event[_PAYLOAD] is None and not is_empty:
                redacted.append(number)
        self._numbers.redacted(redacted)
        for (run, _), event in told.items():
            self._numbers.happened(run, [_stored_of(event)])
            self._numbers.changed(run)  # who waits for news of the run learns of them
