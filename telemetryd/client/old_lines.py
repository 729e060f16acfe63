"""Translates the lines of the replaced client's files (3.x) into ours, which mean what its service would have stored.

Its buffer (`*.jsonl.ready`) and its raw files (`raw/*.ndjson`) hold a run as a whole, once when it begins and once
more, with the same event_id, when it ends; metrics_json and context_json are texts there, and what was not given is
null. Raw files hold events as well, which name their run by its run_id.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

import orjson

from telemetryd.client.fields import CHANGES, FIELDS, NAMES
from telemetryd.client.intake import Intake, is_null_text, object_of
from telemetryd.client.lines import Json, encode, is_operation, read_object
from telemetryd.timestamps import canonical

_NAMES_OF_3X: Final = frozenset({"record_type", "schema_version", "agent_owner"})
"""A line of 3.x has at least one of these names; no line of ours has any."""
_MARKS: Final = tuple(f'"{name}"'.encode() for name in _NAMES_OF_3X)
_NEEDED: Final = (*NAMES, "start_time")
_OTHER_TIMES: Final = ("created_at", "updated_at", "end_time")
_OF_THE_OLD_SERVICE: Final = frozenset({"schema_version", "record_type", "updated_at", "id"})


@dataclass(slots=True)
class Translated:
    """Lines of ours, and the lines of 3.x that they come from."""

    lines: list[bytes] = field(default_factory=list)
    origins: dict[bytes, bytes] = field(default_factory=dict)


def translate(lines: list[bytes]) -> Translated:
    """Return lines in our form; those that are so already, or cannot be read, come back as they are."""
    if not any(mark in line for line in lines for mark in _MARKS):
        return Translated(lines)
    translator = _Translator()
    for line in lines:
        translator.add(line)
    return translator.done


class _Translator:
    """Takes line after line; what is said of a run twice becomes one run, and a change in case it is known already."""

    def __init__(self) -> None:
        self.done = Translated()
        self._runs: dict[str, tuple[int, Json]] = {}
        """event_id → where the run's line stands, and what it says."""
        self._event_ids: dict[str, str] = {}
        """run_id → event_id of the last run that has it."""
        self._events: dict[str, int] = {}

    def add(self, line: bytes) -> None:
        """Translate the next line."""
        value = _read(line)
        if value is None:
            self.done.lines.append(line)
        elif value.get("record_type") == "event":
            self._append(_event_line(value, self._event_ids, self._events), line)
        else:
            self._add_run(line, value)

    def _add_run(self, line: bytes, value: Json) -> None:
        run = _run(value)
        event_id = run["event_id"]
        self._event_ids[run["run_id"]] = event_id
        if event_id in self._runs:
            place, known = self._runs[event_id]
            # The last word counts, except that a run does not begin after it has ended.
            first, last = (known, run) if _has_ended(run) or not _has_ended(known) else (run, known)
            run = {**first, **last, **({"created_at": known["created_at"]} if "created_at" in known else {})}
            joined = encode(run).rstrip()
            self.done.origins[joined] = self.done.origins.pop(self.done.lines[place])
            self.done.lines[place] = joined
            self._runs[event_id] = place, run
        else:
            run.setdefault("start_time", _start(value))
            self._runs[event_id] = len(self.done.lines), run
            self._append(run, line)
        if _has_ended(run):
            fields = {name: said for name, said in run.items() if name in CHANGES}
            self._append({"op": "update", "event_id": event_id, "fields": fields}, line)

    def _append(self, value: Json, origin: bytes) -> None:
        line = encode(value).rstrip()
        self.done.lines.append(line)
        self.done.origins[line] = origin


def _read(line: bytes) -> Json | None:
    """Return a line of 3.x as an object, or None if it is none, or lacks what the daemon asks for."""
    if not any(mark in line for mark in _MARKS) or is_operation(line):
        return None
    value = read_object(line)
    if value is None or value.keys().isdisjoint(_NAMES_OF_3X):
        return None
    needed = ("run_id", "event_type") if value.get("record_type") == "event" else _NEEDED
    return value if all(isinstance(value.get(name), str) for name in needed) else None


def _run(value: Json) -> Json:
    """Return a run as POST takes it; what no field can take is kept in context_json, as the client does it."""
    intake = Intake(lambda field, why: None)
    given = {name: said for name, said in value.items() if name not in _OF_THE_OLD_SERVICE}
    names = {name: given.pop(name) for name in NAMES}
    if given.get("status") is not None:
        given["status"] = intake.status(given["status"])
    return {**names, **intake.sort(given, FIELDS)}


def _start(value: Json) -> str:
    """Return when a run began whose start_time is no time; without any other one, the daemon refuses what it says."""
    others = (value.get(name) for name in _OTHER_TIMES)
    moments = (canonical(other) for other in others if isinstance(other, str))
    return next(filter(None, moments), value["start_time"])


def _has_ended(run: Json) -> bool:
    return str(run.get("status", "running")) != "running"


def _event_line(value: Json, event_ids: dict[str, str], known: dict[str, int]) -> Json:
    """Return the line for an event; without a run among the lines before, the daemon is asked for it by its run_id.

    The key comes from the event's content, so that a repeat is known; the second of two equal ones has another.
    """
    payload = value.get("payload_json")
    said = None if is_null_text(payload) else object_of(payload)
    event = Intake(lambda field, why: None).event(value["event_type"], said, {})
    content = orjson.dumps([value["run_id"], value.get("timestamp"), event], option=orjson.OPT_SORT_KEYS)
    key = f"3x-{hashlib.blake2b(content, digest_size=16).hexdigest()}"
    known[key] = known.get(key, 0) + 1
    event["event_key"] = key if known[key] == 1 else f"{key}-{known[key]}"
    if value.get("timestamp") is not None:
        event["timestamp"] = value["timestamp"]
    event_id = event_ids.get(value["run_id"])
    whose = {"run_id": value["run_id"]} if event_id is None else {"event_id": event_id}
    return {"op": "event", **whose, "event": event}
