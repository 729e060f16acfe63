"""Evaluates the alert rules periodically, stores changes of state, and has them delivered until confirmed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from typing import Final

from telemetryd.errors import TelemetrydError, sentence
from telemetryd.model import alerts
from telemetryd.model.alerts import EvaluateRules, Kept, ListFiring
from telemetryd.model.chores import Chore
from telemetryd.model.commands import KeepAlerts, RecordAlerts
from telemetryd.model.rules import Regression, Rule, Rules, load_rules
from telemetryd.model.values import format_timestamp, utc_now
from telemetryd.ops.logs import log
from telemetryd.services import webhooks
from telemetryd.services.deliveries import DeliveryPace, Outbox
from telemetryd.settings import Settings
from telemetryd.store import Store

_AT_ONCE: Final = 50
"""Changes that are logged before the event loop gets its turn."""
_LOOK_EVERY_S: Final = 1.0
"""How often it is looked at whether this daemon leads."""


class Alerting:
    """The alerts of one daemon.

    Args:
        store: where runs are, and what is kept of alerts.
        rules: what is looked for, and who is told.
        clock: returns the time.
        pace: how messages that are not accepted are sent again.
        given_up: gets the number of messages that will never be delivered.
        rest: how many times as long as its evaluation a rule of commits rests at least: 1 % of a reader at most.

    """

    def __init__(
        self,
        store: Store,
        rules: Rules,
        clock: Callable[[], datetime] = utc_now,
        pace: DeliveryPace | None = None,
        given_up: Callable[[int], None] = lambda _: None,
        *,
        rest: int = 100,
    ) -> None:
        self._store, self._rules, self._clock, self._given_up, self._rest = store, rules, clock, given_up, rest
        self._pace = pace or DeliveryPace()
        self._outboxes = self._outboxes_of(rules, {})
        self._exchanged = asyncio.Event()
        self._evaluated_at: str | None = None
        self._problems: dict[str, str] = {}
        self._more: dict[str, int] = {}
        """The number of further subjects for which each rule fires, which are not kept."""

    async def shown(self) -> alerts.Alerts:
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

    def prepare(self, settings: Settings) -> Callable[[], None] | None:
        """Read the rule file again; return what puts its rules into effect, or None if they are the same.

        What fires and what waits to be delivered stays.

        Raises:
            ConfigurationError: with every fault of the file.

        """
        rules = load_rules(settings.alerts_file)
        return None if rules == self._rules else partial(self._exchange, rules)

    def _exchange(self, rules: Rules) -> None:
        self._outboxes = self._outboxes_of(rules, self._outboxes)
        self._rules = rules
        self._exchanged.set()

    def _outboxes_of(self, rules: Rules, before: Mapping[str, Outbox]) -> dict[str, Outbox]:
        """Return an outbox for each webhook: if it is the same, the one from before, which knows what rests."""
        return {
            webhook.name: was
            if (was := before.get(webhook.name)) is not None and was.webhook == webhook
            else Outbox(self._store, webhook, clock=self._clock, pace=self._pace, given_up=self._given_up)
            for webhook in rules.webhooks
        }

    async def run(self) -> None:
        """Work for ever, always by the rules in effect; cancel it to end it. Without rules it does nothing."""
        while True:
            self._exchanged.clear()
            names = {rule.name for rule in self._rules.rules}
            self._problems = {name: problem for name, problem in self._problems.items() if name in names}
            self._more = {name: more for name, more in self._more.items() if name in names}
            if self._has_rules:
                await self._forget()
                await self._work()
            else:
                self._store.resign(Chore.ALERTS)
                await self._exchanged.wait()

    async def _work(self) -> None:
        """Evaluate the rules and deliver messages until the rules are exchanged and what is under way has ended.

        The first evaluation comes after one pause, so that agents can send what waited for the daemon to start.
        """
        rules, cheap_turn, dear_turn = self._rules, asyncio.Lock(), asyncio.Lock()
        dear = [rule for rule in rules.rules if isinstance(rule, Regression)]
        cheap = tuple(rule for rule in rules.rules if rule not in dear)
        async with webhooks.open_session() as session, asyncio.TaskGroup() as group:
            working = [(outbox.sending, group.create_task(outbox.run(session))) for outbox in self._outboxes.values()]
            if cheap:
                working.append((cheap_turn, group.create_task(self._watch(rules, cheap, cheap_turn, rest=0))))
            for rule in dear:
                watching = group.create_task(self._watch(rules, (rule,), dear_turn, rest=self._rest))
                working.append((dear_turn, watching))
            await self._exchanged.wait()
            await asyncio.gather(*(_end(turn, task) for turn, task in working))

    async def _watch(self, rules: Rules, some: tuple[Rule, ...], turn: asyncio.Lock, rest: int) -> None:
        """Evaluate some rules again and again, as long as they are in effect.

        Args:
            rules: all that are in effect now.
            some: evaluated together.
            turn: held meanwhile, so that not all dear rules are evaluated at once.
            rest: how many times as long as an evaluation a pause lasts at least.

        """
        now_s, pause_s = asyncio.get_running_loop().time, rules.every_s
        while True:
            await asyncio.sleep(pause_s)
            async with turn:
                if self._rules is not rules:
                    return
                if not self._store.leads(Chore.ALERTS):  # another daemon evaluates them
                    continue
                begin_s = now_s()
                try:
                    await self.evaluate(some)
                except TelemetrydError as error:
                    log.warning("Alerts postponed", extra={"error_message": sentence(error)})
                    self._problems |= {rule.name: sentence(error) for rule in some}
            pause_s = max(rules.every_s, rest * (now_s() - begin_s))

    async def _forget(self) -> None:
        """Forget what belongs to rules and webhooks that are not in the file any more, as soon as we lead.

        Until then it is up to another daemon, whose file may have them.
        """
        while not self._store.leads(Chore.ALERTS):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await self._exchanged.wait()
                    return
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

    async def evaluate(self, rules: tuple[Rule, ...]) -> None:
        """Evaluate some rules once, and store what changed together with what is to be delivered.

        Raises:
            UnavailableError: if that is not possible; what changed is found again the next time.

        """
        in_effect, outboxes = self._rules, self._outboxes
        evaluation = await self._store.fetch(EvaluateRules(rules, self._clock()))
        problems = {rule: found for rule, found in evaluation.found.items() if isinstance(found, str)}
        for rule, problem in problems.items():
            if self._problems.get(rule) != problem:
                log.warning("Rule not evaluated", extra={"rule": rule, "error_message": problem})
        self._more |= {rule: evaluation.more.get(rule, 0) for rule in evaluation.found}
        # In a thread, for they may be thousands, and the event loop has others to look after.
        changed = await asyncio.to_thread(alerts.changes, evaluation, in_effect, lambda: str(uuid.uuid4()))
        if changed:
            given_up = await self._store.submit(RecordAlerts(changed))
            if given_up:
                log.error("Deliveries given up: too many wait", extra={"result_count": given_up})
                self._given_up(given_up)
        for place, change in enumerate(changed, 1):
            if place % _AT_ONCE == 0:
                await asyncio.sleep(0)
            log.log(
                logging.WARNING if change.firing else logging.INFO,
                "Alert firing" if change.firing else "Alert resolved",
                extra={"rule": change.rule, "summary": change.summary, "delivery": change.id},
            )
            for name in change.webhooks:
                outboxes[name].wake()
        self._evaluated_at = format_timestamp(evaluation.now)
        kept = {name: problem for name, problem in self._problems.items() if name not in evaluation.found}
        self._problems = kept | problems


async def _end(turn: asyncio.Lock, task: asyncio.Task[None]) -> None:
    """End a task that holds the lock whenever it does what must not be cut off."""
    async with turn:
        task.cancel()
