"""SQL for commands: one open transaction that carries out a group of them.

Rows are waited for in one order, or two daemons could each wait for the other: first the event_ids of new runs, in
their order; then the runs that commands name, in the order of their event_ids; then the turn to draw numbers. Whatever
else a command finds is passed over if somebody holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from operator import itemgetter
from typing import Any, Final

from psycopg import sql

from telemetryd.engine.columns import PROCESS
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements import (
    commands_alerts,
    commands_confirmations,
    commands_edges,
    commands_removal,
    commands_replica,
    commands_thinning,
)
from telemetryd.engine.postgres.statements.arrays import by_column, creating
from telemetryd.engine.postgres.statements.deltas import Deltas
from telemetryd.engine.postgres.statements.numbers import Numbers
from telemetryd.errors import DatabaseSuspectError
from telemetryd.model.commands import (
    Applied,
    ApplyChanges,
    Command,
    ConfirmDelivery,
    ConfirmPrune,
    Created,
    CreateEvents,
    CreateRuns,
    DeleteRun,
    EndProcess,
    EventsCreated,
    Indexed,
    IndexTexts,
    KeepAlerts,
    MergeChanges,
    ProcessEnded,
    Pruned,
    PruneRuns,
    Reaped,
    ReapRuns,
    RecordAlerts,
    RedactRun,
    RegisterProcess,
    Registration,
    Removed,
    TooManyLabels,
    TrustClock,
    Updated,
    UpdateRun,
)
from telemetryd.model.events import EVENT_KEY, TIMESTAMP
from telemetryd.model.runs import AGENT_NAME, CREATED_AT, DIGEST, EVENT_ID, STORED, columns, digest
from telemetryd.model.stats import FACTS
from telemetryd.model.values import MAX_LABELS, Role, Row, SqlValue, Status, count_labels, merge_labels
from telemetryd.settings import Sync

_BOOLEANS: Final = tuple(map(STORED.index, columns(Role.BOOLEAN)))
_COLUMNS: Final = (*STORED, "updated_at", DIGEST)
_CREATE: Final = creating(_COLUMNS)
_HOLD: Final = f"""
    SELECT event_id, id, run_id, labels::text, {", ".join(FACTS)} FROM agent_runs WHERE event_id = ANY (%s::text[])
    ORDER BY event_id FOR NO KEY UPDATE
"""
_CERTIFICATES: Final = """
    SELECT run, certified_at, error_summary, error_details FROM run_processes
    WHERE run IN (SELECT id FROM agent_runs WHERE event_id = ANY (%s::text[]))
"""
_KNOWN_EVENTS: Final = """
    SELECT e.run, e.event_key FROM unnest(%s::text[], %s::text[]) AS given (event_id, event_key)
    JOIN agent_runs AS r ON r.event_id = given.event_id
    JOIN run_events AS e ON e.run = r.id AND e.event_key = given.event_key
"""
_ARRIVALS: Final = """
    INSERT INTO run_arrivals (created_at, run, agent_name, arrived_at)
    SELECT * FROM unnest(%s::text[], %s::bigint[], %s::text[], %s::text[]) ON CONFLICT DO NOTHING
"""
_TOUCH: Final = "UPDATE agent_runs SET updated_at = %s WHERE id = %s"
_REGISTER: Final = f"""
    INSERT INTO run_processes (run, registered_at, {", ".join(PROCESS)})
    VALUES (%(run)s, %(now)s, {", ".join(f"%({name})s" for name in PROCESS)})
    ON CONFLICT (run) DO UPDATE SET registered_at = excluded.registered_at,
        {", ".join(f"{name} = excluded.{name}" for name in PROCESS)},
        certified_at = NULL, error_summary = NULL, error_details = NULL
"""
_FORGET_PROCESS: Final = "DELETE FROM run_processes WHERE run = %s"
_WORDS_BEGUN: Final = """
    SELECT NOT (indisvalid AND indisready) FROM pg_index WHERE indexrelid = to_regclass('idx_runs_words')
"""

_UNLESS_CHANGED: Final = sql.SQL("{0} = CASE WHEN {0} = %s THEN NULL ELSE {0} END")

_facts_of: Final = itemgetter(*map(STORED.index, FACTS))
_STATUS: Final = FACTS.index("status")
_Naming = UpdateRun | CreateEvents | RegisterProcess | DeleteRun | RedactRun
"""A command that names a run."""


@dataclass(slots=True)
class _Held:
    """A run that nobody else can change until our COMMIT, as far as commands need to know it."""

    event_id: str
    id: int
    run_id: str
    labels: str | None
    facts: list[Any]
    certificate: tuple[str | None, str | None, str | None] | None = None
    """When it was certified, and with which words; None if no process is registered."""


class Transaction:
    """One open transaction: applies commands and, at its end, stores what they add up to and draws numbers.

    Args:
        plain: the connection, in no transaction.
        now: the moment, one for the whole group.
        sync: what an acknowledgement promises.

    """

    def __init__(self, plain: Plain, now: str, sync: Sync) -> None:
        self._plain = plain
        self._now = now
        self._numbers = Numbers(plain, sync)
        self._deltas = Deltas()
        self._late: list[tuple[Any, Any]] = []
        """Statements whose results nobody needs; they go with the next ones."""
        self._has_written = False
        self._has_turn = False
        self._held: dict[str, _Held] = {}
        self._runs: dict[int, _Held] = {}

    def apply(self, commands: Sequence[Command[Any]]) -> list[Any]:
        """Carry out commands, and return the outcome of each: first the new runs, then the others in their order."""
        created = self._open(commands)
        return [next(created) if isinstance(command, CreateRuns) else self._apply(command) for command in commands]

    def finish(self) -> None:
        """Send what is left, and the COMMIT with it: so nobody waits for us between our turn and our COMMIT."""
        with self._plain.pipeline():
            self._flush()
            self._has_written |= self._deltas.append(self._plain)
            self._take_turn()
            self._numbers.draw(has_written=self._has_written)
            done = self._plain.execute("COMMIT")
            self._numbers.check_promises()
        if done.statusmessage != "COMMIT":  # which rolls back, without an error, what has failed before
            raise DatabaseSuspectError(f"PostgreSQL answered a COMMIT with {done.statusmessage}")

    # --- New runs, and those that are named ----------------------------------------------------------

    def _open(self, commands: Sequence[Command[Any]]) -> Iterator[Created]:
        """Store the new runs and hold the named ones, in one round trip; return the outcomes of creating."""
        batches = [command.rows for command in commands if isinstance(command, CreateRuns)]
        rows = [self._complete(row) for row in chain.from_iterable(batches)]
        # No text of PostgreSQL holds a NUL, so there is no such run.
        named = {command.event_id for command in commands if isinstance(command, _Naming)}
        names = sorted(name for name in named if "\0" not in name)
        given = [
            (command.event_id, str(row[EVENT_KEY]))
            for command in commands
            if isinstance(command, CreateEvents) and "\0" not in command.event_id
            for row in command.rows
        ]
        created = held = certificates = known = None
        with self._plain.pipeline():
            self._plain.execute("BEGIN")
            if rows:
                created = self._plain.execute(_CREATE, _arrays(rows))
            if names:
                held = self._plain.execute(_HOLD, (names,))
                certificates = self._plain.execute(_CERTIFICATES, (names,))
            if given:
                known = self._plain.execute(_KNOWN_EVENTS, by_column(given))
        self._held = {} if held is None else {row[0]: _Held(row[0], row[1], row[2], row[3], [*row[4:]]) for row in held}
        self._runs = {run.id: run for run in self._held.values()}
        for run, *certificate in certificates or ():
            if run in self._runs:
                self._runs[run].certificate = tuple(certificate)
        self._known_events = {*known} if known is not None else set()
        new: dict[str, int] = dict(created) if created is not None else {}
        self._take_in(rows, new)
        return _outcomes(batches, new)

    def _complete(self, row: Row) -> Row:
        """Return a row as it is stored: created now unless it says when, updated now, and with its body's digest."""
        created_at = row[CREATED_AT] or self._now
        return (*row[:CREATED_AT], created_at, *row[CREATED_AT + 1 :], self._now, digest(row))

    def _take_in(self, rows: list[Row], new: dict[str, int]) -> None:
        """Count the new runs, and note which of them say that they were created after now; there hardly ever is one."""
        if not new:
            return
        self._has_written = True
        ahead = []
        for event_id, row in {row[EVENT_ID]: row for row in reversed(rows)}.items():
            run = new.get(str(event_id))
            if run is not None and str(row[CREATED_AT]) > self._now:
                ahead.append((row[CREATED_AT], run, row[AGENT_NAME], self._now))
        if ahead:
            self._late.append((_ARRIVALS, by_column(ahead)))
        unseen = dict(new)
        for row in rows:
            run = unseen.pop(str(row[EVENT_ID]), None)
            if run is not None:
                self._deltas.created.append(_facts_of(row))
                self._numbers.changed(run)

    # --- Commands ------------------------------------------------------------------------------------

    def _apply(self, command: Command[Any]) -> object:
        outcome: object
        match command:
            case UpdateRun():
                outcome = self._update(command)
            case CreateEvents():
                outcome = self._create_events(command)
            case RegisterProcess():
                outcome = self._register(command)
            case _:
                self._flush()  # the others look for runs themselves, as all before them have left them
                outcome = self._apply_to_found(command)
        return outcome

    def _apply_to_found(self, command: Command[Any]) -> object:
        outcome: object
        match command:
            case DeleteRun():
                outcome = self._delete(command)
            case RedactRun():
                outcome = self._redact(command)
            case EndProcess():
                outcome = self._end_process(command)
            case PruneRuns():
                outcome = self._prune(command)
            case ReapRuns():
                outcome = self._reap(command)
            case ApplyChanges():
                outcome = self._apply_changes(command)
            case MergeChanges():
                self._has_written = True
                outcome = commands_edges.merge(self._plain, self._numbers, self._deltas, command, self._now)
            case _:
                outcome = self._apply_to_others(command)
        return outcome

    def _apply_to_others(self, command: Command[Any]) -> object:
        match command:
            case ConfirmPrune() | TrustClock():
                self._has_written = True
                commands_confirmations.apply(self._plain, command, self._now)
                return None
            case IndexTexts():
                begun = self._plain.execute(_WORDS_BEGUN).fetchone()
                return Indexed(more=True) if begun is not None and begun[0] else None
            case RecordAlerts() | ConfirmDelivery() | KeepAlerts():
                self._has_written = True
                return commands_alerts.apply(self._plain, command, self._now)
        raise TypeError(f"No statement carries out {type(command).__name__}")

    def _update(self, command: UpdateRun) -> Updated | TooManyLabels | None:
        run = self._held.get(command.event_id)
        if run is None:
            return None
        changes: dict[str, SqlValue] = {**command.changes, "updated_at": self._now}
        if "labels" in changes:
            changes["labels"] = merge_labels(run.labels, str(changes["labels"]))
            if (many := count_labels(changes["labels"])) > MAX_LABELS:
                return TooManyLabels(many)
            run.labels = None if changes["labels"] is None else str(changes["labels"])
        assignments = [sql.SQL("{} = %s").format(sql.Identifier(name)) for name in changes]
        values: list[SqlValue] = [*changes.values()]
        if "status" in changes:
            for name, said in self._take_certificate_back(run, changes).items():
                # Only what the certificate itself wrote is cleared.
                assignments.append(_UNLESS_CHANGED.format(sql.Identifier(name)))
                values.append(said)
        statement = sql.SQL("UPDATE agent_runs SET {} WHERE id = %s").format(sql.SQL(", ").join(assignments))
        self._late.append((statement, (*values, run.id)))
        self._numbers.changed(run.id)
        facts = [changes.get(name, value) for name, value in zip(FACTS, run.facts, strict=True)]
        self._deltas.change(run.facts, facts)
        run.facts = facts
        return Updated(run.run_id)

    def _take_certificate_back(self, run: _Held, changes: dict[str, SqlValue]) -> dict[str, str]:
        """Forget the process of a run that speaks for itself; return what its certificate says and nothing replaces."""
        if run.certificate is None or (run.certificate[0] is None and changes["status"] == Status.RUNNING):
            return {}
        said = zip(("error_summary", "error_details"), run.certificate[1:], strict=True)
        self._late.append((_FORGET_PROCESS, (run.id,)))
        run.certificate = None
        return {name: text for name, text in said if text is not None and name not in changes}

    def _create_events(self, command: CreateEvents) -> EventsCreated | None:
        run = self._held.get(command.event_id)
        if run is None:
            return None
        new = []
        for row in command.rows:
            key = run.id, str(row[EVENT_KEY])
            if key not in self._known_events:
                self._known_events.add(key)
                new.append((*row[:TIMESTAMP], row[TIMESTAMP] or self._now, *row[TIMESTAMP + 1 :]))
        if new:  # so an archived run is not deleted with events that came later, and it is not stale
            self._numbers.happened(run.id, new)
            self._late.append((_TOUCH, (self._now, run.id)))
            self._numbers.changed(run.id)
        return EventsCreated(len(new))

    def _register(self, command: RegisterProcess) -> Registration:
        run = self._held.get(command.event_id)
        if run is None:
            return Registration.NO_RUN
        if run.facts[_STATUS] != Status.RUNNING:
            return Registration.NOT_RUNNING
        self._late.append((_REGISTER, {"run": run.id, "now": self._now, **asdict(command.process)}))
        run.certificate = (None, None, None)
        return Registration.DONE

    def _delete(self, command: DeleteRun) -> Removed | None:
        run = self._held.get(command.event_id)
        if run is None:
            return None
        self._has_written = True
        self._numbers.forget_events(run.id)
        done = commands_removal.delete(self._plain, self._numbers, run.id, run.event_id)
        if not done.more:
            self._deltas.deleted.append(tuple(run.facts))
            self._forget([run.id])
        return done

    def _redact(self, command: RedactRun) -> Removed | None:
        run = self._held.get(command.event_id)
        if run is None:
            return None
        self._has_written = True
        if "labels" in command.fields:
            run.labels = None
        facts = [None if name in command.fields else value for name, value in zip(FACTS, run.facts, strict=True)]
        self._deltas.change(run.facts, facts)
        run.facts = facts
        return commands_removal.redact(self._plain, self._numbers, run.id, command, self._now)

    def _end_process(self, command: EndProcess) -> ProcessEnded:
        done, changed = commands_thinning.end_process(self._plain, self._numbers, command, self._now)
        self._has_written = True
        for run, old, new in changed:
            self._deltas.change(old, new)
            if run in self._runs:
                self._runs[run].facts = [*new]
        return done

    def _prune(self, command: PruneRuns) -> Pruned:
        pruned, deleted = commands_thinning.prune(self._plain, self._numbers, command)
        self._has_written = True
        self._deltas.deleted += [facts for _, facts in deleted]
        self._forget([run for run, _ in deleted])
        return pruned

    def _reap(self, command: ReapRuns) -> Reaped:
        reaped, is_more = commands_thinning.reap(self._plain, self._numbers, command, self._now)
        self._has_written = True
        for run, *facts in reaped:
            self._deltas.change([*facts[:_STATUS], str(Status.RUNNING), *facts[_STATUS + 1 :]], facts)
            if run in self._runs:
                self._runs[run].facts, self._runs[run].certificate = facts, None
        return Reaped(len(reaped), is_more)

    def _apply_changes(self, command: ApplyChanges) -> Applied:
        self._take_turn()  # before any of its rows is waited for; there is one who follows
        self._has_written = True
        plan = commands_replica.apply_changes(self._plain, command)
        self._deltas.deleted += plan.taken
        self._deltas.created += plan.added
        return Applied(len(command.changes), len(command.events))

    # --- What all of them need ------------------------------------------------------------------------

    def _flush(self) -> None:
        """Send the statements whose results nobody needs."""
        late, self._late = self._late, []
        self._has_written |= bool(late)
        if late:
            with self._plain.pipeline():
                for statement, values in late:
                    self._plain.execute(statement, values)

    def _take_turn(self) -> None:
        """Wait, once, until nobody else draws numbers."""
        if not self._has_turn:
            self._has_turn = True
            self._numbers.take_turn()

    def _forget(self, runs: Sequence[int]) -> None:
        """Forget that runs are held: they are gone."""
        for run in runs:
            if (held := self._runs.pop(run, None)) is not None:
                self._held.pop(held.event_id, None)


def _arrays(rows: Sequence[Row]) -> list[list[Any]]:
    """Return rows column by column, as `unnest` takes them."""
    given = by_column(rows)
    for place in _BOOLEANS:
        given[place] = [*map(int, given[place])]
    return given


def _outcomes(batches: Sequence[tuple[Row, ...]], new: dict[str, int]) -> Iterator[Created]:
    """Yield the outcome of each batch; a repeat in the same group is a duplicate of the first one."""
    unseen = {*new}
    for rows in batches:
        news = []
        for row in rows:
            news.append(row[EVENT_ID] in unseen)
            unseen.discard(str(row[EVENT_ID]))
        yield Created(tuple(news))
