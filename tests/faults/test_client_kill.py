"""Agents and daemon killed at random: every run whose recording had returned is stored, whole, exactly once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.faults.conftest import Rounds
from tests.faults.ledger import Ledger
from tests.tools.client_soak import Soak


def _disturb(folder: Path, ledger: Ledger, times: int, agents: int) -> None:
    seed = random.randrange(1 << 30)
    soak = Soak(folder, agents, seed=seed)
    try:
        for number in range(times):
            soak.disturb()
            wait_until(lambda enough=number * 10: len(soak.promised()) > enough)  # type: ignore[misc]
        verdict = soak.finish()
    finally:
        soak.close()
    assert verdict.left == 0, f"seed {seed}: {verdict}"
    assert verdict.promised > (times - 1) * 10, verdict
    ledger.record(
        fault="SIGKILL of clients and daemon, then `sync`",
        mode="WAL",
        rounds=verdict.agent_kills + verdict.daemon_kills,
        acknowledged=verdict.promised,
        lost=len(verdict.lost),
        duplicated=verdict.twice,
        unrecovered=len(verdict.damage),
        server_errors=verdict.server_errors,
        notes=[f"seed {seed}: {verdict}", *verdict.damage],
    )


def test_a_dozen_deaths(tmp_path: Path, ledger: Ledger) -> None:
    _disturb(tmp_path, ledger, 12, 2)


@pytest.mark.slow
def test_two_hundred_deaths(tmp_path: Path, ledger: Ledger, rounds: Rounds) -> None:
    _disturb(tmp_path, ledger, rounds(200, least=20), 3)
