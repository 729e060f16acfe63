"""Limits of the operating system, and how close the process is to them."""

from __future__ import annotations

import resource
from typing import Final

_MOST_DESCRIPTORS: Final = 65_536


def descriptor_limit() -> int:
    """Raise the process's limit on open files as far as it may be raised, and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = min(hard, _MOST_DESCRIPTORS) if hard != resource.RLIM_INFINITY else _MOST_DESCRIPTORS
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit
