"""The commit that broke something is named, and hardly ever one that broke nothing."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetryd.cli.regressions import text_of
from telemetryd.cli.sample_data import AGENTS, World, finished
from telemetryd.engine.sqlite.statements import regressions
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.errors import InvalidRequestError
from telemetryd.model.regressions import (
    ALPHA,
    MAX_RUNS,
    Regression,
    Run,
    find,
    fisher,
    gather,
    in_order,
    parse,
    rank_sum,
    to_json,
)
from telemetryd.model.values import format_timestamp
from tests.conftest import Api, StartDaemon, make_run
from tests.http_client import call
from tests.tools.process import telemetryd

PATH = "/api/v1/regressions"
NOW = datetime(2026, 1, 3, 12, 30, tzinfo=UTC)
COMMIT = "{:040x}".format
REPO = "git@github.com:acme/site.git"


def invent(
    random: Random,
    number: int,
    each: int,
    rate: Callable[[int], float] = lambda _: 0.95,
    duration: Callable[[int], float] = lambda _: 10_000,
) -> list[Run]:
    """Runs of commits with so many runs each; the rate and the duration are those of a run's place."""
    return [
        Run(
            str(place),
            f"{place:06}",
            COMMIT(place // each),
            None,
            random.random() < rate(place),
            max(1, round(duration(place) * random.lognormvariate(0, 0.55))),
        )
        for place in range(number)
    ]


def regressions_of(runs: list[Run]) -> list[Regression]:
    return find("a", "j", in_order(runs))


# --- The statistics ------------------------------------------------------------------------------


@given(st.data())
def test_fisher_is_exact(data: st.DataObject) -> None:
    m = data.draw(st.integers(2, 40))
    k, n = data.draw(st.integers(0, m)), data.draw(st.integers(1, m - 1))
    x = data.draw(st.integers(max(0, n + k - m), min(k, n)))
    chances = {
        other: Fraction(math.comb(k, other) * math.comb(m - k, n - other), math.comb(m, n))
        for other in range(max(0, n + k - m), min(k, n) + 1)
    }
    below = sum(chance for other, chance in chances.items() if other <= x)
    above = sum(chance for other, chance in chances.items() if other >= x)
    assert fisher(x, n, k, m) == pytest.approx(float(min(1, 2 * min(below, above))), rel=1e-9)


def test_the_rank_test_is_near_the_exact_one() -> None:
    for values in (range(1, 15), (1, 1, 2, 3, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9)):
        ranks = [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]
        ties = sum(t**3 - t for t in (list(values).count(value) for value in set(values)))
        expected = 6 * 15 / 2
        sums = [sum(chosen) for chosen in combinations(ranks, 6)]
        for rank in (25.5, 30.0, 33.0):
            exact = sum(abs(other - expected) >= abs(rank - expected) for other in sums) / len(sums)
            assert rank_sum(rank, 6, 14, ties) == pytest.approx(exact, abs=0.01)
    assert rank_sum(5 * 5.5, 5, 10, 10**3 - 10) == 1.0


@pytest.mark.parametrize(("number", "each", "rate"), [(120, 10, 0.95), (200, 5, 0.7), (200, 5, 0.5), (300, 20, 0.85)])
def test_false_alarms_are_as_rare_as_is_said(number: int, each: int, rate: float) -> None:
    random = Random(f"{number} {each} {rate}")
    alarms = sum(bool(regressions_of(invent(random, number, each, lambda _: rate))) for _ in range(400))
    assert alarms <= 400 * ALPHA


def test_a_step_is_found_and_its_commit_named() -> None:
    random, rounds = Random(2), 400
    found, exact, near = 0, 0, 0
    for _ in range(rounds):
        runs = invent(random, 160, 10, lambda place: 0.95 if place < 100 else 0.6)
        named = [each for each in regressions_of(runs) if each.measure == "success_rate"]
        if named:
            distance = abs(int(named[0].first_bad_commit, 16) - 10)
            found, exact, near = found + 1, exact + (distance == 0), near + (distance <= 1)
    assert found >= 0.9 * rounds
    assert exact >= 0.8 * found
    assert near >= 0.95 * found


def test_a_slowdown_is_found_among_successful_runs_only() -> None:
    random, rounds = Random(3), 100
    named = [
        finding
        for _ in range(rounds)
        for finding in regressions_of(invent(random, 120, 10, duration=lambda place: 10_000 * (1 + (place >= 60))))
    ]
    assert {finding.measure for finding in named} == {"duration"}
    assert len(named) >= 0.9 * rounds
    assert sum(abs(int(finding.first_bad_commit, 16) - 6) <= 1 for finding in named) >= 0.9 * rounds
    failed = [run._replace(succeeded=False) for run in invent(random, 120, 10, duration=lambda place: 1 + 9 * place)]
    assert regressions_of(failed) == []
    unknown = [run._replace(duration_ms=0) for run in failed]
    assert regressions_of([run._replace(succeeded=True) for run in unknown]) == []


def outcomes_of(blocks: tuple[tuple[int, int], ...]) -> list[tuple[int, bool]]:
    """For each commit so many successes and failures, these spread evenly: the commit's number and the outcome."""
    return [
        (number, place * f // (s + f) == (place + 1) * f // (s + f))
        for number, (s, f) in enumerate(blocks)
        for place in range(s + f)
    ]


def steps(*blocks: tuple[int, int]) -> list[Run]:
    """Runs of one commit after the other: for each how many succeed and how many fail."""
    outcomes = outcomes_of(blocks)
    return [
        Run(f"e{place}", f"{place:06}", COMMIT(number), REPO, good, 0) for place, (number, good) in enumerate(outcomes)
    ]


def test_a_finding_shows_everything() -> None:
    runs = steps((20, 0), (19, 1), (8, 12), (9, 11))
    [finding] = regressions_of(runs)
    assert (finding.first_bad_commit, finding.last_good_commit) == (COMMIT(2), COMMIT(1))
    assert finding.to_json()["before"] == {"commits": 2, "runs": 40, "success_rate": 0.975}
    assert finding.to_json()["after"] == {"commits": 2, "runs": 40, "success_rate": 0.425}
    assert finding.p_value <= ALPHA
    assert finding.commit_url == f"https://github.com/acme/site/commit/{COMMIT(2)}"
    assert finding.runs == tuple([run.event_id for run in runs[40:] if not run.succeeded][:5])


def test_what_was_fixed_and_broke_again_is_two_findings() -> None:
    found = regressions_of(steps((60, 0), (20, 40), (60, 0), (15, 45)))
    assert [finding.first_bad_commit for finding in found] == [COMMIT(1), COMMIT(3)]
    assert found[1].before.value == 1.0


def test_what_becomes_better_is_none() -> None:
    assert regressions_of(steps((20, 40), (60, 0))) == []
    faster = invent(Random(1), 200, 10, duration=lambda place: 9000 if place < 100 else 900)
    assert regressions_of(faster) == []


def test_what_is_certain_but_small_is_none() -> None:
    assert regressions_of(steps((1000, 0), (960, 40))) == []
    assert regressions_of(steps((1000, 0), (940, 60))) != []


def test_an_outage_of_some_hours_is_no_commits_work() -> None:
    def runs(fails: range) -> list[Run]:
        return [run._replace(succeeded=place not in fails) for place, run in enumerate(steps((80, 0), (60, 0)))]

    assert regressions_of(runs(range(100, 120))) == []
    assert regressions_of(runs(range(80, 100))) == []
    [finding] = regressions_of(runs(range(80, 140)))
    assert finding.first_bad_commit == COMMIT(1)


RUNS = st.lists(
    st.builds(
        Run,
        event_id=st.uuids().map(str),
        created_at=st.integers(0, 30).map("{:02}".format),
        commit=st.sampled_from("abcd"),
        repo=st.none(),
        succeeded=st.booleans(),
        duration_ms=st.integers(0, 9) | st.just(1000),
    ),
    max_size=80,
)


@given(RUNS, st.randoms(use_true_random=False))
def test_the_order_in_which_runs_come_does_not_matter(runs: list[Run], random: Random) -> None:
    # A commit that breaks everything is put after them, so that there is something to find.
    runs += [Run(f"z{place}", "99", "z", None, False, 1) for place in range(30)]
    shuffled = random.sample(runs, len(runs))
    assert gather([("a", "j", runs)]) == gather([("a", "j", shuffled)])
    commits = [block[0].commit for block in in_order(shuffled)]
    assert len(set(commits)) == len(commits)
    firsts = [min(run.created_at for run in runs if run.commit == commit) for commit in commits]
    assert firsts == sorted(firsts)


@given(RUNS)
def test_when_a_commits_later_runs_were_created_does_not_matter(runs: list[Run]) -> None:
    runs += [Run(f"z{place}", "99", "z", None, False, 1) for place in range(30)]
    blocks = in_order(runs)
    moved = [run._replace(created_at="99") if place else run for block in blocks for place, run in enumerate(block)]
    plain = [(each.first_bad_commit, each.before, each.after, each.p_value) for each in find("a", "j", blocks)]
    other = [(each.first_bad_commit, each.before, each.after, each.p_value) for each in regressions_of(moved)]
    assert other == plain


@given(RUNS)
def test_one_commit_never_gives_a_finding(runs: list[Run]) -> None:
    findings = gather([("a", "j", [run._replace(commit="a") for run in runs])])
    assert findings.regressions == ()
    assert findings.pairs == 0


@given(RUNS)
def test_what_is_found_is_worse_certain_and_shown_by_its_runs(runs: list[Run]) -> None:
    by_id = {run.event_id: run for run in runs}
    for finding in regressions_of(runs):
        assert 0 <= finding.p_value <= ALPHA
        assert finding.first_bad_commit != finding.last_good_commit
        assert 1 <= len(finding.runs) <= 5
        if finding.measure == "success_rate":
            assert finding.before.value > finding.after.value
            assert not any(by_id[event_id].succeeded for event_id in finding.runs)
        else:
            assert all(by_id[event_id].duration_ms > finding.before.value for event_id in finding.runs)


# --- What invented agents did --------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "number", "hours"), [(1, 1500, range(24)), (2, 2400, (4,)), (3, 2400, (22,))])
def test_the_commit_that_breaks_an_agent_of_the_demo_is_named_at_every_hour(
    seed: int, number: int, hours: Iterable[int]
) -> None:
    [broken] = [agent.name for agent in AGENTS if agent.breaks]
    for hour in hours:
        end = datetime(2026, 11, 27, hour, tzinfo=UTC)  # a Friday
        runs = [
            finished(story)
            for story in World(seed, end - timedelta(days=1), end).runs(number)
            if story.ends_at <= end and story.run["agent_name"] == broken
        ]
        [commit] = {run["git_commit_hash"] for run in runs if "canonical_url" in run.get("error_summary", "")}
        named = {
            finding.first_bad_commit
            for job_type in ("rewrite", "audit")
            for finding in find(broken, job_type, in_order([_seen(run) for run in runs if run["job_type"] == job_type]))
        }
        assert named == {commit}, hour


def _seen(run: dict[str, Any]) -> Run:
    return Run(
        run["event_id"],
        run["created_at"],
        run["git_commit_hash"],
        run["git_repo"],
        run["status"] == "success",
        run["duration_ms"],
    )


# --- Over HTTP -----------------------------------------------------------------------------------


def posted(blocks: tuple[tuple[int, int], ...], **fields: Any) -> list[dict[str, Any]]:
    """Runs as they are posted, a minute apart up to now, in each block so many successes and failures."""
    outcomes = outcomes_of(blocks)
    begin = datetime.now(UTC) - timedelta(minutes=len(outcomes) + 1)
    return [
        make_run(
            **{
                "created_at": format_timestamp(begin + timedelta(minutes=place)),
                "status": "success" if good else "failure",
                "git_commit_hash": COMMIT(number),
                "git_repo": REPO,
                **fields,
            }
        )
        for place, (number, good) in enumerate(outcomes)
    ]


BROKEN = ((30, 0), (29, 1), (10, 20))


async def test_the_answer_names_the_commit_with_its_runs(api: Api) -> None:
    runs = posted(BROKEN, agent_name="seo", job_type="audit")
    await api.batch([*runs, *posted(((30, 0), (30, 0)), agent_name="fine")])
    await api.batch(posted(((9, 0), (0, 9)), agent_name="running", status="running"))
    await api.batch(posted(((9, 0), (0, 9)), agent_name="without", git_commit_hash=None))
    answer = await api.get(PATH)
    assert (answer["alpha"], answer["pairs"]) == (ALPHA, 2)
    assert datetime.fromisoformat(answer["to"]) - datetime.fromisoformat(answer["from"]) == timedelta(days=30)
    [finding] = answer["regressions"]
    assert finding.pop("p_value") < 1e-6
    assert finding == {
        "agent_name": "seo",
        "job_type": "audit",
        "measure": "success_rate",
        "first_bad_commit": COMMIT(2),
        "last_good_commit": COMMIT(1),
        "before": {"commits": 2, "runs": 60, "success_rate": 0.983333},
        "after": {"commits": 1, "runs": 30, "success_rate": 0.333333},
        "commit_url": f"https://github.com/acme/site/commit/{COMMIT(2)}",
        "runs": [run["event_id"] for run in runs[60:] if run["status"] == "failure"][:5],
    }


async def test_the_most_certain_comes_first_and_filters_choose(api: Api) -> None:
    await api.batch(posted(BROKEN, agent_name="a", job_type="x"))
    await api.batch(posted(((30, 0), (29, 1), (0, 30)), agent_name="b", job_type="y"))

    async def found(query: str) -> list[str]:
        return [each["agent_name"] for each in (await api.get(f"{PATH}?{query}"))["regressions"]]

    assert await found("") == ["b", "a"]
    assert await found("agent_name=a") == ["a"]
    assert await found("agent_name=a,c") == ["a"]
    assert await found("agent_name=*") == ["b", "a"]
    assert await found("agent_name=*b") == ["b"]
    assert await found("job_type=x") == ["a"]
    assert await found("agent_name=a&job_type=y") == []
    assert await found("to=-1d") == []
    assert await found("from=-20m") == []  # the good commits are older than that


async def test_no_pattern_takes_long(api: Api) -> None:
    await api.batch(posted(BROKEN, agent_name="a" * 255))
    assert (await api.get(f"{PATH}?agent_name=*{'a*' * 126}b"))["regressions"] == []
    assert len((await api.get(f"{PATH}?agent_name=*{'a*' * 126}"))["regressions"]) == 1


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("alpha=0.5", "alpha"),
        ("status=failure", "status"),
        ("from=soon", "from"),
        ("to=1", "to"),
        ("from=now&to=-1h", "from"),
        ("agent_name=", "agent_name"),
        ("from=-1d&from=-2d", "from"),
    ],
)
async def test_what_is_no_question_is_refused(api: Api, query: str, named: str) -> None:
    answer = await api.get(f"{PATH}?{query}", status=400)
    assert named in answer["detail"]


def test_times_are_those_of_the_filters() -> None:
    query = parse("from=-2d&to=2026-01-03T00:00:00%2B01:00&agent_name=a*", NOW)
    assert datetime.fromisoformat(query.start) == NOW - timedelta(days=2)
    assert datetime.fromisoformat(query.end) == datetime(2026, 1, 2, 23, tzinfo=UTC)
    assert query.parameters()["agent_name"] == "a*"
    with pytest.raises(InvalidRequestError, match="before to"):
        parse("to=-31d", NOW)


def test_only_the_newest_runs_are_read_by_the_index_without_a_sort(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "x", isolation_level=None)) as opened:
        migrate.create(opened, format_timestamp(NOW))
        for statement, bound in (
            (regressions.NEXT_PAIR, ("", "")),
            (regressions.RUNS, {"agent_name": "a", "job_type": "j", "start": "", "end": "~"}),
        ):
            plan = "\n".join(row[3] for row in opened.execute(f"EXPLAIN QUERY PLAN {statement}", bound))
            assert "idx_runs_agent" in plan
            assert "TEMP B-TREE" not in plan
            assert "SCAN agent_runs" not in plan or statement == regressions.NEXT_PAIR
    assert f"LIMIT {MAX_RUNS}" in regressions.RUNS


# --- The command ---------------------------------------------------------------------------------


@pytest.mark.sqlite
def test_the_command_asks_the_daemon_or_the_database(tmp_path: Path, start_daemon: StartDaemon) -> None:
    place = str(tmp_path / "socket")
    daemon = start_daemon("--unix", place)
    daemon.wait_for_line("Serving")
    asked = ["regressions", "--db-path", str(daemon.database)]
    assert telemetryd(*asked, "--unix", place).stdout.startswith("No commit made anything worse in 0 pairs")
    address = f"http://127.0.0.1:{daemon.wait_for_line('Serving')['addresses'][0].rpartition(':')[2]}"
    assert call(address, "POST", "/api/v1/runs/batch", posted(BROKEN, agent_name="seo"))[1]["inserted"] == 90
    shown = telemetryd(*asked, "--unix", place).stdout
    assert "seo / translate_directory: success rate 98.3% -> 33.3% (p = " in shown
    assert f"first bad commit  {COMMIT(2)}  https://github.com/acme/site/commit/" in shown
    answer = json.loads(telemetryd(*asked, "--unix", place, "--json").stdout)
    assert json.loads(telemetryd(*asked, "--json").stdout)["regressions"] == answer["regressions"]
    daemon.stop()
    direct = json.loads(telemetryd(*asked, "--json", "--agent", "s*").stdout)
    assert direct["regressions"] == answer["regressions"] != []


def test_durations_are_shown_in_their_unit() -> None:
    query = parse("", NOW)
    runs = invent(Random(1), 200, 10, duration=lambda place: 2000 if place < 100 else 90_000)
    text = text_of(dict(to_json(query, gather([("a", "j", runs)]))))
    assert " s -> 1." in text
    assert " min (p = " in text
    assert "1 pair of agent and job type" in text


def test_no_name_controls_the_terminal() -> None:
    names = ("\x1b]0;a title\x07", "j\n\x9b2J")
    runs = invent(Random(1), 200, 10, duration=lambda place: 2000 if place < 100 else 90_000)
    text = text_of(
        dict(to_json(parse("", NOW), gather([(*names, [run._replace(commit=f"\x1b{run.commit}") for run in runs])])))
    )
    assert r"\u001b]0;a title\u0007 / j\n\u009b2J: median duration" in text
    assert all(line.isprintable() for line in text.split("\n"))
