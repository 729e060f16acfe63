"""Clients that send a mix of requests and write down what they were told, and the comparison of a database with it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements import deltas
from tests.conftest import Row, make_run

_STATUSES: Final = ("running", "success", "failure", "partial", "timeout", "cancelled")
_CHANGED: Final = ("status", "duration_ms", "items_succeeded", "error_summary", "metrics_json")
FIELDS: Final = (
    "event_id", "run_id", "created_at", "start_time", "agent_name", "job_type", "output_summary", "git_commit_hash",
    *_CHANGED,
)  # fmt: skip
"""What every run of the load has, and what is compared."""

EVENTS: Final = "events"
"""Where a run holds its events, by their keys; an event is what `_EVENT_FIELDS` names."""
_EVENT_FIELDS: Final = ("event_key", "event_type", "timestamp", "payload")

Runs = Mapping[str, Row]
"""Runs by their event_id, each with its events."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the load: it creates runs (unless they are there), changes one, or reports events of one."""

    identity: str
    """The `X-Request-ID` that it was sent with."""
    method: str
    path: str
    body: Any
    creates: tuple[Row, ...] = ()
    changes: str | None = None
    """The event_id of the run that it changes."""
    reports: tuple[Row, ...] = ()
    """Events of that run; then it changes nothing else of it."""

    def apply(self, runs: dict[str, Row]) -> None:
        """Do to `runs` what the daemon does to the database."""
        for run in self.creates:
            runs.setdefault(run["event_id"], run)
        if self.changes is not None:
            old = runs[self.changes]
            runs[self.changes] = {**old, **(self._with_reports(old) if self.reports else self.body)}

    def _with_reports(self, run: Row) -> Row:
        return {EVENTS: {event["event_key"]: event for event in self.reports} | _events(run)}

    @property
    def touched(self) -> set[str]:
        """The runs that it creates or changes."""
        return {run["event_id"] for run in self.creates} | ({self.changes} if self.changes else set())


def _events(run: Row) -> Row:
    events: Row = run.get(EVENTS, {})
    return events


class Client:
    """Sends one request after the other, so that at any moment all but the last were answered.

    Its runs are touched by nobody else. After a crash it repeats the request that got no answer, as clients do.
    """

    def __init__(self, number: int, seed: int, summary_bytes: int) -> None:
        self.number = number
        self._random = random.Random(seed)
        self._summary_bytes = summary_bytes
        self.runs: dict[str, Row] = {}
        """What was acknowledged."""
        self.pending: Request | None = None
        """What was sent and not answered."""
        self.is_unsure = False
        """Whether that may be stored already: it is sent again, and nobody has looked."""
        self.answered: list[Request] = []

    async def run(self, session: aiohttp.ClientSession, go_on: Callable[[], bool]) -> None:
        """Send for as long as it should go on and there are answers."""
        with contextlib.suppress(aiohttp.ClientError, ConnectionError, TimeoutError, json.JSONDecodeError):
            while go_on():
                if self.pending is None:
                    make = self._random.choice((self._create, self._batch, self._update, self._report, self._repeat))
                    self.pending = make()
                await self._send(session, self.pending)

    async def _send(self, session: aiohttp.ClientSession, request: Request) -> None:
        headers = {"X-Request-ID": request.identity}
        path = f"/api/v1/runs{request.path}"
        async with session.request(request.method, path, json=request.body, headers=headers) as response:
            text = await response.text()
            if response.status == 503:
                raise ConnectionError(text)
            assert response.status in (200, 201), text
            answer = json.loads(text)
        new = sum(run["event_id"] not in self.runs for run in request.creates)
        if request.reports:
            known = _events(self.runs[request.changes or ""])
            new = sum(event["event_key"] not in known for event in request.reports)
        # A request is stored as a whole, or not at all.
        possible = (new, 0) if self.is_unsure else (new,)
        if request.reports or request.path == "/batch":
            total = len(request.reports or request.creates)
            assert (answer["inserted"], answer["duplicates"]) in [(count, total - count) for count in possible], text
        elif request.creates:
            assert answer["status"] in ["created" if count else "duplicate" for count in possible], text
        request.apply(self.runs)
        self.answered.append(request)
        self.pending, self.is_unsure = None, False

    @property
    def stored(self) -> int:
        """How many runs and events the daemon has said are stored."""
        return len(self.runs) + sum(len(_events(run)) for run in self.runs.values())

    def request_after(self, count: int) -> Request | None:
        """Return the request that was sent after so many were answered."""
        return self.answered[count] if count < len(self.answered) else self.pending

    def _create(self) -> Request:
        run = self._make()
        return self._request("POST", "", run, creates=(run,))

    def _batch(self) -> Request:
        batch = tuple(self._make() for _ in range(self._random.randint(2, 40)))
        return self._request("POST", "/batch", list(batch), creates=batch)

    def _update(self) -> Request:
        if not self.runs:
            return self._create()
        event_id = self._random.choice(list(self.runs))
        return self._request("PATCH", f"/{event_id}", self._values(), changes=event_id)

    def _report(self) -> Request:
        if not self.runs:
            return self._create()
        event_id = self._random.choice(list(self.runs))
        count = self._random.choice((1, 1, self._random.randint(2, 40)))
        events = tuple(self._event(number) for number in range(count))
        body = list(events) if count > 1 else events[0]
        return self._request("POST", f"/{event_id}/events", body, changes=event_id, reports=events)

    def _event(self, number: int) -> Row:
        chance = self._random
        return {
            "event_key": f"{len(self.answered)}-{number}",
            "event_type": f"type-{chance.randrange(4)}",
            "timestamp": f"2026-01-01T{chance.randrange(24):02}:{chance.randrange(60):02}:00.000000Z",
            "payload": {"page": chance.randrange(1000), "text": "ü" * chance.randrange(self._summary_bytes // 8)},
        }

    def _repeat(self) -> Request:
        known = [request for request in self.answered[-20:] if request.creates or request.reports]
        if not known:
            return self._batch()
        old = self._random.choice(known)
        return self._request("POST", old.path, old.body, creates=old.creates, changes=old.changes, reports=old.reports)

    def _request(self, method: str, path: str, body: Any, **what: Any) -> Request:
        return Request(f"load-{self.number}-{len(self.answered)}", method, path, body, **what)

    def _make(self) -> Row:
        chance = self._random
        return make_run(
            created_at=f"2026-01-01T{chance.randrange(3):02}:{chance.randrange(60):02}:00.000000Z",
            start_time=f"2026-01-0{chance.randrange(1, 4)}T00:00:00.000000Z",
            agent_name=f"agent-{chance.randrange(5)}",
            job_type=f"job-{chance.randrange(3)}",
            output_summary="x" * chance.randrange(self._summary_bytes),
            git_commit_hash=f"{chance.randrange(16**12):012x}",
            **self._values(),
        )

    def _values(self) -> Row:
        chance = self._random
        return {
            "status": chance.choice(_STATUSES),
            "duration_ms": chance.randrange(1_000_000),
            "items_succeeded": chance.randrange(1000),
            "error_summary": "e" * chance.randrange(100),
            "metrics_json": {"tokens": chance.randrange(1_000_000), "host": "ü"},
        }


class Load:
    """Twelve clients, whose runs outlive the daemon that they were sent to."""

    def __init__(self, seed: int, clients: int = 12, summary_bytes: int = 2000) -> None:
        self.clients = [Client(number, seed * clients + number, summary_bytes) for number in range(clients)]

    @property
    def acknowledged(self) -> int:
        """How many requests were answered."""
        return sum(len(client.answered) for client in self.clients)

    async def run(self, url: str, enough: float = math.inf) -> None:
        """Let all clients send until enough is acknowledged, or the daemon is gone."""
        async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(120)) as session:
            await asyncio.gather(*(client.run(session, lambda: self.acknowledged < enough) for client in self.clients))

    def check(self, database: Contents) -> Findings:
        """Compare a database with what was acknowledged, and take for acknowledged what else is there."""
        findings = Findings.of(database)
        for client in self.clients:
            judge(database.runs, client.runs, client.pending, findings)
            if client.pending is not None and client.pending.touched <= database.runs.keys():
                client.pending.apply(applied := dict(client.runs))
                if all(same(database.runs[name], applied[name]) for name in client.pending.touched):
                    client.runs = applied
        strangers = database.runs.keys() - {name for client in self.clients for name in client.runs}
        if strangers:
            findings.note("unrecovered", f"{len(strangers)} runs that nobody sent")
        return findings


@dataclass
class Findings:
    """What is wrong with a database."""

    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, database: Contents) -> Findings:
        """Return what is wrong with a database in itself."""
        findings = cls()
        if database.duplicates:
            what = f"{database.duplicates} runs or events are there twice"
            findings.note("duplicated", what, database.duplicates)
        for damage in database.damage:
            findings.note("unrecovered", damage)
        return findings

    def note(self, kind: str, what: str, count: int = 1) -> None:
        """Take down one thing: "lost", "duplicated" or "unrecovered"."""
        self.counts[kind] += count
        self.notes.append(f"{kind}: {what}")

    def figures(self) -> dict[str, Any]:
        """Return them as `Ledger.record` takes them."""
        return {**self.counts, "notes": self.notes}

    def add(self, other: Findings, where: str) -> None:
        """Take in what was found elsewhere."""
        self.counts += other.counts
        self.notes += [f"{where}: {note}" for note in other.notes]


def judge(found: Runs, acknowledged: Runs, pending: Request | None, findings: Findings) -> None:
    """Compare one client's runs in a database with those acknowledged; its last request is there as a whole, or not."""
    after = dict(acknowledged)
    touched: set[str] = set()
    if pending is not None:
        pending.apply(after)
        touched = pending.touched
    for name, run in acknowledged.items():
        if name not in found:
            findings.note("lost", f"{name} is gone")
        elif not same(found[name], run) and not (name in touched and same(found[name], after[name])):
            findings.note("lost", f"{name} is {found[name]} instead of {run}")
    new = touched - acknowledged.keys()
    stored = new & found.keys()
    if stored and stored != new:
        findings.note("unrecovered", f"half a batch: {len(stored)} of {len(new)}")
    for name in stored:
        if not same(found[name], after[name]):
            findings.note("unrecovered", f"half a run: {found[name]} instead of {after[name]}")


def same(found: Row, sent: Row) -> bool:
    """Return whether a stored run has the values of one that was sent, and its events, all of them and no other."""
    return _events(found) == _events(sent) and all(found[name] == sent[name] for name in FIELDS)


@dataclass(frozen=True, slots=True)
class Contents:
    """What stands in a database, and what is wrong with it in itself."""

    runs: Runs
    duplicates: int
    damage: tuple[str, ...]


def count_server_errors(log: Iterable[Row]) -> int:
    """Count in the lines of a daemon's log the 5xx answers other than the documented 503."""
    return sum(line.get("status", 0) >= 500 and line["status"] != 503 for line in log)


_COUNTED: Final = (
    (
        "SELECT agent_name, job_type, status, count(*) FROM agent_runs NOT INDEXED GROUP BY 1, 2, 3",
        "SELECT agent_name, job_type, status, runs FROM run_totals WHERE runs <> 0",
    ),
    (
        "SELECT substr(created_at, 1, 16), count(*) FROM agent_runs NOT INDEXED GROUP BY 1",
        "SELECT minute, runs FROM run_minutes WHERE runs <> 0",
    ),
    (
        "SELECT substr(created_at, 1, 13), min(start_time), max(start_time) FROM agent_runs NOT INDEXED GROUP BY 1",
        # An hour may be kept too wide, never too narrow.
        "SELECT hour, max(first_start, min(start_time)), min(last_start, max(start_time))"
        " FROM run_hours JOIN agent_runs ON substr(created_at, 1, 13) = hour GROUP BY 1",
    ),
)


_READ_EVENTS: Final = f"""
    SELECT (SELECT event_id FROM agent_runs WHERE id = run), {", ".join(_EVENT_FIELDS)} FROM run_events NOT INDEXED
"""


def read(connection: sqlite3.Connection) -> Contents:
    """Read every run and event, and check the file and its totals."""
    runs = connection.execute(f"SELECT {', '.join(FIELDS)} FROM agent_runs NOT INDEXED")
    return contents(runs, connection.execute(_READ_EVENTS), damage(connection))


def read_postgres(plain: Plain) -> Contents:
    """Read every run and event of a database on PostgreSQL, and check its totals."""
    with plain.transaction():
        wrong = deltas.count_wrong(plain)
        # No index may hide what is there twice.
        plain.execute("SET LOCAL enable_indexscan = off")
        plain.execute("SET LOCAL enable_indexonlyscan = off")
        runs = plain.execute(f"SELECT {', '.join(FIELDS)} FROM agent_runs".encode()).fetchall()
        events = plain.execute(_READ_EVENTS.replace(" NOT INDEXED", "").encode()).fetchall()
    return contents(runs, events, [f"{wrong} counts are wrong"] if wrong else [])


def contents(
    run_rows: Iterable[Iterable[Any]], event_rows: Iterable[tuple[Any, ...]], damage: Iterable[str]
) -> Contents:
    """Put together what was read."""
    rows = [_row(values) for values in run_rows]
    runs = {row["event_id"]: row for row in rows}
    duplicates = len(rows) - len(runs)
    strangers = 0
    for event_id, *values in event_rows:
        event = _decoded(dict(zip(_EVENT_FIELDS, values, strict=True)), "payload")
        if (run := runs.get(event_id)) is None:
            strangers += 1
            continue
        events = run.setdefault(EVENTS, {})
        duplicates += event["event_key"] in events
        events[event["event_key"]] = event
    found = [*damage, *([f"{strangers} events of no run"] if strangers else [])]
    return Contents(runs, duplicates, tuple(found))


def _row(values: Iterable[Any]) -> Row:
    return _decoded(dict(zip(FIELDS, values, strict=True)), "metrics_json")


def _decoded(row: Row, name: str) -> Row:
    with contextlib.suppress(TypeError, ValueError):  # in a damaged file anything may stand there
        row[name] = json.loads(row[name])
    return row


def damage(connection: sqlite3.Connection) -> Iterator[str]:
    """Yield what is wrong with a file of the current schema and its totals."""
    for (finding,) in connection.execute("PRAGMA integrity_check"):
        if finding != "ok":
            yield f"integrity_check: {finding}"
    for counted, kept in _COUNTED:
        if Counter(connection.execute(counted)) != Counter(connection.execute(kept)):
            yield f"the totals differ from: {counted}"
