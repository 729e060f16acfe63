"""The fields of an answered run that no engine stores, because they are made from others."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import orjson

from telemetryd.git_urls import MAX_ADDRESS, commit_url, repo_url

_ADDRESSES: Final = ("commit_url", "repo_url")

NEEDED_CHARACTERS: Final = MAX_ADDRESS + 1
"""How much is needed of what they are made from: one too many shows that it is none."""


def apart(fields: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return which of some fields are stored, and which are made."""
    stored = tuple(name for name in fields if name not in _ADDRESSES)
    return stored, tuple(name for name in fields if name in _ADDRESSES)


@lru_cache(maxsize=1024)  # a page has few different ones
def members(made: tuple[str, ...], repo: str | None = None, commit: str | None = None) -> str:
    """Return the made fields as members of a JSON object."""
    values = {"commit_url": commit_url(repo, commit), "repo_url": repo_url(repo)}
    return ",".join(f'"{name}":{orjson.dumps(values[name]).decode()}' for name in made)
