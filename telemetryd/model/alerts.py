"""Alert states: facts become findings, findings become changes of state, as frozen data without SQL."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, field
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal, NotRequired, cast

import orjson
from pydantic import Field
from typing_extensions import TypeAliasType, TypedDict

from telemetryd.model.answers import FreeObject, Moment, Number
from telemetryd.model.commands import AlertChange
from telemetryd.model.filters import Filters
from telemetryd.model.queries import Query
from telemetryd.model.regressions import RegressionMeasure
from telemetryd.model.rules import ANY, KINDS, FailureRate, Regression, Rule, Rules, Silent, Slow, Stale
from telemetryd.model.stats import GetStats, hour_number
from telemetryd.model.values import Status, format_timestamp

FAILED: Final = (str(Status.FAILURE), str(Status.TIMEOUT))
"""What a failure rate counts as failed."""
FINISHED: Final = tuple(str(status) for status in Status if status is not Status.RUNNING)
MAX_WAITING: Final = 1000
"""Deliveries that may wait for one webhook; beyond it the oldest are given up."""
MAX_FIRING: Final = 1000
"""Subjects that a rule fires for one by one; the others are counted."""
_LONGEST: Final = timedelta(days=36_500)

Group = Mapping[str, Any]
"""A group as `stats` answers it."""


@dataclass(frozen=True, slots=True, order=True)
class Subject:
    """What a rule has found: an agent, a job type of an agent, or a commit that made it worse; else that is empty."""

    agent_name: str
    job_type: str = ""
    measure: str = ""
    first_bad_commit: str = ""

    def to_json(self) -> dict[str, str]:
        """Return it as it is reported."""
        return {name: value for name, value in asdict(self).items() if value}


@dataclass(frozen=True, slots=True)
class Finding:
    """That a rule holds for a subject, in a sentence, and the figures."""

    subject: Subject
    summary: str
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class EvaluateRules(Query["Evaluation"]):
    """Which subjects each rule holds for, at a moment. Answer: `Evaluation`."""

    rules: tuple[Rule, ...]
    now: datetime


@dataclass(frozen=True, slots=True)
class ListFiring(Query["Kept"]):
    """What is firing as it is stored, and how many deliveries wait. Answer: `Kept`."""


@dataclass(frozen=True, slots=True)
class ListDeliveries(Query[list["Delivery"]]):
    """The oldest deliveries that wait for a webhook. Answer: a list of `Delivery`."""

    webhook: str
    limit: int = 1000


@dataclass(frozen=True, slots=True)
class Firing:
    """A rule that is firing for a subject, as it is stored."""

    rule: str
    subject: Subject
    since: str
    seq: int
    summary: str
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kept:
    """What is firing, and for each webhook how many deliveries wait."""

    firing: tuple[Firing, ...]
    waiting: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message that waits for a webhook; the same id is the same message, however often it comes."""

    number: int
    id: str
    created_at: str
    body: str

    @property
    def alert(self) -> tuple[str, Subject]:
        """Return which alert it is about."""
        body = orjson.loads(self.body)
        return body["rule"], Subject(**body["subject"])


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the rules hold for in one snapshot, and what was firing in it."""

    now: datetime
    found: Mapping[str, tuple[Finding, ...] | str]
    """The findings of each rule; or a sentence that says why they are unknown, and then nothing changes."""
    firing: tuple[Firing, ...]
    seq: int
    """Where the commit sequence stood, and in which epoch."""
    epoch: str
    more: Mapping[str, int] = field(default_factory=dict)
    """The number of further subjects of each rule, which are not among those found."""


def bounded(findings: Iterable[Finding], fired: Collection[Subject]) -> tuple[tuple[Finding, ...], int]:
    """Return `MAX_FIRING` findings at most, and how many there are besides.

    What fires already goes on firing, before anything new: or alerts would end though nothing has changed.
    """
    old: list[Finding] = []
    new: list[Finding] = []
    count = 0
    for finding in findings:
        count += 1
        some = old if finding.subject in fired else new
        if len(some) < MAX_FIRING:
            some.append(finding)
    found = (*old, *new)[:MAX_FIRING]
    return found, count - len(found)


def silent(rule: Silent, now: datetime, heard: Mapping[str, str | None]) -> tuple[Finding, ...]:
    """Find the agents that were last heard of too long ago, or never."""
    before = ago(now, rule.after_s)
    span = span_text(rule.after_s)
    return tuple(
        Finding(
            Subject(agent),
            f"{agent} has been silent for more than {span}" if last else f"{agent} has never been heard of",
            {"last_heard": last, "after_s": rule.after_s},
        )
        for agent, last in heard.items()
        if last is None or last < before
    )


def window_of(rule: FailureRate | Slow, now: datetime) -> GetStats:
    """Return what to ask the statistics: the whole hours from that in which the window begins."""
    group_by = ("agent_name", "status" if isinstance(rule, FailureRate) else "job_type")
    return GetStats(
        hour_number(ago(now, rule.window_s)),
        hour_number(format_timestamp(now)) + 1,
        group_by,
        filters=filters_of(rule, {"status": FINISHED} if isinstance(rule, Slow) else {}),
    )


def filters_of(rule: FailureRate | Slow | Regression, more: Mapping[str, tuple[str, ...]] | None = None) -> Filters:
    """Return which agents and job types a rule is about, and what else is asked for."""
    equal = {"agent_name": tuple(name for name in rule.agent_name if "*" not in name), "job_type": rule.job_type}
    patterns = tuple(tuple(name.split("*")) for name in rule.agent_name if "*" in name and rule.agent_name != ANY)
    return Filters({name: values for name, values in {**equal, **(more or {})}.items() if values}, patterns=patterns)


def failure_rate(rule: FailureRate, groups: Iterable[Group]) -> tuple[Finding, ...]:
    """Find the agents of which too many finished runs failed; groups are by agent and status."""
    finished: dict[str, int] = {}
    failed: dict[str, int] = {}
    for group in groups:
        if group["status"] in FINISHED:
            agent = group["agent_name"]
            finished[agent] = finished.get(agent, 0) + group["runs"]
            failed[agent] = failed.get(agent, 0) + (group["runs"] if group["status"] in FAILED else 0)
    return tuple(
        Finding(
            Subject(agent),
            f"{failed[agent]} of the last {runs} runs of {agent} failed ({failed[agent] / runs:.1%}, more than "
            f"{rule.above:.1%}) within {span_text(rule.window_s)}",
            {"runs": runs, "failed": failed[agent], "rate": round(failed[agent] / runs, 6), "above": rule.above},
        )
        for agent, runs in finished.items()
        if runs >= rule.min_runs and failed[agent] / runs > rule.above
    )


def limits(rule: Slow, groups: Iterable[Group]) -> dict[Subject, float]:
    """Return for each job type of an agent how many milliseconds a run may take, where enough runs show it."""
    return {
        Subject(group["agent_name"], group["job_type"]): group["duration_ms"]["p99"] * rule.factor
        for group in groups
        if group["runs"] >= rule.min_runs and group["duration_ms"]["p99"]
    }


@dataclass(frozen=True, slots=True)
class Running:
    """The running runs of a subject that are meant: how many, and the one that counts most."""

    runs: int
    event_id: str
    since: str


def slow(subject: Subject, limit_ms: float, running: Running) -> Finding:
    """Return the finding that runs take longer than the limit."""
    return Finding(
        subject,
        f"{_runs(running.runs)} of {subject.agent_name} ({subject.job_type}) for longer than usual "
        f"({span_text(limit_ms / 1000)}); the longest is {running.event_id}",
        {"runs": running.runs, "limit_ms": round(limit_ms), "longest": running.event_id, "start_time": running.since},
    )


def stale(rule: Stale, agent: str, running: Running) -> Finding:
    """Return the finding that runs have not changed for too long."""
    return Finding(
        Subject(agent),
        f"{_runs(running.runs)} of {agent} without a change for more than {span_text(rule.after_s)}; the oldest is "
        f"{running.event_id}",
        {"runs": running.runs, "after_s": rule.after_s, "oldest": running.event_id, "created_at": running.since},
    )


def _runs(number: int) -> str:
    return "1 run is running" if number == 1 else f"{number} runs are running"


def ago(now: datetime, seconds: float) -> str:
    """Return the stored form of the moment so many seconds before now, at most a century."""
    return format_timestamp(now - min(timedelta(seconds=min(seconds, _LONGEST.total_seconds())), _LONGEST))


def span_text(seconds: float) -> str:
    """Return a time for people: 90s, 2h, 1.5d."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size or seconds == size:
            return f"{seconds / size:.3g}{unit}"
    return f"{seconds:.3g}s"


def changes(evaluation: Evaluation, rules: Rules, new_id: Callable[[], str]) -> tuple[AlertChange, ...]:
    """Return what has changed: who began to fire, and who ceased; one who goes on firing is no change."""
    at = format_timestamp(evaluation.now)
    changed: list[AlertChange] = []
    for name, found in evaluation.found.items():
        if isinstance(found, str):
            continue
        rule = rules.named(name)
        fired = {firing.subject: firing for firing in evaluation.firing if firing.rule == name}
        now_found = {finding.subject: finding for finding in found}
        changed += [
            _change(evaluation, rule, finding, at, new_id(), firing=True)
            for subject, finding in sorted(now_found.items(), key=lambda item: item[0])
            if subject not in fired
        ]
        changed += [
            _change(evaluation, rule, Finding(subject, was.summary, was.details), was.since, new_id(), firing=False)
            for subject, was in sorted(fired.items(), key=lambda item: item[0])
            if subject not in now_found
        ]
    return tuple(changed)


def _change(
    evaluation: Evaluation, rule: Rule, finding: Finding, since: str, new_id: str, *, firing: bool
) -> AlertChange:
    body = {
        "id": new_id,
        "state": "firing" if firing else "resolved",
        "rule": rule.name,
        "kind": rule.kind,
        "subject": finding.subject.to_json(),
        "summary": finding.summary if firing else f"No longer so: {finding.summary}",
        "details": finding.details,
        "since": since,
        "at": format_timestamp(evaluation.now),
        "seq": evaluation.seq,
        "epoch": evaluation.epoch,
        "more": evaluation.more.get(rule.name, 0),
    }
    return AlertChange(
        id=new_id,
        rule=rule.name,
        subject=astuple(finding.subject),
        firing=firing,
        since=since,
        seq=evaluation.seq,
        summary=finding.summary,
        details=orjson.dumps(finding.details).decode(),
        webhooks=rule.webhooks,
        body=orjson.dumps(body).decode(),
    )


RuleKind = TypeAliasType(
    "RuleKind", Annotated[str, Field(json_schema_extra={"enum": list(KINDS)}, description="What a rule looks for.")]
)
AlertState = TypeAliasType(
    "AlertState", Annotated[Literal["firing", "ok"], Field(description="Whether a rule is firing for anything.")]
)


class SubjectAnswer(TypedDict):
    """What a rule is firing for."""

    agent_name: str
    job_type: NotRequired[str]
    measure: NotRequired[RegressionMeasure]
    first_bad_commit: NotRequired[str]


class FiringAnswer(TypedDict):
    """That a rule is firing for a subject."""

    subject: SubjectAnswer
    since: Moment
    seq: Annotated[Number, Field(description="Where the commit sequence stood when it was found.")]
    summary: str
    details: FreeObject


class RuleState(TypedDict):
    """A rule, and what it is firing for."""

    name: str
    kind: RuleKind
    state: AlertState
    problem: Annotated[str | None, Field(description="Why it cannot be evaluated now.")]
    webhooks: list[str]
    firing: list[FiringAnswer]
    more: Annotated[Number, Field(description="For how many it fires besides; they are counted, not listed.")]


class WebhookState(TypedDict):
    """A webhook, and what waits for it."""

    name: str
    waiting: Annotated[Number, Field(description="Messages that are not confirmed yet.")]


class Alerts(TypedDict):
    """The rules of alerts."""

    evaluated_at: Moment | None
    rules: list[RuleState]
    webhooks: list[WebhookState]


def shown(
    rules: Rules, kept: Kept, evaluated_at: str | None, problems: Mapping[str, str], more: Mapping[str, int]
) -> Alerts:
    """Return what `GET /api/v1/alerts` answers."""
    firing_of: dict[str, list[Firing]] = {rule.name: [] for rule in rules.rules}
    for firing in kept.firing:
        if firing.rule in firing_of:
            firing_of[firing.rule].append(firing)
    return {
        "evaluated_at": evaluated_at,
        "rules": [
            {
                "name": rule.name,
                "kind": rule.kind,
                "state": "firing" if firing_of[rule.name] else "ok",
                "problem": problems.get(rule.name),
                "webhooks": list(rule.webhooks),
                "firing": [
                    {
                        "subject": cast(SubjectAnswer, firing.subject.to_json()),
                        "since": firing.since,
                        "seq": firing.seq,
                        "summary": firing.summary,
                        "details": {**firing.details},
                    }
                    for firing in firing_of[rule.name]
                ],
                "more": more.get(rule.name, 0),
            }
            for rule in rules.rules
        ],
        "webhooks": [{"name": hook.name, "waiting": kept.waiting.get(hook.name, 0)} for hook in rules.webhooks],
    }
