"""The only Python with SQL: how each command and each query is said to SQLite."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import cache
from itertools import chain, groupby
from operator import itemgetter
from typing import Final

import orjson

from telemetryd import events, migrate
from telemetryd.commands import (
    Command,
    Created,
    CreateEvents,
    CreateRuns,
    EndProcess,
    EventsCreated,
    Outcome,
    Process,
    ProcessEnded,
    Pruned,
    PruneRuns,
    Reaped,
    ReapRuns,
    RegisterProcess,
    Registration,
    Updated,
    UpdateRun,
)
from telemetryd.errors import InvalidRequestError
from telemetryd.events import TIMESTAMP, EventPage
from telemetryd.queries import (
    TIME_BOUNDS,
    CountPrunable,
    Counts,
    CountStale,
    GetRun,
    ListEvents,
    ListRuns,
    Page,
    Position,
)
from telemetryd.runs import (
    AGENT_NAME,
    COLUMNS,
    CREATED_AT,
    EVENT_ID,
    JOB_TYPE,
    START_TIME,
    STATUS,
    STORED,
    TEXTS,
    Row,
    SqlValue,
    Status,
)

# --- Commands ------------------------------------------------------------------------------------

_MINUTE: Final = len("2025-12-24T10:00")
_HOUR: Final = len("2025-12-24T10")

_ROWS_AT_ONCE: Final = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""How many rows one INSERT may take: each number has its own prepared statement."""


_INSERTED: Final = {
    "agent_runs": ((*STORED, "updated_at"), "event_id"),
    "run_events": (("run", *events.STORED), "run, event_key"),
}
"""The tables that take many rows at once: the columns that are given, and the key that no two rows share."""


@cache
def _insert_into(table: str, rows: int) -> str:
    """Return the statement that stores so many rows, except those whose key is known already."""
    columns, key = _INSERTED[table]
    places = f"({', '.join('?' * len(columns))})"
    return f"""
        INSERT INTO {table} ({", ".join(columns)}) VALUES {", ".join([places] * rows)}
        ON CONFLICT ({key}) DO NOTHING
    """  # noqa: S608 - names from the definitions of a run and an event


# Rows that were inserted next to each other have successive ids (sqlite.org/autoinc.html: the largest plus one).
_LAST_EVENT_IDS: Final = """
    SELECT json_group_array(event_id) FROM agent_runs WHERE id > (SELECT max(id) FROM agent_runs) - ?
"""

_FIND_RUN: Final = "SELECT id, run_id, agent_name, job_type, status FROM agent_runs WHERE event_id = ?"

_PROCESS: Final = tuple(field.name for field in fields(Process))
_REGISTER: Final = f"""
    INSERT OR REPLACE INTO run_processes (run, registered_at, {", ".join(_PROCESS)})
    VALUES (:run, :now, {", ".join(f":{name}" for name in _PROCESS)})
"""  # noqa: S608 - column names from the definition of a process

_REGISTERED: Final = """
    SELECT run, event_id, agent_name, job_type, status
    FROM run_processes AS p INDEXED BY idx_processes_waiting CROSS JOIN agent_runs ON agent_runs.id = run
    WHERE certified_at IS NULL AND p.pid = :pid AND p.start_time = :start_time AND p.boot_id = :boot_id
        AND p.pid_namespace = :pid_namespace
    LIMIT :limit
"""
_FAIL: Final = """
    UPDATE agent_runs SET
        status = 'failure', end_time = max(:ended_at, start_time), updated_at = :now,
        duration_ms = max(0, CAST(round((julianday(:ended_at) - julianday(start_time)) * 86400000) AS INTEGER)),
        error_summary = :error_summary, error_details = :error_details
    WHERE id = :run AND status = 'running'
"""
_CERTIFY: Final = """
    UPDATE run_processes SET certified_at = :now, error_summary = :error_summary, error_details = :error_details
    WHERE run = :run
"""
_FIND_CERTIFICATE: Final = "SELECT certified_at, error_summary, error_details FROM run_processes WHERE run = ?"
_FORGET_PROCESS: Final = "DELETE FROM run_processes WHERE run = ?"

# What is added to the totals goes in as one JSON array, in one step of SQLite (see `Transaction`).
_ADD_TO_TOTALS: Final = """
    INSERT INTO run_totals (agent_name, job_type, status, runs)
    SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
        json_extract(value, '$[3]') FROM json_each(?) WHERE true
    ON CONFLICT (agent_name, job_type, status) DO UPDATE SET runs = runs + excluded.runs
"""
_ADD_TO_MINUTES: Final = """
    INSERT INTO run_minutes (minute, runs)
    SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(?) WHERE true
    ON CONFLICT (minute) DO UPDATE SET runs = runs + excluded.runs
"""
_WIDEN_HOURS: Final = """
    INSERT INTO run_hours (hour, first_start, last_start)
    SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]')
        FROM json_each(?) WHERE true
    ON CONFLICT (hour) DO UPDATE SET
        first_start = min(first_start, excluded.first_start), last_start = max(last_start, excluded.last_start)
"""

# A total that has drifted (a row changed by hand) is no reason to refuse what agents send.
_TAKE_FROM_TOTAL: Final = """
    UPDATE run_totals SET runs = max(runs - ?4, 0) WHERE agent_name = ?1 AND job_type = ?2 AND status = ?3
"""
_TAKE_FROM_MINUTE: Final = "UPDATE run_minutes SET runs = max(runs - ?2, 0) WHERE minute = ?1"

_DROP_TOTAL: Final = "DELETE FROM run_totals WHERE agent_name = ? AND job_type = ? AND status = ? AND runs = 0"
_DROP_MINUTE: Final = "DELETE FROM run_minutes WHERE minute = ? AND runs = 0"
_DROP_HOUR: Final = """
    DELETE FROM run_hours WHERE hour = ?1
        AND NOT EXISTS (SELECT 1 FROM run_minutes WHERE minute >= ?1 || ':' AND minute < ?1 || ';')
"""

_PRUNE_EVENTS: Final = 5_000
"""Events that one `PruneRuns` deletes at most, so that a few talkative runs do not hold the writer up."""
_DELETE_EVENTS: Final = """
    DELETE FROM run_events WHERE id IN (
        SELECT run_events.id FROM json_each(?) CROSS JOIN run_events INDEXED BY idx_events_time ON run = value LIMIT ?
    )
"""
_WITHOUT_EVENTS: Final = """
    SELECT value FROM json_each(?) WHERE NOT EXISTS (SELECT 1 FROM run_events WHERE run = value)
"""
_DELETE_PRUNED: Final = (
    "DELETE FROM agent_runs WHERE id = ?",
    "DELETE FROM run_processes WHERE run = ?",
    "DELETE FROM unconverted_values WHERE run = ?",
)

_VACUUM_PAGES: Final = 256
"""Pages that one `PruneRuns` returns to the file system at most: 1 MiB, a few milliseconds."""
_INCREMENTAL: Final = 2

_IS_STALE: Final = "status = 'running' AND created_at < :stale_before AND updated_at < :stale_before"

# The guide's values for a stale run; a run that was changed lately (a heartbeat by PATCH) is not stale.
_REAP: Final = """
    UPDATE agent_runs SET
        status = 'cancelled', end_time = :now, updated_at = :now,
        error_summary = 'Stale run cleaned up on startup (created at ' || created_at || ')',
        output_summary = 'Process did not complete - cleanup on restart'
    WHERE id IN ({stale} ORDER BY created_at LIMIT :limit)
    RETURNING id, agent_name, job_type
"""


class Transaction:
    """One open transaction: applies commands and, at its end, brings the totals up to date.

    Python gives the interpreter's lock away for each step of SQLite, and a busy event loop gives it back late; so
    whatever many commands have in common is done in few steps, not row by row.
    """

    def __init__(self, connection: sqlite3.Connection, now: str) -> None:
        self._cursor = connection.cursor()
        self._now = now
        self._totals: Counter[tuple[str, str, str]] = Counter()
        self._minutes: Counter[str] = Counter()
        self._hours: dict[str, tuple[str, str]] = {}

    def apply(self, commands: Sequence[Command]) -> list[Outcome]:
        """Run the commands' statements in order and return their outcomes; the totals follow in `finish`.

        Creates that stand next to each other are stored together.
        """
        outcomes: list[Outcome] = []
        for kind, neighbours in groupby(commands, type):
            if kind is CreateRuns:
                outcomes += self._create([command.rows for command in neighbours if isinstance(command, CreateRuns)])
            else:
                outcomes += map(self._apply_alone, neighbours)
        return outcomes

    def _apply_alone(self, command: Command) -> Outcome:
        outcome: Outcome
        match command:
            case CreateRuns(rows):
                outcome = self._create([rows])[0]
            case UpdateRun():
                outcome = self._update(command)
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
        return outcome

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Undo everything that is applied inside the block if the block fails."""
        totals, minutes = self._totals.copy(), self._minutes.copy()
        self._cursor.execute("SAVEPOINT command")
        try:
            yield
        except Exception:
            if self._cursor.connection.in_transaction:
                self._cursor.execute("ROLLBACK TO command")
            self._totals, self._minutes = totals, minutes
            raise
        finally:
            if self._cursor.connection.in_transaction:
                self._cursor.execute("RELEASE command")

    def finish(self) -> None:
        """Write the totals that the commands changed."""
        added = [(*key, runs) for key, runs in self._totals.items() if runs > 0]
        taken = [(*key, -runs) for key, runs in self._totals.items() if runs < 0]
        minutes_added = [(minute, runs) for minute, runs in self._minutes.items() if runs > 0]
        minutes_taken = [(minute, -runs) for minute, runs in self._minutes.items() if runs < 0]
        # A command that was undone may have widened a span; a span too wide costs time, not correctness.
        spans = [(hour, *span) for hour, span in self._hours.items()]
        for statement, rows in ((_ADD_TO_TOTALS, added), (_ADD_TO_MINUTES, minutes_added), (_WIDEN_HOURS, spans)):
            if rows:
                self._cursor.execute(statement, (orjson.dumps(rows).decode(),))
        if taken or minutes_taken:
            self._take(taken, minutes_taken)

    def _take(self, totals: list[tuple[str, str, str, int]], minutes: list[tuple[str, int]]) -> None:
        """Lower totals; where nothing is left of one, a minute or an hour, it leaves no row of zeros behind."""
        write = self._cursor.executemany
        write(_TAKE_FROM_TOTAL, totals)
        write(_DROP_TOTAL, [total[:3] for total in totals])
        write(_TAKE_FROM_MINUTE, minutes)
        write(_DROP_MINUTE, [minute[:1] for minute in minutes])
        write(_DROP_HOUR, [(hour,) for hour in {minute[:_HOUR] for minute, _ in minutes}])

    def _create(self, batches: list[tuple[Row, ...]]) -> list[Created]:
        rows = [self._complete(row) for batch in batches for row in batch]
        inserted = self._insert("agent_runs", rows)
        if inserted == len(rows):
            self._count(rows)
            return [Created((True,) * len(batch)) for batch in batches]
        last = orjson.loads(self._cursor.execute(_LAST_EVENT_IDS, (inserted,)).fetchone()[0])
        unseen = set(last)
        if len(unseen) != inserted:
            raise sqlite3.InternalError("the ids of new runs are not successive")
        self._count([row for row in {row[EVENT_ID]: row for row in reversed(rows)}.values() if row[EVENT_ID] in unseen])
        outcomes = []
        for batch in batches:
            new = []
            for row in batch:
                new.append(row[EVENT_ID] in unseen)
                unseen.discard(row[EVENT_ID])  # a repeat in the same group is a duplicate of the first one
            outcomes.append(Created(tuple(new)))
        return outcomes

    def _insert(self, table: str, rows: list[Row]) -> int:
        """Insert as many rows as possible with each statement; return how many were new."""
        inserted = start = 0
        for size in _ROWS_AT_ONCE:
            while len(rows) - start >= size:
                values = [*chain.from_iterable(rows[start : start + size])]
                inserted += self._cursor.execute(_insert_into(table, size), values).rowcount
                start += size
        return inserted

    def _complete(self, row: Row) -> Row:
        """Return a row as it is stored: created now unless it says when, and updated now."""
        if row[CREATED_AT]:
            return (*row, self._now)
        return (*row[:CREATED_AT], self._now, *row[CREATED_AT + 1 :], self._now)

    def _count(self, new: list[Row]) -> None:
        for row in new:
            created_at, start_time = str(row[CREATED_AT]), str(row[START_TIME])
            self._totals[str(row[AGENT_NAME]), str(row[JOB_TYPE]), str(row[STATUS])] += 1
            self._minutes[created_at[:_MINUTE]] += 1
            first, last = self._hours.get(created_at[:_HOUR], (start_time, start_time))
            self._hours[created_at[:_HOUR]] = (min(first, start_time), max(last, start_time))

    def _update(self, command: UpdateRun) -> Updated | None:
        found = self._cursor.execute(_FIND_RUN, (command.event_id,)).fetchone()
        if found is None:
            return None
        run, run_id, agent_name, job_type, status = found
        changes = {**command.changes, "updated_at": self._now}
        assignments = ", ".join(f"{name} = ?" for name in changes)
        if "status" in changes:
            assignments += self._take_certificate_back(run, changes)
        self._cursor.execute(
            f"UPDATE agent_runs SET {assignments} WHERE id = ?",  # noqa: S608 - names from the definition
            (*changes.values(), run),
        )
        self._move(agent_name, job_type, status, str(changes.get("status", status)))
        return Updated(run_id)

    def _take_certificate_back(self, run: int, changes: Mapping[str, SqlValue]) -> str:
        """Forget the process of a run that speaks for itself; return assignments that clear what its certificate says.

        Only what the certificate itself wrote is cleared, and only where the change sets nothing.
        """
        found = self._cursor.execute(_FIND_CERTIFICATE, (run,)).fetchone()
        if found is None or (found[0] is None and changes["status"] == Status.RUNNING):
            return ""
        self._cursor.execute(_FORGET_PROCESS, (run,))
        written = zip(("error_summary", "error_details"), found[1:], strict=True)
        said = {name: text for name, text in written if text is not None and name not in changes}
        if not said:
            return ""
        columns = self._cursor.execute(f"SELECT {', '.join(said)} FROM agent_runs WHERE id = ?", (run,)).fetchone()  # noqa: S608 - two names
        return "".join(f", {name} = NULL" for name, now in zip(said, columns, strict=True) if now == said[name])

    def _move(self, agent_name: str, job_type: str, old: str, new: str) -> None:
        if new != old:
            self._totals[agent_name, job_type, old] -= 1
            self._totals[agent_name, job_type, new] += 1

    def _create_events(self, command: CreateEvents) -> EventsCreated | None:
        found = self._cursor.execute(_FIND_RUN, (command.event_id,)).fetchone()
        if found is None:
            return None
        run = found[0]
        rows = [(run, *row[:TIMESTAMP], row[TIMESTAMP] or self._now, *row[TIMESTAMP + 1 :]) for row in command.rows]
        inserted = self._insert("run_events", rows)
        if inserted:  # so an archived run is not deleted with events that came later, and it is not stale
            self._cursor.execute("UPDATE agent_runs SET updated_at = ? WHERE id = ?", (self._now, run))
        return EventsCreated(inserted)

    def _register(self, command: RegisterProcess) -> Registration:
        found = self._cursor.execute(_FIND_RUN, (command.event_id,)).fetchone()
        if found is None:
            return Registration.NO_RUN
        run, *_, status = found
        if status != Status.RUNNING:
            return Registration.NOT_RUNNING
        self._cursor.execute(_REGISTER, {"run": run, "now": self._now, **asdict(command.process)})
        return Registration.DONE

    def _end_process(self, command: EndProcess) -> ProcessEnded:
        found = self._cursor.execute(_REGISTERED, {**asdict(command.process), "limit": command.limit}).fetchall()
        failed = []
        for run, event_id, agent_name, job_type, status in found:
            if command.death is None or status != Status.RUNNING:
                self._cursor.execute(_FORGET_PROCESS, (run,))
                continue
            values = {"run": run, "now": self._now, **asdict(command.death)}
            self._cursor.execute(_FAIL, values)
            self._cursor.execute(_CERTIFY, values)
            self._move(agent_name, job_type, status, str(Status.FAILURE))
            failed.append(event_id)
        return ProcessEnded(tuple(failed), len(found) == command.limit)

    def _prune(self, command: PruneRuns) -> Pruned:
        chosen = self._cursor.execute(*_select_prunable(command)).fetchall()
        found = len(chosen)
        ids = orjson.dumps([row[0] for row in chosen]).decode()
        if self._cursor.execute(_DELETE_EVENTS, (ids, _PRUNE_EVENTS)).rowcount == _PRUNE_EVENTS:
            done_with = {run for (run,) in self._cursor.execute(_WITHOUT_EVENTS, (ids,))}
            chosen = [row for row in chosen if row[0] in done_with]
        for deleted in _DELETE_PRUNED:
            self._cursor.executemany(deleted, [row[:1] for row in chosen])
        for _, agent_name, job_type, status, created_at in chosen:
            self._totals[agent_name, job_type, status] -= 1
            self._minutes[created_at[:_MINUTE]] -= 1
        is_more = found == command.limit or len(chosen) < found
        return Pruned(len(chosen), is_more or self._return_space() > 0)

    def _return_space(self) -> int:
        """Return some free pages to the file system; tell how many are left that can be returned."""
        if self._cursor.execute("PRAGMA auto_vacuum").fetchone()[0] != _INCREMENTAL:
            return 0
        for _ in range(min(self._free_pages(), _VACUUM_PAGES)):
            # Each page is a step without columns, and sqlite3 takes one step of such a statement, whatever N is.
            self._cursor.execute("PRAGMA incremental_vacuum(1)")
        return self._free_pages()

    def _free_pages(self) -> int:
        return int(self._cursor.execute("PRAGMA freelist_count").fetchone()[0])

    def _reap(self, command: ReapRuns) -> Reaped:
        stale, values = _select_stale("id", command.stale_before, command.agent_name)
        reaped = self._cursor.execute(
            _REAP.format(stale=stale), {**values, "now": self._now, "limit": command.limit}
        ).fetchall()
        self._cursor.executemany(_FORGET_PROCESS, [row[:1] for row in reaped])
        for _, agent_name, job_type in reaped:
            self._move(agent_name, job_type, str(Status.RUNNING), str(Status.CANCELLED))
        return Reaped(len(reaped))


def _old_runs(command: PruneRuns | CountPrunable) -> tuple[str, list[str], dict[str, SqlValue]]:
    """Return the index, the conditions and the parameters that find the runs to prune."""
    equal = {name: value for name in ("agent_name", "status") if (value := getattr(command, name)) is not None}
    index, _ = _INDEXES[frozenset(equal)]
    conditions = ["created_at < :created_before", *(f"{name} = :{name}" for name in equal)]
    return index, conditions, {**equal, "created_before": command.created_before}


def _select_prunable(command: PruneRuns) -> tuple[str, dict[str, SqlValue]]:
    index, conditions, values = _old_runs(command)
    source = f"agent_runs INDEXED BY {index}"
    if command.versions is not None:
        # A cross join is done in the order in which it stands: each version finds its run by the row number.
        source = "json_each(:versions) CROSS JOIN agent_runs NOT INDEXED ON agent_runs.id = json_extract(value, '$[0]')"
        conditions.append("updated_at = json_extract(value, '$[1]')")
        values["versions"] = orjson.dumps(command.versions).decode()
    return (
        "SELECT agent_runs.id, agent_name, job_type, status, created_at "  # noqa: S608 - our own words
        f"FROM {source} "
        f"WHERE {' AND '.join(conditions)} ORDER BY created_at LIMIT :limit",
        {**values, "limit": command.limit},
    )


def _select_stale(what: str, stale_before: str, agent_name: str | None) -> tuple[str, dict[str, SqlValue]]:
    index, _ = _INDEXES[frozenset({"status"} if agent_name is None else {"status", "agent_name"})]
    agent = "" if agent_name is None else " AND agent_name = :agent_name"
    values: dict[str, SqlValue] = {"stale_before": stale_before}
    if agent_name is not None:
        values["agent_name"] = agent_name
    return f"SELECT {what} FROM agent_runs INDEXED BY {index} WHERE {_IS_STALE}{agent}", values  # noqa: S608 - our own words


# --- Queries -------------------------------------------------------------------------------------

_SELECT_EVENTS: Final = f"""
    SELECT {", ".join(events.COLUMNS)} FROM run_events INDEXED BY idx_events_time
    WHERE run = ? ORDER BY timestamp, id LIMIT ? OFFSET ?
"""  # noqa: S608 - names from the definition of an event
_EVENT_PAYLOAD: Final = events.COLUMNS.index("payload")
_SELECT_PROCESSES: Final = f"""
    SELECT {", ".join(_PROCESS[:-1])}, max({_PROCESS[-1]}) FROM run_processes INDEXED BY idx_processes_waiting
    WHERE certified_at IS NULL GROUP BY pid, start_time, boot_id, pid_namespace
"""  # noqa: S608 - names from the definition of a process
_SELECT: Final = f"SELECT {', '.join(COLUMNS)} FROM agent_runs"  # noqa: S608 - names from the definition
_NEWEST_FIRST: Final = "ORDER BY created_at DESC, id DESC"

# Which index serves which equality filters. Every index goes on with created_at and the rowid, so a walk
# backwards is already in order. Where an index has the status but the query has not, the walk is a merge of
# one ordered arm for each of the six statuses.
_INDEXES: Final[dict[frozenset[str], tuple[str, bool]]] = {
    frozenset(names.split()): (index, merge_statuses)
    for names, index, merge_statuses in (
        ("", "idx_runs_created_desc", False),
        ("status", "idx_runs_status", False),
        ("agent_name", "idx_runs_agent_created", False),
        ("agent_name status", "idx_runs_agent_status_created", False),
        ("agent_name job_type", "idx_runs_agent", True),
        ("agent_name job_type status", "idx_runs_agent", False),
        ("job_type", "idx_runs_job", True),
        ("job_type status", "idx_runs_job", False),
    )
}


_SPAN_OF_HOURS: Final = """
    SELECT min(hour), max(hour) || ';' FROM run_hours
    WHERE last_start >= coalesce(:start_time_from, '') AND first_start <= coalesce(:start_time_to, '~')
"""
"""The hours in which runs that started in a range can have been created; ';' is the character behind ':'."""

Span = tuple[SqlValue, SqlValue]


def select_page(query: ListRuns, created: Span | None = None) -> tuple[str, dict[str, SqlValue]]:
    """Return the SQL text and the parameters that fetch a page, and one row more to see if others follow.

    `created` is a span of created_at outside of which nothing can match.
    """
    index, merge_statuses = _INDEXES[frozenset(query.equal)]
    values: dict[str, SqlValue] = {**query.equal, **query.bounds, "rows": query.limit + 1, "offset": query.offset}
    conditions = [f"{name} = :{name}" for name in query.equal]
    for name, (column, comparison) in TIME_BOUNDS.items():
        if name in query.bounds and column != "created_at":
            conditions.append(f"{column} {comparison} :{name}")
    walks = _walks(query, created, values)
    statuses = [f"status = '{status}'" for status in Status] if merge_statuses else []
    arms = []
    for walk in walks:
        for status in statuses or [""]:
            where = " AND ".join(filter(None, [status, *conditions, walk]))
            arms.append(f"{_SELECT} INDEXED BY {index}" + (f" WHERE {where}" if where else ""))
    return f"{' UNION ALL '.join(arms)} {_NEWEST_FIRST} LIMIT :rows OFFSET :offset", values


def _walks(query: ListRuns, created: Span | None, values: dict[str, SqlValue]) -> list[str]:
    """Return the conditions on created_at for each walk down an index: one bound at each end, for it uses only one.

    A walk that goes on behind a cursor has two parts: the rest of the runs created at the same moment, and all
    runs created before it. A comparison of pairs would only use the moment, and read all of its runs again.
    """
    lower, upper, end = query.bounds.get("created_after"), query.bounds.get("created_before"), ""
    if created is not None and (lower is None or created[0] is None or str(created[0]) > lower):
        end, values["span_from"] = "created_at >= :span_from", created[0]
    elif lower is not None:
        end = "created_at > :created_after"
    if created is not None and created[1] is not None:
        upper = min(upper or "~", str(created[1]))
    if query.after is not None and (upper is None or query.after.created_at < upper):
        values |= {"moment": query.after.created_at, "after_id": query.after.id}
        # The plus keeps the index to the one moment, in which its rows are in the order of their ids.
        parts = [["created_at = :moment", "id < :after_id", end and f"+{end}"], ["created_at < :moment", end]]
    elif upper is not None:
        values["upper"] = upper
        parts = [["created_at < :upper", end]]
    else:
        parts = [[end]]
    return [" AND ".join(filter(None, part)) for part in parts]


PAGE_BYTES: Final = 32 * 1024 * 1024
"""About how much one page may hold, which is in memory several times over while it is answered."""

_texts_of: Final = itemgetter(*map(COLUMNS.index, TEXTS))


def fetch_page(connection: sqlite3.Connection, query: ListRuns) -> Page:
    """Fetch one page of runs.

    Raises:
        InvalidRequestError: if they hold more than `PAGE_BYTES`. A shorter page would lose runs to whoever pages
            by offset.

    """
    rows: list[Row] = []
    size = 0
    for row in connection.execute(*select_page(query, _created_span(connection, query))):
        size += len("".join(filter(None, _texts_of(row))))
        if size > PAGE_BYTES and 0 < len(rows) < query.limit:
            raise InvalidRequestError(
                f"Invalid limit: {query.limit}; the first {len(rows)} of these runs hold {PAGE_BYTES >> 20} MiB, "
                f"the most that one answer holds: ask for at most {len(rows)} at a time"
            )
        rows.append(row)
    if len(rows) <= query.limit:
        return Page(rows, None)
    rows.pop()
    last = dict(zip(COLUMNS, rows[-1], strict=True))
    return Page(rows, Position(str(last["created_at"]), int(last["id"] or 0)))


def _created_span(connection: sqlite3.Connection, query: ListRuns) -> Span | None:
    started = {name: query.bounds.get(name) for name in ("start_time_from", "start_time_to")}
    if not any(started.values()):
        return None
    span: Span = connection.execute(_SPAN_OF_HOURS, started).fetchone()
    return span


def fetch_run(connection: sqlite3.Connection, query: GetRun) -> Row | None:
    """Fetch the run with an event_id."""
    row: Row | None = connection.execute(f"{_SELECT} WHERE event_id = ?", (query.event_id,)).fetchone()
    return row


def fetch_events(connection: sqlite3.Connection, query: ListEvents) -> dict[str, EventPage]:
    """Fetch the events of each of the runs that there are, by event_id; all pages together hold about `PAGE_BYTES`."""
    pages: dict[str, EventPage] = {}
    room = PAGE_BYTES
    for event_id in query.event_ids:
        run = connection.execute("SELECT id FROM agent_runs WHERE event_id = ?", (event_id,)).fetchone()
        if run is None:
            continue
        rows: list[Row] = []
        more = False
        for row in connection.execute(_SELECT_EVENTS, (*run, query.limit + 1, query.offset)):
            room -= len(row[_EVENT_PAYLOAD] or "")
            more = len(rows) == query.limit or (room < 0 and bool(rows or pages))
            if more:
                break
            rows.append(row)
        pages[event_id] = EventPage(rows, more)
    return pages


def fetch_processes(connection: sqlite3.Connection) -> list[Process]:
    """Fetch each process that is registered and not certified, with the most out-of-memory kills it is known with."""
    return [Process(*row) for row in connection.execute(_SELECT_PROCESSES)]


def count_prunable(connection: sqlite3.Connection, query: CountPrunable) -> int:
    """Count the runs that pruning would delete."""
    index, conditions, values = _old_runs(query)
    where = " AND ".join(conditions)
    return int(
        connection.execute(f"SELECT count(*) FROM agent_runs INDEXED BY {index} WHERE {where}", values).fetchone()[0]  # noqa: S608 - our own words
    )


def count_stale(connection: sqlite3.Connection, query: CountStale) -> int:
    """Count the runs that reaping would cancel."""
    return int(connection.execute(*_select_stale("count(*)", query.stale_before, query.agent_name)).fetchone()[0])


def fetch_counts(connection: sqlite3.Connection, recent_since: str, now: str) -> Counts:
    """Read the totals that the writer keeps; their cost does not grow with the number of runs.

    `recent` are the runs created in the minutes from that of `recent_since` to that of `now`.
    """
    agents = connection.execute("SELECT agent_name, sum(runs) FROM run_totals GROUP BY agent_name HAVING sum(runs) > 0")
    job_types = connection.execute("SELECT DISTINCT job_type FROM run_totals WHERE runs > 0 ORDER BY job_type")
    recent = connection.execute(
        "SELECT coalesce(sum(runs), 0) FROM run_minutes WHERE minute BETWEEN ? AND ?",
        (recent_since[:_MINUTE], now[:_MINUTE]),
    )
    return Counts(dict(agents), tuple(row[0] for row in job_types), recent.fetchone()[0])


# --- Checking and salvaging ----------------------------------------------------------------------

_WRONG_TOTALS: Final = """
    WITH counted AS (
        SELECT agent_name || char(0) || job_type || char(0) || status AS place, count(*) AS runs
            FROM agent_runs GROUP BY agent_name, job_type, status
        UNION ALL
        SELECT substr(created_at, 1, 16), count(*) FROM agent_runs GROUP BY 1
    ), kept AS (
        SELECT agent_name || char(0) || job_type || char(0) || status AS place, runs FROM run_totals WHERE runs <> 0
        UNION ALL
        SELECT minute, runs FROM run_minutes WHERE runs <> 0
    )
    SELECT count(DISTINCT place) FROM (
        SELECT place FROM (SELECT * FROM counted EXCEPT SELECT * FROM kept)
        UNION ALL
        SELECT place FROM (SELECT * FROM kept EXCEPT SELECT * FROM counted)
        UNION ALL
        SELECT c.hour FROM (
            SELECT substr(created_at, 1, 13) AS hour, min(start_time) AS first, max(start_time) AS last
            FROM agent_runs GROUP BY 1
        ) AS c LEFT JOIN run_hours AS k ON k.hour = c.hour
        WHERE k.hour IS NULL OR k.first_start > c.first OR k.last_start < c.last
    )
"""

SAVE_RUN: Final = (
    f"INSERT INTO agent_runs ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))}) ON CONFLICT DO NOTHING"  # noqa: S608 - names from the definition
)
KEEP_ORIGINAL: Final = "INSERT OR IGNORE INTO unconverted_values (run, field, reason, original) VALUES (?, ?, ?, ?)"

BESIDE_RUNS: Final = ("unconverted_values", "run_events", "run_processes")
"""The tables of the schema whose rows a salvage copies as they are."""

FIRST_NUMBER: Final = -(2**63)
LAST_NUMBER: Final = 2**63 - 1
WALK_FROM: Final = {
    "front": "SELECT rowid, * FROM agent_runs NOT INDEXED WHERE rowid > ? ORDER BY rowid LIMIT ?",
    "back": "SELECT rowid, * FROM agent_runs NOT INDEXED WHERE rowid < ? ORDER BY rowid DESC LIMIT ?",
}
READ_BY_NUMBER: Final = "SELECT rowid, * FROM agent_runs NOT INDEXED WHERE rowid = ?"
_SMALL_INDEXES: Final = ("idx_runs_created_desc", "idx_runs_start", "idx_runs_event_id")
NUMBERS_IN_INDEXES: Final = tuple(
    f"SELECT rowid FROM agent_runs INDEXED BY {index} WHERE {column} >= '' AND rowid > ? AND rowid < ?"  # noqa: S608 - our own names
    for index, column in zip(_SMALL_INDEXES, ("created_at", "start_time", "event_id"), strict=True)
)
COUNTS_OF_RUNS: Final = (
    "SELECT sum(runs) FROM run_totals",
    *(f"SELECT count(*) FROM agent_runs INDEXED BY {index}" for index in _SMALL_INDEXES),  # noqa: S608 - our own names
)


def read_table(connection: sqlite3.Connection, name: str) -> Iterator[list[tuple[object, ...]]]:
    """Yield the rows of any table in slices, until its end or the first damage."""
    quoted = name.replace('"', '""')
    rows = connection.execute(f'SELECT * FROM "{quoted}"')  # noqa: S608 - quoted
    while part := rows.fetchmany(500):
        yield part


def make_alike(source: sqlite3.Connection, name: str, target: sqlite3.Connection, new: str) -> None:
    """Make a table with the columns of another one, of any type, under a new name."""
    quoted = name.replace('"', '""')
    columns = ['"{}"'.format(row[1].replace('"', '""')) for row in source.execute(f'PRAGMA table_info("{quoted}")')]
    target.execute(f'CREATE TABLE "{new}" ({", ".join(columns)})')


def fill_table(connection: sqlite3.Connection, name: str, rows: list[tuple[object, ...]]) -> int:
    """Insert rows into any table, except those that are there already; return how many were new."""
    quoted, places = name.replace('"', '""'), ", ".join("?" * len(rows[0]))
    return connection.executemany(f'INSERT OR IGNORE INTO "{quoted}" VALUES ({places})', rows).rowcount  # noqa: S608 - quoted


_STRAYS: Final = "FROM {table} WHERE run NOT IN (SELECT id FROM agent_runs)"


def count_strays(connection: sqlite3.Connection) -> dict[str, int]:
    """Count the rows that refer to runs that are gone, in each table that has some."""
    counted = ((table, f"SELECT count(*) {_STRAYS.format(table=table)}") for table in BESIDE_RUNS)
    found = ((table, int(connection.execute(sql).fetchone()[0])) for table, sql in counted)
    return {table: rows for table, rows in found if rows}


def delete_strays(connection: sqlite3.Connection) -> dict[str, int]:
    """Delete the rows that refer to runs that are gone: a new run could get the number of theirs. Return how many."""
    deleted = ((table, f"DELETE {_STRAYS.format(table=table)}") for table in BESIDE_RUNS)
    done = ((table, connection.execute(sql).rowcount) for table, sql in deleted)
    return {table: rows for table, rows in done if rows}


def count_wrong_totals(connection: sqlite3.Connection) -> int:
    """Count the totals that differ from what the table holds."""
    return int(connection.execute(_WRONG_TOTALS).fetchone()[0])


def recount_totals(connection: sqlite3.Connection) -> None:
    """Count every total again, inside the caller's transaction."""
    for table in ("run_totals", "run_minutes", "run_hours"):
        connection.execute(f"DELETE FROM {table}")  # noqa: S608 - one of three names
    migrate.derive(connection)
