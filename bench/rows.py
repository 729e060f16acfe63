"""The run that the loads send, for Python; bench/lua/run.lua has the same one."""

from __future__ import annotations

import random
from typing import Any

from telemetryd.model.runs import parse_run
from telemetryd.model.values import Row


def make_run(nonce: str, number: int) -> dict[str, Any]:
    """Return a run whose event_id is unique for a nonce and a number, and begins with random digits."""
    return {
        "event_id": f"{random.getrandbits(32):08x}-{nonce}-{number}",
        "run_id": f"20251231T153045Z-hugo-translator-{number}",
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


def make_row(nonce: str, number: int) -> Row:
    """Return the same run as the values that are stored, in the order of `runs.STORED`."""
    return parse_run(make_run(nonce, number)).row
