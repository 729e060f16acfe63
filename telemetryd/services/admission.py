"""Who may write which runs, and how many: the prefix of a token and the quotas of agents, in one place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from aiohttp import web

from telemetryd.errors import ItemRefusedError, NotAllowedError, QuotaExceededError, RunNotFoundError
from telemetryd.model import queries, runs, values
from telemetryd.ops.metrics import Metrics
from telemetryd.services.admin_handlers import STORE
from telemetryd.store import Store
from telemetryd.web.limits import AgentQuotas, Exhausted, take
from telemetryd.web.tokens import BEARER, Bearer

QUOTAS: Final = web.AppKey("quotas", AgentQuotas)
METRICS: Final = web.AppKey("metrics", Metrics)
_AT_ONCE: Final = 1000
"""Runs whose agents are looked up at once."""
_AGENT: Final = runs.STORED.index("agent_name")


class Admission:
    """What one request may create.

    An agent whose quota is not used up when its first run comes may create all that the request holds of it.
    """

    __slots__ = ("_app", "_bearer", "_found", "_prefix", "_quotas")

    def __init__(self, request: web.Request) -> None:
        self._app = request.app
        self._bearer = request[BEARER]
        self._prefix = "" if self._bearer is None else self._bearer.prefix
        self._quotas = self._app[QUOTAS]
        self._found: dict[str, Exhausted | None] = {}

    @classmethod
    def of(cls, request: web.Request) -> Admission | None:
        """Return what a request may create, None if that is anything."""
        return cls(request) if request[BEARER] is not None or request.app[QUOTAS].are_on else None

    def check(self, row: values.Row) -> None:
        """See that a new run may be stored, before anything is looked up.

        Raises:
            NotAllowedError: if its agent's name does not begin with the token's prefix.
            QuotaExceededError: if its agent's quota is used up.

        """
        agent = str(row[_AGENT])
        if self._prefix and not agent.startswith(self._prefix):
            _refuse(self._app[METRICS], self._bearer)
            raise NotAllowedError(f"agent_name must begin with {self._prefix!r}, as this token may write no other runs")
        if self._quotas.are_on:
            if agent not in self._found:
                self._found[agent] = self._quotas.of(agent).exhausted(creates=True)
            _raise_exhausted(self._app[METRICS], agent, self._found[agent])

    def late(self, rows: Sequence[values.Row]) -> Mapping[int, ItemRefusedError]:
        """Return which runs come too late, by their places: others have used up their agents' quotas since `check`."""
        if not self._quotas.are_on:
            return {}
        agents = [str(row[_AGENT]) for row in rows]
        exhausted = {agent: self._quotas.of(agent).exhausted(creates=True) for agent in dict.fromkeys(agents)}
        found = ((place, agent, exhausted[agent]) for place, agent in enumerate(agents))
        return {
            place: _refused_for_quota(self._app[METRICS], agent, what)
            for place, agent, what in found
            if what is not None
        }

    async def check_known(self, row: values.Row) -> None:
        """See that a run that was known is no other agent's.

        Raises:
            NotAllowedError: if it is.

        """
        for refusal in (await self.taken([row])).values():
            raise refusal

    async def taken(self, known: Sequence[values.Row]) -> Mapping[int, ItemRefusedError]:
        """Return which runs that were known are another agent's, by their places: neither a duplicate nor created.

        Nobody can hide that an id is taken from who tries to take it, but nothing else is revealed.
        """
        if not self._prefix:
            return {}
        refused: dict[int, ItemRefusedError] = {}
        event_ids = [str(row[runs.EVENT_ID]) for row in known]
        owners = await _agents(self._app[STORE], event_ids)
        for place, event_id in enumerate(event_ids):
            if not owners.get(event_id, "").startswith(self._prefix):
                _refuse(self._app[METRICS], self._bearer)
                refused[place] = NotAllowedError("The event_id is taken by a run that this token may not write")
        return refused

    def pay(self, rows: Sequence[values.Row], size: int, total: int = 1) -> None:
        """Count what is let in, of so many items; the bytes of a batch are shared out evenly among them.

        Raises:
            TokenQuotaError: if others have used up the token's quota of runs in the meantime.

        """
        if self._bearer is not None and self._bearer.quota is not None:
            take(self._bearer.quota, runs=len(rows))
        if self._quotas.are_on:
            for agent, count in Counter(str(row[_AGENT]) for row in rows).items():
                self._quotas.of(agent).pay(runs=count, size=size * count / total)


async def check_run(request: web.Request, event_id: str, size: int) -> None:
    """See that a stored run may be changed by so many bytes, and count them.

    A run of another agent is answered as one that there is not. Which agent a run has never changes.

    Raises:
        RunNotFoundError: if the token may not write it, or there is none.
        QuotaExceededError: if its agent's quota is used up.

    """
    bearer, quotas = request[BEARER], request.app[QUOTAS]
    prefix = "" if bearer is None else bearer.prefix
    if not prefix and not quotas.are_on:
        return
    agent = (await _agents(request.app[STORE], [event_id])).get(event_id)
    if prefix and (agent is None or not agent.startswith(prefix)):
        if agent is not None:
            _refuse(request.app[METRICS], bearer)
        raise RunNotFoundError(values.shorten(event_id))
    if agent is not None and quotas.are_on:
        quota = quotas.of(agent)
        _raise_exhausted(request.app[METRICS], agent, quota.exhausted(creates=False))
        quota.pay(size=size)


async def _agents(store: Store, event_ids: Sequence[str]) -> Mapping[str, str]:
    """Return the agent of each run that there is."""
    found: dict[str, str] = {}
    for begin in range(0, len(event_ids), _AT_ONCE):
        asked = queries.GetAgents(tuple(event_ids[begin : begin + _AT_ONCE]))
        part: dict[str, str] = await store.fetch(asked)
        found |= part
    return found


def _refuse(metrics: Metrics, bearer: Bearer | None) -> None:
    if bearer is not None:
        metrics.refuse_token(bearer.name, "prefix")


def _raise_exhausted(metrics: Metrics, agent: str, exhausted: Exhausted | None) -> None:
    if exhausted is not None:
        raise _refused_for_quota(metrics, agent, exhausted)


def _refused_for_quota(metrics: Metrics, agent: str, exhausted: Exhausted) -> QuotaExceededError:
    metrics.refuse_quota("agent", exhausted.quota)
    return QuotaExceededError(
        f"The quota of {exhausted.quota} of the agent {values.shorten(agent)!r} is used up; try again later",
        exhausted.wait_s,
    )
