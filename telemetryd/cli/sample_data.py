"""Generates sample runs of twenty agents: the same seed gives the same runs."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from itertools import accumulate
from random import Random
from typing import Any, Final, Literal

Json = dict[str, Any]
Rhythm = Literal["office", "night", "steady", "nightly"]
"""When an agent runs: with its users, while they sleep, all day, or in the hours after 2 o'clock."""

REPO: Final = "https://github.com/acme/{}.git"
LOOKED_BACK: Final = timedelta(days=14)
"""How much of the past, up to its end, has a commit that breaks an agent: what lies before is only history."""
BREAKS_AT: Final = 0.55
"""Which share of that an agent's runs have begun when the commit breaks it: days enough on both sides, at any hour."""
_BROKEN_FAILS: Final = 0.8
"""Which share of its runs fails then."""
_OUTAGE_EVERY: Final = timedelta(days=5)
"""How often, on average, all agents suffer together: such failures are no commit's work."""
_STEPS_OF_TIME: Final = 1000
_PARENTS_FOR: Final = timedelta(minutes=40)
STALE: Final = 3
"""Runs that were begun hours ago, and of which nobody has heard again."""


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent: what it does, how often, for how long and how well.

    Attributes:
        weight: its share of all runs, relative to the others'.
        seconds: the median duration.
        failing: the share of runs that fail on an ordinary day.
        is_child: whether runs of the orchestrator start its runs.
        breaks: whether a commit breaks it.

    """

    name: str
    job_types: tuple[str, ...]
    rhythm: Rhythm
    weight: float
    seconds: float
    failing: float
    items: int
    repo: str
    host: str
    trigger: str = "schedule"
    is_child: bool = False
    breaks: bool = False


ORCHESTRATOR: Final = "nightly-orchestrator"
AGENTS: Final = (
    Agent("hugo-translator", ("translate", "review"), "night", 9, 190, 0.02, 60, "website", "build-01", is_child=True),
    Agent("seo-optimizer", ("rewrite", "audit"), "office", 8, 48, 0.02, 25, "seo-tools", "build-02", breaks=True),
    Agent("link-checker", ("check_links",), "steady", 12, 35, 0.03, 240, "website", "edge-01"),
    Agent("ticket-triage", ("classify", "route"), "office", 16, 6, 0.015, 1, "support-bots", "agents-01", "webhook"),
    Agent("invoice-reader", ("extract", "match_orders"), "office", 10, 14, 0.04, 8, "finance-ai", "agents-02", "queue"),
    Agent("code-reviewer", ("review_pull_request",), "office", 9, 95, 0.02, 12, "platform", "ci-01", "webhook"),
    Agent("test-fixer", ("fix_flaky_test", "bisect"), "office", 5, 410, 0.12, 3, "platform", "ci-02", "ci"),
    Agent("dependency-updater", ("update", "changelog"), "night", 4, 160, 0.06, 14, "platform", "ci-01"),
    Agent("doc-writer", ("write_reference", "write_guide"), "office", 4, 240, 0.03, 6, "docs", "agents-01"),
    Agent("image-describer", ("alt_text",), "steady", 8, 22, 0.02, 40, "website", "gpu-01", is_child=True),
    Agent("price-watcher", ("crawl_prices",), "steady", 14, 18, 0.05, 120, "market", "edge-02"),
    Agent("news-digest", ("collect", "summarise"), "steady", 6, 70, 0.02, 45, "digest", "agents-02"),
    Agent("sitemap-builder", ("build_sitemap",), "nightly", 2, 33, 0.01, 900, "website", "build-01", is_child=True),
    Agent("log-analyst", ("find_anomalies",), "steady", 6, 55, 0.02, 300, "ops-bots", "ops-01"),
    Agent("backup-verifier", ("restore_and_compare",), "nightly", 1, 1300, 0.03, 4, "ops-bots", "ops-01"),
    Agent("release-notes", ("draft",), "office", 2, 80, 0.02, 20, "platform", "ci-01", "manual"),
    Agent("survey-coder", ("code_answers",), "office", 3, 130, 0.03, 150, "research", "gpu-01", "manual"),
    Agent("product-matcher", ("embed", "match"), "night", 5, 520, 0.03, 2000, "market", "gpu-02", is_child=True),
    Agent("spam-filter", ("score",), "steady", 15, 3, 0.008, 1, "support-bots", "agents-03", "queue"),
    Agent(ORCHESTRATOR, ("orchestrate",), "nightly", 2, 2400, 0.02, 4, "ops-bots", "ops-02"),
)  # fmt: skip

_ERRORS: Final = (
    (
        "Rate limit of the model provider",
        "RateLimitError: 429 Too Many Requests\n  retry-after: 40\n  after 5 attempts in 71 s",
    ),
    (
        "Connection reset by api.example.com",
        "ConnectionResetError: [Errno 104] Connection reset by peer\n"
        "  POST https://api.example.com/v2/items\n  at sync_items (sync.py:118)",
    ),
    (
        "Answer of the model is no valid JSON",
        "JSONDecodeError: Expecting ',' delimiter: line 41 column 9 (char 1822)\n  at parse_answer (answers.py:57)",
    ),
    (
        "3 files could not be read",
        "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9 in position 412\n"
        "  content/fr/a-propos.md\n  content/fr/équipe.md\n  content/fr/histoire.md",
    ),
    ("Out of disk space in /var/tmp", "OSError: [Errno 28] No space left on device: '/var/tmp/render-7f3a'"),
)
_BROKEN: Final = (
    "KeyError: 'canonical_url' in rewrite",
    "Traceback (most recent call last):\n"
    '  File "seo/rewrite.py", line 88, in rewrite\n'
    '    target = page.meta["canonical_url"]\n'
    "KeyError: 'canonical_url'",
)
_STEPS: Final = ("fetch", "prepare", "model", "write")
_TEAMS: Final = {
    "website": "web",
    "seo-tools": "search",
    "support-bots": "support",
    "finance-ai": "finance",
    "platform": "platform",
    "docs": "docs",
    "market": "market",
    "digest": "editors",
    "ops-bots": "operations",
    "research": "research",
}
"""Whose agents are in which repository."""
_REGIONS: Final = ("eu-central", "eu-central", "us-east", "ap-south")
_HIGH_PRIORITY: Final = 0.15
"""Which share of the runs has a label that says so."""
_AUTHORS: Final = ("Ada Berg <ada@example.com>", "Noor Vos <noor@example.com>", "Kim Sato <kim@example.com>")


@dataclass(frozen=True, slots=True)
class Story:
    """A run as it is posted, what happened in it, and how it goes on if it is not over."""

    run: Json
    events: list[Json]
    ends_at: datetime
    finish: Json
    """The PATCH that ends it, at `ends_at`."""

    def split(self, moment: datetime) -> tuple[list[Json], Story]:
        """Return the events up to a moment, and the story that is left after it."""
        past = [event for event in self.events if _moment(event["timestamp"]) <= moment]
        return past, replace(self, events=self.events[len(past) :])


@dataclass(slots=True)
class World:
    """What the agents live in: the same for the same seed and the same span of time."""

    seed: int
    begin: datetime
    end: datetime
    incidents: dict[str, list[tuple[datetime, datetime, int]]] = field(init=False)
    """When something was wrong with each agent, and with which error."""
    breaks: dict[str, datetime] = field(init=False)
    """When the commit comes that breaks an agent."""

    def __post_init__(self) -> None:
        self.breaks = {agent.name: self._after(agent, BREAKS_AT) for agent in AGENTS if agent.breaks}
        random = Random(f"{self.seed} incidents")  # noqa: S311 - invented data
        hours = (self.end - self.begin) / timedelta(hours=1)
        outages = [
            self._incident(random, 0)
            for _ in range(round((self.end - self.begin) / _OUTAGE_EVERY * random.random() * 2))
        ]
        self.incidents = {}
        for agent in AGENTS:
            several = [*outages]
            if agent.breaks:  # what is wrong with it is its commit
                self.incidents[agent.name] = several
                continue
            for _ in range(max(1, round(hours / 170)) if random.random() < min(0.9, 0.3 + hours / 500) else 0):
                several.append(self._incident(random, random.randrange(len(_ERRORS))))
            self.incidents[agent.name] = several

    def _incident(self, random: Random, error: int) -> tuple[datetime, datetime, int]:
        """Invent some hours in which many runs end with an error."""
        start = self.begin + (self.end - self.begin) * random.random()
        return start, start + timedelta(hours=0.7 + 2.5 * random.random()), error

    def _after(self, agent: Agent, share: float) -> datetime:
        """Return the moment when this share of an agent's latest runs is to be expected behind it."""
        begin = max(self.begin, self.end - LOOKED_BACK)
        step = (self.end - begin) / _STEPS_OF_TIME
        moments = [begin + step * number for number in range(_STEPS_OF_TIME)]
        expected = [*accumulate(_likelihood(agent.rhythm, moment) for moment in moments)]
        return moments[bisect(expected, share * expected[-1])]

    def runs(self, number: int) -> Iterator[Story]:
        """Yield about so many runs within the span of time, oldest first, and some that nobody has heard of again."""
        random = Random(f"{self.seed} runs")  # noqa: S311
        moments = sorted(
            (moment, index)
            for index, agent in enumerate(AGENTS)
            for moment in _moments(random, agent, self.begin, self.end, number)
        )
        parent: Json | None = None
        stem = f"{self.seed}-{self.end:%Y%m%d}"
        for serial, (moment, index) in enumerate(moments):
            agent = AGENTS[index]
            is_near = parent is not None and moment - _moment(parent["start_time"]) < _PARENTS_FOR
            started_by = parent if agent.is_child and is_near else None
            story = self.story(random, agent, moment, f"{stem}-{serial}", started_by)
            if agent.name == ORCHESTRATOR:
                parent = story.run
            yield story
        for serial in range(STALE):
            agent = AGENTS[(7 * serial + self.seed) % len(AGENTS)]
            moment = self.end - min(self.end - self.begin, timedelta(days=1)) * (0.1 + 0.07 * serial)
            yield _unheard(self.story(random, agent, moment, f"{stem}-stale-{serial}", None))

    def story(
        self, random: Random, agent: Agent, moment: datetime, serial: str, parent: Json | None, *, speed: float = 1
    ) -> Story:
        """Invent one run that begins at a moment, and ends so many times faster than usual."""
        seconds = agent.seconds / speed * math.exp(random.gauss(0, 0.35))
        commit, commit_time, is_broken = self._commit(agent, moment)
        status, error = self._outcome(random, agent, moment, is_broken)
        if status == "timeout":
            seconds = agent.seconds / speed * 6
        elif status == "failure":
            seconds *= 0.2 + 0.6 * random.random()
        ends_at = moment + timedelta(seconds=seconds)
        job_type = random.choice(agent.job_types)
        number = max(1, round(agent.items * math.exp(random.gauss(0, 0.4))))
        failed = {
            "success": 0,
            "failure": number - number // 3,
            "timeout": number // 2,
            "partial": max(1, number // 8),
        }.get(status, 0)
        finish: Json = {
            "status": status,
            "end_time": _text(ends_at),
            "duration_ms": round(seconds * 1000),
            "items_succeeded": number - failed if status != "cancelled" else 0,
            "items_failed": failed,
            "metrics_json": {
                "tokens_in": number * random.randrange(200, 900),
                "tokens_out": number * random.randrange(50, 400),
                "cost_usd": round(number * random.uniform(0.0004, 0.004), 4),
            },
        }
        if error is not None:
            finish |= {"error_summary": error[0], "error_details": error[1]}
        elif status == "cancelled":
            finish["output_summary"] = "Cancelled before it was done"
        else:
            finish["output_summary"] = f"{number - failed} of {number} items done by {job_type}"
        run: Json = {
            "event_id": f"demo-{serial}",
            "run_id": f"{moment:%Y%m%dT%H%M%SZ}-{agent.name}-{_hash(serial)[:6]}",
            "agent_name": agent.name,
            "job_type": job_type,
            "created_at": _text(moment),
            "start_time": _text(moment),
            "status": "running",
            "items_discovered": number,
            "input_summary": f"{number} items for {job_type}",
            "host": agent.host,
            "environment": "prod" if random.random() < 0.9 else "staging",
            "trigger_type": "parent" if parent is not None else agent.trigger,
            "platform": "python",
            "product": agent.repo,
            "labels": {
                "team": _TEAMS[agent.repo],
                "region": random.choice(_REGIONS),
                **({"priority": "high"} if random.random() < _HIGH_PRIORITY else {}),
            },
            "git_repo": REPO.format(agent.repo),
            "git_branch": "main",
            "git_commit_hash": commit,
            "git_commit_timestamp": _text(commit_time),
            "git_commit_author": _AUTHORS[int(commit[0], 16) % len(_AUTHORS)],
            "git_commit_source": ("manual", "llm", "ci")[int(commit[1], 16) % 3],
            "context_json": {"model": "large-2" if agent.seconds > 60 else "small-2", "attempt": 1},
        }
        if parent is not None:
            run["parent_run_id"] = parent["run_id"]
        return Story(run, _events(random, moment, seconds, status, error), ends_at, finish)

    def _commit(self, agent: Agent, moment: datetime) -> tuple[str, datetime, bool]:
        """Return the commit that an agent runs at a moment, when it was made, and whether it is broken."""
        breaks_at = self.breaks.get(agent.name, self.end)
        hours = 5 + int(_hash(agent.repo)[:2], 16) % 14  # between two commits of its repository
        made = moment - (moment - datetime(2000, 1, 1, tzinfo=UTC)) % timedelta(hours=hours)
        is_broken = agent.breaks and moment >= breaks_at
        if agent.breaks and (is_broken or made > breaks_at):
            made = breaks_at
        return _hash(f"{self.seed} {agent.repo} {_text(made)} {is_broken}"), made, is_broken

    def _outcome(
        self, random: Random, agent: Agent, moment: datetime, is_broken: bool
    ) -> tuple[str, tuple[str, str] | None]:
        if is_broken and random.random() < _BROKEN_FAILS:
            return "failure", _BROKEN
        for start, end, error in self.incidents[agent.name]:
            if start <= moment < end and random.random() < 0.6:
                return (
                    ("timeout", ("No answer within the time limit", "TimeoutError: the model did not answer"))
                    if random.random() < 0.2
                    else ("failure", _ERRORS[error])
                )
        if random.random() < agent.failing:
            return "failure", random.choice(_ERRORS)
        chance = random.random()
        if chance < 0.02:
            return "partial", ("Some items were left out", "ValueError: empty input, see the events")
        if chance < 0.025:
            return "timeout", ("No answer within the time limit", "TimeoutError: the model did not answer")
        return ("cancelled" if chance < 0.032 else "success"), None


def _moments(random: Random, agent: Agent, begin: datetime, end: datetime, number: int) -> Iterator[datetime]:
    """Yield when an agent's runs begin: its share of all, more of them in its hours."""
    share = round(number * agent.weight / sum(each.weight for each in AGENTS))
    found = 0
    while found < share:
        moment = begin + (end - begin) * random.random()
        if random.random() < _likelihood(agent.rhythm, moment):
            found += 1
            yield moment


def _likelihood(rhythm: Rhythm, moment: datetime) -> float:
    hour = moment.hour + moment.minute / 60
    week = 0.35 if moment.weekday() >= 5 else 1.0
    if rhythm == "office":
        return week * (0.06 + 0.94 * math.exp(-(((hour - 13.5) / 4.2) ** 2)))
    if rhythm == "night":
        return 0.12 + 0.88 * math.exp(-((min(abs(hour - 2.5), 24 - abs(hour - 2.5)) / 3.2) ** 2))
    if rhythm == "nightly":
        return 1.0 if 2 <= hour < 5 else 0.08
    return 0.7 + 0.3 * math.sin((hour - 8) * math.pi / 12)


def _events(random: Random, moment: datetime, seconds: float, status: str, error: tuple[str, str] | None) -> list[Json]:
    if error is None and random.random() > 0.15:
        return []
    at = [moment + timedelta(seconds=seconds * share) for share in sorted(random.random() for _ in _STEPS)]
    found: list[Json] = [
        {
            "event_type": "step",
            "timestamp": _text(when),
            "payload": {"name": step, "done": index + 1, "of": len(_STEPS)},
        }
        for index, (step, when) in enumerate(zip(_STEPS, at, strict=True))
    ]
    if error is not None:
        found[-1] = {
            "event_type": "error",
            "timestamp": _text(moment + timedelta(seconds=seconds)),
            "payload": {"message": error[0], "status": status},
        }
        found.insert(
            2, {"event_type": "retry", "timestamp": found[1]["timestamp"], "payload": {"attempt": 2, "after_s": 5}}
        )
    return found


def finished(story: Story) -> Json:
    """Return a story's run as it is when it is over."""
    return {**story.run, **story.finish}


def _unheard(story: Story) -> Story:
    return Story(story.run, story.events[:1], datetime.max.replace(tzinfo=UTC), {})


def _hash(text: str) -> str:
    return blake2b(text.encode(), digest_size=20).hexdigest()


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)
