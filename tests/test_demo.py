from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telemetryd.cli.sample_data import AGENTS, BREAKS_AT, LOOKED_BACK, ORCHESTRATOR, STALE, Story, World, finished
from telemetryd.model import events, runs
from tests.conftest import StartDaemon, wait_until
from tests.http_client import get
from tests.tools import demo_seeds
from tests.tools.forks import popen
from tests.tools.process import telemetryd

END = datetime(2026, 11, 28, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def stories(seed: int = 1, number: int = 2000, days: int = 1) -> list[Story]:
    return list(World(seed, END - days * DAY, END).runs(number))


@settings(max_examples=20)
@given(seed=st.integers(), number=st.integers(1, 300), days=st.integers(1, 366))
def test_whatever_is_invented_is_valid_and_the_same_again(seed: int, number: int, days: int) -> None:
    invented = stories(seed, number, days)
    assert invented == stories(seed, number, days)
    assert abs(len(invented) - number) <= len(AGENTS) + STALE
    assert len({story.run["event_id"] for story in invented}) == len(invented)
    for story in invented:
        assert runs.parse_run(finished(story)).ignored == ()
        assert runs.parse_run(story.run).ignored == ()
        assert runs.parse_patch(story.finish)[1] == ()
        events.parse_events(story.events)
        assert END - days * DAY <= datetime.fromisoformat(story.run["start_time"]) <= END


def test_another_seed_invents_something_else() -> None:
    first, second = ({str(story.run["start_time"]) for story in stories(seed)} for seed in (1, 2))
    assert len(first & second) < 10


def test_a_day_has_everything_there_is_to_see() -> None:
    invented = stories()
    ended = [finished(story) for story in invented if story.ends_at <= END]
    assert {story.run["agent_name"] for story in invented} == {agent.name for agent in AGENTS}
    assert len(AGENTS) == 20
    assert {run["status"] for run in ended} == {"success", "failure", "partial", "timeout", "cancelled"}
    assert 0.85 < sum(run["status"] == "success" for run in ended) / len(ended) < 0.97
    assert len([story for story in invented if not story.finish]) == STALE
    assert any(story.events for story in invented)
    parents = {run["run_id"] for run in ended if run["agent_name"] == ORCHESTRATOR}
    children = Counter(story.run["parent_run_id"] for story in invented if "parent_run_id" in story.run)
    assert {*children} <= parents | {story.run["run_id"] for story in invented if story.ends_at > END}
    assert max(children.values()) >= 2


def test_one_agent_fails_from_a_commit_on() -> None:
    own = [finished(story) for story in stories() if story.run["agent_name"] == "seo-optimizer" and story.finish]
    breaks_at = World(1, END - DAY, END).breaks["seo-optimizer"]
    late = [run for run in own if datetime.fromisoformat(run["start_time"]) >= breaks_at]
    early = [run for run in own if run not in late]

    def share(chosen: list[dict[str, Any]]) -> float:
        return [run["status"] for run in chosen].count("failure") / len(chosen)

    assert abs(len(early) / len(own) - BREAKS_AT) < 0.1
    assert share(early) < 0.1
    assert share(late) > 0.5
    assert {run["git_commit_hash"] for run in late}.isdisjoint(run["git_commit_hash"] for run in early)
    assert len({run["git_commit_hash"] for run in late}) == 1


def test_the_commit_that_breaks_an_agent_is_recent_however_long_the_past_is() -> None:
    for days, seed in ((14, 1), (30, 2), (366, 3)):
        [breaks_at] = World(seed, END - days * DAY, END).breaks.values()
        assert 5 * DAY < END - breaks_at < LOOKED_BACK - 5 * DAY


def test_some_hours_are_bad_for_all_agents() -> None:
    """Of two weeks, most have such hours."""
    found = []
    for seed in range(20):
        each = [{*hours} for hours in World(seed, END - 14 * DAY, END).incidents.values()]
        assert len(each) == len(AGENTS)
        found.append(len(set.intersection(*each)))
    assert found.count(0) < 10
    assert max(found) <= 6


def test_runs_have_labels_to_filter_by() -> None:
    invented = stories()
    teams = {story.run["agent_name"]: story.run["labels"]["team"] for story in invented}
    assert all(story.run["labels"]["team"] == teams[story.run["agent_name"]] for story in invented)
    assert teams["seo-optimizer"] == "search"
    assert len({*teams.values()}) == 10
    assert {story.run["labels"]["region"] for story in invented} == {"eu-central", "us-east", "ap-south"}
    assert 0.1 < sum(story.run["labels"].get("priority") == "high" for story in invented) / len(invented) < 0.2


def test_failures_come_in_clusters() -> None:
    world = World(1, END - DAY, END)
    bad: dict[bool, list[bool]] = {True: [], False: []}
    for story in world.runs(4000):
        run = finished(story)
        if run["agent_name"] != "seo-optimizer" and story.finish:
            begun = datetime.fromisoformat(run["start_time"])
            in_incident = any(start <= begun < end for start, end, _ in world.incidents[run["agent_name"]])
            bad[in_incident].append(run["status"] in ("failure", "timeout"))
    assert sum(bad[True]) / len(bad[True]) > 0.4
    assert sum(bad[False]) / len(bad[False]) < 0.08
    assert len(bad[True]) > 50


def test_the_office_works_by_day() -> None:
    hours = Counter(int(s.run["start_time"][11:13]) for s in stories() if s.run["agent_name"] == "ticket-triage")
    assert sum(hours[hour] for hour in range(9, 18)) > 4 * sum(hours[hour] for hour in range(9))


def test_the_command_fills_a_daemon_once(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    arguments = ("demo", "--url", daemon.url, "--no-live", "--runs", "300", "--days", "3", "--seed", "5")
    told = telemetryd(*arguments).stdout.splitlines()
    assert get(daemon.url, "/api/v1/runs?label.team=search&limit=1")[1][0]["agent_name"] == "seo-optimizer"
    assert told[-1] == f"Look at {daemon.url}/"
    total = get(daemon.url, "/metrics")[1]["total_runs"]
    assert told[0] == f"{total} runs of 20 agents posted"
    assert 280 <= total <= 320
    stored = get(daemon.url, "/api/v1/runs?include=events&limit=1000")[1]
    assert any(run["events"] for run in stored)
    again = telemetryd(*arguments).stdout.splitlines()
    assert again[0].startswith("0 runs of 20 agents posted: what seed 5 invents today was there already")
    assert get(daemon.url, "/api/v1/runs?include=events&limit=1000")[1] == stored


def test_the_command_reaches_a_socket_and_brings_the_token(start_daemon: StartDaemon, tmp_path: Path) -> None:
    token = {"TELEMETRY_API_AUTH_ENABLED": "true", "TELEMETRY_API_AUTH_TOKEN": "secret-of-the-house"}
    socket = tmp_path / "d.sock"
    daemon = start_daemon("--unix", str(socket), **token)
    daemon.wait_for_line("Serving")
    arguments = ("demo", "--unix", socket, "--no-live", "--runs", "20")
    done = telemetryd(*arguments, "--json", TELEMETRY_API_AUTH_TOKEN="secret-of-the-house")
    told = json.loads(done.stdout)
    assert 0 < told.pop("runs") < 40
    assert told == {"agents": 20, "page": None}
    refused = telemetryd(*arguments, status=1)
    assert "The daemon answered 401: A valid token is needed" in refused.stderr


def test_the_agent_that_a_commit_breaks_is_found_and_no_other(start_daemon: StartDaemon) -> None:
    """At one hour; `python -m tests.tools.demo_seeds` looks at all 24 and at 100 seeds."""
    seen = demo_seeds.look(start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL").url, demo_seeds.DEFAULT_SEED, END)
    assert seen == demo_seeds.Seen(is_found=True, is_named=True, others=())


@pytest.mark.slow
def test_it_is_found_at_every_hour_and_with_nearly_every_seed() -> None:
    assert demo_seeds.main() == 0


def test_a_daemon_that_is_not_there_is_one_sentence(free_port: int) -> None:
    done = telemetryd("demo", "--port", str(free_port), "--no-live", status=1)
    assert f"Cannot reach the daemon: http://localhost:{free_port}" in done.stderr
    assert "ftp" in telemetryd("demo", "--url", "ftp://nowhere", "--no-live", status=2).stderr


def test_it_goes_on_until_it_is_interrupted(start_daemon: StartDaemon) -> None:
    url = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL").url
    command = [sys.executable, "-m", "telemetryd", "demo", "--url", url, "--runs", "20"]
    process = popen(command, os.environ, stderr=subprocess.PIPE)

    def live() -> list[Any]:
        found = get(url, "/api/v1/runs?limit=1000&include=events")[1]
        now = datetime.now(UTC)
        for run in found:  # nothing is reported before it has happened
            moments = [run["start_time"], run["end_time"], *(event["timestamp"] for event in run["events"])]
            assert all(datetime.fromisoformat(moment) <= now for moment in moments if moment is not None)
        return [run for run in found if run["event_id"].startswith("demo-live-")]

    try:
        wait_until(lambda: any(run["status"] != "running" for run in live()))
    finally:
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert errors.splitlines()[-1] == "Stopped."
