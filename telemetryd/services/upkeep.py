"""Automatic prune, reap and indexing, in slices; deletion needs a confirmation and a trustworthy clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from telemetryd.durations import duration_text
from telemetryd.errors import TelemetrydError, sentence
from telemetryd.model import clocks, requests
from telemetryd.model.chores import Chore
from telemetryd.model.clocks import Reading
from telemetryd.model.commands import IndexTexts, TrustClock
from telemetryd.model.queries import Confirmed, CountPrunable, GetConfirmed, Prunable
from telemetryd.model.values import utc_now
from telemetryd.ops.logs import log
from telemetryd.services import admin
from telemetryd.settings import Settings
from telemetryd.store import Store

_PRUNE_EVERY_S: Final = 3600.0
_REAP_EVERY_S: Final = 60.0
_LOOK_EVERY_S: Final = 60.0
"""How often the clock is looked at."""
_TRUST_AGAIN_AFTER: Final = timedelta(hours=1)
_LEAST_PAUSE_S: Final = 0.01
_LOOK_AT_SERVER_S: Final = 1.0
"""How often it is looked at what a server that is shared does, or another daemon."""
_AGAIN_S: Final = 5.0
_HOW_TO_CONFIRM_THE_CLOCK: Final = (
    "nothing is deleted or cancelled by itself until the clock is set right, or confirmed by the date of the day: "
    "telemetryd confirm-clock YYYY-MM-DD"
)

Slice = Callable[[], Awaitable[dict[str, Any]]]


async def in_slices(do: Slice, counted: str, pause_s: float = _LEAST_PAUSE_S) -> int:
    """Do slice after slice until nothing is left, and rest after each as long as it took, or longer; return the sum.

    So others have the writer at least half of the time, however slow the disk is.
    """
    total = 0
    while True:
        started = time.monotonic()
        answer = await do()
        total += int(answer[counted])
        if not answer["more"]:
            return total
        await asyncio.sleep(max(time.monotonic() - started, pause_s))


@dataclass(frozen=True, slots=True)
class _Unconfirmed:
    """What pruning waits for."""

    confirmed_s: float | None
    found: Prunable


class FullText(StrEnum):
    """Whether runs can be searched for words."""

    OFF = "off"
    BUILDING = "building"
    READY = "ready"


class Upkeep:
    """What one daemon does by itself: delete runs of an age, cancel those that are stale, index their words.

    Deleting waits until the operator has confirmed the age for this database, and both wait while the clock has
    jumped: a wrong clock would make everything old at once.
    """

    def __init__(self, store: Store, settings: Settings, clock: Callable[[], datetime] = utc_now) -> None:
        self._store, self._clock = store, clock
        self._prune_after, self._stale_after = settings.prune_after, settings.stale_after
        self._full_text = settings.full_text
        self.full_text = FullText.BUILDING if settings.full_text else FullText.OFF
        self._news = asyncio.Event()
        self._doubt: str | None = None
        self._unconfirmed: _Unconfirmed | None = None

    async def run(self) -> None:
        """Work for ever; cancel it to end it. Nothing happens if nothing is configured."""
        async with asyncio.TaskGroup() as group:
            if self._full_text:
                group.create_task(self.index_texts())
            if self._prune_after is not None or self._stale_after is not None:
                chore = Chore.REAPING if self._prune_after is None else Chore.PRUNING
                group.create_task(self._repeat("clock", chore, _LOOK_EVERY_S, self._keep_clock))
            if self._prune_after is not None:
                group.create_task(self._repeat("pruned", Chore.PRUNING, _PRUNE_EVERY_S, self._prune))
            if (age := self._stale_after) is not None:
                group.create_task(self._repeat("reaped", Chore.REAPING, min(_REAP_EVERY_S, age / 4), self._reap))

    async def index_texts(self) -> None:
        """Build the full-text index as far as it is not built, however often that is put off."""
        started = time.monotonic()
        slices = 0
        # A server builds it by itself: then a slice is but a look whether it is done.
        pause_s = _LOOK_AT_SERVER_S if self._store.is_shared else _LEAST_PAUSE_S
        while True:
            try:
                slices += await in_slices(self._index_slice, "slices", pause_s)
            except TelemetrydError as error:
                log.warning("Upkeep postponed", extra={"task": "full text", "error_message": sentence(error)})
                await asyncio.sleep(_AGAIN_S)
            else:
                break
        self.full_text = FullText.READY
        if slices:
            took = {"duration_ms": round((time.monotonic() - started) * 1000, 3)}
            log.info("The full-text index is built", extra=took)

    async def _index_slice(self) -> dict[str, Any]:
        done = await self._store.submit(IndexTexts())
        return {"slices": int(done is not None), "more": done is not None and done.more}

    def look_again(self) -> None:
        """Look at once at what has been confirmed."""
        self._news.set()
        self._news = asyncio.Event()

    def notices(self) -> list[str]:
        """Return what is configured and yet not done automatically, and which command changes that."""
        notices = [f"{self._doubt}: {_HOW_TO_CONFIRM_THE_CLOCK}"] if self._doubt is not None else []
        if (waiting := self._unconfirmed) is not None and self._prune_after is not None:
            age = duration_text(self._prune_after)
            known = "" if waiting.confirmed_s is None else f" (confirmed are {duration_text(waiting.confirmed_s)})"
            oldest = "" if waiting.found.oldest is None else f", the oldest of {waiting.found.oldest}"
            notices.append(
                f"TELEMETRY_PRUNE_AFTER={age} deletes nothing until it is confirmed for this database{known}: "
                f"{waiting.found.runs} runs would be deleted{oldest}; confirm it with: "
                f"telemetryd prune --confirm-automatic {age}"
            )
        return notices

    def shown(self) -> dict[str, Any]:
        """Return what `/health` reports of it."""
        waiting = self._unconfirmed
        return {
            "prune_after": None if self._prune_after is None else duration_text(self._prune_after),
            "stale_after": None if self._stale_after is None else duration_text(self._stale_after),
            "paused": self._doubt is not None,
            "unconfirmed": None
            if waiting is None
            else {"would_delete": waiting.found.runs, "oldest": waiting.found.oldest},
        }

    async def _repeat(self, task: str, chore: Chore, pause_s: float, do: Callable[[], Awaitable[None]]) -> None:
        while True:
            news = self._news
            if not self._store.leads(chore):  # another daemon does it
                await asyncio.sleep(_LOOK_AT_SERVER_S)
                continue
            try:
                await do()
            except TelemetrydError as error:
                log.warning("Upkeep postponed", extra={"task": task, "error_message": sentence(error)})
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await news.wait()

    async def _keep_clock(self) -> None:
        """Note from time to time that the clock is right; while it is in doubt, what was known stays."""
        confirmed, reading = await self._look(self._clock())
        known = confirmed.clock
        if self._doubt is not None:
            if known is None and confirmed.newest is not None:
                # Else the runs that come in now, stored by the wrong clock, would prove it right after a restart.
                await self._store.submit(TrustClock(Reading(confirmed.newest, "", 0.0)))
        elif known is None or known.boot_id != reading.boot_id or _is_old(known, reading):
            await self._store.submit(TrustClock(reading))

    async def _look(self, now: datetime) -> tuple[Confirmed, Reading]:
        """Fetch what is confirmed, and check whether the clock can be trusted; log if that has changed."""
        reading = clocks.read(now)
        confirmed = await self._store.fetch(GetConfirmed())
        doubt = confirmed.doubt(reading)
        was_in_doubt, self._doubt = self._doubt is not None, doubt
        if doubt is not None and not was_in_doubt:
            log.error("The clock has jumped", extra={"reason": doubt, "advice": _HOW_TO_CONFIRM_THE_CLOCK})
        elif doubt is None and was_in_doubt:
            log.info("The clock is right again, or confirmed")
            self.look_again()
        return confirmed, reading

    async def _prune(self) -> None:
        assert self._prune_after is not None  # noqa: S101 - or it would not be called
        now = self._clock()
        confirmed, _ = await self._look(now)
        if confirmed.prune_after_s is None or self._prune_after < confirmed.prune_after_s:
            found = await self._store.fetch(CountPrunable(requests.moment_ago(now, self._prune_after)))
            self._unconfirmed = _Unconfirmed(confirmed.prune_after_s, found)
            log.warning("Nothing is deleted by itself yet", extra={"reason": self.notices()[-1]})
            return
        self._unconfirmed = None
        if total := await in_slices(lambda: self._slice(admin.prune, "pruned", self._prune_after), "pruned"):
            log.info("Pruned", extra={"result_count": total})

    async def _reap(self) -> None:
        if total := await in_slices(lambda: self._slice(admin.reap, "reaped", self._stale_after), "reaped"):
            log.info("Reaped", extra={"result_count": total})

    async def _slice(
        self, do: Callable[[Store, object, datetime], Awaitable[dict[str, Any]]], counted: str, age_s: float | None
    ) -> dict[str, Any]:
        """Do one slice, by the very moment at which the clock was looked at."""
        assert age_s is not None  # noqa: S101 - or it would not be called
        now = self._clock()
        await self._look(now)
        if self._doubt is not None:
            return {counted: 0, "more": False}
        return await do(self._store, {"created_before": requests.moment_ago(now, age_s)}, now)


def _is_old(known: Reading, now: Reading) -> bool:
    return datetime.fromisoformat(now.moment) - datetime.fromisoformat(known.moment) > _TRUST_AGAIN_AFTER
