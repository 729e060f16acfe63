"""The command that fills a daemon with sample runs: demo."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Set
from contextlib import closing
from datetime import datetime, timedelta
from random import Random
from typing import Any, Final

import click
import orjson

from telemetryd.cli.options import counted, failing, json_flag, print_json, progress
from telemetryd.cli.reach import RefusedError, Where, daemon_flags, pause_s
from telemetryd.cli.sample_data import AGENTS, LOOKED_BACK, Story, World, finished
from telemetryd.client.answers import shown
from telemetryd.client.transport import Answer, Transport, UnreachableError, run_path
from telemetryd.model.values import utc_now

_BATCH: Final = 500
_DAYS: Final = LOOKED_BACK.days
PER_DAY: Final = 1000
_TRIES: Final = 30
_LIVE_EVERY_S: Final = 1.5
_LIVE_SPEED: Final = 6
"""How much faster than real ones live runs end, so that one sees them end."""


class _Poster:
    """Posts to one daemon, and posts again while it is busy."""

    def __init__(self, transport: Transport, sleep: Callable[[float], None] = time.sleep) -> None:
        self._transport = transport
        self._sleep = sleep
        self.posted = 0
        """How many runs were new to the daemon."""

    def send(self, method: str, path: str, body: object, fields: Set[str]) -> Any:
        """Send a request until it is taken; return the answer's JSON, an object with these fields.

        Raises:
            RefusedError: if it is refused, or the daemon does not answer.

        """
        for attempt in range(1, _TRIES + 1):
            try:
                answer: Answer = self._transport.request(method, path, orjson.dumps(body))
            except UnreachableError as error:
                raise RefusedError(f"Cannot reach the daemon: {error}") from error
            if answer.status in (200, 201):
                if not isinstance(answer.body, dict) or not answer.body.keys() >= fields:
                    raise RefusedError("What answered is no telemetryd: it does not say what became of the runs")
                return answer.body
            if answer.status not in (429, 503) or attempt == _TRIES:
                raise RefusedError(shown(answer), answer.status)
            self._sleep(pause_s({"Retry-After": answer.headers.get("retry-after", "")}))
        raise AssertionError("the last attempt returns or raises")

    def begin(self, stories: list[Story], now: datetime) -> list[Story]:
        """Post runs as they are now, with their events up to now; return what is left of those that are not over.

        Runs that were there already have another story, invented earlier today; they are left as they are.
        """
        runs = [finished(story) if story.ends_at <= now else story.run for story in stories]
        answer = self.send("POST", "/api/v1/runs/batch", runs, {"inserted", "duplicates"})
        self.posted += answer["inserted"]
        if answer["duplicates"]:
            return []
        left = []
        for story in stories:
            past, future = story.split(now)
            self._report(story, past)
            if story.finish and story.ends_at > now:
                left.append(future)
        return left

    def end(self, story: Story) -> None:
        """Post the events of a run that are left, and its end."""
        self._report(story, story.events)
        self.send("PATCH", run_path(story.run["event_id"]), story.finish, {"updated"})

    def _report(self, story: Story, events: list[dict[str, Any]]) -> None:
        if events:
            self.send("POST", f"{run_path(story.run['event_id'])}/events", events, {"inserted"})


@click.command(
    help=rf"""Post {_DAYS} days of invented runs, then more until Ctrl-C.

    Twenty agents have made them, so that there is something to look at: parents and children, events, figures, labels
    and commits. Failures come in clusters, some of them in all agents at once, and one agent (seo-optimizer) fails from
    a certain commit on, which `telemetryd regressions` names if there are about {_DAYS} days of runs. Their event_ids
    begin with `demo-`; what a seed has invented on one day is not stored twice. Meant for a database to try things
    out with.

    \b
    Examples:
      telemetryd demo
      telemetryd demo --days 365 --runs 50000 --no-live --json
      telemetryd demo --unix /run/telemetryd/telemetryd.sock --seed 7
    """
)
@click.option("--runs", "number", type=click.IntRange(1), help=f"How many runs; default: {PER_DAY} a day.")
@click.option(
    "--days", type=click.IntRange(1, 366), default=_DAYS, show_default=True, help="How many days they lie back."
)
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed at the same time invents the same.")
@click.option("--live/--no-live", default=True, help="Whether to go on with new runs until Ctrl-C.")
@json_flag
@daemon_flags
def demo(*, number: int | None, days: int, seed: int, live: bool, as_json: bool, where: Where) -> None:
    now = utc_now()
    with failing():
        config = where.config()
        with closing(Transport(config)) as transport:
            poster = _Poster(transport)
            world = World(seed, now - timedelta(days=days), now)
            open_runs = _post(poster, world, number or days * PER_DAY, now)
            page = None if config.url.startswith("unix:") else f"{config.url.rstrip('/')}/"
            if as_json:
                print_json({"runs": poster.posted, "agents": len(AGENTS), "page": page})
            else:
                known = "" if poster.posted else f": what seed {seed} invents today was there already"
                click.echo(f"{counted(poster.posted, 'run')} of {counted(len(AGENTS), 'agent')} posted{known}")
                click.echo(f"Look at {page or 'the address of the daemon'}")
            if live:
                click.echo("Going on live; Ctrl-C stops.", err=True)
                try:
                    _go_on(poster, world, open_runs)
                except KeyboardInterrupt:
                    click.echo("Stopped.", err=True)


def _post(poster: _Poster, world: World, number: int, now: datetime) -> list[Story]:
    """Post the past; return the runs that are not over."""
    open_runs: list[Story] = []
    with progress() as drawn:
        waiting: list[Story] = []
        for story in world.runs(number):
            waiting.append(story)
            if len(waiting) == _BATCH:
                open_runs += poster.begin(waiting, now)
                waiting = []
                drawn("Inventing", min(poster.posted, number), number)
        open_runs += poster.begin(waiting, now)
    return open_runs


def _go_on(poster: _Poster, world: World, open_runs: list[Story]) -> None:
    """Begin runs and end them, for ever."""
    random = Random(f"{world.seed} live")  # noqa: S311 - invented data
    session = f"{world.end:%Y%m%dT%H%M%S}"
    ends = [(story.ends_at, index, story) for index, story in enumerate(open_runs)]
    heapq.heapify(ends)
    serial = len(ends)
    while True:
        now = utc_now()
        while ends and ends[0][0] <= now:
            poster.end(heapq.heappop(ends)[2])
        agent = random.choices(AGENTS, [each.weight for each in AGENTS])[0]
        story = world.story(random, agent, now, f"live-{session}-{serial}", None, speed=_LIVE_SPEED)
        for left in poster.begin([story], now):
            heapq.heappush(ends, (left.ends_at, serial, left))
        serial += 1
        time.sleep(random.expovariate(1 / _LIVE_EVERY_S))
