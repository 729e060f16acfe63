"""What a test does where something that it needs is missing: it is skipped, but fails in CI."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import NoReturn

import pytest


def require_program(program: str, package: str) -> None:
    """Skip the test if a program is missing, except in CI, which installs all of them and skips nothing."""
    if shutil.which(program) is None:
        give_up(f"{program} is needed, which is missing: apt-get install {package}")


def require_package(package: str) -> None:
    """Skip the test if a package of the extra "dev" is missing, except in CI."""
    if importlib.util.find_spec(package) is None:
        give_up(f"{package} is needed, which is missing: pip install -e .[dev]")


def give_up(reason: str) -> NoReturn:
    """Skip the test, which cannot run here; CI can run all, so there it fails."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
