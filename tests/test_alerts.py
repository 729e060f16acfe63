"""Alerts: each rule against brute force, the file's faults, and one delivery for each change, whatever is killed."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import random
import re
import signal
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from telemetryd.engine.sqlite.connection import connect
from telemetryd.engine.sqlite.statements import alerts as statements
from telemetryd.engine.sqlite.statements.commands import Transaction
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.errors import ConfigurationError
from telemetryd.model import alerts, commit_alerts, sketches
from telemetryd.model.alerts import (
    EvaluateRules,
    Evaluation,
    Finding,
    Firing,
    ListDeliveries,
    ListFiring,
    Subject,
    changes,
    span_text,
)
from telemetryd.model.change_points import MEASURES
from telemetryd.model.commands import ConfirmDelivery, KeepAlerts, RecordAlerts
from telemetryd.model.queries import Query
from telemetryd.model.rules import (
    FailureRate,
    Regression,
    Rule,
    Rules,
    Silent,
    Slow,
    Stale,
    Webhook,
    load_rules,
    matcher,
)
from telemetryd.model.values import format_timestamp
from telemetryd.services.alerting import Alerting
from telemetryd.services.deliveries import DeliveryPace
from telemetryd.settings import Settings
from tests.conftest import Api, MakeApi, StartDaemon, eventually, make_run
from tests.months import COMMIT, Part, cells, fetcher, runs_of
from tests.tools.process import telemetryd

SECRET = "a-secret-of-25-characters"
NOW = datetime(2026, 1, 10, 12, 30, tzinfo=UTC)
START = "2026-01-10T12:30:00.000000Z"


def at(**before: float) -> str:
    return format_timestamp(NOW - timedelta(**before))


# --- Each kind against brute force ---------------------------------------------------------------


async def found(api: Api, rule: Rule) -> dict[Subject, dict[str, Any]]:
    evaluation = await api.store.fetch(EvaluateRules((rule,), NOW))
    findings = evaluation.found[rule.name]
    assert not isinstance(findings, str)
    assert len({finding.subject for finding in findings}) == len(findings)
    return {finding.subject: dict(finding.details) for finding in findings}


def set_updated(api: Api, runs: list[dict[str, Any]]) -> None:
    """Give runs the updated_at that the test has thought of: the daemon's clock gives all of them the same."""
    changed = " ".join(f"WHEN '{run['event_id']}' THEN '{run['changed']}'" for run in runs)
    api.execute(f"UPDATE agent_runs SET updated_at = CASE event_id {changed} ELSE updated_at END")


def random_runs(seed: int, count: int = 400) -> list[dict[str, Any]]:
    choose = random.Random(seed)
    runs = []
    for _ in range(count):
        # On a grid, so that no age is near a limit that is known within 1 % only.
        age = choose.choice((choose.randrange(10), choose.randrange(600))) / 2 + choose.uniform(0, 0.01)
        duration = choose.choice((0, 60_000, 600_000, 6_000_000))
        runs.append(
            make_run(
                agent_name=f"{choose.choice(('web', 'seo'))}-{choose.randrange(5)}",
                job_type=choose.choice(("crawl", "write")),
                status=choose.choice(("running", "success", "success", "failure", "timeout", "partial", "cancelled")),
                created_at=at(hours=age),
                start_time=at(hours=age + choose.choice((0, 0, 40))),
                duration_ms=duration,
            )
        )
    return runs


async def post_all(api: Api, runs: list[dict[str, Any]]) -> None:
    assert (await api.batch(runs))["inserted"] == len(runs)


@pytest.mark.parametrize("seed", range(3))
async def test_silent_is_what_brute_force_finds(api: Api, seed: int) -> None:
    runs = random_runs(seed, 60)
    choose = random.Random(seed)
    for run in runs:
        run["changed"] = at(hours=choose.uniform(0, 100))
    await post_all(api, [{name: value for name, value in run.items() if name != "changed"} for run in runs])
    set_updated(api, runs)
    rule = Silent("quiet", (), ("web-*", "seo-1", "never-seen", "not-*"), 4 * 3600)
    heard: dict[str, list[str]] = {"never-seen": [], "seo-1": []}
    for run in runs:
        if run["agent_name"].startswith("web-") or run["agent_name"] == "seo-1":
            heard.setdefault(run["agent_name"], []).append(run["created_at"])
            if run["status"] == "running":
                heard[run["agent_name"]].append(run["changed"])
    expected = {Subject(agent) for agent, times in heard.items() if max(times, default="") < at(hours=4)}
    assert {*await found(api, rule)} == expected
    assert Subject("never-seen") in expected


async def test_the_clock_of_an_agent_hides_neither_its_silence_nor_its_stale_runs(make_api: MakeApi) -> None:
    arrivals = [NOW - timedelta(hours=5)]
    api = await make_api(clock=lambda: arrivals[-1])
    ahead = {"created_at": at(hours=-1000), "status": "running"}
    await post_all(api, [make_run(agent_name=name, **ahead) for name in ("far", "near", "back")])
    await post_all(api, [make_run(agent_name="near", created_at=at(hours=1), status="success")])  # 4 h ahead, then
    arrivals.append(NOW - timedelta(hours=2))
    await post_all(api, [make_run(agent_name="back", **ahead)])
    quiet = await found(api, Silent("quiet", (), ("*",), 4 * 3600))
    assert {subject.agent_name: details["last_heard"] for subject, details in quiet.items()} == {
        "far": at(hours=5),
        "near": at(hours=5),
    }
    left = await found(api, Stale("left", (), ("*",), 4 * 3600))
    assert {subject.agent_name: details["created_at"] for subject, details in left.items()} == {
        "far": at(hours=5),
        "near": at(hours=5),
        "back": at(hours=5),
    }


@pytest.mark.parametrize("seed", range(3))
async def test_the_failure_rate_is_what_brute_force_finds(api: Api, seed: int) -> None:
    runs = random_runs(seed)
    await post_all(api, runs)
    rule = FailureRate("bad", (), ("web-*", "seo-3"), ("crawl",), 100 * 3600, 5, 0.35)
    expected = {}
    since = at(hours=100)[:13]
    for agent in {run["agent_name"] for run in runs if matcher(rule.agent_name)(run["agent_name"])}:
        meant = [
            run["status"]
            for run in runs
            if run["agent_name"] == agent
            and run["job_type"] == "crawl"
            and run["created_at"] >= since
            and run["status"] != "running"
        ]
        failed = sum(status in ("failure", "timeout") for status in meant)
        if len(meant) >= 5 and failed / len(meant) > 0.35:
            expected[Subject(agent)] = (len(meant), failed)
    answer = await found(api, rule)
    assert {subject: (details["runs"], details["failed"]) for subject, details in answer.items()} == expected
    assert expected


@pytest.mark.parametrize("seed", range(3))
async def test_slow_is_what_brute_force_finds(api: Api, seed: int) -> None:
    runs = random_runs(seed)
    await post_all(api, runs)
    rule = Slow("slow", (), ("*",), (), 200 * 3600, 8, 2.0)
    expected = {}
    since = at(hours=200)[:13]
    for subject in {Subject(run["agent_name"], run["job_type"]) for run in runs}:
        mine = [run for run in runs if Subject(run["agent_name"], run["job_type"]) == subject]
        ended = sorted(run["duration_ms"] for run in mine if run["status"] != "running" and run["created_at"] >= since)
        if len(ended) < 8 or not (p99 := ended[99 * (len(ended) - 1) // 100]):
            continue
        ages = {
            run["event_id"]: (NOW - datetime.fromisoformat(run["start_time"])).total_seconds() * 1000
            for run in mine
            if run["status"] == "running"
        }
        assert not any(abs(age / (2 * p99) - 1) < 2 * sketches.ERROR for age in ages.values())  # else it may be either
        if over := [age for age in ages.values() if age > 2 * p99]:
            expected[subject] = (len(over), max(over))
    answer = await found(api, rule)
    assert {subject: details["runs"] for subject, details in answer.items()} == {
        subject: number for subject, (number, _) in expected.items()
    }
    for subject, details in answer.items():
        age = (NOW - datetime.fromisoformat(details["start_time"])).total_seconds() * 1000
        assert age == expected[subject][1]
    assert expected


@pytest.mark.parametrize("seed", range(3))
async def test_stale_is_what_brute_force_finds(api: Api, seed: int) -> None:
    runs = random_runs(seed)
    choose = random.Random(seed)
    for run in runs:
        run["changed"] = at(hours=choose.uniform(0, 20))
    await post_all(api, [{name: value for name, value in run.items() if name != "changed"} for run in runs])
    set_updated(api, runs)
    rule = Stale("stale", (), ("web-*",), 10 * 3600)
    expected: dict[Subject, list[tuple[str, str]]] = {}
    for run in runs:
        is_old = run["created_at"] < at(hours=10) and run["changed"] < at(hours=10)
        if run["agent_name"].startswith("web-") and run["status"] == "running" and is_old:
            expected.setdefault(Subject(run["agent_name"]), []).append((run["created_at"], run["event_id"]))
    answer = await found(api, rule)
    assert {subject: (details["runs"], details["oldest"]) for subject, details in answer.items()} == {
        subject: (len(each), min(each)[1]) for subject, each in expected.items()
    }
    assert expected


@pytest.mark.sqlite
async def test_no_rule_scans_the_runs(api: Api) -> None:
    runs = random_runs(1)
    await post_all(api, runs)
    set_updated(api, [{**run, "changed": run["created_at"]} for run in runs])
    rules = (
        Silent("a", (), ("*",), 1),
        FailureRate("b", (), ("*",), (), 90 * 86_400, 1, 0.0),
        Slow("c", (), ("*",), (), 90 * 86_400, 1, 1.0),
        Stale("d", (), ("*",), 1),
    )
    said: list[str] = []
    with closing(connect(api.settings.db_path, "ro")) as connection:
        connection.set_trace_callback(said.append)
        evaluation = statements.evaluate(connection, EvaluateRules(rules, NOW))
        connection.set_trace_callback(None)
        assert all(evaluation.found[rule.name] for rule in rules)
        selects = [sql for sql in said if sql.lstrip().startswith("SELECT") and "agent_runs" in sql]
        assert len({re.sub(r"'[^']*'", "", sql) for sql in selects}) >= 3
        for sql in selects:
            for *_, step in connection.execute(f"EXPLAIN QUERY PLAN {sql}"):
                assert not step.startswith("SCAN agent_runs"), sql


async def test_too_many_groups_are_a_problem_of_that_rule_alone(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = random_runs(1)
    await post_all(api, runs)
    set_updated(api, [{**run, "changed": run["created_at"]} for run in runs])
    monkeypatch.setattr("telemetryd.model.stats.MAX_GROUPS", 3)
    rules = (FailureRate("b", (), ("*",), (), 90 * 86_400, 1, 0.0), Stale("d", (), ("*",), 1))
    evaluation = await api.store.fetch(EvaluateRules(rules, NOW))
    assert isinstance(evaluation.found["b"], str)
    assert evaluation.found["d"]


@pytest.mark.parametrize(
    "rule",
    [
        Silent("many", ("team",), ("many-*",), 60.0),
        Stale("many", ("team",), ("many-*",), 60.0),
        FailureRate("many", ("team",), ("many-*",), (), 90 * 86_400, 1, 0.0),
    ],
    ids=["silent", "stale", "failure-rate"],
)
async def test_a_rule_fires_for_so_many_and_counts_the_others(
    api: Api, monkeypatch: pytest.MonkeyPatch, rule: Rule
) -> None:
    monkeypatch.setattr(alerts, "MAX_FIRING", 3)
    status = "failure" if isinstance(rule, FailureRate) else "running"
    begun = [
        make_run(event_id=name, agent_name=name, status=status, created_at=at(hours=2))
        for name in ("one", "many-c", "many-d", "many-e", "many-f")
    ]
    await post_all(api, begun)
    set_updated(api, [{**run, "changed": run["created_at"]} for run in begun])
    alerting = Alerting(api.store, Rules((rule,), (HOOK,)), lambda: NOW)
    await alerting.evaluate((rule,))
    (shown,) = (await alerting.shown())["rules"]
    assert ([each["subject"]["agent_name"] for each in shown["firing"]], shown["more"]) == (
        ["many-c", "many-d", "many-e"],
        1,
    )
    added = [
        make_run(event_id=name, agent_name=name, status=status, created_at=at(hours=2)) for name in ("many-a", "many-b")
    ]
    await post_all(api, added)
    set_updated(api, [{**run, "changed": run["created_at"]} for run in added])
    await alerting.evaluate((rule,))  # those that fire go on, though others come before them by their names
    (shown,) = (await alerting.shown())["rules"]
    assert [each["subject"]["agent_name"] for each in shown["firing"]] == ["many-c", "many-d", "many-e"]
    assert shown["more"] == 3
    told = [json.loads(each.body) for each in await api.store.fetch(ListDeliveries("team"))]
    assert [(each["subject"]["agent_name"], each["more"]) for each in told] == [
        ("many-c", 1),
        ("many-d", 1),
        ("many-e", 1),
    ]


async def test_what_an_older_version_kept_beyond_the_bound_is_forgotten(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = tuple(Finding(Subject(f"{number}"), "so", {}) for number in range(5))
    await api.store.submit(RecordAlerts(changes(Evaluation(NOW, {"one": agents}, (), 0, ""), RULES, lambda: "id")))
    monkeypatch.setattr(alerts, "MAX_FIRING", 3)
    assert await api.store.submit(KeepAlerts(("one",), ("team",))) == 2
    kept = await api.store.fetch(ListFiring())
    assert [each.subject.agent_name for each in kept.firing] == ["0", "1", "2"]


def test_times_are_written_for_people() -> None:
    assert [*map(span_text, (45, 60, 90, 7200, 86_400, 129_600, 604_800))] == [
        "45s",
        "1m",
        "90s",
        "2h",
        "1d",
        "36h",
        "7d",
    ]


# --- One delivery for each change ----------------------------------------------------------------

HOOK = Webhook("team", "http://127.0.0.1:1/", SECRET.encode())
RULES = Rules((Stale("one", ("team",), ("*",), 60.0), Silent("two", ("team",), ("*",), 60.0)), (HOOK,))
subjects = st.frozensets(st.sampled_from([Subject("a"), Subject("b"), Subject("a", "job")]))
evaluations = st.fixed_dictionaries({"one": st.none() | subjects, "two": st.none() | subjects})


@given(st.lists(evaluations, max_size=12), st.data())
def test_each_change_makes_one_delivery_and_nothing_else_does(
    steps: list[dict[str, frozenset[Subject] | None]], data: st.DataObject
) -> None:
    """Whatever is found, can not be sent, is evaluated again, or is lost between evaluation and commit."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        migrate.create(connection, START)
        firing: dict[str, frozenset[Subject]] = {"one": frozenset(), "two": frozenset()}
        expected: list[tuple[str, Subject, str]] = []
        for number, step in enumerate(steps):
            evaluation = Evaluation(
                NOW + timedelta(minutes=number),
                {
                    rule: "cannot be told" if each is None else tuple(Finding(one, "so it is", {}) for one in each)
                    for rule, each in step.items()
                },
                statements.fetch_kept(connection, ListFiring()).firing,
                number,
                "0" * 12,
            )
            ids = iter(range(100))
            changed = changes(evaluation, RULES, lambda: f"{number}-{next(ids)}")  # noqa: B023 - used at once
            is_lost = data.draw(st.booleans())
            connection.execute("BEGIN")
            transaction = Transaction(connection, START)
            transaction.apply([RecordAlerts(changed)])
            transaction.finish()
            connection.execute("ROLLBACK" if is_lost else "COMMIT")
            if is_lost:
                continue
            for rule, each in step.items():
                if each is None:
                    continue
                expected += [(rule, subject, "firing") for subject in sorted(each - firing[rule])]
                expected += [(rule, subject, "resolved") for subject in sorted(firing[rule] - each)]
                firing[rule] = each
            kept = statements.fetch_kept(connection, ListFiring())
            assert {(each.rule, each.subject) for each in kept.firing} == {
                (rule, subject) for rule, each in firing.items() for subject in each
            }
        deliveries = statements.fetch_deliveries(connection, ListDeliveries("team", 1000))
        bodies = [json.loads(delivery.body) for delivery in deliveries]
        told = [
            (body["rule"], Subject(body["subject"]["agent_name"], body["subject"].get("job_type", "")), body["state"])
            for body in bodies
        ]
        assert told == expected
        assert len({delivery.id for delivery in deliveries}) == len(deliveries)
        assert [delivery.id for delivery in deliveries] == [body["id"] for body in bodies]


async def test_only_so_many_deliveries_wait(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "MAX_WAITING", 3)
    given_up = []
    for number in range(3):
        agents = tuple(Finding(Subject(f"{number}-{each}"), "so", {}) for each in range(2))
        kept = await api.store.fetch(ListFiring())
        old = tuple(Finding(each.subject, each.summary, each.details) for each in kept.firing)
        evaluation = Evaluation(NOW, {"one": (*old, *agents)}, kept.firing, 0, "")
        changed = changes(evaluation, RULES, lambda: "id")
        assert len(changed) == 2
        given_up.append(await api.store.submit(RecordAlerts(changed)))
    assert given_up == [0, 1, 2]
    waiting = await api.store.fetch(ListDeliveries("team"))
    assert [json.loads(each.body)["subject"]["agent_name"] for each in waiting] == ["1-1", "2-0", "2-1"]
    assert await api.store.submit(ConfirmDelivery(waiting[0].number)) == 1
    assert await api.store.submit(ConfirmDelivery(waiting[0].number)) == 0
    assert await api.store.submit(KeepAlerts(("one",), ())) == 2
    assert len((await api.store.fetch(ListFiring())).firing) == 6
    assert await api.store.submit(KeepAlerts(("other",), ())) == 6


# --- Which commit broke it -----------------------------------------------------------------------

BROKE = Regression("broke", ("team",), ("*",), (), 30 * 86_400.0, MEASURES)
Runs = list[dict[str, Any]]


def firing_after(runs: Runs, fired: list[Firing], now: datetime = NOW, rule: Regression = BROKE) -> list[Firing]:
    """Return what fires once these runs have been looked at."""
    since = {firing.subject: firing.since for firing in fired}
    return [
        Firing("broke", each.subject, since.get(each.subject, format_timestamp(now)), 0, each.summary, each.details)
        for each in commit_alerts.regressions(rule, now, cells(runs), fired, fetcher(runs))
    ]


def told_by(runs: Runs, every: int = 3) -> list[tuple[int, str, str]]:
    """Return what is told if a rule looks after every so many runs: after how many, the state, and the commit."""
    fired: list[Firing] = []
    told = []
    for number in range(every, len(runs) + 1, every):
        now = datetime.fromisoformat(runs[number - 1]["created_at"]) + timedelta(minutes=1)
        window = [run for run in runs[:number] if run["created_at"] >= format_timestamp(now - timedelta(days=30))]
        now_fired = firing_after(window, fired, now)
        before, after = ({each.subject.first_bad_commit for each in some} for some in (fired, now_fired))
        told += [(number, "firing", each) for each in sorted(after - before)]
        told += [(number, "resolved", each) for each in sorted(before - after)]
        fired = now_fired
    return told


def chances(seed: int, *parts: tuple[int, float], a_day: int = 12) -> Runs:
    """Return runs of so many days with each chance of success, two days for each commit."""
    choose = random.Random(seed)
    days = sum(days for days, _ in parts)
    runs = [run for day in range(days) for run in runs_of(Part(day // 2, 1, a_day, 0), end=NOW + timedelta(days=day))]
    rates = [rate for days, rate in parts for _ in range(days * a_day)]
    return [
        {**run, "status": "success" if choose.random() < rate else "failure"}
        for run, rate in zip(runs, rates, strict=True)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_a_bad_commit_is_told_once_however_its_runs_come(seed: int) -> None:
    """A rule looks again and again; what it has reported does not come and go with each run, nor change its name."""
    runs = chances(seed, (14, 0.95), (10, 0.5), (6, 0.95))
    told = told_by(runs)
    assert [state for _, state, _ in told] == ["firing", "resolved"]
    (broke, _, commit), (fixed, _, _) = told
    assert commit in {COMMIT(6), COMMIT(7), COMMIT(8)}
    assert 17 * 12 < broke <= 22 * 12
    assert 25 * 12 < fixed <= 29 * 12


@pytest.mark.parametrize("seed", range(4))
def test_a_flapping_finding_is_told_once(seed: int) -> None:
    """Days on which all is well come between bad ones, so that the finding itself comes and goes."""
    bad = [part for _ in range(4) for part in ((4, 0.4), (1, 0.95))]
    told = told_by(chances(seed, (12, 0.95), *bad))
    assert [state for _, state, _ in told].count("firing") <= 1


@pytest.mark.parametrize("seed", range(3))
def test_many_looks_at_what_no_commit_changed_tell_nothing(seed: int) -> None:
    assert told_by(chances(seed, (30, 0.85)), every=6) == []


def test_an_outage_of_three_days_is_no_alert() -> None:
    runs = runs_of(Part(0, 10, 12, 0), Part(1, 4, 12, 0), Part(2, 3, 0, 12), Part(2, 6, 12, 0))
    assert told_by(runs, every=2) == []


def test_each_bad_commit_is_an_alert_of_its_own() -> None:
    parts = [Part(0, 10, 20, 0), Part(1, 6, 14, 6)]
    fired: list[Firing] = []

    def named(*more: Part) -> list[str]:
        parts.extend(more)
        fired[:] = firing_after(runs_of(*parts), fired)
        return [each.subject.first_bad_commit for each in fired]

    assert named() == [COMMIT(1)]
    assert named(Part(2, 7, 4, 16)) == [COMMIT(1), COMMIT(2)]  # another one makes it still worse
    assert named(Part(3, 4, 14, 6)) == [COMMIT(1)]  # the second is fixed, the first is not
    assert named(Part(4, 4, 20, 0)) == []
    assert named() == []  # what was fixed does not come back


def test_an_alert_of_a_commit_ends_after_the_window() -> None:
    runs = runs_of(Part(0, 10, 12, 0), Part(1, 7, 4, 8))
    fired = firing_after(runs, [])
    assert [each.subject.first_bad_commit for each in fired] == [COMMIT(1)]
    later = NOW + timedelta(days=31)
    bad = [run for run in runs if run["git_commit_hash"] == COMMIT(1)]
    assert firing_after(bad, fired, later - timedelta(days=2)) == fired
    assert firing_after(bad, fired, later) == []
    assert firing_after([], fired) == []


def test_a_bad_commit_whose_own_runs_do_not_count_any_more_is_not_fixed_by_older_ones() -> None:
    """As when its successes have been pruned or corrected: durations are those of successes."""
    runs = runs_of(Part(0, 10, 12, 0, 1000), Part(1, 2, 12, 0, 9000), Part(2, 6, 12, 0, 9000))
    rule = replace(BROKE, measure=("duration",))
    [fired] = firing_after(runs, [], rule=rule)
    assert fired.subject.first_bad_commit == COMMIT(1)
    failed = [{**run, "status": "failure"} if run["git_commit_hash"] == COMMIT(1) else run for run in runs]
    assert firing_after(failed, [fired], rule=rule) == [fired]


async def test_a_bad_commit_is_delivered_with_what_shows_it(api: Api) -> None:
    runs = runs_of(Part(0, 6, 12, 0), Part(1, 5, 12, 0), Part(2, 7, 0, 12), end=NOW)
    await post_all(api, runs)
    rules = Rules((BROKE,), (HOOK,))
    now = NOW
    alerting = Alerting(api.store, rules, lambda: now)

    async def bodies() -> list[dict[str, Any]]:
        return [json.loads(each.body) for each in await api.store.fetch(ListDeliveries("team"))]

    await alerting.evaluate(rules.rules)
    await alerting.evaluate(rules.rules)
    [body] = await bodies()
    [finding] = (await api.get(f"/api/v1/regressions?from={at(days=30)}&to={at()}"))["regressions"]
    del finding["agent_name"], finding["job_type"]
    assert body["details"] == finding
    assert (finding["first_bad_commit"], finding["last_good_commit"]) == (COMMIT(2), COMMIT(1))
    assert finding["commit_url"] == f"https://github.com/acme/site/commit/{COMMIT(2)}"
    assert finding["runs"] == [run["event_id"] for run in runs[132:137]]
    assert (body["kind"], body["state"]) == ("regression", "firing")
    assert body["subject"] == {
        "agent_name": "seo",
        "job_type": "audit",
        "measure": "success_rate",
        "first_bad_commit": COMMIT(2),
    }
    assert body["summary"] == "0.0% of the runs of seo (audit) succeed since commit 000000000000, 100.0% before"
    now = NOW + timedelta(days=8)
    await post_all(api, runs_of(Part(3, 8, 12, 0), end=now))
    await alerting.evaluate(rules.rules)
    told = [(each["state"], each["subject"]["first_bad_commit"]) for each in await bodies()]
    assert told == [("firing", COMMIT(2)), ("resolved", COMMIT(2))]
    now = NOW + timedelta(days=16)
    await post_all(api, runs_of(Part(4, 8, 12, 0, 90_000), end=now))
    await alerting.evaluate(rules.rules)
    shown = await alerting.shown()
    [firing] = shown["rules"][0]["firing"]
    assert firing["summary"] == (
        "half of the runs of seo (audit) take 90s or longer since commit 000000000000, 10s before"
    )
    await alerting.evaluate(rules.rules)
    assert len(await bodies()) == 3


async def test_a_rule_names_agents_jobs_and_measures(api: Api) -> None:
    for agent, job in (("a", "x"), ("a", "y"), ("b", "x")):
        await post_all(api, runs_of(Part(0, 10, 6, 0), Part(1, 6, 0, 6), end=NOW, agent_name=agent, job_type=job))

    async def pairs(**fields: Any) -> set[tuple[str, str]]:
        rule = replace(BROKE, **fields)
        return {(each.agent_name, each.job_type) for each in await found(api, rule)}

    assert await pairs() == {("a", "x"), ("a", "y"), ("b", "x")}
    assert await pairs(agent_name=("a*",)) == {("a", "x"), ("a", "y")}
    assert await pairs(agent_name=("b", "c-*"), job_type=("x",)) == {("b", "x")}
    assert await pairs(measure=("duration",)) == set()
    assert await pairs(window_s=14 * 86_400.0) == {("a", "x"), ("a", "y"), ("b", "x")}
    assert await pairs(window_s=5 * 86_400.0) == set()  # the good commits are older than that


@pytest.mark.sqlite
async def test_a_rule_that_cannot_be_evaluated_says_so_and_keeps_no_other_from_it(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("interrupted")

    rules = Rules((Silent("quiet", (), ("nobody",), 60.0), replace(BROKE, webhooks=())), (), 0.01)
    alerting = Alerting(api.store, rules, lambda: NOW)
    problem: str | None = None
    working = asyncio.create_task(alerting.run())
    with monkeypatch.context() as patched:
        patched.setattr(statements, "fetch_cells", fail)
        while not problem:
            quiet, broke = (await alerting.shown())["rules"]
            problem = broke["problem"] if quiet["state"] == "firing" else None
            await asyncio.sleep(0.01)
        assert problem == "The database cannot be read now; try again later"
        assert quiet["problem"] is None
    while problem:
        problem = (await alerting.shown())["rules"][1]["problem"]
        await asyncio.sleep(0.01)
    working.cancel()
    await asyncio.wait((working,))


async def test_only_a_rule_of_commits_rests_as_long_as_its_evaluation_asks_for(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one look that had to wait, for a reader or the disk, would keep the others from being heard for long."""
    asked: list[tuple[Rule, ...]] = []

    fetch = api.store.fetch

    async def note(query: Query[Any]) -> Any:
        if isinstance(query, EvaluateRules):
            asked.append(query.rules)
        return await fetch(query)

    monkeypatch.setattr(api.store, "fetch", note)
    quiet = Silent("quiet", (), ("nobody",), 60.0)
    alerting = Alerting(api.store, Rules((quiet, BROKE), (), 0.01), lambda: NOW, rest=1_000_000)
    working = asyncio.create_task(alerting.run())
    await eventually(lambda: asked.count((quiet,)) > 5 and (BROKE,) in asked)
    assert asked.count((BROKE,)) == 1
    working.cancel()
    await asyncio.wait((working,))


# --- Over the wire -------------------------------------------------------------------------------


class Receiver:
    """A webhook: keeps what comes, and answers as it should."""

    def __init__(self) -> None:
        self.url = ""
        self.got: list[dict[str, Any]] = []
        self.answers: list[int] = []
        """Answers to the next messages; then 204."""
        self.hold: asyncio.Event | None = None
        self.refused: str | None = None
        """The agent whose messages are never accepted."""
        self.accepted: list[dict[str, Any]] = []

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        signed = request.headers["Telemetry-Timestamp"].encode() + b"." + body
        expected = "sha256=" + hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
        assert request.headers["Telemetry-Signature"] == expected
        message = json.loads(body)
        assert request.headers["Telemetry-Delivery"] == message["id"]
        self.got.append(message)
        if self.hold is not None:
            await self.hold.wait()
        if self.refused is not None and message["subject"]["agent_name"] == self.refused:
            return web.Response(status=422)
        self.accepted.append(message)
        return web.Response(status=self.answers.pop(0) if self.answers else 204, headers={"Location": "/elsewhere"})


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hook", receiver.take)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    try:
        yield receiver
    finally:
        await runner.cleanup()


QUIET = '[[rules]]\nname = "{}"\nkind = "silent"\nagent_name = "hugo-*"\nafter = "1h"\n'


def write_rules(folder: Path, url: str, rules: str = QUIET.format("quiet")) -> Path:
    path = folder / "alerts.toml"
    (folder / "secret").write_text(SECRET + "\n")
    path.write_text(f'every = "1s"\n[webhooks.team]\nurl = "{url}"\nsecret_file = "secret"\n' + rules)
    return path


async def test_a_message_is_sent_until_it_is_confirmed_and_in_order(api: Api, tmp_path: Path) -> None:
    now = NOW
    async with receiving() as receiver:
        receiver.answers = [500, 302, 404]
        rules = load_rules(write_rules(tmp_path, receiver.url))
        alerting = Alerting(api.store, rules, lambda: now, DeliveryPace(0.001, 0.01))
        await api.post(make_run(created_at=at(hours=2), status="success"))
        await alerting.evaluate(rules.rules)
        await alerting.evaluate(rules.rules)
        await api.post(make_run(created_at=at(), status="success"))
        await alerting.evaluate(rules.rules)
        working = asyncio.create_task(alerting.run())
        await eventually(lambda: len(receiver.got) >= 5)
        await eventually(lambda: not api.execute("SELECT 1 FROM alert_deliveries"))
        working.cancel()
        await asyncio.wait((working,))
    assert [message["state"] for message in receiver.got] == ["firing"] * 4 + ["resolved"]
    assert len({message["id"] for message in receiver.got}) == 2
    first, last = receiver.got[0], receiver.got[-1]
    assert (first["subject"], first["rule"], first["kind"]) == ({"agent_name": "hugo-translator"}, "quiet", "silent")
    assert first["since"] == last["since"] == first["at"] == START
    assert 0 < first["seq"] < last["seq"]
    assert len(first["epoch"]) == 12


async def test_one_that_is_never_accepted_keeps_no_other_from_being_delivered(api: Api, tmp_path: Path) -> None:
    now, given_up = NOW, [0]

    async def evaluate(*agents: str, heard: float) -> None:
        await api.batch([make_run(agent_name=agent, created_at=at(hours=heard), status="success") for agent in agents])
        await alerting.evaluate(rules.rules)

    async with receiving() as receiver:
        receiver.refused = "hugo-poison"
        rules = replace(load_rules(write_rules(tmp_path, receiver.url)), every_s=3600.0)
        alerting = Alerting(api.store, rules, lambda: now, DeliveryPace(0.001, 0.01), given_up.append)
        await evaluate("hugo-poison", heard=2)
        await evaluate("hugo-poison", heard=0)
        await evaluate("hugo-good", heard=2)
        working = asyncio.create_task(alerting.run())
        await eventually(lambda: len(receiver.accepted) == 1)
        tried = len(receiver.got)
        await evaluate("hugo-good", heard=0)
        await eventually(lambda: len(receiver.accepted) == 2 and len(receiver.got) > tried + 1)
        assert [each["state"] for each in receiver.accepted] == ["firing", "resolved"]
        assert {each["state"] for each in receiver.got if each not in receiver.accepted} == {"firing"}
        now = datetime.now(UTC) + timedelta(hours=25)  # the messages have the time of the store's clock
        await eventually(lambda: not api.execute("SELECT 1 FROM alert_deliveries"))
        working.cancel()
        await asyncio.wait((working,))
    assert sum(given_up) == 2


async def test_rules_that_are_exchanged_cost_no_message_and_send_none_twice(api: Api, tmp_path: Path) -> None:
    def settings(rules: str) -> Settings:
        return api.settings.model_copy(update={"alerts_file": write_rules(tmp_path, receiver.url, rules)})

    def exchange(rules: str) -> None:
        put = alerting.prepare(settings(rules))
        assert put is not None
        put()

    async def state() -> dict[str, Any]:
        return {rule["name"]: rule["state"] for rule in (await alerting.shown())["rules"]}

    async with receiving() as receiver:
        receiver.hold = asyncio.Event()
        both = QUIET.format("quiet") + QUIET.format("gone")
        alerting = Alerting(api.store, load_rules(settings(both).alerts_file), lambda: NOW, DeliveryPace(0.001, 0.01))
        await api.post(make_run(created_at=at(hours=2), status="success"))
        working = asyncio.create_task(alerting.run())
        await eventually(lambda: len(receiver.got) == 1)  # each rule has fired; one message is on its way
        with pytest.raises(ConfigurationError):
            alerting.prepare(settings("[[rules]]"))
        assert alerting.prepare(settings(both)) is None
        exchange(QUIET.format("quiet") + QUIET.format("new"))
        assert await state() == {"quiet": "firing", "new": "ok"}
        receiver.hold.set()
        await eventually(lambda: len(receiver.accepted) == 3)
        assert await state() == {"quiet": "firing", "new": "firing"}
        exchange(both)  # what was gone was forgotten, so it fires anew
        await eventually(lambda: len(receiver.accepted) == 4)
        assert await state() == {"quiet": "firing", "gone": "firing"}
        working.cancel()
        await asyncio.wait((working,))
    assert receiver.got == receiver.accepted
    assert [message["state"] for message in receiver.got] == ["firing"] * 4
    assert [message["rule"] for message in receiver.got] == ["quiet", "gone", "new", "gone"]
    assert len({message["id"] for message in receiver.got}) == 4


async def test_an_evaluation_that_is_under_way_ends_well_when_its_rules_are_gone(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    fetch = api.store.fetch

    async def hold(query: Query[Any]) -> Any:
        if isinstance(query, EvaluateRules) and not begun.is_set():
            begun.set()
            await go_on.wait()
        return await fetch(query)

    monkeypatch.setattr(api.store, "fetch", hold)
    old = Silent("old", (), ("nobody",), 60.0)
    alerting = Alerting(api.store, Rules((old, replace(BROKE, webhooks=())), (), 0.01), lambda: NOW)
    working = asyncio.create_task(alerting.run())
    await begun.wait()
    path = write_rules(tmp_path, "http://127.0.0.1:9/", QUIET.format("new").replace("hugo-*", "nobody"))
    put = alerting.prepare(api.settings.model_copy(update={"alerts_file": path}))
    assert put is not None
    put()
    go_on.set()
    await eventually(lambda: {rule for (rule,) in api.execute("SELECT rule FROM alert_states")} == {"new"})
    assert not working.done()
    working.cancel()
    await asyncio.wait((working,))


async def wait_for(check: Callable[[], bool]) -> None:
    await eventually(check)


async def test_a_daemon_that_is_killed_before_the_answer_sends_the_same_message_again(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    async with receiving() as receiver:
        receiver.hold = asyncio.Event()  # the message arrives, its confirmation does not
        path = write_rules(tmp_path, receiver.url)
        daemon = start_daemon(TELEMETRY_ALERTS_FILE=str(path))
        url = await asyncio.to_thread(lambda: daemon.url)
        old = format_timestamp(datetime.now(UTC) - timedelta(hours=2))
        async with aiohttp.ClientSession(url) as session:
            async with session.post("/api/v1/runs", json=make_run(created_at=old, status="success")) as response:
                assert response.status == 201
            await wait_for(lambda: len(receiver.got) == 1)
            async with session.get("/api/v1/alerts") as response:
                listed = await response.json()
            async with session.get("/metrics?format=prometheus") as response:
                families = [*text_string_to_metric_families(await response.text())]
        samples = [(each.name, *each.labels.values(), each.value) for family in families for each in family.samples]
        assert ("telemetryd_alerts_firing", "quiet", 1) in samples
        assert ("telemetryd_alert_deliveries_waiting", "team", 1) in samples
        assert listed["webhooks"] == [{"name": "team", "waiting": 1}]
        assert listed["rules"][0]["state"] == "firing"
        assert listed["rules"][0]["firing"][0]["subject"] == {"agent_name": "hugo-translator"}
        await asyncio.to_thread(daemon.stop, signal.SIGKILL)
        receiver.hold.set()
        again = start_daemon(TELEMETRY_ALERTS_FILE=str(path))
        await asyncio.to_thread(again.wait_for_line, "Alert delivered")
        assert len(receiver.got) == 2
        assert receiver.got[0] == receiver.got[1]
        url = await asyncio.to_thread(lambda: again.url)
        async with aiohttp.ClientSession(url) as session:
            async with session.post("/api/v1/runs", json=make_run(status="success")) as response:
                assert response.status == 201
            await wait_for(lambda: len(receiver.got) == 3)  # after some evaluations that reported nothing new
            async with session.get("/api/v1/alerts") as response:
                assert (await response.json())["rules"][0]["firing"] == []
        assert await asyncio.to_thread(again.stop) == 0
    assert receiver.got[2]["state"] == "resolved"
    assert receiver.got[2]["id"] != receiver.got[0]["id"]
    for line in (*daemon.lines, *again.lines):
        assert SECRET not in json.dumps(line)
        assert receiver.url not in json.dumps(line)


@pytest.mark.sqlite
async def test_alerts_test_shows_what_would_be_sent_while_the_daemon_runs(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    async with receiving() as receiver:
        path = write_rules(tmp_path, receiver.url)
        daemon = start_daemon()
        url = await asyncio.to_thread(lambda: daemon.url)
        old = format_timestamp(datetime.now(UTC) - timedelta(hours=2))
        run = make_run(created_at=old, status="success", agent_name="hugo-\x1b]0;a title")
        async with aiohttp.ClientSession(url) as session, session.post("/api/v1/runs", json=run) as response:
            assert response.status == 201
        options = ("alerts", "test", "--alerts-file", path, "--db-path", daemon.database)
        shown = await asyncio.to_thread(telemetryd, *options)
        assert "firing  quiet (silent)" in shown.stdout
        assert "1 change would be sent" in shown.stdout
        assert shown.stdout.count(r"hugo-\u001b]0;a title has been silent") == 2
        assert receiver.got == []
        sent = json.loads((await asyncio.to_thread(telemetryd, *options, "--send", "--json")).stdout)
        assert sent["sent"] == {"team": None}
        assert [message["state"] for message in sent["would_send"]] == ["firing"]
        assert sent["would_send"][0]["webhooks"] == ["team"]
        assert [message["state"] for message in receiver.got] == ["test"]
        receiver.answers = [500]
        failed = await asyncio.to_thread(telemetryd, *options, "--send", status=1)
        assert "team: not confirmed: it answered 500" in failed.stdout


async def test_without_a_file_there_are_no_rules(make_api: MakeApi) -> None:
    api = await make_api()
    assert await api.get("/api/v1/alerts") == {"evaluated_at": None, "rules": [], "webhooks": []}
    answer = await api.get("/api/v1/alerts?state=firing", 400)
    assert "state" in answer["detail"]
    alerting = Alerting(api.store, Rules())
    working = asyncio.create_task(alerting.run())
    await asyncio.sleep(0)
    assert alerting.prepare(api.settings) is None
    working.cancel()
    await asyncio.wait((working,))


# --- The file ------------------------------------------------------------------------------------

HEAD = '[webhooks.team]\nurl = "https://example.org/x"\nsecret_env = "HOOK"\n'
RULE = '[[rules]]\nname = "n"\nkind = "stale"\nafter = "1h"\n'


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("rules = 1", ["rules: must be tables, each under a line [[rules]] (it is 1)"]),
        ("x = 1", ["x: is no key of a rule file; it may have every, webhooks, rules"]),
        ('every = "2h"', ["every: must be a duration from 1s to 1h, such as 1m (it is '2h')"]),
        ("[[rules]]", ["rule 1: name: is missing", "rule 1: kind: is missing; it must be one of silent, failure-rate"]),
        (
            RULE.replace("stale", "old"),
            ["rule 'n': kind: must be one of silent, failure-rate, slow, stale, regression (it is 'old')"],
        ),
        (RULE.replace("1h", "1"), ["rule 'n': after: must be a duration such as 6h or 30m (it is '1')"]),
        (RULE + "above = 1", ["rule 'n': above: is no key of a rule of the kind stale; it may have name, kind"]),
        (
            RULE + 'webhooks = ["x"]',
            ["rule 'n': webhooks: must be an array of names of webhooks; there are team (it is"],
        ),
        (RULE + "agent_name = []", ["rule 'n': agent_name: must be a name of 1 to 255 characters, or an array"]),
        (RULE + RULE, ["rule 'n': name: must be another one than that of the other rules"]),
        (
            '[[rules]]\nname = "n"\nkind = "failure-rate"\nwindow = "30m"\nabove = 20\nmin_runs = true',
            [
                "rule 'n': window: must be a duration of 1h or more, such as 6h or 30d",
                "rule 'n': min_runs: must be a whole number, 1 or more (it is True)",
                "rule 'n': above: must be a number from 0 up to, but not, 1 (it is 20)",
            ],
        ),
        (
            '[[rules]]\nname = "n"\nkind = "slow"\nwindow = "7d"\nfactor = 0.5',
            ["rule 'n': factor: must be a number from 1 to 1000 (it is 0.5)"],
        ),
        (
            '[[rules]]\nname = "n"\nkind = "regression"\nmeasure = ["speed"]\nmin_runs = 5',
            [
                "rule 'n': measure: must be success_rate or duration, or an array of both (it is ['speed'])",
                "rule 'n': min_runs: is no key of a rule of the kind regression; it may have name, kind, webhooks",
            ],
        ),
        (
            '[webhooks.b]\nurl = "ftp://x/"\nsecret_env = "HOOK"',
            ["webhook 'b': url: must be an address that begins with"],
        ),
        ('[webhooks.b]\nurl = "http://x/"', ["webhook 'b': secret_env: must be given, or secret_file, but not both"]),
        (
            '[webhooks.b]\nurl = "http://x/"\nsecret_env = "NONE"',
            ["webhook 'b': secret_env: the environment variable NONE must hold at least 16 characters"],
        ),
        (
            '[webhooks.b]\nurl = "http://x/"\nsecret_file = "none"',
            ["webhook 'b': secret_file: must be a file that can be read (it is 'none'"],
        ),
        ("[", ["is not a TOML file: "]),
        ("x = " + "[" * 5000, ["is not a TOML file: "]),
    ],
)
def test_a_wrong_file_is_reported_with_every_fault_and_its_place(tmp_path: Path, text: str, faults: list[str]) -> None:
    path = tmp_path / "alerts.toml"
    path.write_text(f"{text}\n{HEAD}" if text.startswith(("rules", "x", "every")) else f"{HEAD}{text}")
    with pytest.raises(ConfigurationError) as raised:
        load_rules(path, {"HOOK": SECRET})
    assert len(raised.value.problems) == len(faults)
    for problem, fault in zip(raised.value.problems, faults, strict=True):
        assert problem.startswith(f"{path}: {fault}")
        assert SECRET not in problem


def test_the_example_of_the_documentation_is_read_as_it_stands(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "alerts.md").read_text("utf-8")
    path = tmp_path / "alerts.toml"
    path.write_text(page.split("```toml\n")[1].split("```")[0])
    rules = load_rules(path, {"TEAM_HOOK_SECRET": SECRET})
    assert [rule.kind for rule in rules.rules] == ["silent", "failure-rate", "slow", "stale", "regression"]
    assert all(rule.webhooks == ("team",) for rule in rules.rules)
    assert isinstance(regression := rules.rules[4], Regression)
    assert (regression.window_s, regression.job_type) == (30 * 86_400, ())
    assert regression.measure == ("success_rate", "duration")
    assert (rules.every_s, rules.rules[1].agent_name) == (60, ("hugo-*", "seo-*"))
    assert SECRET not in repr(rules)
    assert "example.org" not in repr(rules)


def test_the_verification_of_the_documentation_works() -> None:
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "alerts.md").read_text("utf-8")
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    from telemetryd.services.webhooks import sign

    now = str(int(datetime.now(UTC).timestamp()))
    headers = {"Telemetry-Timestamp": now, "Telemetry-Signature": sign(b"secret", now, b"{}")}
    assert names["is_genuine"](b"secret", headers, b"{}")
    assert not names["is_genuine"](b"secret", headers, b"{} ")
    assert not names["is_genuine"](b"another", headers, b"{}")
    old = str(int(now) - 1000)
    assert not names["is_genuine"](b"secret", {**headers, "Telemetry-Timestamp": old}, b"{}")


def test_the_daemon_refuses_a_wrong_file(tmp_path: Path) -> None:
    path = write_rules(tmp_path, "https://example.org/", RULE.replace("1h", "soon"))
    database = tmp_path / "t.sqlite"
    for command in (("serve",), ("alerts", "test")):
        done = telemetryd(*command, "--alerts-file", path, "--db-path", database, status=2, cwd=tmp_path)
        assert (
            done.stderr == f"telemetryd: {path}: rule 'n': after: must be a duration such as 6h or 30m (it is 'soon')\n"
        )
    missing = telemetryd("serve", "--alerts-file", "none.toml", "--db-path", database, status=2, cwd=tmp_path)
    assert missing.stderr.startswith("telemetryd: TELEMETRY_ALERTS_FILE: none.toml cannot be read: No such file")
    assert not database.exists()
    assert "TELEMETRY_ALERTS_FILE" in telemetryd("alerts", "test", status=2, cwd=tmp_path).stderr


def test_a_pattern_of_many_asterisks_is_matched_in_linear_time() -> None:
    """As a regular expression it would hold the interpreter for hours."""
    is_meant = matcher(("*a" * 20 + "b", "exact"))
    assert not is_meant("a" * 255)
    assert is_meant("a" * 254 + "b")
    assert is_meant("exact")
    assert not is_meant("exactly")
