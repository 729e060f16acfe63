"""Validates and converts what an agent records; keeps the values that the daemon would reject.

One wrong field never costs a run: it is left out, the log says so, and context_json has the value, shortened, under
`telemetryd.rejected`. A run needs an agent, a job, a start and ids: what is wrong of those is made good, and kept
there as well.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta
from typing import Any, Final, cast

from telemetryd.client.context import timestamp
from telemetryd.client.fields import COUNTS, FIELDS, FLAGS, NAMES, SOURCES, STATUSES, TIMES
from telemetryd.client.values import MAX_VALUES, SCALARS, Room, TooMuchError, key_of, plain, short, text_of
from telemetryd.git_urls import without_credentials
from telemetryd.timestamps import canonical, format_timestamp

REJECTED: Final = "telemetryd.rejected"
UNKNOWN: Final = "unknown"
"""The agent or the job of a run that names none."""
MAX_NAME: Final = 255
_MAX_COUNT: Final = 2**63 - 1
_MAX_REJECTED: Final = 50
_LAST_SECOND: Final = 253_402_300_799
"""9999-12-31T23:59:59Z"""
_FIRST_SECOND: Final = 100_000_000
"""3 March 1973: less is a time.monotonic() or a duration, not a time.time()."""
MAX_LABELS: Final = 32
MAX_LABEL_KEY: Final = 63
_LABEL_KEY: Final = re.compile(r"[a-z0-9][a-z0-9_.-]*", re.ASCII)
_DATE: Final = re.compile(r"\d{4}-?\d\d-?\d\d", re.ASCII)
_DIGITS: Final = re.compile(r"\d{1,19}", re.ASCII)
_FLAG_WORDS: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
OF_THE_SERVER: Final = frozenset({"id", "updated_at", "commit_url", "repo_url"})
"""What a fetched run has besides what can be given; a caller that records it again need not take it out."""

Json = dict[str, Any]
Complain = Callable[[str, str], None]
"""Gets the field that was left out, and why."""


class WrongValueError(Exception):
    """A value that a field cannot take; the text says what it must be."""


# --- One value -----------------------------------------------------------------------------------


def _text(value: object) -> str:
    text = value if type(value) is str else text_of(value)
    if text is None:
        raise WrongValueError("must be text")
    return text


def name_of(value: object) -> str:
    """Return a value as one of the names that identify a run.

    Raises:
        WrongValueError: if it is none.

    """
    text = _text(value)
    if not text.isascii() or "\0" in text:  # as the line will have it
        text = text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
    if not text.strip() or len(text) > MAX_NAME:
        raise WrongValueError(f"must be text of 1 to {MAX_NAME} characters that is not blank")
    return text


def _address(value: object) -> str | None:
    return without_credentials(_text(value))


def _whole(value: object) -> int:
    if type(value) is int and 0 <= value <= _MAX_COUNT:
        return value
    number = plain(value, Room())
    if isinstance(number, str) and _DIGITS.fullmatch(stripped := number.strip()):
        number = int(stripped)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if type(number) is int and 0 <= number <= _MAX_COUNT:
        return number
    raise WrongValueError(f"must be a whole number from 0 to {_MAX_COUNT}")


def _ordinal(value: object) -> int:
    number = _whole(value)
    if number == 0:
        raise WrongValueError(f"must be a whole number from 1 to {_MAX_COUNT}")
    return number


def _hex_id(digits: int) -> Callable[[object], str]:
    is_id = re.compile(rf"(?!0+$)[0-9a-f]{{{digits}}}", re.ASCII).fullmatch

    def take(value: object) -> str:
        text = text_of(value)
        if text is None or is_id(text) is None:
            raise WrongValueError(f"must be {digits} lower-case hexadecimal digits, not all of them 0")
        return text

    return take


def _label(labels: Mapping[str, Any], key: str, value: object) -> str | None:
    """Return the value of a label to be added to others; None removes it.

    Raises:
        WrongValueError: if it is none, or the key is not that of a label, or there are too many.

    """
    if len(key) > MAX_LABEL_KEY or _LABEL_KEY.fullmatch(key) is None:
        allowed = f"1 to {MAX_LABEL_KEY} characters of a-z, 0-9, _, . and -, the first one a letter or a digit"
        raise WrongValueError(f"must have a key of {allowed}")
    if key not in labels and len(labels) == MAX_LABELS:
        raise WrongValueError(f"is too much: a run has at most {MAX_LABELS} labels")
    return None if value is None else name_of(value)


def _milliseconds(value: object) -> int:
    """Return a duration; half a millisecond is no reason to lose it."""
    if type(value) is int:
        return _whole(value)
    if isinstance(value, timedelta):
        value = value / timedelta(milliseconds=1)
    elif getattr(getattr(value, "dtype", None), "kind", None) == "m":
        value = plain(value, Room())
        value = value * 1000 if isinstance(value, float) else value
    elif not isinstance(value, (str, bytes)):
        value = plain(value, Room())
    return _whole(round(value) if isinstance(value, float) and value - value == 0.0 else value)


def _flag(value: object) -> bool:
    flag = plain(value, Room())
    if isinstance(flag, str):
        flag = _FLAG_WORDS.get(flag.strip().lower())
    if isinstance(flag, (bool, int, float)) and flag in (0, 1):
        return bool(flag)
    raise WrongValueError("must be true or false")


def _status(value: object) -> str:
    if type(value) is str and value in STATUSES:
        return STATUSES[value]
    text = text_of(value)
    status = STATUSES.get(text.strip().lower()) if text is not None else None
    if status is None:
        raise WrongValueError(f"must be one of {', '.join(dict.fromkeys(STATUSES.values()))}")
    return status


def _source(value: object) -> str:
    text = text_of(value)
    if text is None or (word := text.strip().lower()) not in SOURCES:
        raise WrongValueError(f"must be one of {', '.join(SOURCES)}")
    return word


def _moment(value: object) -> str:
    moment: str | None = None
    if type(value) is str and (moment := canonical(value)) is not None:
        return moment
    if isinstance(value, datetime) and value == value and value.utcoffset() is not None:  # noqa: PLR0124 - NaT
        with contextlib.suppress(OverflowError, ValueError):
            moment = format_timestamp(value)
    elif isinstance(found := value if type(value) is str else plain(value, Room()), str):
        text = found.strip()
        is_date = _DATE.fullmatch(text) is not None
        moment = canonical(f"{text}T00:00:00" if is_date else text)
    elif isinstance(found, (int, float)) and not isinstance(found, bool) and _FIRST_SECOND <= found <= _LAST_SECOND:
        moment = timestamp(found)
    if moment is None:
        raise WrongValueError("must be a datetime, an ISO 8601 text, or seconds since the epoch as of time.time()")
    return moment


_TAKERS: Final[dict[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(NAMES, name_of),
    **dict.fromkeys(COUNTS, _whole),
    **dict.fromkeys(TIMES, _moment),
    **dict.fromkeys(FLAGS, _flag),
    "duration_ms": _milliseconds,
    "attempt": _ordinal,
    "trace_id": _hex_id(32),
    "span_id": _hex_id(16),
    "git_commit_source": _source,
    "git_repo": _address,
    "status": _status,
}
"""How a field's value is taken; every other field is text, or an object."""
_OBJECTS: Final = ("metrics_json", "context_json")
_LABELS: Final = "labels"
_TEXTS: Final = FIELDS - _TAKERS.keys() - {*_OBJECTS, _LABELS}
_NUMBERS: Final = frozenset((*COUNTS, "duration_ms"))
"""Most values are such, and need nothing."""


def _take(name: str, value: object) -> Any:
    """Return a field's value as the daemon takes it.

    Raises:
        WrongValueError: if there is no such form; the text says what it must be.

    """
    try:
        return _TAKERS.get(name, _text)(value)
    except (WrongValueError, TooMuchError):
        raise
    except Exception as error:  # an agent's own class may do anything
        raise WrongValueError("cannot be read") from error


# --- A run's values ------------------------------------------------------------------------------


class Bag:
    """Figures or facts of a run so far, which become one JSON object, within the daemon's bounds."""

    __slots__ = ("_left", "_sizes", "values")

    def __init__(self) -> None:
        self.values: Json = {}
        self._left = MAX_VALUES - 4 * _MAX_REJECTED
        self._sizes: dict[str, int] = {}
        """How many keys and values those hold that hold any."""

    def put(self, name: str, value: object) -> None:
        """Add a value, or replace one.

        Raises:
            WrongValueError: if it cannot be had, or is too much; what there was stays.

        """
        left = self._left - (0 if name in self.values else 2) + self._sizes.get(name, 0)
        if left < 0:
            raise WrongValueError(_TOO_MUCH)
        if type(value) in SCALARS or (type(value) is int and -_MAX_COUNT <= value <= _MAX_COUNT):
            kept, size = value, 0
        else:
            room = Room(left)
            try:
                kept = plain(value, room, _DEPTH)
            except TooMuchError as error:
                raise WrongValueError(_TOO_MUCH) from error
            except Exception as error:  # an agent's own class may do anything
                raise WrongValueError("cannot be read") from error
            size = left - room.left
        self.values[name] = kept
        self._left = left - size
        if size or name in self._sizes:
            self._sizes[name] = size


_TOO_MUCH: Final = f"is too much: one JSON object holds at most {MAX_VALUES} keys and values"
_DEPTH: Final = 63
"""One level less than a JSON object may have, as it stands in one."""


class Intake:
    """Sorts what is said of one run, call after call.

    PATCH replaces metrics_json and context_json as a whole, so they always hold everything said so far; so do labels,
    each of which replaces the one before.
    """

    __slots__ = ("_bags", "_complain", "_is_reported", "_rejected")

    def __init__(self, complain: Complain) -> None:
        self._complain = complain
        self._bags: dict[str, Bag] = {}
        self._rejected: Json = {}
        self._is_reported = True

    def name(self, field: str, value: object, otherwise: Callable[[], str]) -> str:
        """Return a name that a run must have: the given one, or what can be made of it, or another."""
        if value is None:
            return otherwise()
        if _is_usual(value):
            return cast("str", value)
        try:
            return str(_take("event_id", value))  # every name is taken like this one
        except (WrongValueError, TooMuchError) as error:
            self.reject(field, value, str(error))
        text: str | None = None
        with contextlib.suppress(Exception):  # an agent's own class may do anything
            text = text_of(value)
        return shortened(text) if text is not None and text.strip() else otherwise()

    def required(self, field: str, value: object) -> str:
        """Return the agent's or the job's name; what is missing is reported like what is wrong."""
        if _is_usual(value):
            return cast("str", value)
        if value is None:
            self.reject(field, None, "must be given")
        return self.name(field, value, lambda: UNKNOWN)

    def reject(self, field: str, value: object, why: str) -> None:
        """Keep a value that is left out, and report it."""
        if len(self._rejected) < _MAX_REJECTED or field in self._rejected:
            self._rejected[field] = short(value) if field != "git_repo" else f"({type(value).__name__})"  # a secret?
            self._is_reported = False
        self._complain(field, why)

    def sort(self, given: Mapping[Any, Any], known: frozenset[str]) -> Json:
        """Return what is said as fields that the daemon takes; what has no field (any more) is metrics or context."""
        fields: Json = {}
        joined: set[str] = set()
        for name, value in [*given.items()]:
            if value is None or (name in _OBJECTS and is_null_text(value)):
                continue  # as null in a request: nothing is said
            kind = type(value)
            if name in known and (
                (kind is str and name in _TEXTS) or (kind is int and name in _NUMBERS and 0 <= value <= _MAX_COUNT)
            ):
                fields[name] = value
            elif name not in known:
                joined |= self._put_elsewhere(name, value)
            elif name in _OBJECTS:
                joined |= self._put_all(name, value)
            elif name == _LABELS:
                joined |= self._put_labels(value)
            else:
                self._put_field(fields, name, value)
        if not self._is_reported:
            self._report_rejected()
            joined.add("context_json")
        for name in joined:
            fields[name] = self._bag(name).values
        return fields

    def _bag(self, place: str) -> Bag:
        bag = self._bags.get(place)
        if bag is None:
            bag = self._bags[place] = Bag()
        return bag

    def status(self, value: object) -> str:
        """Return how a run ended; one that ended in no known way has ended all the same, and counts as partial."""
        if type(value) is str and value in STATUSES:
            return STATUSES[value]
        try:
            return "success" if value is None else str(_take("status", value))
        except WrongValueError as error:
            self.reject("status", value, str(error))
            return "partial"

    def event(self, event_type: object, payload: object, more: Mapping[Any, Any]) -> Json:
        """Return an event as the daemon takes it; an intake is for the events or for the fields of a run."""
        event: Json = {"event_type": self.required("event_type", event_type)}
        for part in (payload, more):
            self._put_all("context_json", part, "payload")
        if not self._is_reported:
            self._report_rejected()
        if kept := self._bag("context_json").values:
            event["payload"] = kept
        return event

    def _report_rejected(self) -> None:
        values = self._bag("context_json").values
        before = values.get(REJECTED)
        values[REJECTED] = {**before, **self._rejected} if isinstance(before, dict) else dict(self._rejected)
        self._is_reported = True

    def _put_field(self, fields: Json, name: str, value: object) -> None:
        try:
            taken = _take(name, value)
        except (WrongValueError, TooMuchError) as error:
            self.reject(name, value, str(error) or _TOO_MUCH)
        else:
            if taken is not None:
                fields[name] = taken
            else:
                self._complain(name, "has no form in which host and path can be distinguished from a secret")

    def _put_elsewhere(self, name: object, value: object) -> set[str]:
        """Put a value without a field into metrics or context; return which it was."""
        if name == "git_repo":  # it cannot be changed any more, but may hold a secret all the same
            fields: Json = {}
            self._put_field(fields, name, value)
            value = fields.get(name)
        place = "metrics_json" if _is_number(value) else "context_json"
        return {place} if self._put(self._bag(place), name, value) else set()

    def _put_all(self, place: str, value: object, called: str = "") -> set[str]:
        """Put the members of an object into metrics or context; return which it was, unless nothing could be had."""
        try:
            members = [*(value if type(value) is dict else object_of(value)).items()]
        except Exception:  # noqa: BLE001 - an agent's own class may do anything
            self.reject(called or place, value, "cannot be read")
            return set()
        bag, is_kept = self._bag(place), not members
        for name, item in members:
            is_kept |= self._put(bag, name, item)
        return {place} if is_kept else set()

    def _put_labels(self, value: object) -> set[str]:
        """Take labels, each by itself; return that they were said, unless nothing could be had."""
        try:
            members = [*(value if type(value) is dict else object_of(value)).items()]
        except Exception:  # noqa: BLE001 - an agent's own class may do anything
            self.reject(_LABELS, value, "cannot be read")
            return set()
        labels, is_said = self._bag(_LABELS), False
        for name, item in members:
            key = name if type(name) is str else key_of(name)
            try:
                labels.put(key, _label(labels.values, key, item))
            except WrongValueError as error:
                self.reject(f"{_LABELS}.{key}"[:MAX_NAME], item, str(error))
            else:
                is_said = True
        return {_LABELS} if is_said else set()

    def _put(self, bag: Bag, name: object, value: object) -> bool:
        key = name if type(name) is str else key_of(name)
        try:
            bag.put(key, value)
        except WrongValueError as error:
            self.reject(key, value, str(error))
            return False
        return True


def _is_usual(value: object) -> bool:
    """Return whether a name is what nearly every agent gives, which needs no second look."""
    if type(value) is not str:
        return False
    return value.isascii() and value.isprintable() and 0 < len(value) <= MAX_NAME and not value.isspace()


def _is_number(value: object) -> bool:
    """Return whether a value that has no field is a figure."""
    kind = type(value)
    if kind in SCALARS or kind is int:
        return kind is int or kind is float or kind is bool
    try:
        return isinstance(plain(value, Room(100)), (int, float))
    except Exception:  # noqa: BLE001 - an agent's own class may do anything
        return False


def shortened(name: str) -> str:
    """Return a name that is too long as one that is not; the same again, so that a repeat is known."""
    import hashlib  # noqa: PLC0415 - rarely needed

    text = name.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return f"{text[: MAX_NAME - 17]}-{digest}"


def is_null_text(value: object) -> bool:
    """Return whether a text in the place of an object says nothing, as agents of the replaced library wrote it."""
    return isinstance(value, str) and value.strip() in ("", "null")


def object_of(value: object) -> Mapping[Any, Any]:
    """Return metrics, context or a payload as an object; agents of the replaced library may give its JSON text."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, Mapping):
        return value
    if value is None:
        return {}
    if not isinstance(value, (list, str, int, float, date)):
        record = plain(value, Room())
        if isinstance(record, dict):
            return record
    return {"value": value}
