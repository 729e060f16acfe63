"""The spool's lines: how a run, a change to a run and an event of a run are written, and read again.

A line is one JSON object, and is a run unless it has an `op`, by which ours begin:

    {"event_id":"…", …}                                       a run, just as POST /api/v1/runs takes it
    {"op":"update","event_id":"…","fields":{…}}               changes, as PATCH takes them
    {"op":"event","event_id":"…","event":{"event_key":…, …}}  an event of a run
    {"op":"event","run_id":"…","event":{"event_key":…, …}}    the same, if only the run's run_id is known

A line that was written by a forked process about a run of its parent also holds `"after":[stream,number,size]`:
where the parent's spool stood at the fork, which must have been sent before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from telemetryd.client.fields import CHANGES
from telemetryd.client.values import Room, plain

OP: Final = b'{"op":"'
RUN: Final = b'{"event_id":"'
_STARTS: Final = (RUN, OP)
_NUL: Final = b"\\u0000"
_BEGINNINGS: Final = 100
"""How many places are tried where a whole line may begin."""

Json = dict[str, Any]
After = tuple[str, int, int]
"""A stream, the number of one of its files, and a size of that file."""


# --- Writing -------------------------------------------------------------------------------------


def encode(value: Mapping[str, Any]) -> bytes:
    """Return a value as one line with its newline; what JSON has no form for becomes the nearest that it has."""
    try:
        line = orjson.dumps(value, None, orjson.OPT_APPEND_NEWLINE)
    except (
        TypeError,
        ValueError,
    ):  # keys that are no strings, lone surrogates, integers beyond 64 bits, depth, objects
        line = orjson.dumps(_clean(plain(value, Room(_MAX_VALUES), _MAX_DEPTH)), None, orjson.OPT_APPEND_NEWLINE)
    if _NUL in line:  # the daemon refuses NUL characters
        line = orjson.dumps(_clean(orjson.loads(line)), None, orjson.OPT_APPEND_NEWLINE)
    return line


_MAX_VALUES: Final = 10_000_000
"""More than any line has; each object in it has its own bound."""
_MAX_DEPTH: Final = 100


def _clean(value: Any) -> Any:
    """Return a plain value without NUL characters and lone surrogates."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value


# --- Reading -------------------------------------------------------------------------------------


def repair(line: bytes) -> bytes | None:
    """Return the whole line that stands after a torn one, or None.

    A write that the disk cut short leaves half a line without a newline, and the next line of another thread
    follows at once. Where that one begins is certain: only its true beginning is a JSON text up to the end.
    """
    for start in _STARTS:
        at = len(line)
        for _ in range(_BEGINNINGS):
            at = line.rfind(start, 0, at)
            if at <= 0:
                break
            if read_object(line[at:]) is not None:
                return line[at:]
    return None


def read_object(line: bytes) -> Json | None:
    """Return a line as a JSON object, or None if it is none."""
    try:
        value = orjson.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _read_writable(line: bytes) -> Json | None:
    """Return a line as an object that can be written again; orjson reads 1024 levels of nesting and writes 254."""
    value = read_object(line)
    try:
        orjson.dumps(value)
    except TypeError:
        return None
    return value


def unfold(line: bytes) -> list[bytes]:
    """Return a run that holds its events, as in an archive of `telemetryd prune`, as one line for each of them.

    The events' ids are the daemon's own, which gives new ones. Any other line comes back as it is.
    """
    run = (_read_writable(line) or {}) if b'"events"' in line and not is_operation(line) else {}
    event_id, events = run.get("event_id"), run.pop("events", None)
    if not isinstance(event_id, str) or not isinstance(events, list) or not events:
        return [line]
    lines = [encode(run)]
    for event in events:
        fields = {name: value for name, value in event.items() if name != "id"} if isinstance(event, dict) else event
        lines.append(encode({"op": "event", "event_id": event_id, "event": fields}))
    return [unfolded.rstrip() for unfolded in lines]


@dataclass(slots=True)
class RunItem:
    """A run to be created, and the lines that it stands for."""

    body: bytes
    lines: list[bytes]
    changes: Json | None = None
    """The later changes that `body` has already; to be sent as well if the run was known before."""
    event_id: str = ""


@dataclass(slots=True)
class UpdateItem:
    """Changes to one run, and the lines they come from."""

    event_id: str
    fields: Json
    lines: list[bytes]


@dataclass(slots=True)
class EventItem:
    """One event of a run."""

    event_id: str
    event: Json
    line: bytes


@dataclass(slots=True)
class Plan:
    """What a window of lines asks for, in the order in which it has to be sent."""

    runs: list[RunItem] = field(default_factory=list)
    events: dict[str, list[EventItem]] = field(default_factory=dict)
    updates: dict[str, UpdateItem] = field(default_factory=dict)
    nameless: dict[str, list[EventItem]] = field(default_factory=dict)
    """run_id → events of a run whose event_id is not known yet."""
    unreadable: list[bytes] = field(default_factory=list)


def is_operation(line: bytes) -> bool:
    """Return whether a line says something of a run, instead of being one; other programs may put blanks into it."""
    if line.startswith(_STARTS):
        return line.startswith(OP)
    return b'"op"' in line and "op" in (read_object(line) or {})


def after_of(line: bytes) -> After | None:
    """Return what must have been sent before a line, or None."""
    if b'"after"' in line and is_operation(line):
        match (read_object(line) or {}).get("after"):
            case [str() as stream, int() as number, int() as size]:
                return stream, number, size
    return None


def plan(lines: list[bytes]) -> Plan:
    """Sort lines into requests: changes of a run whose start is among the lines become part of its start."""
    result = Plan()
    started: dict[str, RunItem] = {}
    operations: list[bytes] = []
    for line in lines:
        if is_operation(line):
            operations.append(line)
        else:
            result.runs.append(RunItem(line, [line]))
    if not operations:
        return result
    for item in result.runs:
        item.event_id = event_id_of(item.body)
        started.setdefault(item.event_id, item)
    for line in operations:
        _add_operation(result, started, line)
    for item in started.values():
        run = read_object(item.body) if item.changes else None
        if item.changes is None or run is None:
            continue
        try:
            # One name twice in a line made by hand: the daemon reads the last one, so it may mean another run.
            joined = orjson.dumps(merged(run, item.changes)) if run.get("event_id") == item.event_id else None
        except TypeError:  # deeper than orjson writes, though it could be read
            joined = None
        if joined is not None:
            item.body = joined
        else:
            later = result.updates.get(item.event_id)
            fields, lines = (later.fields, later.lines) if later is not None else ({}, [])
            result.updates[item.event_id] = UpdateItem(
                item.event_id, merged(item.changes, fields), [*item.lines[1:], *lines]
            )
            item.lines, item.changes = item.lines[:1], None
    return result


def event_id_of(line: bytes) -> str:
    """Return the event_id of a run, or of what is said of it; an empty text if there is none."""
    if line.startswith(RUN):
        raw = line[len(RUN) : line.find(b'"', len(RUN))]
        if b"\\" not in raw:
            return raw.decode("utf-8", "replace")
    value = (read_object(line) or {}).get("event_id")
    return value if isinstance(value, str) else ""


def said(fields: Json) -> Json:
    """Return the changes that an update asks for: PATCH leaves alone what is null."""
    return {name: value for name, value in fields.items() if value is not None}


def merged(fields: Json, later: Json) -> Json:
    """Return fields after later changes to them: PATCH replaces each of them, and merges labels."""
    both = {**fields, **later}
    if isinstance(before := fields.get("labels"), dict) and isinstance(after := later.get("labels"), dict):
        both["labels"] = {**before, **after}
    return both


def _add_operation(result: Plan, started: Mapping[str, RunItem], line: bytes) -> None:
    value = _read_writable(line) or {}
    event_id, fields, event = value.get("event_id"), value.get("fields"), value.get("event")
    run_id = value.get("run_id")
    if event_id is None and isinstance(run_id, str) and value["op"] == "event" and isinstance(event, dict):
        result.nameless.setdefault(run_id, []).append(EventItem("", event, line))
    elif not isinstance(event_id, str):
        result.unreadable.append(line)
    elif value["op"] == "update" and isinstance(fields, dict):
        _add_update(result, started.get(event_id), UpdateItem(event_id, said(fields), [line]))
    elif value["op"] == "event" and isinstance(event, dict):
        result.events.setdefault(event_id, []).append(EventItem(event_id, event, line))
    else:
        result.unreadable.append(line)


def _add_update(result: Plan, run: RunItem | None, update: UpdateItem) -> None:
    """Join an update with what is sent before, so that the run ends as if each line were sent by itself.

    What PATCH does not take (event_id, created_at, a name) a start would take: such an update stays a PATCH, and so do
    those after it.
    """
    if (known := result.updates.get(update.event_id)) is not None:
        known.fields = merged(known.fields, update.fields)
        known.lines += update.lines
    elif run is not None and update.fields.keys() <= CHANGES:
        run.changes = merged(run.changes or {}, update.fields)
        run.lines += update.lines
    else:
        result.updates[update.event_id] = update


def dead_letter(line: bytes, status: int | None, reason: object, moment: str) -> bytes:
    """Return the dead-letter file's line for a line that will never be taken."""
    value = read_object(line)
    entry: Json = {"time": moment, "status": status, "reason": reason}
    text = line.decode("utf-8", "backslashreplace")
    entry["line"] = value if value is not None else text
    try:
        encoded = _compact(entry)
    except RecursionError:
        encoded = _compact({**entry, "line": text})
    return encoded.encode("utf-8", "replace") + b"\n"


def _compact(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
