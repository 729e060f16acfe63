"""Counts in how many invented worlds only the agent that a commit breaks is found: `python -m tests.tools.demo_seeds`.

Every world is what `telemetryd demo` posts by default, without its events; a daemon gets all of them over HTTP, one
after the other in time, and `GET /api/v1/regressions` is asked about each.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import click

from telemetryd.cli.demo import PER_DAY
from telemetryd.cli.sample_data import AGENTS, LOOKED_BACK, World, finished
from tests.conftest import Daemon
from tests.http_client import call, get

DEFAULT_SEED: Final = 1
HOURS: Final = 24
SEEDS: Final = 100
ENOUGH: Final = 98
"""In how many worlds of other seeds the agent must be found, and no other."""
FIRST_END: Final = datetime(2021, 1, 18, tzinfo=UTC)
APART: Final = LOOKED_BACK + timedelta(days=1)
"""How far apart worlds lie; as it is no number of weeks, they end on every day of one."""
BATCH: Final = 5000


@dataclass(frozen=True, slots=True)
class Seen:
    """What was found in one world."""

    is_found: bool
    """Whether the agent that a commit breaks is."""
    is_named: bool
    """Whether that commit is."""
    others: tuple[str, ...]
    """Which agents are that no commit breaks."""

    @property
    def is_right(self) -> bool:
        """Whether exactly one agent is found, the right one."""
        return self.is_found and not self.others


def look(url: str, seed: int, end: datetime) -> Seen:
    """Post a world, and ask about it."""
    world = World(seed, end - LOOKED_BACK, end)
    runs = [finished(story) if story.ends_at <= end else story.run for story in world.runs(LOOKED_BACK.days * PER_DAY)]
    for first in range(0, len(runs), BATCH):
        status, answer = call(url, "POST", "/api/v1/runs/batch", runs[first : first + BATCH])
        if status != 200 or answer["duplicates"]:
            raise SystemExit(f"The runs were answered {status}: {answer}")
    span = urlencode({"from": (end - LOOKED_BACK).isoformat(), "to": end.isoformat()})
    findings: list[dict[str, Any]] = get(url, f"/api/v1/regressions?{span}")[1]["regressions"]
    [broken] = (agent.name for agent in AGENTS if agent.breaks)
    [commit] = {run["git_commit_hash"] for run in runs if "canonical_url" in run.get("error_summary", "")}
    own = [finding for finding in findings if finding["agent_name"] == broken]
    return Seen(
        bool(own),
        any(finding["first_bad_commit"] == commit for finding in own),
        tuple(sorted({finding["agent_name"] for finding in findings} - {broken})),
    )


def ends() -> Iterator[datetime]:
    """Yield when worlds end, at midnight."""
    end = FIRST_END
    while True:
        yield end
        end += APART


def main() -> int:
    """Look at worlds of the default seed that end at each hour of the day, and at worlds of other seeds."""
    moments = ends()
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(Path(folder), TELEMETRY_DB_JOURNAL_MODE="WAL")
        try:
            by_hour = [
                _told(
                    f"seed {DEFAULT_SEED} at {hour} o'clock",
                    look(daemon.url, DEFAULT_SEED, next(moments) + timedelta(hours=hour)),
                )
                for hour in range(HOURS)
            ]
            by_seed = [
                _told(f"seed {seed}", look(daemon.url, seed, next(moments) + timedelta(hours=seed % 24)))
                for seed in range(DEFAULT_SEED + 1, DEFAULT_SEED + 1 + SEEDS)
            ]
        finally:
            daemon.close()
    for name, seen in (("hours", by_hour), ("seeds", by_seed)):
        right, named = sum(each.is_right for each in seen), sum(each.is_named for each in seen)
        click.echo(f"{right} of {len(seen)} {name}: the agent, and no other; {named} of {len(seen)}: the commit itself")
    is_enough = sum(each.is_right for each in by_seed) >= ENOUGH
    return 0 if is_enough and all(each.is_right for each in by_hour) else 1


def _told(name: str, seen: Seen) -> Seen:
    if not (seen.is_right and seen.is_named):
        click.echo(f"{name}: {seen}")
    return seen


if __name__ == "__main__":
    sys.exit(main())
