"""The commit that broke something is named, and hardly ever one that broke nothing."""

from __future__ import annotations

import json
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from bench import regressions as simulation
from bench.facts import seconds_of
from telemetryd.cli.regressions import text_of
from telemetryd.errors import InvalidRequestError
from telemetryd.model.change_points import ALPHA, MIN_DAYS, Spell, blocks_of, in_order, permuted
from telemetryd.model.change_sizes import effect_of
from telemetryd.model.commit_cells import Cell, slot_of
from telemetryd.model.filters import Filters
from telemetryd.model.intervals import student, wilson
from telemetryd.model.neighbours import outages
from telemetryd.model.regressions import Findings, FindRegressions, gather, parse, to_json
from telemetryd.model.values import format_timestamp
from tests.conftest import Api, StartDaemon
from tests.http_client import call
from tests.months import BROKEN, COMMIT, Part, cells, fetcher, runs_of
from tests.tools.process import telemetryd

PATH = "/api/v1/regressions"
NOW = datetime(2026, 1, 3, 12, 30, tzinfo=UTC)
EVERY = FindRegressions(Filters({}), "2025-12-01T00:00:00.000000Z", format_timestamp(NOW))


def found_in(runs: list[dict[str, Any]]) -> Findings:
    return gather(EVERY, cells(runs), fetcher(runs))


def named_in(*parts: Part) -> list[str]:
    return [each.first_bad_commit for each in found_in(runs_of(*parts)).regressions]


# --- Rates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", simulation.HARMLESS)
def test_what_no_commit_changed_hardly_ever_gives_a_finding(name: str) -> None:
    assert simulation.rates(name, simulation.HARMLESS[name], 10)["found"] <= 0.1


@pytest.mark.parametrize(
    ("name", "found", "near"),
    [
        ("95 to 60 % for 8 days", 0.95, 0.9),
        ("95 to 60 % for 15 days", 0.95, 0.9),
        ("durations x 2 for 8 days", 0.95, 0.85),
    ],
)
def test_a_bad_commit_is_found_and_named(name: str, found: float, near: float) -> None:
    shares = simulation.rates(name, simulation.HARMFUL[name], 20)
    assert shares["found"] >= found
    assert shares["near"] >= near


# --- What is found -------------------------------------------------------------------------------


def test_a_finding_shows_everything() -> None:
    runs = runs_of(*BROKEN)
    [finding] = found_in(runs).regressions
    assert finding.to_json() == {
        "agent_name": "seo",
        "job_type": "audit",
        "measure": "success_rate",
        "first_bad_commit": COMMIT(2),
        "last_good_commit": COMMIT(1),
        "before": {"commits": 2, "days": 17, "runs": 192, "success_rate": 1.0},
        "after": {"commits": 1, "days": 7, "runs": 72, "success_rate": 0.416667},
        "effect": finding.to_json()["effect"],
        "others": {
            "agents": 0,
            "before": {"runs": 0, "success_rate": None},
            "after": {"runs": 0, "success_rate": None},
            "as_well": False,
        },
        "left_out_hours": 0,
        "p_value": 0.002,
        "commit_url": f"https://github.com/acme/site/commit/{COMMIT(2)}",
        "runs": [run["event_id"] for run in runs[192:] if run["status"] == "failure"][:5],
    }
    effect = finding.effect
    assert effect.low is not None
    assert effect.high is not None
    assert effect.value == pytest.approx(7 / 12 - 2 * 7 / 12)
    assert -0.75 < effect.low < effect.value < effect.high < -0.4


def test_a_slowdown_is_found_among_successful_runs_only() -> None:
    slow = (Part(0, 8, 12, 0), Part(1, 8, 12, 0), Part(2, 6, 12, 0, 21_000))
    runs = runs_of(*slow)
    [finding] = found_in(runs).regressions
    assert (finding.measure, finding.first_bad_commit) == ("duration", COMMIT(2))
    assert (finding.before.value, finding.after.value) == (10_000, 21_000)
    assert finding.effect.value == pytest.approx(2.1, rel=0.03)
    assert finding.runs == tuple(run["event_id"] for run in runs[192:197])
    assert finding.others.agents == 0
    assert found_in([{**run, "status": "failure"} for run in runs]).regressions == ()
    assert found_in([{**run, "duration_ms": 0} for run in runs]).regressions == ()


def test_what_was_broken_for_a_while_and_fixed_is_a_finding() -> None:
    [finding] = found_in(runs_of(Part(0, 16, 12, 0), Part(1, 14, 4, 8), Part(2, 6, 12, 0))).regressions
    assert finding.first_bad_commit == COMMIT(1)
    assert (finding.before.value, finding.after.commits) == (1.0, 1)


def test_what_becomes_better_or_a_little_worse_is_none() -> None:
    assert named_in(Part(0, 10, 5, 7), Part(1, 10, 12, 0)) == []
    assert named_in(Part(0, 10, 12, 0, 20_000), Part(1, 10, 12, 0, 10_000)) == []
    assert named_in(Part(0, 10, 100, 0), Part(1, 10, 96, 4)) == []
    assert named_in(Part(0, 10, 100, 0), Part(1, 10, 94, 6)) == [COMMIT(1)]
    assert named_in(Part(0, 10, 12, 0, 10_000), Part(1, 10, 12, 0, 11_500)) == []


@pytest.mark.parametrize("days", range(MIN_DAYS - 1))
def test_it_is_too_early_to_tell_after_few_days(days: int) -> None:
    findings = found_in(runs_of(Part(0, 10, 12, 0), Part(1, 10, 12, 0), Part(2, days, 3, 9)))
    assert findings.regressions == ()
    assert [each.first_bad_commit for each in findings.too_early] == ([COMMIT(2)] if days else [])
    findings = found_in(runs_of(Part(0, days, 12, 0), Part(1, 10, 3, 9)))
    assert findings.regressions == ()
    assert len(findings.too_early) == (1 if days else 0)


def test_an_outage_of_three_days_is_no_commits_work() -> None:
    good = Part(0, 12, 12, 0), Part(1, 6, 12, 0)
    assert named_in(*good, Part(2, 3, 0, 12), Part(2, 3, 12, 0)) == []
    assert named_in(*good, Part(2, 2, 12, 0), Part(2, 3, 0, 12)) == []
    assert named_in(*good, Part(2, 6, 0, 12)) == [COMMIT(2)]


def test_what_drifts_is_no_commits_work() -> None:
    parts = [Part(day, 1, 12, 0, round(10_000 * 1.04**day)) for day in range(28)]
    findings = found_in(runs_of(*parts))
    assert findings.regressions == findings.too_early == ()


def test_an_outage_that_others_share_is_left_out() -> None:
    fails = Part(1, 4, 2, 10)
    own = runs_of(Part(0, 14, 12, 0), fails, Part(1, 3, 12, 0))
    others = [run for agent in "ab" for run in runs_of(Part(7, 14, 12, 0), fails, Part(7, 3, 12, 0), agent_name=agent)]
    assert all(findings == () for findings in (found_in(own + others).regressions, found_in(own + others).too_early))
    broken = runs_of(Part(0, 9, 12, 0), Part(1, 2, 0, 12), Part(2, 3, 12, 0), Part(3, 7, 5, 7))
    others = [
        run
        for agent in "ab"
        for run in runs_of(Part(7, 9, 12, 0), Part(7, 2, 0, 12), Part(7, 10, 11, 1), agent_name=agent)
    ]
    [finding] = found_in(broken + others).regressions
    assert (finding.first_bad_commit, finding.left_out_hours) == (COMMIT(3), 48)
    assert finding.others.agents == 2
    assert finding.others.was == pytest.approx(1, abs=0.06)
    assert finding.others.became == pytest.approx(11 / 12, abs=0.01)
    assert not finding.others.as_well


def test_successes_last_as_long_in_an_outage_so_that_durations_leave_nothing_out() -> None:
    slow = runs_of(Part(0, 9, 12, 0), Part(1, 3, 12, 0), Part(2, 9, 12, 0, 21_000))
    others = [
        run
        for agent in "ab"
        for run in runs_of(Part(7, 12, 12, 0), Part(7, 2, 0, 12), Part(7, 7, 12, 0), agent_name=agent)
    ]
    [finding] = found_in(slow + others).regressions
    assert (finding.measure, finding.first_bad_commit, finding.left_out_hours) == ("duration", COMMIT(2), 0)
    assert finding.runs == tuple(run["event_id"] for run in slow[144:149])


def test_what_became_of_others_for_good_is_shown() -> None:
    runs = [run for agent in "abc" for run in runs_of(*BROKEN, agent_name=agent)]
    findings = found_in(runs).regressions
    assert [each.agent_name for each in findings] == ["a", "b", "c"]
    assert all(each.others.as_well and each.others.agents == 2 for each in findings)


def test_only_the_slots_in_which_others_fail_far_more_often_are_left_out() -> None:
    usual = dict.fromkeys(range(120), (20, 1))
    assert outages(usual) == frozenset()
    assert outages({}) == frozenset()
    assert outages({1: (5, 5)}) == frozenset()
    assert outages({**usual, 50: (20, 15), 51: (20, 12), 119: (20, 20)}) == {50, 51, 119}
    assert outages({slot: (20, 1 if slot < 80 else 12) for slot in range(120)}) == frozenset()
    assert outages(dict.fromkeys(range(120), (20, 10))) == frozenset()


def test_no_order_of_days_is_rarer_than_is_said() -> None:
    random = Random(1)
    chances = [permuted([random.gauss(0, 1) for _ in range(20)])[0] for _ in range(300)]
    assert sum(chance <= ALPHA for chance in chances) <= 6
    assert permuted([0.0] * 9) == (1.0, 0)
    assert permuted([-1.0] * 10 + [1.0] * 10) == (0.002, 1)
    assert permuted([1.0] * 10 + [-1.0] * 10) == (0.002, -1)


def test_orders_of_a_year_of_slots_are_not_kept() -> None:
    """Each number of slots has orders of its own, of which those of a year would take 3 MB, and of five years 14."""
    tracemalloc.start()
    assert permuted([-1.0] * 730 + [1.0] * 730, shuffles=199) == (0.01, 1)
    assert tracemalloc.get_traced_memory()[0] < 1 << 18
    tracemalloc.stop()


def test_intervals_are_those_of_the_books() -> None:
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-3)
    assert [student(freedom) for freedom in (2, 5, 10, 30)] == pytest.approx([4.303, 2.571, 2.228, 2.042], rel=0.035)


def test_an_interval_holds_the_true_change_as_often_as_is_said() -> None:
    random, held, rounds = Random(4), 0, 200
    for _ in range(rounds):
        runs = runs_of(Part(0, 12, 20, 0), Part(1, 8, 20, 0))
        for run in runs:
            is_good = random.random() < (0.9 if run["git_commit_hash"] == COMMIT(0) else 0.6)
            run["status"] = "success" if is_good else "failure"
        blocks = blocks_of("success_rate", in_order(cells(runs)), frozenset())
        effect = effect_of("success_rate", Spell(blocks[:1]), Spell(blocks[1:]))
        assert effect.low is not None
        assert effect.high is not None
        held += effect.low <= -0.3 <= effect.high
    assert held >= 0.92 * rounds


# --- Invariants ----------------------------------------------------------------------------------

CELLS = st.builds(
    lambda agent, commit, slot, failures, successes, timed, seconds: Cell(
        agent,
        "j",
        commit,
        slot,
        failures + successes,
        failures,
        min(timed, successes),
        400 * min(timed, successes) + seconds % 90,
        seconds,
    ),
    st.sampled_from("ab"),
    st.sampled_from(["", "c1", "c2", "c3", "c4"]),
    st.integers(0, 60),
    st.integers(0, 4),
    st.integers(1, 6),
    st.integers(0, 6),
    st.integers(0, 20_000),
)
MONTHS = st.lists(CELLS, max_size=60, unique_by=lambda cell: (cell.agent_name, cell.commit, cell.slot)).map(
    lambda some: [
        *some,  # so that there is something to find
        *(Cell("a", "j", "bad", slot, 4, 4, 0, 0, 40) for slot in range(61, 91)),
        *(Cell("a", "j", "good", slot, 4, 0, 4, 1600, 40) for slot in range(-30, 0)),
    ]
)


def look(some: list[Cell]) -> Findings:
    return gather(EVERY, some, lambda _: [])


@given(MONTHS, st.randoms(use_true_random=False))
def test_the_order_in_which_cells_come_does_not_matter(some: list[Cell], random: Random) -> None:
    assert look(random.sample(some, len(some))) == look(some)


@given(MONTHS)
def test_what_commits_are_called_does_not_matter(some: list[Cell]) -> None:
    begins = [
        (cells[0].slot, cells[0].seconds / cells[0].runs) for cells in in_order(c for c in some if c.agent_name == "a")
    ]
    assume(len(set(begins)) == len(begins))  # two that begin in the same second on average are told apart by name
    names = {"c1": "z", "c2": "y", "c3": "x", "c4": "w", "good": "v", "bad": "u", "": ""}
    renamed = look([cell._replace(commit=names[cell.commit]) for cell in some])
    plain = look(some)
    assert [(names[each.first_bad_commit], each.p_value, each.effect) for each in plain.regressions] == [
        (each.first_bad_commit, each.p_value, each.effect) for each in renamed.regressions
    ]


@given(MONTHS, st.integers(-3000, 3000))
def test_when_it_happened_does_not_matter(some: list[Cell], days: int) -> None:
    moved = look([cell._replace(slot=cell.slot + 4 * days) for cell in some])
    assert moved == look(some)


@given(MONTHS)
def test_other_agents_matter_by_how_many_of_their_runs_fail_when(some: list[Cell]) -> None:
    others = [
        cell._replace(agent_name="c" if cell.commit > "c2" else "b", commit="", job_type=cell.commit)
        for cell in some
        if cell.agent_name == "b"
    ]
    plain, other = (look([cell for cell in some if cell.agent_name == "a"] + rest).regressions for rest in (
        [cell for cell in some if cell.agent_name == "b"], others))  # fmt: skip
    shown = [[(each.first_bad_commit, each.p_value, each.effect) for each in several if each.agent_name == "a"]
             for several in (plain, other)]  # fmt: skip
    assert shown[0] == shown[1]


@given(
    st.lists(CELLS, min_size=2, max_size=8, unique_by=lambda cell: (cell.agent_name, cell.commit)), st.integers(1, 3)
)
@example([Cell("a", "j", f"c{failures}", 0, 9, failures, 0, 0, 40 * failures) for failures in (1, 8)], 1)
def test_in_its_first_hours_nothing_is_certain(some: list[Cell], slots: int) -> None:
    findings = look([cell._replace(slot=cell.slot % slots) for cell in some])
    assert (findings.regressions, findings.too_early) == ((), ())


@given(MONTHS)
def test_one_commit_never_gives_a_finding(some: list[Cell]) -> None:
    findings = look([cell._replace(commit="same" if cell.commit else "") for cell in some])
    assert findings == Findings((), (), 0)


@given(MONTHS)
def test_what_is_found_is_worse_certain_and_between_its_bounds(some: list[Cell]) -> None:
    findings = look(some)
    for finding in (*findings.regressions, *findings.too_early):
        assert 0 <= finding.p_value <= ALPHA
        assert finding.first_bad_commit != finding.last_good_commit
        effect = finding.effect
        assert effect.low is None or effect.high is None or effect.low <= effect.value <= effect.high
        worse = finding.before.value - finding.after.value
        assert worse > 0 if finding.measure == "success_rate" else effect.value > 1
    for finding in findings.regressions:
        assert min(finding.before.days, finding.after.days) >= MIN_DAYS


def test_a_slot_and_the_seconds_in_it_are_those_of_the_moment() -> None:
    assert slot_of("1970-01-02T05:59:59.999999Z") == 4
    assert slot_of("1970-01-02T06:00:00.000000Z") == 5
    assert seconds_of("1970-01-02T06:00:00.000000Z") == 0
    assert seconds_of("1970-01-02T05:59:59.999999Z") == 6 * 3600 - 1


def test_commits_stand_in_the_order_in_which_they_came() -> None:
    runs = [run for commit in (5, 3, 9, 1) for run in runs_of(Part(commit, 1, 4, 0))[:4]]
    for place, run in enumerate(runs):
        run["created_at"] = format_timestamp(NOW + timedelta(minutes=place))
    assert [several[0].commit for several in in_order(cells(runs))] == [COMMIT(each) for each in (5, 3, 9, 1)]


# --- Over HTTP -----------------------------------------------------------------------------------


def posted(*parts: Part, **fields: Any) -> list[dict[str, Any]]:
    return runs_of(*parts, end=datetime.now(UTC), **fields)


async def test_the_answer_names_the_commit_with_its_runs(api: Api) -> None:
    runs = posted(*BROKEN)
    await api.batch([*runs, *posted(Part(0, 9, 5, 0), Part(1, 9, 5, 0), agent_name="fine")])
    await api.batch(posted(Part(0, 4, 9, 0), Part(1, 4, 0, 9), agent_name="running", status="running"))
    await api.batch(posted(Part(0, 4, 9, 0), Part(1, 4, 9, 0), agent_name="without", git_commit_hash=None))
    answer = await api.get(PATH)
    assert (answer["alpha"], answer["pairs"], answer["min_days"]) == (ALPHA, 2, MIN_DAYS)
    assert datetime.fromisoformat(answer["to"]) - datetime.fromisoformat(answer["from"]) == timedelta(days=30)
    [finding] = answer["regressions"]
    assert answer["too_early"] == []
    assert finding["first_bad_commit"] == COMMIT(2)
    assert finding["before"]["success_rate"] == 1
    assert finding["after"]["success_rate"] == 0.416667
    assert finding["others"]["agents"] == 2
    assert finding["runs"] == [run["event_id"] for run in runs[192:] if run["status"] == "failure"][:5]


async def test_what_is_too_early_is_told_apart(api: Api) -> None:
    await api.batch(posted(Part(0, 9, 12, 0), Part(1, 8, 12, 0), Part(2, 2, 3, 9)))
    answer = await api.get(PATH)
    assert answer["regressions"] == []
    [finding] = answer["too_early"]
    assert finding["first_bad_commit"] == COMMIT(2)
    assert finding["after"]["days"] <= 3
    assert len(finding["runs"]) == 5


async def test_a_bad_commit_of_this_hour_hinders_no_answer(api: Api) -> None:
    await api.batch(posted(*BROKEN))
    runs = [{**run, "created_at": None} for run in posted(Part(0, 1, 9, 0), Part(1, 1, 0, 9), agent_name="new")]
    await api.batch([{name: value for name, value in run.items() if value is not None} for run in runs])
    answer = await api.get(PATH)
    assert answer["pairs"] == 2
    assert [finding["agent_name"] for finding in answer["regressions"]] == ["seo"]


async def test_filters_choose(api: Api) -> None:
    await api.batch(posted(*BROKEN, agent_name="a", job_type="x"))
    await api.batch(posted(*BROKEN, agent_name="b", job_type="y"))

    async def found(query: str) -> list[str]:
        return [each["agent_name"] for each in (await api.get(f"{PATH}?{query}"))["regressions"]]

    assert await found("") == ["a", "b"]
    assert await found("agent_name=a") == ["a"]
    assert await found("agent_name=a,c") == ["a"]
    assert await found("agent_name=*") == ["a", "b"]
    assert await found("agent_name=*b") == ["b"]
    assert await found("job_type=x") == ["a"]
    assert await found("agent_name=a&job_type=y") == []
    assert await found("to=-7d") == []
    assert await found("from=-5d") == []  # the good commits are older than that


async def test_no_pattern_takes_long(api: Api) -> None:
    await api.batch(posted(*BROKEN, agent_name="a" * 255))
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


# --- The command ---------------------------------------------------------------------------------


@pytest.mark.sqlite
def test_the_command_asks_the_daemon_or_the_database(tmp_path: Path, start_daemon: StartDaemon) -> None:
    place = str(tmp_path / "socket")
    daemon = start_daemon("--unix", place)
    daemon.wait_for_line("Serving")
    asked = ["regressions", "--db-path", str(daemon.database)]
    assert telemetryd(*asked, "--unix", place).stdout.startswith("No commit made anything worse in 0 pairs")
    address = f"http://127.0.0.1:{daemon.wait_for_line('Serving')['addresses'][0].rpartition(':')[2]}"
    assert call(address, "POST", "/api/v1/runs/batch", posted(*BROKEN))[1]["inserted"] == 264
    shown = telemetryd(*asked, "--unix", place).stdout
    assert "seo / audit: success rate 100.0% -> 41.7%, by 4" in shown
    assert f"first bad commit  {COMMIT(2)}  https://github.com/acme/site/commit/" in shown
    answer = json.loads(telemetryd(*asked, "--unix", place, "--json").stdout)
    assert json.loads(telemetryd(*asked, "--json").stdout)["regressions"] == answer["regressions"]
    daemon.stop()
    direct = json.loads(telemetryd(*asked, "--json", "--agent", "s*").stdout)
    assert direct["regressions"] == answer["regressions"] != []


def text_for(runs: list[dict[str, Any]]) -> str:
    return text_of(dict(to_json(parse("", NOW), found_in(runs))))


def test_durations_are_shown_in_their_unit() -> None:
    text = text_for(runs_of(Part(0, 10, 9, 0, 2000), Part(1, 10, 9, 0, 90_000)))
    assert "median duration 2.0 s -> 1.5 min, x 4" in text
    assert "1 pair of agent and job type" in text


def test_what_is_too_early_is_told_last() -> None:
    text = text_for(runs_of(Part(0, 10, 12, 0), Part(1, 2, 3, 9)))
    assert "No commit made anything worse" in text
    assert "Too early to tell" in text.split("\n\n")[1]


def test_no_name_controls_the_terminal() -> None:
    names: dict[str, Any] = {"agent_name": "\x1b]0;a title\x07", "job_type": "j\n\x9b2J"}
    runs = [
        {**run, "git_commit_hash": f"\x1b{run['git_commit_hash']}"}
        for run in runs_of(Part(0, 10, 9, 0, 2000), Part(1, 10, 9, 0, 90_000), **names)
    ]
    text = text_for(runs)
    assert r"\u001b]0;a title\u0007 / j\n\u009b2J: median duration" in text
    assert all(line.isprintable() for line in text.split("\n"))
