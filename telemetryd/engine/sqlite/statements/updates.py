"""SQL for changes of runs: carries out many in few steps of SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any, Final, NamedTuple

import orjson

from telemetryd.model.commands import TooManyLabels, Updated, UpdateRun
from telemetryd.model.stats import FACTS, Facts
from telemetryd.model.values import MAX_LABELS, SqlValue, Status, count_labels, merge_labels

_AT_ONCE: Final = (256, 64, 16, 4, 1)
"""How many runs one UPDATE may change: each number has its own prepared statement."""

_FIND: Final = f"""
    SELECT json_group_array(json_array(key, agent_runs.id, run_id, run IS NOT NULL, {", ".join(FACTS)}))
    FROM json_each(?) CROSS JOIN agent_runs ON event_id = value LEFT JOIN run_processes ON run = agent_runs.id
"""
_FIND_LABELS: Final = "SELECT labels FROM agent_runs WHERE id = ?"
_FIND_CERTIFICATE: Final = "SELECT certified_at, error_summary, error_details FROM run_processes WHERE run = ?"
FORGET_PROCESS: Final = "DELETE FROM run_processes WHERE run = ?"


class Change(NamedTuple):
    """A run that was changed, and what the statistics know of it before and after."""

    run: int
    old: Facts
    new: Facts


def update(
    cursor: sqlite3.Cursor, commands: Iterable[UpdateRun], now: str
) -> Iterator[tuple[Updated | TooManyLabels | None, Change | None]]:
    """Change runs in order; yield for each command its outcome, and the change if there is one."""
    for part in _apart(commands):
        yield from _update_at_once(cursor, part, now)


def _apart(commands: Iterable[UpdateRun]) -> Iterator[list[UpdateRun]]:
    """Yield the commands in order, in parts of which each names a run only once."""
    part: dict[str, UpdateRun] = {}
    for command in commands:
        if command.event_id in part:
            yield [*part.values()]
            part = {}
        part[command.event_id] = command
    yield [*part.values()]


def _update_at_once(
    cursor: sqlite3.Cursor, commands: Sequence[UpdateRun], now: str
) -> list[tuple[Updated | TooManyLabels | None, Change | None]]:
    event_ids = orjson.dumps([command.event_id for command in commands]).decode()
    outcomes: list[tuple[Updated | TooManyLabels | None, Change | None]] = [(None, None)] * len(commands)
    alike: dict[tuple[str, ...], list[tuple[SqlValue, ...]]] = {}
    for place, run, run_id, has_process, *facts in orjson.loads(cursor.execute(_FIND, (event_ids,)).fetchone()[0]):
        changes = {**commands[place].changes, "updated_at": now}
        if "labels" in changes:
            stored = cursor.execute(_FIND_LABELS, (run,)).fetchone()[0]
            changes["labels"] = merge_labels(stored, str(changes["labels"]))
            if (many := count_labels(changes["labels"])) > MAX_LABELS:
                outcomes[place] = TooManyLabels(many), None
                continue
        if has_process and "status" in changes:
            changes |= _take_certificate_back(cursor, run, changes)
        alike.setdefault((*changes,), []).append((run, *changes.values()))
        new = tuple(changes.get(name, value) for name, value in zip(FACTS, facts, strict=True))
        outcomes[place] = Updated(run_id), Change(run, tuple(facts), new)
    for names, rows in alike.items():
        start = 0
        for size in _AT_ONCE:
            while len(rows) - start >= size:
                cursor.execute(_change(names, size), [*chain.from_iterable(rows[start : start + size])])
                start += size
    return outcomes


@cache
def _change(names: tuple[str, ...], rows: int) -> str:
    """Return the statement that sets these columns of so many runs, each row of values led by the run's id."""
    places = f"({', '.join('?' * (len(names) + 1))})"
    return f"""
        WITH given(run, {", ".join(f"new_{name}" for name in names)}) AS (VALUES {", ".join([places] * rows)})
        UPDATE agent_runs SET {", ".join(f"{name} = new_{name}" for name in names)} FROM given WHERE id = given.run
    """


def _take_certificate_back(cursor: sqlite3.Cursor, run: int, changes: Mapping[str, SqlValue]) -> dict[str, SqlValue]:
    """Forget the process of a run that speaks for itself; return changes that clear what its certificate says.

    Only what the certificate itself wrote is cleared, and only where the change sets nothing.
    """
    certified_at, *texts = cursor.execute(_FIND_CERTIFICATE, (run,)).fetchone()
    if certified_at is None and changes["status"] == Status.RUNNING:
        return {}
    cursor.execute(FORGET_PROCESS, (run,))
    written = zip(("error_summary", "error_details"), texts, strict=True)
    said: dict[str, Any] = {name: text for name, text in written if text is not None and name not in changes}
    if not said:
        return {}
    columns = cursor.execute(f"SELECT {', '.join(said)} FROM agent_runs WHERE id = ?", (run,)).fetchone()
    return {name: None for name, stored in zip(said, columns, strict=True) if stored == said[name]}
