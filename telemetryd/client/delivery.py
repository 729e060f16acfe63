"""Turns lines into requests and answers into verdicts: stored, dead letter, or again later."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import orjson

from telemetryd.client.answers import (
    DEFAULT_ROWS,
    FLOW_HEADER,
    BatchResult,
    UnclearError,
    accounts_for,
    named_fields,
    parse_flow,
    read_batch,
    retry_after_s,
    shown,
)
from telemetryd.client.aside import Aside
from telemetryd.client.batch import NO_ADDRESS, Batch, Events, Nameless, Runs, Step, Update, events_of, updates_of
from telemetryd.client.complaints import Complaints
from telemetryd.client.counters import Counters
from telemetryd.client.lines import (
    EventItem,
    RunItem,
    after_of,
    encode,
    event_id_of,
    read_object,
    repair,
)
from telemetryd.client.transport import Answer, UnreachableError, run_path, runs_path
from telemetryd.timestamps import canonical
from telemetryd.uuids import new_uuid

MAX_BYTES: Final = 4 << 20
_LEAST_BYTES: Final = 64 << 10
_MORE_BYTES: Final = 16 << 10
_PASSING: Final = (408, 429, 502, 503, 504)
"""Answers that have nothing to do with what was asked."""
_FORBIDDEN: Final = 403
"""What an item gets whose agent the token may not write; only somebody who changes the token can help it."""
_TRIES_BEFORE_SPLIT: Final = 3
_TRIES_BEFORE_GIVING_UP: Final = 10


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


class BlockedError(WaitError):
    """A line that is set aside still does not come through."""


class Requests(Protocol):
    """What sends a request."""

    def request(self, method: str, path: str, body: bytes | None = None, media_type: str = ...) -> Answer:
        """Return the answer."""


Bury = Callable[[list[bytes], int | None, object], None]
"""Puts lines into the dead-letter file with a status and a reason."""


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
    """Sends batches, one after the other; knows the pace that the daemon asks for.

    Only what the daemon itself answers decides about a line (`Answer.is_daemons`). Whatever else answers means: later.

    Args:
        requests: what sends a request.
        bury: takes the lines that the daemon refuses for good.
        counters: where is counted what becomes of lines.
        aside: takes the lines that do not come through to the daemon; without it they are reported as refused.

    """

    def __init__(self, requests: Requests, bury: Bury, counters: Counters, aside: Aside | None = None) -> None:
        self._requests = requests
        self._bury = bury
        self._counters = counters
        self._aside = aside
        self._complaints = Complaints()
        self.rows = DEFAULT_ROWS
        self.bytes = MAX_BYTES
        """How much to send at once: what is too large for anybody on the way makes it smaller for a while."""
        self.pause_s = 0.0

    def send(self, batch: Batch) -> None:
        """Bring every line of a batch to its end.

        Raises:
            RetryError: if something is left; call again with the same batch, later.
            OSError: if neither the dead-letter file can be written nor lines be set aside.

        """
        while batch.steps:
            step = batch.steps[0]
            if self._has_to_wait(batch, step):
                more: Sequence[Step] = self._wait_aside(batch, step)
            elif isinstance(step, Runs):
                more = self._send_runs(batch, step)
            elif isinstance(step, Events):
                more = self._send_events(batch, step)
            elif isinstance(step, Nameless):
                more = self._find_run(batch, step)
            else:
                more = self._send_update(batch, step)
            batch.steps.popleft()
            batch.steps.extendleft(reversed(more))
        while batch.dead:
            lines, status, reason = batch.dead[0]
            is_buried = self._try_to_bury(batch, lines, status, reason)
            batch.dead.pop(0)
            if not is_buried:
                continue
            batch.refused += len(lines)
            self._counters.dead += len(lines)
            text = "The daemon refuses %d line(s), which are in the dead-letter file now: %.500s"
            self._complaints.say(logging.ERROR, text, len(lines), reason)
        left = 0
        while batch.aside and self._aside is not None:
            event_id, lines = next(iter(batch.aside.items()))
            self._aside.put(event_id, lines)
            del batch.aside[event_id]
            left += len(lines)
        self._counters.aside += left
        self._count(batch, max(len(batch.lines) - left, 0))

    def _try_to_bury(self, batch: Batch, lines: list[bytes], status: int | None, reason: object) -> bool:
        """Put refused lines into the dead-letter file; if that cannot be written, set them aside and return False."""
        try:
            self._bury(lines, status, reason)
        except OSError as error:
            if self._aside is None or batch.was_aside:
                raise
            text = "%s: %d refused line(s) are set aside, and tried again later: %.500s"
            self._complaints.say(logging.ERROR, text, error, len(lines), reason)
            batch.aside.setdefault(event_id_of(lines[0]), []).extend(lines)
            return False
        return True

    def give_up(self, batch: Batch) -> None:
        """Count what the daemon has taken of a batch that is not sent again."""
        self._count(batch, batch.stored + batch.duplicates + batch.events + batch.refused)

    def _count(self, batch: Batch, sent: int) -> None:
        counters = self._counters
        counters.sent += sent
        counters.stored += batch.stored
        counters.duplicates += batch.duplicates
        counters.events += batch.events
        counters.changes += max(sent - batch.stored - batch.duplicates - batch.events - batch.refused, 0)

    # --- What does not come through --------------------------------------------------------------

    def _has_to_wait(self, batch: Batch, step: Step) -> bool:
        """Return whether lines of the run that come before these are set aside."""
        if self._aside is None or batch.was_aside:
            return False
        if isinstance(step, Runs) and len(step.items) > 1:
            return False  # what could be set aside before a start is said of its run without it, which is an error
        return step.event_id in batch.aside or self._aside.holds(step.event_id)

    def _wait_aside(self, batch: Batch, step: Step) -> Sequence[Step]:
        lines = step.lines
        if not lines and isinstance(step, Update):  # the fields of a change that are left without a refused one
            lines = [encode({"op": "update", "event_id": step.event_id, "fields": step.fields}).rstrip()]
        batch.aside.setdefault(step.event_id, []).extend(lines)
        return []

    def _block(self, batch: Batch, step: Step, answer: Answer) -> Sequence[Step]:
        """Let the others pass a line that something between here and the daemon blocks."""
        if batch.was_aside:
            raise BlockedError(shown(answer))
        if self._aside is None:
            batch.refuse(step.lines, answer.status, shown(answer))
            return []
        text = "%s: %d line(s) of a run are set aside, and tried again later"
        self._complaints.say(logging.ERROR, text, shown(answer), len(step.lines))
        return self._wait_aside(batch, step)

    def _shrink(self, batch: Batch, step: Runs | Events | Update, answer: Answer) -> Sequence[Step]:
        """Do with a 413 what suits it: send less at once, or give up or set aside what is too large by itself."""
        if parts := step.parts():
            self.bytes = max(min(self.bytes, sum(map(len, step.lines))) // 2, _LEAST_BYTES)
            return parts
        if isinstance(step, Runs) and step.items[0].changes:
            return self._reject_run(batch, step.items[0], answer.status, answer.detail)
        if not answer.is_daemons:
            return self._block(batch, step, answer)
        if isinstance(step, Runs):
            return self._reject_run(batch, step.items[0], answer.status, answer.detail)
        batch.refuse(step.lines, answer.status, answer.detail)
        if isinstance(step, Events) or len(step.fields) == 1:
            return []
        # The largest field must not keep the others from saying how the run ended.
        largest = max(step.fields, key=lambda name: len(encode({name: step.fields[name]})))
        return [Update(step.event_id, {n: value for n, value in step.fields.items() if n != largest}, [])]

    # --- Runs ------------------------------------------------------------------------------------

    def _send_runs(self, batch: Batch, step: Runs) -> Sequence[Step]:
        if step.postponed:
            reason, step.postponed = step.postponed, ""
            raise RetryError(reason)
        body = b"\n".join([item.body for item in step.items])
        # What the spool has of a run may have been sent in other pieces, and what can be changed follows by PATCH.
        follows = self._aside is not None or any(item.changes for item in step.items)
        path = "/api/v1/runs/batch?changes=follow" if follows else "/api/v1/runs/batch"
        answer = self._ask("POST", path, body, "application/x-ndjson")
        if answer.is_daemons and answer.status == 200:
            try:
                result = read_batch(answer, len(step.items))
            except UnclearError as error:
                raise RetryError(str(error)) from error
            self.bytes = min(self.bytes + _MORE_BYTES, MAX_BYTES)
            return self._take_result(batch, step, result)
        if answer.status == 413:
            return self._shrink(batch, step, answer)
        if _is_body_fault(answer):
            return step.parts() or self._reject_run(batch, step.items[0], answer.status, answer.detail)
        return self._fail(batch, step, answer)

    def _take_result(self, batch: Batch, step: Runs, result: BatchResult) -> Sequence[Step]:
        if result.errors and result.details is None:  # a daemon that does not say which ones
            return step.parts() or self._reject_run(batch, step.items[0], 422, result.errors)
        batch.stored += result.inserted
        batch.duplicates += result.duplicates
        rejected = result.details or {}
        more: list[Step] = []
        later: list[RunItem] = []
        for index, reason in rejected.items():
            item = step.items[index]
            if reason.status in _PASSING:
                later.append(item)
            elif reason.status == _FORBIDDEN:
                batch.refuse(item.lines, reason.status, reason.detail)
            else:
                more += self._reject_run(batch, item, reason.status, reason.detail)
        if result.duplicates:
            # Which ones were known is not reported, and a known run stays as it is: so send the changes of all of them.
            more += [
                Update(item.event_id, item.changes, item.lines[1:])
                for index, item in enumerate(step.items)
                if item.changes and index not in rejected
            ]
        if later:
            more.append(Runs(later, postponed=f"The daemon takes {len(later)} of {len(step.items)} runs only later"))
        return more

    def _reject_run(self, batch: Batch, item: RunItem, status: int, reason: object) -> Sequence[Step]:
        if item.changes:  # is it the start that is wrong, or what was said later?
            start, *later = item.lines
            return [Runs([RunItem(start, [start])]), *updates_of(item.event_id, later)]
        whole = repair(item.body) if read_object(item.body) is None else None
        if whole is None:
            batch.refuse(item.lines, status, reason)
            return []
        self._counters.torn += 1
        again = Batch.of([whole])
        batch.dead += again.dead
        return again.steps

    # --- Events and changes ----------------------------------------------------------------------

    def _send_events(self, batch: Batch, step: Events) -> Sequence[Step]:
        body = orjson.dumps([item.event for item in step.items])
        answer = self._ask("POST", run_path(step.items[0].event_id) + "/events", body)
        if answer.is_daemons and answer.status in (200, 201) and accounts_for(answer, len(step.items)):
            batch.events += len(step.items)
            return []
        if answer.status == 413:
            return self._shrink(batch, step, answer)
        if _is_body_fault(answer) and len(step.items) > 1:
            return step.parts()
        if _is_body_fault(answer):
            batch.refuse(step.lines, answer.status, answer.detail)
            return []
        return self._handle_address_fault(batch, step, answer, body)

    def _find_run(self, batch: Batch, step: Nameless) -> Sequence[Step]:
        """Ask for the runs that have a run_id, and give each event to the one that it must have happened in."""
        answer = self._ask("GET", f"{runs_path(step.run_id)}&limit=1000&fields=event_id,start_time", None)
        if not answer.is_daemons or answer.status not in (200, 400) or not isinstance(answer.body, (list, dict)):
            return self._fail(batch, step, answer)
        runs = _runs_by_start(answer.body)
        if not runs:
            batch.refuse(step.lines, 404, answer.detail or f"No run has the run_id {step.run_id!r:.300}")
            return []
        found: dict[str, list[EventItem]] = {}
        for item in step.items:
            moment = canonical(str(item.event.get("timestamp"))) or ""
            begun = [event_id for start, event_id in runs if start <= moment]
            event_id = begun[-1] if begun else runs[0][1]
            found.setdefault(event_id, []).append(EventItem(event_id, item.event, item.line))
        return events_of(found)

    def _send_update(self, batch: Batch, step: Update) -> Sequence[Step]:
        body = orjson.dumps(step.fields)
        answer = self._ask("PATCH", run_path(step.event_id), body)
        has_done = answer.status == 200 and isinstance(answer.body, dict) and answer.body.get("updated") is True
        if answer.is_daemons and has_done:
            return []
        if answer.status == 413:
            return self._shrink(batch, step, answer)
        if _is_body_fault(answer) or (answer.is_daemons and answer.detail == _NOTHING_TO_UPDATE):
            if parts := step.parts():
                return parts
            batch.refuse(step.lines, answer.status, answer.detail)
            # One bad field must not keep the others from saying how the run ended.
            bad = named_fields(answer.detail)
            rest = {name: value for name, value in step.fields.items() if name not in bad}
            return [Update(step.event_id, rest, [])] if rest and len(rest) < len(step.fields) else []
        return self._handle_address_fault(batch, step, answer, body)

    def _handle_address_fault(self, batch: Batch, step: Events | Update, answer: Answer, body: bytes) -> Sequence[Step]:
        """Distinguish an address that no run has, one that no server accepts, and a wrong daemon or address."""
        if _is_unknown(answer):
            if self._aside is not None and not batch.was_aside:
                self._aside.look()  # the run's start may have been set aside by another process, just now
                if self._aside.holds(step.event_id):
                    return self._wait_aside(batch, step)
            batch.refuse(step.lines, answer.status, answer.detail)
            return []
        if answer.status in _PATH_FAULTS and self._is_taken(step, body):
            if not answer.is_daemons:
                return self._block(batch, step, answer)
            batch.refuse(step.lines, answer.status, answer.detail or NO_ADDRESS)
            return []
        return self._fail(batch, step, answer)

    def _fail(self, batch: Batch, step: Step, answer: Answer) -> Sequence[Step]:
        """Come back later, unless it is this very step that fails again and again."""
        if answer.status == 500:
            step.tries += 1
            parts = step.parts()
            if parts and step.tries >= _TRIES_BEFORE_SPLIT:
                return parts
            if not parts and step.tries >= _TRIES_BEFORE_GIVING_UP and self._is_healthy():
                if not answer.is_daemons:
                    return self._block(batch, step, answer)
                batch.refuse(step.lines, answer.status, answer.detail)
                return []
        raise _retry(answer)

    def _is_taken(self, step: Events | Update, body: bytes) -> bool:
        """Return whether the daemon itself answers the same request about another run, which does not exist.

        Then it is the event_id that has no place in an address; else the daemon or its address is wrong, for all runs.
        """
        method, suffix = ("POST", "/events") if isinstance(step, Events) else ("PATCH", "")
        answer = self._ask(method, run_path(new_uuid()) + suffix, body)
        return answer.is_daemons and (answer.status == 422 or _is_unknown(answer))

    def _is_healthy(self) -> bool:
        answer = self._ask("GET", "/health", None)
        is_well = answer.status == 200 and isinstance(answer.body, dict) and answer.body.get("status") == "ok"
        return answer.is_daemons and is_well

    # --- One request -----------------------------------------------------------------------------

    def report(self, method: str, path: str, body: bytes) -> Answer:
        """Send a request that concerns no line, and return its answer.

        Raises:
            RetryError: if the daemon takes nothing now.

        """
        answer = self._ask(method, path, body)
        if answer.status in _PASSING or not answer.is_daemons:
            raise _retry(answer)
        return answer

    def _ask(self, method: str, path: str, body: bytes | None, media_type: str = "application/json") -> Answer:
        try:
            answer = self._requests.request(method, path, body, media_type)
        except UnreachableError as error:
            raise RetryError(str(error)) from error
        flow = answer.headers.get(FLOW_HEADER)
        if flow is not None and answer.is_daemons:
            self.rows, self.pause_s = parse_flow(flow)
        return answer


_NOT_FOUND: Final = "Run not found"
_PATH_FAULTS: Final = (400, 404, 405, 414, 431)
"""Answers that an event_id may get which is no part of an address, from the daemon or from a proxy."""
_NOTHING_TO_UPDATE: Final = "No valid fields to update"


def _is_body_fault(answer: Answer) -> bool:
    """Return whether it is what we sent that is wrong, said by the daemon itself."""
    return answer.is_daemons and answer.status == 422


def _is_unknown(answer: Answer) -> bool:
    """Return whether the daemon says that there is no such run."""
    return answer.is_daemons and answer.status == 404 and str(answer.detail).startswith(_NOT_FOUND)


def _runs_by_start(body: object) -> list[tuple[str, str]]:
    """Return start_time and event_id of listed runs, the earliest first."""
    listed = [run for run in body if isinstance(run, dict)] if isinstance(body, list) else []
    return sorted((str(run.get("start_time")), str(run["event_id"])) for run in listed if "event_id" in run)


def _retry(answer: Answer) -> RetryError:
    """Return the error that makes us come back later."""
    is_refusal = 300 <= answer.status < 500 and answer.status not in (408, 425, 429)
    return RetryError(shown(answer), retry_after_s(answer), is_refusal=is_refusal)
