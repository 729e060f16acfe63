from __future__ import annotations

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from telemetryd.model import sketches
from telemetryd.model.values import MAX_INTEGER

PERCENTS = (0, 1, 50, 95, 99, 100)
DURATIONS = st.lists(
    st.one_of(st.integers(0, 3), st.integers(0, 100_000), st.integers(0, MAX_INTEGER)), min_size=1, max_size=300
)


def sketch_of(values: list[int]) -> int:
    return sketches.of(Counter(sketches.bin_of(value) for value in values if value))


def assert_within_the_stated_error(found: list[int], values: list[int]) -> None:
    ordered = sorted(values)
    for percent, quantile in zip(PERCENTS, found, strict=True):
        exact = ordered[percent * (len(ordered) - 1) // 100]
        assert abs(quantile - exact) <= sketches.ERROR * exact * (1 + 1e-9) + 0.5, (percent, quantile, exact)


@given(DURATIONS)
def test_quantiles_are_within_the_stated_error(values: list[int]) -> None:
    assert_within_the_stated_error(sketches.quantiles(sketch_of(values), len(values), PERCENTS), values)


@given(DURATIONS, DURATIONS)
def test_merging_is_adding_and_taking_away_is_subtracting(some: list[int], others: list[int]) -> None:
    assert sketch_of(some) + sketch_of(others) == sketch_of(some + others)
    assert sketch_of(some + others) - sketch_of(others) == sketch_of(some)
    taken = sketches.of({sketches.bin_of(value): -count for value, count in Counter(others).items() if value == 7})
    assert taken == -sketch_of([value for value in others if value == 7])


@given(st.dictionaries(st.integers(0, 2200), st.one_of(st.integers(1, 300), st.integers(1, 2**31 - 1)), max_size=50))
def test_what_is_packed_is_unpacked(bins: dict[int, int]) -> None:
    sketch = sketches.of(bins)
    packed = sketches.pack(sketch)
    assert sketches.unpack(packed) == sketch
    if bins:
        width = math.ceil(max(bins.values()).bit_length() / 8)
        assert len(packed) == 3 + width * (max(bins) - min(bins) + 1)


@given(st.dictionaries(st.integers(0, 300), st.integers(-1000, 1000), max_size=50))
def test_counts_below_zero_are_forgotten(bins: dict[int, int]) -> None:
    left = sketches.of({number: count for number, count in bins.items() if count > 0})
    assert sketches.unpack(sketches.pack(sketches.of(bins))) == left
    values = sum(bins.values())
    if values > 0:
        assert sketches.quantiles(sketches.of(bins), values, PERCENTS) == sketches.quantiles(left, values, PERCENTS)
