"""The client of telemetryd: agents never wait, never crash, and never lose a run.

    from telemetryd import client as telemetry

    with telemetry.run("hugo-translator", "translate_directory") as run:
        run.items(succeeded=45)

The functions here belong to one client that is made from the TELEMETRY_* variables when it is first needed; `Client`
makes others. Only the standard library and orjson are imported.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any, Unpack

from telemetryd.client.client import Client
from telemetryd.client.config import Config
from telemetryd.client.context import parent_run_id
from telemetryd.client.fields import Fields
from telemetryd.client.log_handler import RunHandler
from telemetryd.client.run import Run

__all__ = ["Client", "Config", "Run", "close", "default", "flush", "handler", "parent_run_id", "record", "run", "stats"]


@functools.cache
def default() -> Client:
    """Return the client that the functions of this module use.

    A variable that cannot be used does not keep the agent from its work: see `Client.tolerant`.
    """
    return Client.tolerant()


def run(agent_name: str, job_type: str, *, heartbeat: bool | float = False, **fields: Unpack[Fields]) -> Run:
    """Return a run of the default client; see `Client.run`."""
    return default().run(agent_name, job_type, heartbeat=heartbeat, **fields)


def record(run: Mapping[str, Any]) -> str | None:
    """Record a finished run with the default client; see `Client.record`."""
    return default().record(run)


def handler(level: int | str = "WARNING", *, most: int = 1000) -> logging.Handler:
    """Return a logging handler that puts records into the run around them, as events; see `RunHandler`.

    Args:
        level: records below it are passed over.
        most: how many records of one run become events.

    """
    return RunHandler(level, most=most)


def flush(timeout_s: float = 10.0) -> bool:
    """Wait until everything has been acknowledged; see `Client.flush`."""
    return default().flush(timeout_s)


def stats() -> dict[str, Any]:
    """Return what became of the lines; see `Client.stats`."""
    return default().stats()


def close() -> None:
    """Send what can be sent within a bound; see `Client.close`."""
    default().close()
