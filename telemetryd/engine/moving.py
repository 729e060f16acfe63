"""Moves a database from one engine to another: its tables row by row as they are, compared by their digests."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import orjson

from telemetryd.engine.columns import PROCESS
from telemetryd.errors import DatabaseError
from telemetryd.model import events, runs
from telemetryd.model.stats import SUMS

Row = Sequence[Any]
Fetch = Callable[[int], Sequence[Row]]
"""Returns so many rows at most, the next ones; none at the end."""
Watch = Callable[[str, int, int], None]
"""Is told a phase, how far it has come, and how far it goes."""

_FIRST_ROWS: Final = 50
_MOST_ROWS: Final = 2_000
_FEW_BYTES: Final = 1024 * 1024
_MANY_BYTES: Final = 8 * 1024 * 1024
"""After a slice of fewer bytes the next one has more rows, after one of more it has fewer."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table that every engine has, and the columns whose order its rows are read in."""

    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]


_OF_ALERTS: Final = ("rule", "agent_name", "job_type", "measure", "first_bad_commit")
_OF_COMMITS: Final = ("slot", "agent_name", "job_type", "git_commit_hash")
RUNS: Final = Table("agent_runs", runs.TABLE, ("id",))
CHANGES: Final = Table("run_changes", ("run", "seq"), ("run",))
"""Of every run the number of its last change, also where that is its id."""
ORIGINALS: Final = Table("unconverted_values", ("run", "field", "reason", "kind", "original"), ("run", "field"))
"""What migrations could not convert: a text, and what kind of value it stands for."""
_OF_STATS: Final = ("hours", "names", "start", "agent_name", "job_type", "status")
STATS: Final = Table("run_stats", (*_OF_STATS, *SUMS, "bins"), _OF_STATS)
"""The statistics, to which all that was logged is added; a sum of any size is a text."""
BIG: Final = frozenset(SUMS[-5:])
"""The sums that may be larger than 64 bits."""
TABLES: Final = (
    ORIGINALS,
    Table("run_deletions", ("seq", "event_id"), ("seq",)),
    Table("run_arrivals", ("created_at", "run", "agent_name", "arrived_at"), ("created_at", "run")),
    Table(
        "run_processes",
        ("run", *PROCESS, "registered_at", "certified_at", "error_summary", "error_details"),
        ("run",),
    ),
    Table("alert_states", (*_OF_ALERTS, "since", "seq", "summary", "details"), _OF_ALERTS),
    Table("alert_deliveries", ("number", "webhook", "id", "created_at", "body"), ("number",)),
    Table("followed_feed", ("epoch", "seq", "begun"), ("epoch",)),
    Table("confirmed_prune", ("after_s", "confirmed_at"), ("confirmed_at",)),
    Table("trusted_clock", ("moment", "boot_id", "up_s"), ("moment",)),
    Table("change_feed", ("epoch", "floor", "horizon"), ("epoch",)),
    RUNS,
    Table("run_events", ("run", *events.COLUMNS), ("id",)),
    CHANGES,
    STATS,
    Table("run_totals", ("agent_name", "job_type", "status", "runs"), ("agent_name", "job_type", "status")),
    Table("run_minutes", ("minute", "runs"), ("minute",)),
    Table("run_commits", (*_OF_COMMITS, "runs", "failures", "timed", "bins", "seconds"), _OF_COMMITS),
)
"""All that every engine keeps; what only one of them indexes or counts is made anew."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The last numbers that were drawn: of changes, and of events."""

    number: int
    event: int


class Side(Protocol):
    """A database that nobody writes to meanwhile, as one snapshot."""

    @property
    def name(self) -> str:
        """How messages call it."""

    def count(self) -> int:
        """Return how many runs it has."""

    def drawn(self) -> Drawn:
        """Return which numbers were drawn last."""

    def reading(self, table: Table) -> AbstractContextManager[Fetch]:
        """Read a table in the order of its key, inside the block."""


class Target(Side, Protocol):
    """A new database; nobody sees anything of it before the move is over."""

    def store(self, table: Table, slices: Iterator[Sequence[Row]]) -> None:
        """Store all rows of a table.

        Raises:
            DatabaseError: if it does not take one of them.

        """

    def complete(self, drawn: Drawn, watch: Watch) -> None:
        """Make what only this engine has: its indexes, and what it counts besides."""


@dataclass(frozen=True, slots=True)
class Digest:
    """How many rows a table has, and what they hold, as 128 bits."""

    rows: int
    text: str


@dataclass(frozen=True, slots=True)
class Moved:
    """What was moved, by table; and how long that took."""

    tables: Mapping[str, Digest]
    seconds: float
    was_there: bool = False
    """Whether all of it stood in the target already."""

    @property
    def runs(self) -> int:
        """How many runs."""
        return self.tables[RUNS.name].rows


class _Reader:
    """Reads a table in slices whose size is bounded, and makes its digest."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.rows = 0

    def slices(self, fetch: Fetch) -> Iterator[Sequence[Row]]:
        most = _FIRST_ROWS
        while rows := fetch(most):
            packed = orjson.dumps(rows, default=bytes.hex)
            self._hash.update(packed[1:-1] + b",")  # as if all were one array: other slices make the same digest
            self.rows += len(rows)
            yield rows
            if len(packed) < _FEW_BYTES:
                most = min(most * 2, _MOST_ROWS)
            elif len(packed) > _MANY_BYTES:
                most = max(most // 2, 1)

    def digest(self) -> Digest:
        return Digest(self.rows, self._hash.hexdigest())


def move(source: Side, target: Target, watch: Watch) -> Moved:
    """Copy every table, and compare both sides.

    Raises:
        DatabaseError: if the target does not take what the source holds, or holds something else afterwards.

    """
    began = time.monotonic()
    total = source.count()
    found: dict[str, Digest] = {}
    for table in TABLES:
        reader = _Reader()
        with source.reading(table) as fetch:
            target.store(table, _watched(reader, fetch, _told(watch, "Copying", table, total)))
        found[table.name] = reader.digest()
    target.complete(source.drawn(), watch)
    different = [name for name, digest in digests(target, watch) if digest != found[name]]
    if different:
        raise DatabaseError(
            f"{target.name} does not hold what {source.name} holds in {', '.join(different)}; nothing was kept of it"
        )
    return Moved(found, time.monotonic() - began)


def compare(source: Side, target: Side, watch: Watch) -> Moved | None:
    """Return what stands in both sides, or None if one holds what the other does not."""
    began = time.monotonic()
    found: dict[str, Digest] = {}
    for (name, one), (_, other) in zip(digests(source, watch), digests(target, watch), strict=True):
        if one != other:
            return None
        found[name] = one
    return Moved(found, time.monotonic() - began, was_there=True)


def digests(side: Side, watch: Watch) -> Iterator[tuple[str, Digest]]:
    """Yield the digest of each table."""
    total = side.count()
    for table in TABLES:
        reader = _Reader()
        with side.reading(table) as fetch:
            for _ in _watched(reader, fetch, _told(watch, "Comparing", table, total)):
                pass
        yield table.name, reader.digest()


def _watched(reader: _Reader, fetch: Fetch, told: Callable[[int], None]) -> Iterator[Sequence[Row]]:
    for rows in reader.slices(fetch):
        yield rows
        told(reader.rows)


def _told(watch: Watch, phase: str, table: Table, total: int) -> Callable[[int], None]:
    return (lambda rows: watch(phase, rows, total)) if table is RUNS else (lambda _: None)
