"""Prunes and reaps by itself, as often as the settings ask for, in slices with pauses between them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from typing import Any, Final

from telemetryd import admin
from telemetryd.errors import TelemetrydError, sentence
from telemetryd.logs import log
from telemetryd.settings import Settings
from telemetryd.store import Store

_PRUNE_EVERY_S: Final = 3600.0
_REAP_EVERY_S: Final = 60.0
_DAY_S: Final = 86_400
_LEAST_PAUSE_S: Final = 0.01

Slice = Callable[[], Awaitable[dict[str, Any]]]


async def in_slices(do: Slice, counted: str) -> int:
    """Do slice after slice until nothing is left, and rest after each as long as it took; return the sum.

    So others have the writer at least half of the time, however slow the disk is.
    """
    total = 0
    while True:
        started = time.monotonic()
        answer = await do()
        total += int(answer[counted])
        if not answer["more"]:
            return total
        await asyncio.sleep(max(time.monotonic() - started, _LEAST_PAUSE_S))


async def keep_up(store: Store, settings: Settings, clock: Callable[[], datetime]) -> None:
    """Prune and reap for ever; cancel it to end it. Nothing happens if neither is configured."""
    async with asyncio.TaskGroup() as group:
        if (days := settings.retention_days) is not None:
            prune = partial(_older, admin.prune, store, days * _DAY_S, clock)
            group.create_task(_repeat("Pruned", "pruned", _PRUNE_EVERY_S, prune))
        if (age := settings.stale_after) is not None:
            reap = partial(_older, admin.reap, store, age, clock)
            group.create_task(_repeat("Reaped", "reaped", min(_REAP_EVERY_S, age / 4), reap))


async def _older(
    do: Callable[[Store, object, datetime], Awaitable[dict[str, Any]]],
    store: Store,
    seconds: float,
    clock: Callable[[], datetime],
) -> dict[str, Any]:
    """Do one slice of what was created so long ago."""
    now = clock()
    return await do(store, {"created_before": admin.moment_ago(now, seconds)}, now)


async def _repeat(message: str, counted: str, pause_s: float, do: Slice) -> None:
    while True:
        try:
            total = await in_slices(do, counted)
        except TelemetrydError as error:
            log.warning("Upkeep postponed", extra={"task": counted, "error_message": sentence(error)})
        else:
            if total:
                log.info(message, extra={"result_count": total})
        await asyncio.sleep(pause_s)
