"""Paths as settings hold them: ~ is the user's home, and what only a shell would replace is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import os

_FOR_A_SHELL: Final = re.compile(r"\$\{[^}]*\}|^\$\w+(?=/|$)")


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return the path that a setting means.

    Raises:
        ValueError: if it holds a variable, or the home of somebody who does not exist.

    """
    if (found := _FOR_A_SHELL.search(str(path))) is not None:
        raise ValueError(f"must not hold {found.group()}: nothing replaces it here; ~ is the home, else write it out")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~somebody who does not exist
        raise ValueError(f"cannot be found: {error}") from error
