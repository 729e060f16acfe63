"""The wheel: the same bytes from the same commit wherever it is built, small, and complete."""

from __future__ import annotations

import configparser
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

import telemetryd
from tests.tools import source

ROOT = Path(__file__).parents[1]
LARGEST_BYTES = 1_000_000


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What two builds have made, with the tools that are here."""
    folders = [tmp_path_factory.mktemp("wheels") for _ in range(2)]
    for folder, umask in zip(folders, (0o022, 0o077), strict=True):
        before = os.umask(umask)
        try:
            source.build_wheel(folder, "--no-isolation")
        finally:
            os.umask(before)
    return [wheel for folder in folders for wheel in folder.glob("*.whl")]


def test_two_builds_of_a_commit_are_the_same_bytes(wheels: list[Path]) -> None:
    assert wheels[0].read_bytes() == wheels[1].read_bytes()


def test_it_is_small(wheels: list[Path]) -> None:
    assert wheels[0].stat().st_size < LARGEST_BYTES


def test_it_has_every_module_and_every_file_of_data(wheels: list[Path]) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    places = {"telemetryd/": "telemetryd/", "migrations/": "telemetryd/migrations/", "schema/": "telemetryd/schema/"}
    wanted = {
        name.replace(there, here, 1) for there, here in places.items() for name in tracked if name.startswith(there)
    }
    assert wanted <= set(zipfile.ZipFile(wheels[0]).namelist())


def test_the_tool_that_builds_it_is_the_same_everywhere() -> None:
    """Another version of setuptools makes other bytes."""
    listed = configparser.ConfigParser()
    listed.read(ROOT / "setup.cfg")
    [pinned] = [line for line in listed["options.extras_require"]["dev"].split() if line.startswith("setuptools")]
    assert f'requires = ["{pinned}"]' in (ROOT / "pyproject.toml").read_text()


def test_the_package_of_debian_has_the_same_version() -> None:
    assert (ROOT / "debian" / "changelog").read_text().startswith(f"telemetryd ({telemetryd.__version__}) ")
