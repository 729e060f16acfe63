"""How often a commit is named that changed nothing, and how often one that did: simulated with fixed seeds.

    python -m bench.regressions --pairs 200
    python -m bench.regressions --pairs 100 --url http://127.0.0.1:8765
    python -m bench.regressions --pairs 1000 --only "own outages" --only "slow drift"

Each pair is a month of its own, with what `World` draws: how many runs a day, how often a commit is deployed, how many
other agents there are, and what goes wrong. The same seed gives the same pairs.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Final
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import click
import orjson

from bench.facts import Fact, cells_of
from telemetryd.model.change_points import MEASURES, Change, in_order
from telemetryd.model.regressions import by_pair, changes_of
from telemetryd.model.values import format_timestamp

END: Final = datetime(2026, 11, 27, 12, tzinfo=UTC)
DAYS: Final = 30.0
GOOD: Final = 0.95
"""The success rate in which a bad commit comes."""
PAIR: Final = ("agent", "job")
COMMIT: Final = "{:040x}".format
BATCH: Final = 5000
"""Runs in a request."""


@dataclass
class World:
    """What happens in a month: when a commit is deployed, and how likely a run succeeds at each time.

    Times are days since the begin. What the scenarios leave open is drawn.
    """

    random: Random
    end: datetime = END
    days: float = DAYS
    runs_a_day: float = 0
    good: float = 0
    others: int = 0
    deploys: list[float] = field(default_factory=list)
    own_outages: list[tuple[float, float]] = field(default_factory=list)
    shared_outages: list[tuple[float, float]] = field(default_factory=list)
    fails_in_outage: float = 0.9
    bad_from: float = math.inf
    """When the bad commit is deployed."""
    bad_share: float = 1.0
    """What it multiplies the success rate by."""
    bad_factor: float = 1.0
    """What it multiplies durations by."""
    log_odds: Callable[[float], float] = lambda _: 0.0
    """What is added to the log-odds of success at a time."""
    log_duration: Callable[[float], float] = lambda _: 0.0
    """What is added to the logarithm of a duration at a time."""

    def __post_init__(self) -> None:
        random = self.random
        self.runs_a_day = math.exp(random.uniform(math.log(12), math.log(40)))
        self.good = random.choice([0.9, 0.95, 0.97, 0.99])
        self.others = random.randint(1, 4)
        self.fails_in_outage = random.choice([0.6, 0.9, 1.0])
        per_week = math.exp(random.uniform(math.log(2), math.log(14)))
        moment = random.expovariate(per_week / 7)
        while moment < self.days:
            self.deploys.append(moment)
            moment += random.expovariate(per_week / 7)

    def moment(self, time: float) -> datetime:
        """Return when a time is."""
        return self.end + timedelta(days=time - self.days)

    def outage(self, hours: float) -> tuple[float, float]:
        """Draw an outage, which may be under way at the begin and at the end."""
        begin = self.random.uniform(-hours / 24, self.days)
        return begin, begin + hours / 24

    def breaks(self, days_ago: float, share: float = 1.0, factor: float = 1.0) -> None:
        """Deploy a bad commit."""
        self.bad_from, self.bad_share, self.bad_factor = self.days - days_ago, share, factor
        self.deploys = sorted([*self.deploys, self.bad_from])

    def bad_place(self, commits: Sequence[str]) -> int:
        """Return where the bad commit stands among those with runs; if it had none, the next one shows it first."""
        bad = COMMIT(bisect(self.deploys, self.bad_from))
        return next((place for place, commit in enumerate(commits) if commit >= bad), -9)

    def facts(self) -> Iterator[Fact]:
        """Draw the pair's runs, and those of the others."""
        for number in range(self.others + 1):
            a_day = self.runs_a_day if number == 0 else math.exp(self.random.uniform(math.log(10), math.log(40)))
            for _ in range(round(a_day * self.days)):
                yield self._fact(number, self.random.uniform(0, self.days))

    def _fact(self, number: int, time: float) -> Fact:
        random = self.random
        odds, longer = math.log(self.good / (1 - self.good)), 0.0
        hit = self.shared_outages
        if number == 0:
            odds += self.log_odds(time)
            longer += self.log_duration(time)
            hit = hit + self.own_outages
        success = 1 / (1 + math.exp(-odds))
        if number == 0 and time >= self.bad_from:
            success *= self.bad_share
            longer += math.log(self.bad_factor)
        if any(begin <= time < end for begin, end in hit):
            success = 1 - self.fails_in_outage
        agent, job = PAIR if number == 0 else (f"other-{number}", "job")
        commit = COMMIT(bisect(self.deploys, time)) if number == 0 else COMMIT(10_000 + number)
        status = "success" if random.random() < success else "failure"
        duration = 1 + round(60_000 * math.exp(random.gauss(longer, 0.55)))
        return Fact(agent, job, commit, format_timestamp(self.moment(time)), status, duration)


Scenario = Callable[[World], None]

# --- What may happen ------------------------------------------------------------------------------


def nothing(world: World) -> None:
    """No commit changes anything."""


def own_outages(world: World) -> None:
    """Leave the agent out of order for some hours, several times."""
    for _ in range(world.random.randint(1, 5)):
        world.own_outages.append(world.outage(world.random.uniform(2, 30)))


def own_outage_now(world: World) -> None:
    """Leave the agent out of order for the last 30 hours."""
    world.own_outages.append((world.days - 30 / 24, world.days))


def own_outage_of_three_days(world: World) -> None:
    """Leave the agent out of order for 72 hours, once."""
    world.own_outages.append(world.outage(72))


def own_outage_of_three_days_now(world: World) -> None:
    """Leave the agent out of order for the last 72 hours."""
    world.own_outages.append((world.days - 3, world.days))


def shared_outages(world: World) -> None:
    """Leave all agents out of order for some hours, several times."""
    for _ in range(world.random.randint(1, 5)):
        world.shared_outages.append(world.outage(world.random.uniform(2, 30)))


def shared_outage_of_three_days(world: World) -> None:
    """Leave all agents out of order for 72 hours, once."""
    world.shared_outages.append(world.outage(72))


def weekends(world: World) -> None:
    """Let a quarter or half of the runs of a Saturday or Sunday fail, and let them take longer."""
    odds = _fewer(world, world.random.choice([0.75, 0.5]))
    world.log_odds = lambda time: odds if world.moment(time).weekday() >= 5 else 0.0
    world.log_duration = lambda time: 0.4 if world.moment(time).weekday() >= 5 else 0.0


def nights(world: World) -> None:
    """Let a quarter or half of the runs from 0 to 8 o'clock fail, and let them take longer."""
    odds = _fewer(world, world.random.choice([0.75, 0.5]))
    world.log_odds = lambda time: odds if world.moment(time).hour < 8 else 0.0
    world.log_duration = lambda time: 0.4 if world.moment(time).hour < 8 else 0.0


def correlated(world: World) -> None:
    """Let failures come together: the log-odds wander, and forget in 10 hours."""
    size, random = world.random.choice([1.0, 1.5]), world.random
    kept = math.exp(-1 / 10)
    wave = [random.gauss(0, 1)]
    while len(wave) <= world.days * 24:
        wave.append(kept * wave[-1] + math.sqrt(1 - kept * kept) * random.gauss(0, 1))
    world.log_odds = lambda time: size * wave[int(time * 24)]
    world.log_duration = lambda time: size / 4 * wave[int(time * 24)]


def drift(world: World) -> None:
    """Let durations grow by half to three times, and failures to double or four times, steadily over the month."""
    factor, odds = world.random.choice([1.5, 2, 3]), world.random.choice([0.0, 0.7, 1.4])
    world.log_duration = lambda time: math.log(factor) * time / world.days
    world.log_odds = lambda time: -odds * time / world.days


def _fewer(world: World, share: float) -> float:
    return math.log(share / (1 - share)) - math.log(world.good / (1 - world.good))


def bad(days_ago: float, share: float = 1.0, factor: float = 1.0, also: Callable[[World], None] = nothing) -> Scenario:
    """Return the scenario of a bad commit."""

    def happens(world: World) -> None:
        world.good = GOOD
        also(world)
        world.breaks(days_ago, share, factor)

    return happens


HARMLESS: Final[Mapping[str, Scenario]] = {
    "nothing changed": nothing,
    "own outages of 2 to 30 h": own_outages,
    "own outage of 30 h, under way": own_outage_now,
    "own outage of 72 h": own_outage_of_three_days,
    "own outage of 72 h, under way": own_outage_of_three_days_now,
    "shared outages of 2 to 30 h": shared_outages,
    "shared outage of 72 h": shared_outage_of_three_days,
    "bad weekends": weekends,
    "bad nights": nights,
    "correlated failures (10 h)": correlated,
    "slow drift": drift,
}
HARMFUL: Final[Mapping[str, Scenario]] = {
    "95 to 60 % for 8 days": bad(8, 0.6 / GOOD),
    "95 to 60 % for 5 days": bad(5, 0.6 / GOOD),
    "95 to 60 % for 15 days": bad(15, 0.6 / GOOD),
    "95 to 80 % for 8 days": bad(8, 0.8 / GOOD),
    "95 to 60 % for 8 days, shared outages": bad(8, 0.6 / GOOD, also=shared_outages),
    "95 to 60 % for 8 days, own outages": bad(8, 0.6 / GOOD, also=own_outages),
    "95 to 60 % for 8 days, bad nights": bad(8, 0.6 / GOOD, also=nights),
    "durations x 1.5 for 8 days": bad(8, factor=1.5),
    "durations x 2 for 8 days": bad(8, factor=2.0),
}


def look(world: World) -> tuple[list[Change], list[str]]:
    """Return what is found in the pair's runs, and its commits in order."""
    pairs, neighbours = by_pair(cells_of(world.facts()))
    commits = in_order(pairs[PAIR])
    found = [change for measure in MEASURES for change in changes_of(PAIR, measure, commits, neighbours)]
    return found, [cells[0].commit for cells in commits]


def ask(url: str, world: World, prefix: str) -> tuple[list[str], bool, list[str]]:
    """Post the runs to a daemon and ask it; return the commits named, whether it is early for one, and all in order."""
    facts = [*world.facts()]
    runs = [
        {
            "event_id": f"{prefix}-{number}",
            "run_id": f"{prefix}-{number}",
            "agent_name": f"{prefix}-{fact.agent_name}",
            "job_type": fact.job_type,
            "start_time": fact.created_at,
            "created_at": fact.created_at,
            "status": fact.status,
            "duration_ms": fact.duration_ms,
            "git_commit_hash": fact.commit,
        }
        for number, fact in enumerate(facts)
    ]
    for first in range(0, len(runs), BATCH):
        _call(f"{url}/api/v1/runs/batch", runs[first : first + BATCH])
    span = {name: format_timestamp(world.moment(time)) for name, time in (("from", 0.0), ("to", world.days))}
    answer = _call(f"{url}/api/v1/regressions?{urlencode({'agent_name': f'{prefix}-{PAIR[0]}', **span})}")
    commits = [cells[0].commit for cells in in_order(by_pair(cells_of(facts))[0][PAIR])]
    return [each["first_bad_commit"] for each in answer["regressions"]], bool(answer["too_early"]), commits


def _call(url: str, body: object = None) -> Any:
    data = None if body is None else orjson.dumps(body)
    request = Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - the address that is given
    with urlopen(request) as answer:  # noqa: S310
        return orjson.loads(answer.read())


def rates(name: str, scenario: Scenario, pairs: int, url: str | None = None) -> dict[str, float]:
    """Return of how many pairs there is a finding, one that it is too early for, and one that names the commit."""
    counts = dict.fromkeys(("found", "early", "right", "near"), 0)
    for number in range(pairs):
        world = World(Random(f"{name} {number}"))  # noqa: S311 - invented data
        scenario(world)
        if url is None:
            found, commits = look(world)
            several = [change.since.blocks[0].commit for change in found if not change.is_early]
            is_early = len(several) < len(found)
        else:
            several, is_early, commits = ask(url, world, f"{name} {number}".replace(",", ""))
        named = [commits.index(commit) for commit in several]
        true = world.bad_place(commits)
        counts["found"] += bool(named)
        counts["early"] += is_early
        counts["right"] += true in named
        counts["near"] += any(abs(place - true) <= 1 for place in named)
    return {what: count / pairs for what, count in counts.items()}


@click.command(help=__doc__)
@click.option("--pairs", default=200, show_default=True, help="Pairs of each scenario.")
@click.option("--only", multiple=True, default=[""], help="Scenarios whose name contains this.")
@click.option("--url", help="A daemon without runs that gets all pairs over HTTP, and is asked.")
def main(*, pairs: int, only: tuple[str, ...], url: str | None) -> None:
    click.echo("| what happens | pairs with a finding | too early to tell | right commit | right or next to it |")
    click.echo("|---|--:|--:|--:|--:|")
    for name, scenario in {**HARMLESS, **HARMFUL}.items():
        if any(part in name for part in only):
            shares = rates(name, scenario, pairs, url)
            named = [f"{shares[what]:.1%}" if name in HARMFUL else "" for what in ("right", "near")]
            click.echo(f"| {name} | {shares['found']:.1%} | {shares['early']:.1%} | {' | '.join(named)} |")


if __name__ == "__main__":
    main()
