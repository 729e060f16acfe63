"""The interval of a share: published figures, and that it holds the true share about as often as it says."""

from __future__ import annotations

from math import comb

import pytest

from telemetryd.model.intervals import CERTAINTY, wilson


@pytest.mark.parametrize(
    ("part", "whole", "low", "high"),
    [  # R. G. Newcombe, Two-sided confidence intervals for the single proportion, Stat. Med. 17 (1998), method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_figures(part: int, whole: int, low: float, high: float) -> None:
    assert wilson(part / whole, whole) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1 - part / whole, whole) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("whole", [1, 2, 7, 30, 1000, 10**9])
def test_the_share_is_within_its_bounds(whole: int) -> None:
    for part in {0, 1, whole // 3, whole}:
        low, high = wilson(part / whole, whole)
        assert 0 <= low < high <= 1
        assert low - 1e-12 <= part / whole <= high + 1e-12
    assert wilson(0, whole)[0] == pytest.approx(0, abs=1e-12)
    assert wilson(1, whole)[1] == pytest.approx(1)


@pytest.mark.parametrize("whole", [10, 30, 100])
def test_it_holds_the_true_share_as_often_as_it_says(whole: int) -> None:
    """The coverage on the average of all shares, computed exactly; a single share may be off by a few points."""
    shares = [step / 200 for step in range(1, 200)]
    holding = 0.0
    for share in shares:
        for part in range(whole + 1):
            low, high = wilson(part / whole, whole)
            if low <= share <= high:
                holding += comb(whole, part) * share**part * (1 - share) ** (whole - part)
    assert holding / len(shares) == pytest.approx(CERTAINTY, abs=0.01)
