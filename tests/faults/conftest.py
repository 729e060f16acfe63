from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.ledger import Ledger
from tests.faults.power_cut import build_recorder

Rounds = Callable[..., int]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, which is a suite of its own."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("faults")


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> Rounds:
    """Return a function that takes how often (or how long) the long form does it, and says how often to do it now."""
    scale: float = request.config.getoption("--rounds-scale")

    def scaled(full: int, least: int = 1) -> int:
        return max(least, round(full * scale))

    return scaled


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Ledger:
    """Where a test writes down what it counted."""
    return Ledger.of(request)


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory if there is one: thousands of images are written to it."""
    memory = Path("/dev/shm")
    folder = (memory if os.access(memory, os.W_OK) else tmp_path) / f"images-{os.getpid()}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def recorder_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that records what a process does to its files; one, so that all its processes are forks of one."""
    return build_recorder(tmp_path_factory.mktemp("recorder"))
