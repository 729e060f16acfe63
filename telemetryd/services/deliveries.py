"""Delivers messages to webhooks with retries; a rejected message does not block the others."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import aiohttp

from telemetryd.errors import TelemetrydError, sentence
from telemetryd.model.alerts import Delivery, ListDeliveries
from telemetryd.model.chores import Chore
from telemetryd.model.commands import ConfirmDelivery
from telemetryd.model.rules import Webhook
from telemetryd.model.values import format_timestamp
from telemetryd.ops.logs import log
from telemetryd.services import webhooks
from telemetryd.store import Store

_LOOK_EVERY_S: Final = 1.0
_GIVE_UP_AFTER: Final = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class DeliveryPace:
    """How long to wait before a message is sent again: twice as long each time, up to a bound, less a random part."""

    first_s: float = 1.0
    longest_s: float = 300.0

    def pause_s(self, failures: int) -> float:
        """Return the pause after so many failures, from half of the full one up to that."""
        full_s: float = min(self.first_s * 2 ** min(failures - 1, 30), self.longest_s)
        return full_s * random.uniform(0.5, 1.0)  # noqa: S311 - only so that not all come at once


@dataclass(frozen=True, slots=True)
class _Resting:
    """A message that was not accepted."""

    failures: int
    until: float
    """When it is sent again, in the loop's time."""


class Outbox:
    """What waits for one webhook.

    Messages of one alert go in their order. Those of different alerts pass each other: one that was not accepted rests,
    each time longer, while the others go, first those that were never tried. When several fail in a row, it is the
    webhook that is in trouble, and all of them rest.

    Args:
        store: where they wait.
        webhook: where they are sent.
        clock: decides which are too old.
        pace: how long to rest.
        given_up: called with how many were given up.

    """

    def __init__(
        self,
        store: Store,
        webhook: Webhook,
        *,
        clock: Callable[[], datetime],
        pace: DeliveryPace,
        given_up: Callable[[int], None],
    ) -> None:
        self._store, self._clock, self._pace, self._given_up = store, clock, pace, given_up
        self.webhook = webhook
        self.sending = asyncio.Lock()
        """Held from when a message is sent until its outcome is stored; the task that holds it may cancel `run`."""
        self._news = asyncio.Event()
        self._resting: dict[int, _Resting] = {}
        self._failures = 0
        """How many messages have failed since the last one that was accepted."""

    def wake(self) -> None:
        """Take note that there is a new message."""
        self._news.set()

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Send what waits, for ever."""
        while True:
            if not self._store.leads(Chore.ALERTS):  # another daemon delivers
                await asyncio.sleep(_LOOK_EVERY_S)
                continue
            self._news.clear()
            try:
                waiting = await self._due()
            except TelemetrydError as error:
                log.warning("Alerts postponed", extra={"error_message": sentence(error)})
                await asyncio.sleep(self._pace.pause_s(5))
                continue
            for delivery in waiting:
                await self._send(session, delivery)
                if self._failures > 1:
                    await asyncio.sleep(self._pace.pause_s(self._failures - 1))
                    break  # to see what is new
            if not waiting:
                await self._rest()

    async def _due(self) -> list[Delivery]:
        """Return what is to be sent now: of each alert the first, what was never tried before what was, by age."""
        waiting = await self._store.fetch(ListDeliveries(self.webhook.name))
        numbers = {delivery.number for delivery in waiting}  # others have been given up, because too many wait
        self._resting = {number: rest for number, rest in self._resting.items() if number in numbers}
        first = {delivery.alert: delivery for delivery in reversed(waiting)}
        now = asyncio.get_running_loop().time()
        due = (each for each in first.values() if self._ends_resting(each) <= now)
        return sorted(due, key=lambda delivery: (delivery.number in self._resting, delivery.number))

    def _ends_resting(self, delivery: Delivery) -> float:
        rest = self._resting.get(delivery.number)
        return -math.inf if rest is None else rest.until

    async def _rest(self) -> None:
        """Wait for a new message, or for the next one that has rested."""
        until = min((rest.until for rest in self._resting.values()), default=None)
        if self._store.is_shared:  # of what another daemon has stored nobody tells us
            soon = asyncio.get_running_loop().time() + _LOOK_EVERY_S
            until = soon if until is None else min(until, soon)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._news.wait()

    async def _send(self, session: aiohttp.ClientSession, delivery: Delivery) -> None:
        async with self.sending:
            problem = await webhooks.post(session, self.webhook, delivery.id, delivery.body)
            await self._note(delivery, problem)

    async def _note(self, delivery: Delivery, problem: str | None) -> None:
        """Store how it went: a message that was accepted or is too old needs not be sent again, another one rests."""
        about = {"webhook": self.webhook.name, "delivery": delivery.id}
        if problem is None:
            self._failures = 0
            log.info("Alert delivered", extra=about)
            await self._forget(delivery)
            return
        self._failures += 1
        if delivery.created_at < format_timestamp(self._clock() - _GIVE_UP_AFTER):
            log.error("Delivery given up: a day old", extra={**about, "error_message": problem})
            self._given_up(1)
            await self._forget(delivery)
            return
        before = self._resting.get(delivery.number)
        failures = 1 if before is None else before.failures + 1
        log.warning("Delivery postponed", extra={**about, "error_message": problem, "failures": failures})
        until = asyncio.get_running_loop().time() + self._pace.pause_s(failures)
        self._resting[delivery.number] = _Resting(failures, until)

    async def _forget(self, delivery: Delivery) -> None:
        """Note that a message needs not be sent again."""
        self._resting.pop(delivery.number, None)
        failures = 0
        while True:
            try:
                await self._store.submit(ConfirmDelivery(delivery.number))
            except TelemetrydError as error:
                failures += 1
                log.warning("Alerts postponed", extra={"error_message": sentence(error)})
                await asyncio.sleep(self._pace.pause_s(failures))
            else:
                return
