"""Converts any Python value to the nearest JSON value that the daemon accepts.

Values of other libraries (numpy, pandas, torch, pydantic …) are recognised by what they can do: none is imported.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence, Set
from datetime import date, time, timedelta
from enum import Enum
from typing import Any, Final

MAX_DEPTH: Final = 64
MAX_VALUES: Final = 100_000
"""Levels of nesting, and keys and values, of one JSON object at most; a test compares both with model/values.py."""
_LEAST, _MOST = -(2**63), 2**64 - 1
"""The integers that orjson writes."""
_MOST_SHOWN: Final = 10_000
"""Characters that are kept of an object that has no form in JSON."""
_SHORT: Final = 200
_MORE: Final = "…"

SCALARS: Final = frozenset({str, bool, type(None), float})
"""Types whose values are JSON as they are; so are integers, unless they are too large."""


class TooMuchError(Exception):
    """A value holds more keys and values than the daemon takes."""


class Room:
    """How many keys and values may still be written, and which containers are being written."""

    __slots__ = ("left", "open")

    def __init__(self, left: int = MAX_VALUES) -> None:
        self.left = left
        self.open: set[int] = set()

    def take(self, count: int) -> None:
        """Take some of the room.

        Raises:
            TooMuchError: if there is not as much.

        """
        self.left -= count
        if self.left < 0:
            raise TooMuchError


def plain(value: object, room: Room, depth: int = MAX_DEPTH) -> Any:
    """Return a value as JSON can hold it; `depth` is how many levels of nesting are left.

    Raises:
        TooMuchError: if it holds more than there is room for.

    """
    if type(value) in SCALARS:
        return value
    inner = _opened(value)
    if not isinstance(inner, (dict, list)):
        return inner
    if depth == 0:
        return f"({type(value).__name__} on a level of nesting that is too deep)"
    if id(value) in room.open:
        return f"({type(value).__name__} that contains itself)"
    room.open.add(id(value))
    try:
        if isinstance(inner, list):
            room.take(len(inner))
            return [plain(item, room, depth - 1) for item in inner]
        room.take(2 * len(inner))
        return {key_of(key): plain(item, room, depth - 1) for key, item in inner.items()}
    finally:
        room.open.discard(id(value))


def _opened(value: object) -> Any:
    """Return what stands for a value one level deep: a dict or a list of whatever it holds, or a scalar."""
    if isinstance(value, Enum):
        return plain(value.value, Room())
    for find in (_exact, _container, _moment_or_span, _number, _array, _record):
        if (found := find(value)) is not NotImplemented:
            return found
    return shown(value, _MOST_SHOWN)


def _exact(value: object) -> Any:
    """Return an integer, or a number or a text of a subclass, as the plain one."""
    if isinstance(value, int):
        return value if isinstance(value, bool) else _integer(int.__index__(value))
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).decode("utf-8", "backslashreplace")
    return summary_of(value) if isinstance(value, BaseException) else NotImplemented


def _container(value: object) -> Any:
    if not isinstance(value, (Mapping, Sequence, Set)):
        return NotImplemented
    if len(value) > MAX_VALUES:  # before it is copied: a range has no bound
        raise TooMuchError
    if isinstance(value, Mapping):
        return dict(value)
    named = getattr(value, "_asdict", None) if isinstance(value, tuple) else None
    return list(value) if named is None else dict(named())


def _moment_or_span(value: object) -> Any:
    if isinstance(value, timedelta):
        return _finite(value.total_seconds())
    if isinstance(value, (date, time)):
        return None if value != value else value.isoformat()  # noqa: PLR0124 - NaT differs from itself
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    if kind == "M" and _is_single(value):
        return None if (text := str(value)) == "NaT" else text
    if kind == "m" and _is_single(value):
        unit: Callable[..., Any] = type(value)
        return _finite(float(value / unit(1, "s")))
    return NotImplemented


def _is_single(value: object) -> bool:
    shape = getattr(value, "shape", None)
    return isinstance(shape, Sequence) and len(shape) == 0 and not isinstance(value, type)


def _number(value: object) -> Any:
    """Return whatever says of itself that it is a number as an int where it is whole, else as a float."""
    kind = type(value)
    if kind.__name__ == "NAType":
        return None
    if getattr(value, "shape", None) is not None:
        if not _is_single(value):
            return NotImplemented
        item = getattr(value, "item", None)
        inner = item() if callable(item) else value
        if not isinstance(inner, kind):  # numpy's longdouble gives itself
            return _opened(inner)
    if hasattr(kind, "__index__"):
        return _integer(operator.index(value))  # type: ignore[arg-type]
    return _real(value) if hasattr(kind, "__float__") else NotImplemented


def _real(value: Any) -> Any:
    try:
        number = float(value)
    except OverflowError:
        return shown(value, _MOST_SHOWN)
    except (TypeError, ValueError):  # a symbol, a number with a unit
        return NotImplemented
    if math.isinf(number) and not _is_infinite(value):
        return shown(value, _MOST_SHOWN)
    if math.isfinite(number) and not isinstance(value, float) and (whole := int(value)) == value:
        return _integer(whole)
    return _finite(number)


def _is_infinite(value: Any) -> bool:
    is_infinite = getattr(value, "is_infinite", None)  # Decimal
    return bool(is_infinite()) if callable(is_infinite) else False


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _integer(value: int) -> int | str:
    if _LEAST <= value <= _MOST:
        return value
    return shown(value, _MOST_SHOWN)


def _array(value: object) -> Any:
    """Return arrays of numbers (numpy, torch, pandas) as lists, unless that takes too much memory."""
    to_list, shape = getattr(value, "tolist", None), getattr(value, "shape", None)
    if not callable(to_list) or not isinstance(shape, Sequence) or isinstance(value, type):
        return NotImplemented
    if math.prod(shape) > MAX_VALUES:
        raise TooMuchError
    return to_list()


def _record(value: object) -> Any:
    """Return the fields of a dataclass or of a pydantic model."""
    if isinstance(value, type):
        return NotImplemented
    if (fields := getattr(value, "__dataclass_fields__", None)) is not None:
        return {name: getattr(value, name, None) for name in fields}
    dump = getattr(value, "model_dump", None)
    return dict(dump()) if callable(dump) else NotImplemented


def key_of(key: object) -> str:
    """Return a key as json.dumps writes it; never raises."""
    if type(key) is str:
        return key
    try:
        value = plain(key, Room())
    except Exception:  # noqa: BLE001 - an agent's own class may do anything
        value = shown(key)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return shown(key) if isinstance(value, (dict, list)) else str(value)


# --- Text ----------------------------------------------------------------------------------------


def text_of(value: object) -> str | None:
    """Return a value as the text of a field, or None if it is no text: a list, say, or True.

    Text is whatever says how it is written (a path, a UUID, a URL, an exception), and a number.
    """
    if isinstance(value, Enum):
        return text_of(value.value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bool):
        return None
    for find in (_exact, _moment_or_span, _number):
        if (found := find(value)) is not NotImplemented:
            is_text = found is not None and not isinstance(found, (bool, list, dict))
            return str(value if find is _number else found) if is_text else None  # 12.50 stays 12.50
    is_made_of_others = isinstance(value, (Mapping, Sequence, Set, type)) or getattr(value, "shape", None) is not None
    return None if is_made_of_others or type(value).__str__ is object.__str__ else str(value)


def summary_of(error: BaseException) -> str:
    """Return an exception in one line: its class and its text."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - an agent's own __str__ may do anything
        text = "(its text cannot be made)"
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def shown(value: object, most: int = _SHORT) -> str:
    """Return some text for any value, cut to `most` characters; never raises."""
    try:
        text = hex(value) if isinstance(value, int) and value.bit_length() > most else str(value)
    except Exception:  # noqa: BLE001 - an agent's own __str__ may do anything
        text = f"({type(value).__name__} that cannot be shown)"
    return text if len(text) <= most else text[: most - 1] + _MORE


def short(value: object) -> Any:
    """Return a value that was left out as it is reported: a scalar as it is, all else as short text; never raises."""
    try:
        import reprlib  # noqa: PLC0415 - rarely needed, and not to be had any more at the end of the interpreter

        found = value if type(value) in SCALARS else _opened(value)
        return shown(found if isinstance(found, str) else reprlib.repr(value)) if not _is_scalar(found) else found
    except Exception:  # noqa: BLE001 - an agent's own __repr__ may do anything
        return shown(value)


def _is_scalar(value: object) -> bool:
    return value is None or (isinstance(value, (bool, int, float)) and math.isfinite(value))
