"""Quantiles of durations: a DDSketch in one integer; addition merges sketches, subtraction removes runs.

Each bin is one digit in base 2**32, the lowest digit for bin 0, and counts the values that fall into the bin, up to two
thousand million of them. So any order of additions and subtractions ends at exactly the sketch of the values that are
left. The bins are those of the library `ddsketch` (Masson, Rim, Lee: "DDSketch", VLDB 2019), which guarantees the
relative error.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from struct import unpack as unpack_struct
from typing import Final

from ddsketch.mapping import LogarithmicMapping

ERROR: Final = 0.01
"""A quantile differs by at most this part of itself from the exact one, before it is rounded to a whole number."""
DIGIT: Final = 32
"""Bits of one digit."""

_MAPPING: Final = LogarithmicMapping(ERROR)
_SIGN: Final = 1 << (DIGIT - 1)
_BYTES: Final = DIGIT // 8
_HEADER: Final = 3


@lru_cache(maxsize=100_000)
def bin_of(value: int) -> int:
    """Return the bin of a value from 1 to 2**63 - 1; zeros have none, because their number follows from the total."""
    return int(_MAPPING.key(value))


def of(bins: Mapping[int, int]) -> int:
    """Return the sketch that has these counts, which may be below zero: then it takes away."""
    if not bins:
        return 0
    first = min(bins)
    added = bytearray((max(bins) - first + 1) * _BYTES)
    taken = 0
    for number, count in bins.items():
        if count >= 0:
            place = (number - first) * _BYTES
            added[place : place + _BYTES] = count.to_bytes(_BYTES, "little")
        else:
            taken += -count << (DIGIT * (number - first))
    return (int.from_bytes(added, "little") - taken) << (DIGIT * first)


def pack(sketch: int) -> bytes:
    """Return a sketch as it is stored, in as few bytes as its largest count needs.

    The first byte is the width of a count, the next two are the lowest bin (little-endian), then follow the counts.
    """
    if not sketch:
        return b""
    first = ((sketch & -sketch).bit_length() - 1) // DIGIT
    wide = _digits(sketch >> (DIGIT * first)) if sketch > 0 else b""
    zeros, width = wide.count(0), 0
    while width < _BYTES and zeros != (_BYTES - width) * len(wide) // _BYTES:
        zeros -= wide[width::_BYTES].count(0)
        width += 1
    # A count is below zero if somebody has changed runs by hand; it has borrowed from the next digit.
    if sketch < 0 or (width == _BYTES and max(wide[_BYTES - 1 :: _BYTES]) > 127):
        return pack(_without_debts(sketch))
    packed = bytearray(len(wide) // _BYTES * width)
    for place in range(width):
        packed[place::width] = wide[place::_BYTES]
    return bytes([width]) + first.to_bytes(2, "little") + packed


def unpack(packed: bytes) -> int:
    """Return the sketch that `pack` has packed."""
    if not packed:
        return 0
    width, data = packed[0], packed[_HEADER:]
    wide = bytearray(len(data) // width * _BYTES)
    for place in range(width):
        wide[place::_BYTES] = data[place::width]
    return int.from_bytes(wide, "little") << (DIGIT * int.from_bytes(packed[1:_HEADER], "little"))


def quantiles(sketch: int, values: int, percents: Sequence[int]) -> list[int]:
    """Return for each percent the value with so many below it, of so many values in all, rounded to whole numbers.

    It is the one that stands at `percent / 100 * (values - 1)`, rounded down, when they are sorted and counted from 0.
    There must be at least one value; what the bins do not count is zero.
    """
    if not sketch:
        return [0] * len(percents)
    first = ((sketch & -sketch).bit_length() - 1) // DIGIT
    wide = _digits(sketch >> (DIGIT * first)) if sketch > 0 else b""
    counts = unpack_struct(f"<{len(wide) // _BYTES}I", wide)
    reached = [*accumulate(counts)]
    if not counts or (reached[-1] > values and max(counts) >= _SIGN):  # see `pack`
        return quantiles(_without_debts(sketch), values, percents)
    zeros = max(values - reached[-1], 0)
    last = zeros + reached[-1] - 1
    places = (percent * last // 100 - zeros for percent in percents)
    return [value_of(first + bisect_right(reached, place)) if place >= 0 else 0 for place in places]


@lru_cache(maxsize=10_000)
def value_of(number: int) -> int:
    """Return the value that stands for all of a bin."""
    return round(_MAPPING.value(number))


def _digits(sketch: int) -> bytes:
    return sketch.to_bytes((sketch.bit_length() + DIGIT - 1) // DIGIT * _BYTES, "little")


def _without_debts(sketch: int) -> int:
    """Return a sketch with zeros in the place of counts below zero."""
    kept = place = 0
    while sketch:
        digit = sketch & (2 * _SIGN - 1)
        digit -= 2 * _SIGN if digit >= _SIGN else 0
        kept += max(digit, 0) << (DIGIT * place)
        sketch = (sketch - digit) >> DIGIT
        place += 1
    return kept
