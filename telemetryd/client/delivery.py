"""Turns lines into requests and answers into verdicts: stored, dead letter, or again later."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Final, Protocol, TypeVar

import orjson

from telemetryd.client.complaints import Complaints
from telemetryd.client.context import new_uuid
from telemetryd.client.counters import Counters
from telemetryd.client.lines import EventItem, Json, RunItem, after_of, mend, plan, read_object
from telemetryd.client.transport import Answer, UnreachableError, is_addressable, run_path

DEFAULT_ROWS: Final = 1000
MAX_ROWS: Final = 10_000
MAX_EVENTS: Final = 1000
MAX_BYTES: Final = 4 << 20
_MAX_PAUSE_S: Final = 60.0
_MAX_RETRY_AFTER_S: Final = 3600.0
FLOW_HEADER: Final = "telemetry-flow"
_PASSING: Final = (408, 429, 502, 503, 504)
"""Answers that have nothing to do with what was asked."""
_TRIES_BEFORE_SPLIT: Final = 3
_TRIES_BEFORE_GIVING_UP: Final = 10

T = TypeVar("T")


class RetryError(Exception):
    """The daemon did not take this now; the same request may succeed later."""

    def __init__(self, reason: str, wait_s: float = 0.0, *, is_refusal: bool = False) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        """The least to wait, in seconds, as the daemon said."""
        self.is_refusal = is_refusal
        """Whether nothing will change unless somebody changes the configuration (no token, wrong address)."""


class WaitError(RetryError):
    """The next line has to wait for another process's stream; nothing is wrong."""


class Requests(Protocol):
    """What sends a request."""

    def request(self, method: str, path: str, body: bytes | None = None, media_type: str = ...) -> Answer:
        """Return the answer."""


Bury = Callable[[list[bytes], int | None, object], None]
"""Puts lines into the dead-letter file with a status and a reason."""


@dataclass(slots=True)
class _Runs:
    items: list[RunItem]
    tries: int = 0

    @property
    def lines(self) -> list[bytes]:
        return [line for item in self.items for line in item.lines]

    def parts(self) -> Sequence[_Step]:
        return [_Runs(half) for half in _halves(self.items)] if len(self.items) > 1 else []


@dataclass(slots=True)
class _Events:
    items: list[EventItem]
    tries: int = 0

    @property
    def lines(self) -> list[bytes]:
        return [item.line for item in self.items]

    def parts(self) -> Sequence[_Step]:
        return [_Events(half) for half in _halves(self.items)] if len(self.items) > 1 else []


@dataclass(slots=True)
class _Update:
    event_id: str
    fields: Json
    lines: list[bytes]
    tries: int = 0

    def parts(self) -> Sequence[_Step]:
        return _updates(self.event_id, self.lines) if len(self.lines) > 1 else []


_Step = _Runs | _Events | _Update
"""One request; `parts` are the smaller ones that ask for the same, if there are any."""


def _updates(event_id: str, lines: list[bytes]) -> list[_Update]:
    """Return one update for each line of the spool."""
    return [_Update(event_id, (read_object(line) or {})["fields"], [line]) for line in lines]


@dataclass(slots=True)
class Parcel:
    """Lines on their way: the requests that are still to be sent, and the lines that nobody will take."""

    lines: list[bytes]
    steps: deque[_Step] = field(default_factory=deque)
    dead: list[tuple[list[bytes], int | None, object]] = field(default_factory=list)

    @classmethod
    def of(cls, lines: list[bytes]) -> Parcel:
        """Lay out the requests for some lines: starts, then events, then changes."""
        wanted = plan(lines)
        parcel = cls(lines)
        if wanted.runs:
            parcel.steps.append(_Runs(wanted.runs))
        for event_id, events in wanted.events.items():
            if not is_addressable(event_id):
                parcel.refuse([item.line for item in events], None, _NO_ADDRESS)
                continue
            parcel.steps.extend(_Events(events[at : at + MAX_EVENTS]) for at in range(0, len(events), MAX_EVENTS))
        for update in wanted.updates.values():
            if is_addressable(update.event_id):
                parcel.steps.append(_Update(update.event_id, update.fields, update.lines))
            else:
                parcel.refuse(update.lines, None, _NO_ADDRESS)
        parcel.refuse(wanted.unreadable, None, "The line cannot be read")
        return parcel

    def refuse(self, lines: list[bytes], status: int | None, reason: object) -> None:
        """Send lines to the dead-letter file."""
        if lines:
            self.dead.append((lines, status, reason))


def ready_lines(lines: Sequence[bytes], is_sent: Callable[[tuple[str, int, int]], bool]) -> int:
    """Return how many of the first lines may be sent now; the next one waits for another process's stream."""
    known: set[tuple[str, int, int]] = set()
    for index, line in enumerate(lines):
        after = after_of(line)
        if after is not None and after not in known:
            if not is_sent(after):
                return index
            known.add(after)
    return len(lines)


class Delivery:
    """Sends parcels, one after the other; knows the pace that the daemon asks for."""

    def __init__(self, requests: Requests, bury: Bury, counters: Counters) -> None:
        self._requests = requests
        self._bury = bury
        self._counters = counters
        self._complaints = Complaints()
        self.rows = DEFAULT_ROWS
        self.pause_s = 0.0

    def send(self, parcel: Parcel) -> None:
        """Bring every line of a parcel to its end.

        Raises:
            RetryError: if something is left; call again with the same parcel, later.
            OSError: if the dead-letter file cannot be written.

        """
        while parcel.steps:
            step = parcel.steps[0]
            if isinstance(step, _Runs):
                more = self._send_runs(parcel, step)
            elif isinstance(step, _Events):
                more = self._send_events(parcel, step)
            else:
                more = self._send_update(parcel, step)
            parcel.steps.popleft()
            parcel.steps.extendleft(reversed(more))
        while parcel.dead:
            lines, status, reason = parcel.dead[0]
            self._bury(lines, status, reason)
            parcel.dead.pop(0)
            self._counters.dead += len(lines)
            text = "The daemon refuses %d line(s), which are in the dead-letter file now: %.500s"
            self._complaints.say(logging.ERROR, text, len(lines), reason)
        self._counters.sent += len(parcel.lines)

    # --- Runs ------------------------------------------------------------------------------------

    def _send_runs(self, parcel: Parcel, step: _Runs) -> Sequence[_Step]:
        body = b"\n".join([item.body for item in step.items])
        answer = self._ask("POST", "/api/v1/runs/batch", body, "application/x-ndjson")
        if answer.status == 200:
            return self._settle_batch(parcel, step, _batch_answer(answer, len(step.items)))
        if _is_body_fault(answer):
            return step.parts() or self._reject_run(parcel, step.items[0], answer.status, answer.detail)
        return self._fail(parcel, step, answer)

    def _settle_batch(self, parcel: Parcel, step: _Runs, told: _Batch) -> Sequence[_Step]:
        if told.errors and told.details is None:  # a daemon that does not say which ones
            return step.parts() or self._reject_run(parcel, step.items[0], 422, told.errors)
        self._counters.stored += told.inserted
        self._counters.duplicates += told.duplicates
        rejected = told.details or {}
        more: list[_Step] = []
        for index, reason in rejected.items():
            more += self._reject_run(parcel, step.items[index], 422, reason)
        if told.duplicates:
            # Which ones were known is not told, and a known run stays as it is: so say the changes of all of them.
            more += [
                _Update(item.event_id, item.changes, [])
                for index, item in enumerate(step.items)
                if item.changes and index not in rejected
            ]
        return more

    def _reject_run(self, parcel: Parcel, item: RunItem, status: int, reason: object) -> Sequence[_Step]:
        if item.changes:  # is it the start that is wrong, or what was said later?
            start, *later = item.lines
            return [_Runs([RunItem(start, [start])]), *_updates(item.event_id, later)]
        whole = mend(item.body) if read_object(item.body) is None else None
        if whole is None:
            parcel.refuse(item.lines, status, reason)
            return []
        self._counters.torn += 1
        again = Parcel.of([whole])
        parcel.dead += again.dead
        return again.steps

    # --- Events and changes ----------------------------------------------------------------------

    def _send_events(self, parcel: Parcel, step: _Events) -> Sequence[_Step]:
        body = orjson.dumps([item.event for item in step.items])
        answer = self._ask("POST", run_path(step.items[0].event_id) + "/events", body)
        if answer.status in (200, 201) and _counts(answer.body) == len(step.items):
            return []
        if _is_body_fault(answer) and len(step.items) > 1:
            return step.parts()
        if _is_body_fault(answer) or (answer.status in (404, 405) and answer.detail is not None):
            # 404: no such run, because its start was refused; or a daemon that is too old to know events.
            parcel.refuse(step.lines, answer.status, answer.detail)
            return []
        if answer.status in _PATH_FAULTS and self._is_taken("POST", "/events", body):
            parcel.refuse(step.lines, answer.status, answer.detail or _NO_ADDRESS)
            return []
        return self._fail(parcel, step, answer)

    def _send_update(self, parcel: Parcel, step: _Update) -> Sequence[_Step]:
        body = orjson.dumps(step.fields)
        answer = self._ask("PATCH", run_path(step.event_id), body)
        if answer.status == 200 and isinstance(answer.body, dict) and answer.body.get("updated") is True:
            return []
        if _is_body_fault(answer) or (answer.status == 400 and answer.detail == _NOTHING_TO_UPDATE):
            if parts := step.parts():
                return parts
            parcel.refuse(step.lines, answer.status, answer.detail)
            # One bad field must not keep the others from saying how the run ended.
            bad = _named_fields(answer.detail)
            rest = {name: value for name, value in step.fields.items() if name not in bad}
            return [_Update(step.event_id, rest, [])] if rest and len(rest) < len(step.fields) else []
        is_unknown = answer.status == 404 and str(answer.detail).startswith(_NOT_FOUND)
        if is_unknown or (answer.status in _PATH_FAULTS and self._is_taken("PATCH", "", body)):
            parcel.refuse(step.lines, answer.status, answer.detail or _NO_ADDRESS)
            return []
        return self._fail(parcel, step, answer)

    def _fail(self, parcel: Parcel, step: _Step, answer: Answer) -> Sequence[_Step]:
        """Come back later, unless it is this very step at which the daemon breaks again and again."""
        if answer.status == 500:
            step.tries += 1
            parts = step.parts()
            if parts and step.tries >= _TRIES_BEFORE_SPLIT:
                return parts
            if not parts and step.tries >= _TRIES_BEFORE_GIVING_UP and self._is_healthy():
                parcel.refuse(step.lines, answer.status, answer.detail)
                return []
        raise _retry(answer)

    def _is_taken(self, method: str, suffix: str, body: bytes) -> bool:
        """Tell whether the daemon itself answers the same request about another run, which does not exist.

        Then it is the event_id that has no place in an address; else the daemon or its address is wrong, for all runs.
        """
        answer = self._ask(method, run_path(new_uuid()) + suffix, body)
        return answer.status == 422 or (answer.status == 404 and str(answer.detail).startswith(_NOT_FOUND))

    def _is_healthy(self) -> bool:
        answer = self._ask("GET", "/health", None)
        return answer.status == 200 and isinstance(answer.body, dict) and answer.body.get("status") == "ok"

    # --- One request -----------------------------------------------------------------------------

    def tell(self, method: str, path: str, body: bytes) -> Answer:
        """Send a request that concerns no line, and return its answer.

        Raises:
            RetryError: if the daemon takes nothing now.

        """
        answer = self._ask(method, path, body)
        if answer.status in _PASSING:
            raise _retry(answer)
        return answer

    def _ask(self, method: str, path: str, body: bytes | None, media_type: str = "application/json") -> Answer:
        try:
            answer = self._requests.request(method, path, body, media_type)
        except UnreachableError as error:
            raise RetryError(str(error)) from error
        flow = answer.headers.get(FLOW_HEADER)
        if flow is not None:
            self.rows, self.pause_s = parse_flow(flow)
        return answer


_NOT_FOUND: Final = "Run not found"
_NO_ADDRESS: Final = "This event_id cannot stand in the address of a run"
_PATH_FAULTS: Final = (400, 404, 405, 414, 431)
"""Answers that an event_id may get which is no part of an address, from the daemon or from a proxy."""
_NOTHING_TO_UPDATE: Final = "No valid fields to update"


def _is_body_fault(answer: Answer) -> bool:
    """Tell whether it is what we sent that is wrong, said by the daemon itself (413: by a proxy perhaps)."""
    return answer.status == 413 or (answer.status == 422 and answer.detail is not None)


@dataclass(frozen=True, slots=True)
class _Batch:
    inserted: int
    duplicates: int
    errors: list[Any]
    details: dict[int, Any] | None
    """Index of the item → what is wrong with it; None if the daemon does not tell."""


def _batch_answer(answer: Answer, sent: int) -> _Batch:
    """Read what became of a batch.

    Raises:
        RetryError: if the answer does not account for each run that was sent.

    """
    body = answer.body
    try:
        inserted, duplicates, errors = int(body["inserted"]), int(body["duplicates"]), list(body["errors"])
        told = body.get("error_details")
        details = None if told is None else {int(item["index"]): item["detail"] for item in told}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise RetryError("The answer to a batch cannot be read") from error
    if details is not None and (len(details) != len(errors) or not all(0 <= index < sent for index in details)):
        raise RetryError("The answer to a batch names other errors than it counts")
    if inserted + duplicates + len(errors) != sent:
        raise RetryError(f"The answer to a batch of {sent} accounts for {inserted + duplicates + len(errors)}")
    return _Batch(inserted, duplicates, errors, details)


def _counts(body: object) -> int | None:
    """Return how many events an answer accounts for."""
    try:
        return int(body["inserted"]) + int(body["duplicates"])  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        return None


def _named_fields(detail: object) -> set[str]:
    """Return the fields that a 422 complains about."""
    names: set[str] = set()
    for fault in detail if isinstance(detail, list) else ():
        place = fault.get("loc") if isinstance(fault, dict) else None
        if isinstance(place, list) and len(place) >= 2:
            names.add(str(place[1]))
    return names


def _halves(items: list[T]) -> list[list[T]]:
    middle = len(items) // 2
    return [items[:middle], items[middle:]]


def _retry(answer: Answer) -> RetryError:
    """Return the error that makes us come back later."""
    shown = f"{answer.status}: {answer.detail}" if answer.detail is not None else f"{answer.status}"
    is_refusal = 300 <= answer.status < 500 and answer.status not in (408, 425, 429)
    return RetryError(f"The daemon answered {shown}"[:500], retry_after_s(answer), is_refusal=is_refusal)


def retry_after_s(answer: Answer) -> float:
    """Return the seconds of Retry-After (RFC 9110, 10.2.3: seconds or a date), or 0."""
    text = answer.headers.get("retry-after", "").strip()
    try:
        seconds = float(text) if text[:1].isdigit() else parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, IndexError):
        return 0.0
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S) if math.isfinite(seconds) else 0.0


def parse_flow(text: str) -> tuple[int, float]:
    """Return the batch size and the pause in seconds of `batch=<rows>, pause=<milliseconds>`.

    What is missing or makes no sense counts as the default.
    """
    rows, pause_s = DEFAULT_ROWS, 0.0
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if value.strip().isascii() and value.strip().isdigit():
            if name.strip() == "batch":
                rows = min(max(int(value), 1), MAX_ROWS)
            elif name.strip() == "pause":
                pause_s = min(int(value) / 1000, _MAX_PAUSE_S)
    return rows, pause_s
