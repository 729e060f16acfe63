"""The run that the loads send, for Python, with ids of two kinds; bench/lua/run.lua makes the same ones."""

from __future__ import annotations

import random
import time
from enum import StrEnum
from typing import Any, Final

from telemetryd.model.runs import parse_run
from telemetryd.model.values import Row

_BEGUN_MS: Final = time.time_ns() // 1_000_000
_TICKS_PER_MS: Final = 4096
"""As in telemetryd/uuids.py."""


class Ids(StrEnum):
    """How the ids of a load, event_id and run_id, begin.

    Time-ordered ones (UUIDs of version 7) go to the end of their indexes. Random ones (version 4) go anywhere, so that
    each dirties another page.
    """

    ORDERED = "time-ordered"
    RANDOM = "random"


def make_id(nonce: str, number: int, ids: Ids) -> str:
    """Return an id that ends in the nonce and is unique for it and the number; greater ones follow if it is ordered."""
    if ids is Ids.ORDERED:
        ticks, version = _BEGUN_MS * _TICKS_PER_MS + number, 7
    else:
        ticks, version = random.getrandbits(60), 4
    milliseconds, fraction = divmod(ticks, _TICKS_PER_MS)
    return f"{milliseconds >> 16:08x}-{milliseconds & 0xFFFF:04x}-{version}{fraction:03x}-8000-{nonce}"


def make_run(nonce: str, number: int, ids: Ids) -> dict[str, Any]:
    """Return a run whose ids are unique for a nonce and a number."""
    unique = make_id(nonce, number, ids)
    return {
        "event_id": unique,
        "run_id": f"run-{unique}",
        "agent_name": f"agent-{number % 20}",
        "job_type": "translate_directory",
        "start_time": "2025-12-24T10:00:00Z",
        "end_time": "2025-12-24T10:05:00+00:00",
        "status": "success",
        "items_discovered": 100,
        "items_succeeded": 98,
        "items_failed": 2,
        "duration_ms": 300000,
        "metrics_json": {"tokens": 12345, "cost": 0.25},
        "host": "worker-7",
        "environment": "prod",
        "git_repo": "git@github.com:acme/site.git",
        "git_branch": "main",
        "git_commit_hash": "abcdef1234567",
        "product": "words",
        "trigger_type": "cron",
    }


def make_row(nonce: str, number: int, ids: Ids) -> Row:
    """Return the same run as the values that are stored, in the order of `runs.STORED`."""
    return parse_run(make_run(nonce, number, ids)).row
