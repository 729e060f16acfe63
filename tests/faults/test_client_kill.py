"""Agents and daemon killed at random: every run whose recording had returned is stored, whole, exactly once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.tools.client_soak import Soak


def _rounds(folder: Path, rounds: int, agents: int) -> None:
    seed = random.randrange(1 << 30)
    soak = Soak(folder, agents, seed=seed)
    try:
        for _ in range(rounds):
            soak.disturb()
        verdict = soak.finish()
    finally:
        soak.close()
    assert (verdict.lost, verdict.twice, verdict.left) == (set(), 0, 0), f"seed {seed}: {verdict}"
    assert verdict.promised > rounds * 10, verdict


def test_a_dozen_deaths(tmp_path: Path) -> None:
    _rounds(tmp_path, 12, 2)


@pytest.mark.slow
def test_two_hundred_deaths(tmp_path: Path) -> None:
    _rounds(tmp_path, 200, 3)
