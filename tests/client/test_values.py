"""Any Python value as the nearest one that JSON can hold; numbers of other libraries are numbers."""

from __future__ import annotations

import collections
import dataclasses
import enum
import json
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from telemetryd.client.lines import encode
from telemetryd.client.values import Room, TooMuchError, plain, short, text_of
from tests.needs import require_package


class Float(float):
    pass


class Whole:
    """As numpy's integers: no int, but one by what it can do."""

    shape = ()

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


class Single:
    """As numpy's other scalars, its arrays without dimensions, and torch's: `item()` gives the value."""

    shape = ()

    def __init__(self, value: object) -> None:
        self.value = value

    def item(self) -> object:
        return self.value

    def __str__(self) -> str:
        return str(self.value)


class Array:
    """As numpy's arrays."""

    def __init__(self, *values: float) -> None:
        self.values = values
        self.shape = (len(values),)

    def tolist(self) -> list[float]:
        return [*self.values]


class Kind(enum.Enum):
    FAST = "fast"
    SECOND = 2


class Word(enum.StrEnum):
    ONE = "one"


@dataclasses.dataclass
class Usage:
    tokens: object
    model: str = "m"


class Model:
    """As pydantic's models."""

    def model_dump(self) -> dict[str, object]:
        return {"tokens": Whole(5)}


Point = collections.namedtuple("Point", "x y")


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("never")

    __repr__ = __str__


CYCLE: dict[str, Any] = {"a": 1}
CYCLE["again"] = CYCLE
DEEP: Any = []
for _ in range(100):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Float(0.25), 0.25),
        (Whole(7), 7),
        (Single(0.5), 0.5),
        (Single(True), True),
        (Array(1, 2.5), [1, 2.5]),
        (Decimal(7), 7),
        (Decimal("12.00"), 12),
        (Decimal("0.25"), 0.25),
        (Decimal("1e999999999"), "1E+999999999"),
        (Decimal("NaN"), None),
        (Decimal("Infinity"), None),
        (Fraction(1, 4), 0.25),
        (Fraction(6, 3), 2),
        (Fraction(10**400, 3), f"{10**400}/3"),
        (2**63, 2**63),
        (2**70, str(2**70)),
        (float("inf"), None),
        (Kind.FAST, "fast"),
        (Kind.SECOND, 2),
        (Word.ONE, "one"),
        (Usage(Decimal(5)), {"tokens": 5, "model": "m"}),
        (Model(), {"tokens": 5}),
        (Point(1, Whole(2)), {"x": 1, "y": 2}),
        ({3}, [3]),
        (collections.deque([1]), [1]),
        (range(3), [0, 1, 2]),
        (b"ab\xff", "ab\\xff"),
        (timedelta(seconds=1, milliseconds=500), 1.5),
        (datetime(2025, 12, 24, tzinfo=UTC), "2025-12-24T00:00:00+00:00"),
        (date(2025, 12, 24), "2025-12-24"),
        (time(10, 30), "10:30:00"),
        (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (Path("/x"), "/x"),
        (ValueError("bad"), "ValueError: bad"),
        ({1: 1, None: 2, (1, 2): 3, Kind.FAST: 4}, {"1": 1, "null": 2, "(1, 2)": 3, "fast": 4}),
        ({True: 1, 0.5: 2}, {"true": 1, "0.5": 2}),
        (Unspeakable(), "(Unspeakable that cannot be shown)"),
        (CYCLE, {"a": 1, "again": "(dict that contains itself)"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_becomes_the_nearest_that_json_can_hold(value: object, expected: object) -> None:
    told = json.loads(encode({"value": plain(value, Room())}))["value"]
    assert told == expected
    assert type(told) is type(expected)


def test_a_level_that_is_too_deep_becomes_a_word() -> None:
    text = json.dumps(plain(DEEP, Room()))
    assert text.count("[") == 64
    assert "list on a level of nesting that is too deep" in text


@pytest.mark.parametrize(
    "value", [range(10**12), [[0] * 60_000] * 3, Array(*range(200_000))], ids=["range", "lists", "array"]
)
def test_what_is_too_much_is_reported_before_it_is_made(value: object) -> None:
    with pytest.raises(TooMuchError):
        plain(value, Room())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, "5"),
        (Decimal("12.50"), "12.50"),
        (Single(0.5), "0.5"),
        (b"bytes", "bytes"),
        (Path("/x"), "/x"),
        (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (Kind.FAST, "fast"),
        (datetime(2025, 12, 24), "2025-12-24T00:00:00"),
        (KeyError("bad"), "KeyError: 'bad'"),
        (True, None),
        (["a"], None),
        ({"a": 1}, None),
        (Array(1), None),
        (object(), None),
        (str, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_text_is_what_says_how_it_is_written(value: object, text: str | None) -> None:
    assert text_of(value) == text


@pytest.mark.parametrize(
    "value", ["x" * 1000, ["x" * 100] * 1000, Unspeakable(), DEEP, 10**5000, b"x" * 1000], ids=type
)
def test_what_was_left_out_is_reported_in_short(value: object) -> None:
    assert 0 < len(short(value)) <= 200


def numpy_values() -> Iterator[tuple[object, object]]:
    require_package("numpy")
    import numpy  # here: where it is missing, only this is skipped

    yield numpy.int64(7), 7
    yield numpy.float32(0.5), 0.5
    yield numpy.float64(0.25), 0.25
    yield numpy.bool_(True), True
    yield numpy.array(5), 5
    yield numpy.array([[1, 2]]), [[1, 2]]
    yield numpy.datetime64("2025-12-24T10:00:00.123456789"), "2025-12-24T10:00:00.123456789"
    yield numpy.datetime64("NaT"), None
    yield numpy.timedelta64(1500, "ms"), 1.5


def test_the_numbers_of_numpy_are_numbers() -> None:
    for value, expected in numpy_values():
        told = plain(value, Room())
        assert (told, type(told)) == (expected, type(expected)), repr(value)
