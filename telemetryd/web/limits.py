"""Rate limits and quotas: how much an address, a token or an agent may ask for, for a bounded number of them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from telemetryd.errors import TokenQuotaError

RUNS: Final = "runs per minute"
BYTES: Final = "bytes per day"
_MINUTE_S: Final = 60
_DAY_S: Final = 86_400


class RateLimit:
    """A token bucket for each client address, for a bounded number of addresses.

    Args:
        per_minute: requests that an address may send in a minute, and at once after a rest.
        clock: monotonic seconds.
        addresses: how many addresses are remembered; the one not seen for longest is forgotten first.

    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic, addresses: int = 10_000) -> None:
        self._capacity = float(per_minute)
        self._per_second = per_minute / 60
        self._clock = clock
        self._addresses = addresses
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, address: str) -> float:
        """Take a token for a request; return 0, or the seconds until there will be one."""
        now = self._clock()
        tokens, since = self._buckets.pop(address, (self._capacity, now))
        tokens = min(self._capacity, tokens + (now - since) * self._per_second)
        allowed = tokens >= 1
        self._buckets[address] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > self._addresses:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - tokens) / self._per_second


class Bucket:
    """A bucket that may go into debt: a request that finds a whole unit in it pays for all it brings.

    So what is larger than the quota still gets through once, and a long pause follows.
    """

    __slots__ = ("_capacity", "_level", "_per_second", "_since")

    def __init__(self, capacity: int, seconds: float) -> None:
        self._capacity = float(capacity)
        self._per_second = capacity / seconds
        self._level = self._capacity
        self._since = 0.0

    def wait_s(self, now: float) -> float:
        """Return 0 if it holds a whole unit, else the seconds until it will."""
        self._fill(now)
        return 0.0 if self._level >= 1 else max((1 - self._level) / self._per_second, 1e-3)

    def pay(self, amount: float, now: float) -> None:
        """Take out what was let in."""
        self._fill(now)
        self._level -= amount

    def _fill(self, now: float) -> None:
        self._level = min(self._capacity, self._level + (now - self._since) * self._per_second)
        self._since = now


@dataclass(frozen=True, slots=True)
class Exhausted:
    """A quota that is used up, and the seconds until it is not."""

    quota: str
    wait_s: float


class Quota:
    """New runs per minute and bytes per day; each may have no bound.

    Args:
        runs_per_minute: the bound, or None.
        bytes_per_day: the bound, or None.
        clock: monotonic seconds.

    """

    __slots__ = ("_bytes", "_clock", "_runs")

    def __init__(
        self, runs_per_minute: int | None, bytes_per_day: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._runs = None if runs_per_minute is None else Bucket(runs_per_minute, _MINUTE_S)
        self._bytes = None if bytes_per_day is None else Bucket(bytes_per_day, _DAY_S)
        self._clock = clock

    def exhausted(self, *, creates: bool) -> Exhausted | None:
        """Return which quota lets nothing in now, the one with the longest wait; that of runs is for new ones only."""
        return self.exhausted_of(runs=int(creates), size=1)

    def exhausted_of(self, *, runs: float, size: float) -> Exhausted | None:
        """Return which quota lets nothing in now of what there is any."""
        now = self._clock()
        runs_s = self._runs.wait_s(now) if runs and self._runs is not None else 0.0
        bytes_s = self._bytes.wait_s(now) if size and self._bytes is not None else 0.0
        if not runs_s and not bytes_s:
            return None
        return Exhausted(RUNS, runs_s) if runs_s > bytes_s else Exhausted(BYTES, bytes_s)

    def pay(self, *, runs: int = 0, size: float = 0) -> None:
        """Take out what was let in."""
        now = self._clock()
        if runs and self._runs is not None:
            self._runs.pay(runs, now)
        if size and self._bytes is not None:
            self._bytes.pay(size, now)


def take(quota: Quota, *, runs: int = 0, size: int = 0) -> None:
    """Take out what is let in of a token; requests that began at the same time are let in one by one here.

    Raises:
        TokenQuotaError: if others have used the quota up in the meantime.

    """
    if (exhausted := quota.exhausted_of(runs=runs, size=size)) is not None:
        raise TokenQuotaError(exhausted.quota, exhausted.wait_s)
    quota.pay(runs=runs, size=size)


class AgentQuotas:
    """A quota for each agent name, for a bounded number of names.

    Args:
        runs_per_minute: the bound of each, or None.
        bytes_per_day: the bound of each, or None.
        clock: monotonic seconds.
        agents: how many names are remembered; the one not seen for longest is forgotten first.

    """

    def __init__(
        self,
        runs_per_minute: int | None,
        bytes_per_day: int | None,
        clock: Callable[[], float] = time.monotonic,
        agents: int = 10_000,
    ) -> None:
        self.are_on = runs_per_minute is not None or bytes_per_day is not None
        self._bounds = runs_per_minute, bytes_per_day
        self._clock = clock
        self._agents = agents
        self._quotas: OrderedDict[str, Quota] = OrderedDict()

    def of(self, agent: str) -> Quota:
        """Return the quota of an agent."""
        quota = self._quotas.pop(agent, None) or Quota(*self._bounds, self._clock)
        self._quotas[agent] = quota
        if len(self._quotas) > self._agents:
            self._quotas.popitem(last=False)
        return quota
