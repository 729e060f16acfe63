"""Evaluates the rules of alerts again and again, keeps what changed, and has it delivered until it is confirmed."""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import aiohttp

from telemetryd import alerts, webhooks
from telemetryd.alerts import Delivery, EvaluateRules, Kept, ListDeliveries, ListFiring
from telemetryd.commands import ConfirmDelivery, KeepAlerts, RecordAlerts
from telemetryd.errors import TelemetrydError, sentence
from telemetryd.logs import log
from telemetryd.rules import Regression, Rule, Rules, Webhook
from telemetryd.runs import format_timestamp, utc_now
from telemetryd.store import Store

_GIVE_UP_AFTER: Final = timedelta(hours=24)
_AT_ONCE: Final = 50
"""Changes that are logged before the event loop gets its turn."""
_REST: Final = 100
"""How many times as long as its evaluation a rule of commits rests at least: it takes 1 % of a reader at most."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long to wait before a message is sent again: twice as long each time, up to a bound, less a random part."""

    first_s: float = 1.0
    longest_s: float = 300.0

    def pause_s(self, failures: int) -> float:
        """Return the pause after so many failures, from half of the full one up to that."""
        full_s: float = min(self.first_s * 2 ** min(failures - 1, 30), self.longest_s)
        return full_s * random.uniform(0.5, 1.0)  # noqa: S311 - only so that not all come at once


class Alerting:
    """The alerts of one daemon."""

    def __init__(
        self, store: Store, rules: Rules, clock: Callable[[], datetime] = utc_now, pace: Pace | None = None
    ) -> None:
        self._store, self._rules, self._clock = store, rules, clock
        self._pace = pace or Pace()
        self._news = {webhook.name: asyncio.Event() for webhook in rules.webhooks}
        self._evaluated_at: str | None = None
        self._problems: dict[str, str] = {}
        self._more: dict[str, int] = {}
        """By rule, for how many subjects it fires besides those that are kept."""

    async def shown(self) -> dict[str, Any]:
        """Return what `GET /api/v1/alerts` answers.

        Raises:
            UnavailableError: if the database cannot be read.

        """
        # Without rules nothing that is kept would be shown, and each look at the metrics would read it.
        kept = await self._store.fetch(ListFiring()) if self._has_rules else Kept((), {})
        return alerts.shown(self._rules, kept, self._evaluated_at, self._problems, self._more)

    @property
    def _has_rules(self) -> bool:
        return bool(self._rules.rules or self._rules.webhooks)

    async def run(self) -> None:
        """Work for ever; cancel it to end it. Nothing happens if there are no rules.

        The first evaluation comes after one pause, so that agents can send what waited for the daemon to start.
        """
        if not self._has_rules:
            return
        await self._forget()
        async with webhooks.open_session() as session, asyncio.TaskGroup() as group:
            for webhook in self._rules.webhooks:
                group.create_task(self._deliver(session, webhook))
            dear = [rule for rule in self._rules.rules if isinstance(rule, Regression)]
            cheap = tuple(rule for rule in self._rules.rules if rule not in dear)
            if cheap:
                group.create_task(self._watch(cheap, asyncio.Lock(), rest=0))
            turn = asyncio.Lock()
            for rule in dear:
                group.create_task(self._watch((rule,), turn, rest=_REST))

    async def _watch(self, rules: tuple[Rule, ...], turn: asyncio.Lock, rest: int) -> None:
        """Evaluate some rules again and again, for ever.

        Args:
            rules: evaluated together.
            turn: held meanwhile, so that not all dear rules are evaluated at once.
            rest: how many times as long as an evaluation a pause lasts at least.

        """
        now_s, pause_s = asyncio.get_running_loop().time, self._rules.every_s
        while True:
            await asyncio.sleep(pause_s)
            async with turn:
                begin_s = now_s()
                try:
                    await self._evaluate(rules)
                except TelemetrydError as error:
                    log.warning("Alerts postponed", extra={"error_message": sentence(error)})
                    self._problems |= {rule.name: sentence(error) for rule in rules}
            pause_s = max(self._rules.every_s, rest * (now_s() - begin_s))

    async def _forget(self) -> None:
        """Forget what belongs to rules and webhooks that are not in the file any more."""
        rules, hooks = self._rules.rules, self._rules.webhooks
        command = KeepAlerts(tuple(rule.name for rule in rules), tuple(webhook.name for webhook in hooks))
        while True:
            try:
                forgotten = await self._store.submit(command)
            except TelemetrydError as error:
                log.warning("Alerts postponed", extra={"error_message": sentence(error)})
                await asyncio.sleep(self._pace.longest_s / 60)
                continue
            if forgotten:
                log.info("Alerts of rules and webhooks that are gone forgotten", extra={"result_count": forgotten})
            return

    async def evaluate(self) -> None:
        """Evaluate every rule once, and store what changed together with what is to be delivered.

        Raises:
            UnavailableError: if that is not possible; what changed is found again the next time.

        """
        await self._evaluate(self._rules.rules)

    async def _evaluate(self, rules: tuple[Rule, ...]) -> None:
        evaluation = await self._store.fetch(EvaluateRules(rules, self._clock()))
        problems = {rule: found for rule, found in evaluation.found.items() if isinstance(found, str)}
        for rule, problem in problems.items():
            if self._problems.get(rule) != problem:
                log.warning("Rule not evaluated", extra={"rule": rule, "error_message": problem})
        self._more |= {rule: evaluation.more.get(rule, 0) for rule in evaluation.found}
        # In a thread, for they may be thousands, and the event loop has others to look after.
        changed = await asyncio.to_thread(alerts.changes, evaluation, self._rules, lambda: str(uuid.uuid4()))
        if changed:
            given_up = await self._store.submit(RecordAlerts(changed))
            if given_up:
                log.error("Deliveries given up: too many wait", extra={"result_count": given_up})
        for place, change in enumerate(changed, 1):
            if place % _AT_ONCE == 0:
                await asyncio.sleep(0)
            log.log(
                logging.WARNING if change.firing else logging.INFO,
                "Alert firing" if change.firing else "Alert resolved",
                extra={"rule": change.rule, "summary": change.summary, "delivery": change.id},
            )
            for name in change.webhooks:
                self._news[name].set()
        self._evaluated_at = format_timestamp(evaluation.now)
        kept = {name: problem for name, problem in self._problems.items() if name not in evaluation.found}
        self._problems = kept | problems

    async def _deliver(self, session: aiohttp.ClientSession, webhook: Webhook) -> None:
        """Send what waits for a webhook, in its order, each until it is confirmed."""
        news = self._news[webhook.name]
        while True:
            news.clear()
            try:
                waiting = await self._store.fetch(ListDeliveries(webhook.name))
            except TelemetrydError as error:
                log.warning("Alerts postponed", extra={"error_message": sentence(error)})
                await asyncio.sleep(self._pace.pause_s(5))
                continue
            for delivery in waiting:
                await self._send(session, webhook, delivery)
                await self._confirm(delivery)
            if not waiting:
                await news.wait()

    async def _send(self, session: aiohttp.ClientSession, webhook: Webhook, delivery: Delivery) -> None:
        """Return when a message is confirmed, or too old."""
        about = {"webhook": webhook.name, "delivery": delivery.id}
        failures = 0
        while (problem := await webhooks.post(session, webhook, delivery.id, delivery.body)) is not None:
            failures += 1
            if delivery.created_at < format_timestamp(self._clock() - _GIVE_UP_AFTER):
                log.error("Delivery given up: a day old", extra={**about, "error_message": problem})
                return
            log.warning("Delivery postponed", extra={**about, "error_message": problem, "failures": failures})
            await asyncio.sleep(self._pace.pause_s(failures))
        log.info("Alert delivered", extra=about)

    async def _confirm(self, delivery: Delivery) -> None:
        """Note that a message needs not be sent again."""
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
