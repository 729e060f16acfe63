"""An engine that keeps runs in a dictionary: as little as the writer and the store need."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, cast

from telemetryd.engine.interface import BackupMade, Engine, EngineHealth, Introduction
from telemetryd.errors import (
    CommandFailedError,
    DatabaseSuspectError,
    InvalidRequestError,
    LowDiskError,
    TelemetrydError,
)
from telemetryd.model.changes import Changes, ListChanges
from telemetryd.model.chores import Chore
from telemetryd.model.commands import Command, Created, CreateRuns, Pruned, PruneRuns, Updated, UpdateRun
from telemetryd.model.events import EventPage
from telemetryd.model.queries import CountRuns, Counts, ExportRuns, GetRun, Query
from telemetryd.model.runs import AGENT_NAME, EVENT_ID, JOB_TYPE, RUN_ID
from telemetryd.model.values import Row

A = TypeVar("A")


class Memory:
    """Both halves of an engine, and what a test does to them."""

    def __init__(self) -> None:
        self.runs: dict[str, Row] = {}
        self.groups: list[int] = []
        """How many commands each group had."""
        self.failures: list[TelemetrydError] = []
        """What the next groups fail with, and the next attempts to open it again."""
        self.reopened = self.tidied = 0
        self.suspicion: DatabaseSuspectError | None = None
        self.is_low = False
        self.closed: bool | None = None

    is_shared = False

    def engine(self) -> Engine:
        """Return it as the store takes it."""
        return Engine(self, self)

    def leads(self, _: Chore) -> bool:
        return True

    def resign(self, chore: Chore) -> None:
        """Nobody else is there."""

    # The writing half.

    async def write(self, commands: Sequence[Command[Any]]) -> Sequence[Any]:
        if self.failures:
            raise self.failures.pop(0)
        self.groups.append(len(commands))
        return [self._carry_out(command) for command in commands]

    def _carry_out(self, command: Command[Any]) -> object:
        match command:
            case CreateRuns(rows):
                new = []
                for row in rows:
                    new.append(row[EVENT_ID] not in self.runs)
                    self.runs.setdefault(str(row[EVENT_ID]), row)
                return Created((*new,))
            case UpdateRun(event_id):
                run = self.runs.get(event_id)
                return None if run is None else Updated(str(run[RUN_ID]))
            case PruneRuns():
                count = len(self.runs)
                self.runs.clear()
                return Pruned(count, more=False)
        return CommandFailedError(f"{type(command).__name__} is not for this engine")

    async def tidy_up(self) -> None:
        self.tidied += 1

    async def reopen(self) -> None:
        self.reopened += 1
        if self.failures:
            raise self.failures.pop(0)

    def interrupt(self) -> None:
        self.failures.clear()

    # The reading half.

    async def read(self, query: Query[A]) -> A:
        match query:
            case GetRun(event_id):
                run = self.runs.get(event_id)
                return cast(A, None if run is None else (run, EventPage([], more=False)))
            case CountRuns():
                agents = {str(row[AGENT_NAME]): 1 for row in self.runs.values()}
                job_types = tuple({str(row[JOB_TYPE]) for row in self.runs.values()})
                runs = len(self.runs)
                return cast(A, Counts(agents, job_types, runs, runs, len(agents), len(job_types)))
        raise InvalidRequestError(f"{type(query).__name__} is not for this engine")

    async def read_news(self, query: ListChanges) -> Changes:
        return await self.read(query)

    def watch(self, changed: Callable[[], None]) -> None:
        self.changed = changed

    @asynccontextmanager
    async def export(self, query: ExportRuns) -> AsyncIterator[Any]:
        raise InvalidRequestError("There is nothing to export here")
        yield

    async def back_up(self, now: datetime, *, compress: bool = True) -> BackupMade:
        return BackupMade(Path("memory"), 0, len(self.runs), 0.0, ())

    async def look(self) -> DatabaseSuspectError | None:
        return self.suspicion

    def check_room(self) -> None:
        if self.is_low:
            raise LowDiskError

    def introduction(self) -> Introduction:
        return Introduction({}, ())

    def health(self) -> EngineHealth:
        return EngineHealth({"db_path": "memory"}, {}, durable=False, problem=None, counts={})

    async def close(self, *, is_clean: bool = True) -> None:
        self.closed = is_clean
