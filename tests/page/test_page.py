"""The page at `/` as somebody with a browser sees it."""

from __future__ import annotations

import http.client
import json
import math
import re
import shlex
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.conftest import PATIENCE_S, make_run, wait_until
from tests.http_client import call, get, post
from tests.page.conftest import RUNS, TOKEN, OpenPage, Watched
from tests.tools.browser import DESKTOP, PHONE
from tests.tools.docs import ROOT
from tests.tools.process import telemetryd
from tests.tools.sub_path import sub_path

VIEWS = {
    "overview": ("#/", ".chart svg .bar-group"),
    "week": ("#/?period=7d", ".chart svg .bar-group"),
    "runs": ("#/runs", ".table-body .line"),
    "run": ("#/run/{event_id}", ".timeline li"),
    "stale": ("#/stale?older_than=5m", ".lines a"),
    "agents": ("#/agents?name=re", ".calendar rect"),
}


def address_of(view: str, url: str) -> str:
    failed = get(url, "/api/v1/runs?status=failure&limit=1")[1][0]["event_id"]
    return VIEWS[view][0].format(event_id=failed)


def opened(open_view: OpenPage, url: str, view: str) -> Page:
    """Open a view and wait until everything on it has come."""
    page = open_view(address_of(view, url))
    wait_for(page, view)
    return page


def wait_for(page: Page, view: str) -> None:
    expect(page.locator(f"main {VIEWS[view][1]}").first).to_be_visible()
    expect(page.locator("[aria-busy]")).to_have_count(0)


# --- What the views show -------------------------------------------------------------------------


def test_the_overview_shows_what_happened(page: Page, url: str) -> None:
    tiles = page.locator(".tile")
    expect(tiles.filter(has_text="Runs").locator("dd").first).to_have_text(re.compile(r"^1,\d{3}$"))
    expect(tiles.filter(has_text="Success rate")).to_contain_text(re.compile(r"\d\d\.\d %"))
    metrics = get(url, "/metrics")[1]
    expect(page.locator(".facts")).to_contain_text(f"{metrics['total_runs']:,} by {len(metrics['agents'])} agents")
    expect(page.locator(".facts")).to_contain_text("empty")
    expect(page.locator(".panel", has_text="Most failures").locator("li")).to_have_count(6)
    since = page.evaluate("new Date(Math.floor(Date.now() / 3600000) * 3600000 - 23 * 3600000).toISOString()")
    groups = get(url, f"/api/v1/stats?group_by=agent_name&from={since}")[1]["groups"]
    slowest = max(groups, key=lambda group: group["duration_ms"]["p95"] or 0)["agent_name"]
    expect(page.locator(".panel", has_text="Slowest agents").locator("li").first).to_contain_text(slowest)
    expect(page.locator(".panel", has_text="Latest failures").locator("li").first).to_be_visible()
    expect(page.locator("#health")).to_have_text("Healthy")
    expect(page.locator(".view-head")).to_contain_text(re.compile(r"whole hours since \d+ \w+, \d\d:00, Europe/Berlin"))
    expect(page.locator("#zone")).to_have_text("Times are local: Europe/Berlin")
    running = tiles.filter(has_text="Still running").get_by_role("link")
    expect(running).to_have_attribute("href", re.compile("from="))


@pytest.mark.usefixtures("one_hour")
def test_the_bars_have_the_figures_of_the_api(page: Page, url: str) -> None:
    expect(page.locator(".chart svg")).to_be_visible()
    page.locator("summary", has_text="Show as a table").click()
    expect(page.locator(".as-table tbody tr").last).to_be_visible()
    heads = page.locator(".as-table thead th").all_inner_texts()
    sums = dict.fromkeys(heads[1:], 0)
    for row in page.locator(".as-table tbody tr").all():
        for name, text in zip(heads[1:], row.locator("td").all_inner_texts(), strict=True):
            sums[name] += int(text.replace(",", ""))
    since = page.evaluate("new Date(Math.floor(Date.now() / 3600000) * 3600000 - 23 * 3600000).toISOString()")
    groups = get(url, f"/api/v1/stats?group_by=status&from={since}")[1]["groups"]
    assert sums == {group["status"]: group["runs"] for group in groups}


@pytest.mark.usefixtures("one_hour")
def test_a_bar_and_each_of_its_parts_lead_to_their_runs(page: Page) -> None:
    bar = page.locator(".bar-group", has=page.locator("[fill='url(#hatch)']")).first
    bar.locator("[fill='url(#hatch)']").hover(force=True)  # what is above it gets the pointer
    tip = page.locator(".tip")
    expect(tip).to_contain_text("A click lists failure only")
    title = tip.locator("strong").inner_text()
    numbers = {
        line.locator("span").inner_text(): int(line.locator("b").inner_text()) for line in tip.locator(".line").all()
    }
    page.mouse.down()
    page.mouse.up()
    tally = page.locator(".tally")
    expect(tally).to_have_text(f"{numbers['failure']} run{'' if numbers['failure'] == 1 else 's'}")
    assert set(page.locator(".table-body .badge").all_inner_texts()) == {"failure"}
    begin, end = (datetime.fromisoformat(page.locator(f"#range-{name}").input_value()) for name in ("from", "to"))
    assert title == f"{begin.day} {begin:%b}, {begin:%H:00} – {'' if end.hour else f'{end.day} {end:%b}, '}{end:%H:00}"
    assert end - begin == timedelta(hours=1)
    page.go_back()
    page.locator("summary", has_text="Show as a table").click()
    row = page.locator(".as-table tbody tr", has=page.get_by_role("link", name=title, exact=True))
    expect(row.get_by_role("link")).to_have_count(1 + len(numbers))
    row.get_by_role("link", name=title, exact=True).click()
    expect(page).to_have_url(re.compile(r"#/runs\?from=[^&]*00Z&to=[^&]*00Z$"))
    expect(tally).to_have_text(f"{sum(numbers.values())} runs")


def test_days_are_those_of_the_readers_clock(open_view: OpenPage, url: str) -> None:
    """On 25 October 2026 clocks are put back in Berlin, so that the day has 25 hours."""
    for moment in ("24T22:10", "25T22:50", "25T23:05"):
        post(url, make_run(agent_name="night-owl", status="success", created_at=f"2026-10-{moment}:00Z"))
    page = open_view("#/?from=2026-10-15T22:00Z&to=2026-10-30T23:00Z")
    expect(page.locator("h1")).to_have_text("16 Oct, 00:00 – 31 Oct, 00:00")
    expect(page.get_by_role("heading", name="Runs per day")).to_be_visible()
    page.locator("summary", has_text="Show as a table").click()
    rows = page.locator(".as-table tbody tr")
    assert [row.split() for row in rows.all_inner_texts()] == [["25", "Oct", "2"], ["26", "Oct", "1"]]
    rows.first.get_by_role("link", name="25 Oct").click()
    expect(page.locator(".tally")).to_have_text("2 runs")
    expect(page.locator("#range-from")).to_have_value("2026-10-25T00:00")
    expect(page.locator("#range-to")).to_have_value("2026-10-26T00:00")
    page.locator(".table-body .cover").first.click()
    expect(page.locator(".ids time")).to_have_attribute("title", re.compile("25 Oct 2026, 23:50:00 CET"))
    page.goto(f"{url}/#/agents?name=night-owl")
    squares = page.locator(".calendar .day title")
    expect(squares).to_have_text(["25 Oct: 2 runs, 100 % succeeded", "26 Oct: 1 run, 100 % succeeded"])
    ranges = page.evaluate("""import("./page/range.js").then((range) => [
        range.spans(Date.parse("2026-03-27T23:00Z"), Date.parse("2026-03-30T22:00Z")),
        new Date(range.midnight(Date.parse("2026-03-29T12:00Z"), 1)).toISOString(),
        range.rangeText(Date.parse("2026-03-28T21:00Z"), Date.parse("2026-03-29T04:00Z")),
    ])""")
    assert ranges == [
        [
            {
                "from": "2026-03-27T23:00:00.000Z",
                "to": "2026-03-29T22:00:00.000Z",
                "bucket": "1d",
                "utc_offset": "+01:00",
            },
            {
                "from": "2026-03-29T22:00:00.000Z",
                "to": "2026-03-30T22:00:00.000Z",
                "bucket": "1d",
                "utc_offset": "+02:00",
            },
        ],
        "2026-03-29T22:00:00.000Z",
        "28 Mar, 22:00 – 29 Mar, 06:00",
    ]


def test_where_clocks_are_half_an_hour_off_days_are_kept_apart(open_view: OpenPage, url: str) -> None:
    for moment in ("10T17:50", "10T18:40", "11T17:50"):  # in India 23:20, 00:10 and 23:20
        post(url, make_run(agent_name="night-heron", status="success", created_at=f"2026-09-{moment}:00Z"))
    page = open_view("#/agents?name=night-heron", timezone_id="Asia/Kolkata")
    days = page.locator(".calendar .day")
    expect(days.locator("title")).to_have_text(["10 Sept: 1 run, 100 % succeeded", "11 Sept: 2 runs, 100 % succeeded"])
    days.last.locator("rect").click()
    expect(page.locator(".tally")).to_have_text("2 runs")


def test_a_time_of_ones_own(open_view: OpenPage, url: str) -> None:
    """Of last night, and of any other hours: on the overview and on the runs."""
    page = open_view()
    choice = page.get_by_role("navigation", name="Period")
    expect(page.locator("h1")).to_have_text("Last 24 hours")
    place = choice.bounding_box()
    page.get_by_role("link", name="Last night, 22–06").click()
    expect(page.locator("h1")).to_have_text(re.compile(r"^\d+ \w+, 22:00 – \d+ \w+, 06:00$"))
    assert choice.bounding_box() == place
    expect(page.get_by_role("link", name="Last night, 22–06")).to_have_attribute("aria-current", "true")
    begin, end = (page.locator(f"#range-{name}").input_value() for name in ("from", "to"))
    assert (begin[10:], end[10:]) == ("T22:00", "T06:00")
    asked = dict(parse_qsl(page.url.partition("?")[2]))
    [group] = get(url, f"/api/v1/stats?from={asked['from']}&to={asked['to']}")[1]["groups"]
    runs = page.locator(".tile").filter(has_text="Runs").locator("dd").first
    expect(runs).to_have_text(f"{group['runs']}")
    expect(page.locator(".bar-group")).to_have_count(8)
    page.locator("#range-from").fill(f"{end[:10]}T00:00")
    expect(page.locator(".bar-group")).to_have_count(6)
    expect(page.locator("h1")).to_have_text(re.compile("00:00 – 06:00"))
    page.locator("#range-to").fill(begin)
    expect(page.locator(".range")).to_contain_text("It ends before it begins")
    page.get_by_role("link", name="Runs", exact=True).click()
    page.get_by_label("Created").select_option("Last night, 22–06")
    expect(page.locator(".tally")).to_have_text(re.compile(rf"^{group['runs']} runs|newest 200"))
    expect(page.locator("#range-from")).to_have_value(begin)
    page.locator("#range-to").fill(f"{begin[:10]}T23:00")
    expect(page).to_have_url(re.compile("from=.*&to="))
    [first] = get(url, f"/api/v1/stats?from={asked['from']}&to=" + asked["from"].replace(":00Z", ":30Z"))[1]["groups"]
    expect(page.locator(".tally")).to_have_text(f"{first['runs']} runs")
    page.get_by_label("Created").select_option("Any time")
    expect(page).to_have_url(re.compile("#/runs$"))
    expect(page.locator(".range")).to_be_hidden()
    page.goto(f"{url}/#/runs?created_before=2026-10-25T01:30:00Z")
    expect(page.locator(".chip")).to_have_text("created before: 25 Oct 2026, 02:30:00 CET ×")


def test_a_few_runs_are_not_said_to_be_none_an_hour(open_view: OpenPage, url: str) -> None:
    for number in range(3):
        made = make_run(created_at=f"2021-05-04T1{number}:00:00Z", status="success", items_succeeded=1)
        post(url, made)
    page = open_view("#/?from=2021-05-04T00:00Z&to=2021-05-05T00:00Z")
    expect(page.locator(".tile").first).to_have_text("Runs3by 1 agent, in 1 day")
    page.goto(f"{url}/#/?from=2021-05-04T10:00Z&to=2021-05-04T12:00Z")
    expect(page.locator(".tile").first).to_have_text("Runs2by 1 agent, 1 per hour")
    # A rate of few runs comes with its interval, and there is none of no runs.
    rate = page.locator(".tile").nth(1)
    expect(rate).to_have_text("Success rate100 %2 of 2 finished (95 % interval 34–100 %)")
    page.goto(f"{url}/#/?from=2021-05-04T14:00Z&to=2021-05-04T15:00Z")
    expect(rate).to_have_text("Success rateno datano runs")
    post(url, make_run(created_at="2021-05-04T14:30:00Z"))
    page.reload()
    expect(rate).to_have_text("Success rateno datano run has finished")
    post(url, make_run(created_at="2021-05-04T14:40:00Z", status="failure"))
    page.reload()
    expect(rate).to_have_text("Success rate0 %0 of 1 finished (95 % interval 0–80 %)")
    worst = page.locator(".panel", has_text="Most failures").locator("li")
    expect(worst).to_have_text("hugo-translator100 % (20–100 %) of 1 run1")
    # Nobody has said how long they took, as in many a database of 3.x.
    page.goto(f"{url}/#/runs?created_before=2021-05-05T00:00Z")
    expect(page.locator(".table-body .took").first).to_have_text("–")
    page.goto(f"{url}/#/run/{made['event_id']}")
    expect(page.locator(".run-head .badge")).to_have_text("success")
    expect(page.locator("main")).not_to_contain_text("0 ms")
    call(url, "PATCH", f"/api/v1/runs/{made['event_id']}", {"end_time": made["start_time"]})
    page.reload()
    expect(page.locator(".run-head .took")).to_have_text("0 ms")


def test_the_commit_that_broke_an_agent_is_named_with_its_runs(open_view: OpenPage, url: str) -> None:
    answer = get(url, "/api/v1/regressions")[1]
    found = answer["regressions"] + answer["too_early"]
    first = next(each for each in answer["regressions"] if each["agent_name"] == "seo-optimizer")
    page = open_view()
    panel = page.locator("#regressions")
    expect(panel.locator("li")).to_have_count(len(found))
    expect(panel.locator(".limit")).to_contain_text("Whatever else changed for good at that moment")
    shown = panel.locator("li").nth(found.index(first))
    rate = math.floor(first["after"]["success_rate"] * 1000 + 0.5) / 10  # halves upwards, as the browser does
    expect(shown).to_contain_text(f"{rate:.1f} % since commit")
    expect(shown.locator(f'a[href="{first["commit_url"]}"]')).to_have_attribute("rel", "noopener noreferrer")
    facts = shown.locator(".evidence > div")
    expect(facts.nth(0)).to_have_text(re.compile(r"^Change\d+\.\d points less, 95 % interval \d+\.\d to \d+\.\d less$"))
    before, since = first["before"], first["after"]
    expect(facts.nth(1)).to_contain_text(
        f"Before{before['days']} days ({before['runs']} runs, {before['commits']} commits)"
    )
    expect(facts.nth(1)).to_contain_text(first["last_good_commit"][:12])
    expect(facts.nth(2)).to_contain_text(f"Since{since['days']} days ({since['runs']} runs, 1 commit); see runs 1, 2")
    expect(facts.nth(3)).to_contain_text(re.compile(r"^Others\d+ agents? succeeded in \d\d\.\d % before, \d\d\.\d % s"))
    expect(facts.last).to_have_text(f"By chanceat most 1 in {math.floor(1 / first['p_value'])}")
    expect(shown.get_by_role("link", name="Run demo-")).to_have_count(len(first["runs"]))
    shown.get_by_role("link", name=f"Run {first['runs'][0]}", exact=True).click()
    expect(page).to_have_url(re.compile(f"#/run/{first['runs'][0]}$"))
    expect(page.locator(f'a[href="{first["commit_url"]}"]')).to_be_visible()
    page.go_back()
    shown.locator(".name").click()
    expect(page).to_have_url(re.compile(f"git_commit_hash={first['first_bad_commit']}"))
    expect(page.locator(".table-body .line").first).to_contain_text("seo-optimizer")


def test_what_speaks_against_a_finding_is_said(open_view: OpenPage, url: str) -> None:
    answer = get(url, "/api/v1/regressions")[1]
    [known, *_] = answer["regressions"]
    slower = known | {
        "agent_name": "slower",
        "measure": "duration",
        "before": {"commits": 3, "days": 5, "runs": 50, "median_duration_ms": 30_000},
        "after": {"commits": 1, "days": 1, "runs": 9, "median_duration_ms": 66_000},
        "effect": {"value": 2.2, "low": None, "high": None},
        "others": {"agents": 3, "before": {"runs": 90}, "after": {"runs": 20}, "factor": 1.9, "as_well": True},
        "left_out_hours": 0,
    }
    alone = known | {
        "agent_name": "alone",
        "before": {"commits": 3, "days": 2, "runs": 50, "success_rate": 0.9},
        "after": {"commits": 1, "days": 3, "runs": 9, "success_rate": 0.6},
        "effect": {"value": -0.3, "low": -0.62, "high": 0.04},
        "others": {"agents": 0, "before": {"runs": 0}, "after": {"runs": 0}, "as_well": False},
        "left_out_hours": 6,
    }
    page = open_view(fresh=True)
    told = answer | {"regressions": [], "too_early": [slower, alone]}
    page.route("**/api/v1/regressions", lambda route: route.fulfill(json=told))
    page.reload()
    [first, second] = (page.locator("#regressions li").nth(place) for place in (0, 1))
    expect(first).to_contain_text("too early to tell slower")
    expect(first).to_contain_text("half of the runs end within 30 s before, 1 min 6 s since commit")
    expect(first).to_contain_text(
        "Days with runs: 5 before, 1 since. It takes 4 on each side to tell a commit from an outage."
    )
    expect(first).to_contain_text("2.20 times as long, too few days for an interval")
    expect(first).to_contain_text("worse as well 3 agents took 1.90 times as long as before: hardly one commit's work")
    expect(first).not_to_contain_text("Left out")
    expect(second).to_contain_text("Days with runs: 2 before, 3 since.")
    expect(second).to_contain_text("30.0 points less, 95 % interval 4.0 more to 62.0 less")
    expect(second).to_contain_text("none ran on both sides: nothing tells whether it was all of them")
    expect(second).to_contain_text("6 hours in which other agents failed, too")


def test_what_fires_now_is_shown_with_its_runs(open_view: OpenPage, url: str) -> None:
    def firing() -> dict[str, dict[str, Any]]:
        rules = get(url, "/api/v1/alerts")[1]["rules"]
        return {rule["name"]: rule["firing"][0] for rule in rules if rule["firing"]}

    begin = datetime.now(UTC) - timedelta(days=14)
    runs = [
        make_run(
            agent_name="broken-agent",
            job_type="build",
            created_at=(begin + timedelta(days=number / 20)).isoformat(),
            status="success" if number < 160 else "failure",
            git_commit_hash=f"{number // 20:040x}",
        )
        for number in range(280)
    ]
    call(url, "POST", "/api/v1/runs/batch", runs)  # at once: rules are evaluated meanwhile
    # A rule of commits rests a hundred times as long as it has taken, which on a busy machine is minutes.
    wait_until(lambda: len(firing()) == 2, timeout_s=5 * PATIENCE_S)
    page = open_view()
    lines = page.locator("#alerts li")
    expect(lines).to_have_count(2)
    silent = lines.filter(has_text="nothing heard")
    expect(silent).to_contain_text("nobody, <b>at all</b> has never been heard of")
    expect(silent.get_by_role("link")).to_have_attribute("href", re.compile(r"agent_name=nobody%5C%2C"))
    broken = lines.filter(has_text="broken by a commit")
    found = firing()["broken by a commit"]
    expect(broken).to_contain_text(found["summary"])
    assert found["subject"]["first_bad_commit"] == f"{8:040x}"
    expect(broken.locator("time")).to_have_attribute("datetime", found["since"])
    broken.get_by_role("link", name="broken-agent, build").click()
    expect(page).to_have_url(re.compile(f"git_commit_hash={8:040x}"))
    expect(page.locator(".tally")).to_have_text("20 runs")


def test_without_rules_there_is_no_panel_of_alerts(open_view: OpenPage, closed_url: str, watched: Watched) -> None:
    watched.expected = ("401",)
    page = open_view(at=closed_url)
    sign_in(page)
    expect(page.locator(".chart svg")).to_be_visible()
    expect(page.locator("[aria-busy]")).to_have_count(0)
    expect(page.locator("#alerts")).to_be_hidden()


def test_a_run_shows_everything(open_view: OpenPage, url: str) -> None:
    run = get(url, "/api/v1/runs?status=failure&agent_name=seo-optimizer&limit=1")[1][0]
    page = open_view(f"#/run/{run['event_id']}")
    expect(page.locator("h1")).to_have_text(run["job_type"])
    expect(page.locator(".error-panel .headline")).to_have_text(run["error_summary"])
    expect(page.locator(".error-panel pre")).to_have_text(run["error_details"])
    expect(page.locator(".timeline")).to_contain_text("retry")
    expect(page.locator(f'a[href="{run["commit_url"]}"]')).to_have_attribute("rel", "noopener noreferrer")
    page.locator("summary", has_text="All fields").click()
    expect(page.locator(".everything th")).to_have_text(list(run))


def test_the_last_events_of_a_failed_run_are_seen_first(open_view: OpenPage, url: str) -> None:
    run = make_run(status="failure", error_summary="It broke", start_time="2026-01-01T00:00:00Z")
    post(url, run)
    steps = [
        {"event_type": "fatal error" if number == 300 else "step", "event_key": str(number), "payload": {"n": number}}
        | {"timestamp": f"2026-01-01T00:{number // 60:02}:{number % 60:02}Z"}
        for number in range(301)
    ]
    call(url, "POST", f"/api/v1/runs/{run['event_id']}/events", steps)
    page = open_view(f"#/run/{run['event_id']}")
    lines = page.locator(".timeline li")
    expect(lines.last).to_contain_text("fatal error")
    expect(lines).to_have_count(25)
    page.get_by_role("button", name="Show earlier events").click()
    expect(lines).to_have_count(125)
    expect(lines.first).to_contain_text("n 176")
    page.get_by_role("button", name="First events").click()
    expect(page).to_have_url(re.compile(r"\?events=first$"))
    expect(lines.first).to_contain_text("n 0")
    expect(page.get_by_role("button", name="First events")).to_have_attribute("aria-pressed", "true")
    for count in (125, 225, 301):
        page.get_by_role("button", name="Show later events").click()
        expect(lines).to_have_count(count)
    expect(lines.last).to_contain_text("fatal error")
    expect(page.get_by_role("button", name="Show later events")).to_have_count(0)
    find = page.get_by_label("Find events")
    find.fill('"n":2')
    expect(page).to_have_url(re.compile(r"events=first&find=%22n%22%3A2$"))
    expect(lines.nth(1)).to_contain_text("n 20")
    expect(lines).to_have_count(25)
    page.get_by_role("button", name="Last events").click()
    expect(lines.last).to_contain_text("n 299")
    page.get_by_role("button", name="Show earlier events").click()
    expect(lines).to_have_count(111)  # 2, 20 to 29 and 200 to 299
    find.fill("FATAL")
    expect(lines).to_have_text([re.compile("fatal error")])
    find.fill("nothing")
    expect(page.locator("main")).to_contain_text("No event holds this text")
    call(url, "PATCH", f"/api/v1/runs/{run['event_id']}", {"status": "success"})
    page.goto(page.url.partition("?")[0])
    page.reload()
    expect(find).to_have_value("")
    expect(lines.first).to_contain_text("n 0")


def test_events_of_a_running_run_come_by_themselves(open_view: OpenPage, url: str) -> None:
    run = make_run()
    post(url, run)
    path = f"/api/v1/runs/{run['event_id']}/events"
    page = open_view(f"#/run/{run['event_id']}")
    expect(page.locator("main")).to_contain_text("It reported no events")
    for number in (1, 2):
        call(url, "POST", path, {"event_type": f"step {number}"})
        expect(page.locator(".timeline li")).to_have_count(number)  # it looks every 3 s
    expect(page.locator(".timeline li").last).to_contain_text("step 2")


def test_megabytes_of_text_and_values_are_shown_in_part(open_view: OpenPage, url: str) -> None:
    """Of some MB hardly anything is put into the document, until somebody asks for all of one text."""
    end = "ValueError: this is the end \U0001f600"
    run = make_run(
        status="failure",
        error_details="Traceback\n" + "  a line of it\n" * 20_000 + end,
        input_summary="\U0001f600" * 50_000,
        metrics_json={f"key {number}": number for number in range(8_000)},
        context_json={"deep": {"values": [*range(9_000)]}},
    )
    post(url, run)
    many = {f"p{number}": number for number in range(4_000)}
    for number in range(26):
        event = {"event_type": "step", "event_key": str(number), "payload": many | {"long": "x" * 50_000}}
        call(url, "POST", f"/api/v1/runs/{run['event_id']}/events", event)
    page = open_view(f"#/run/{run['event_id']}")
    expect(page.locator(".timeline li")).to_have_count(25, timeout=60_000)
    expect(page.locator("[aria-busy]")).to_have_count(0, timeout=60_000)
    assert page.evaluate("document.querySelectorAll('*').length") < 3000
    assert page.evaluate("document.querySelector('main').textContent.length") < 100_000
    error = page.locator(".error-panel pre")
    expect(error).to_contain_text("Traceback")
    expect(error).to_contain_text(end)  # of an error the last line says most
    error.get_by_role("button", name="Show all").click()
    expect(error.locator(".whole")).to_be_focused()
    assert page.evaluate("document.querySelector('.error-panel pre').textContent.length") > 300_000
    page.locator(".payload").first.get_by_role("button", name="Show all (4,001 values)").click()
    expect(page.locator(".payload .whole")).to_contain_text('"p3999": 3999')
    page.get_by_text("7,976 more").get_by_role("button").click()
    expect(page.locator(".panel", has_text="Its figures").locator(".whole")).to_contain_text('"key 7999": 7999')
    page.locator("summary", has_text="All fields").click()
    expect(page.locator(".everything")).to_contain_text("input_summary")
    page.goto(f"{url}/#/runs")
    expect(page.locator(".table-body .line").first).to_be_visible()
    assert page.evaluate("document.querySelector('main').textContent.length") < 100_000


def test_a_family_of_hundreds_leads_to_all_of_them(open_view: OpenPage, url: str) -> None:
    parent = make_run(status="success")
    post(url, parent)
    children = [make_run(parent_run_id=parent["run_id"], agent_name="child") for _ in range(150)]
    call(url, "POST", "/api/v1/runs/batch", children)
    page = open_view(f"#/run/{parent['event_id']}")
    expect(page.locator(".tree ul .node")).to_have_count(100)
    page.get_by_role("link", name="All runs that it started").click()
    expect(page.locator(".tally")).to_have_text("150 runs")


def test_a_family_is_a_tree(open_view: OpenPage, url: str) -> None:
    child = next(
        run for run in get(url, "/api/v1/runs?limit=1000")[1] if run["parent_run_id"] and "demo" in run["event_id"]
    )
    [parent] = get(url, f"/api/v1/runs?run_id={child['parent_run_id']}")[1]
    page = open_view(f"#/run/{child['event_id']}")
    expect(page.locator(".tree > li > .node").first).to_contain_text("nightly-orchestrator")
    expect(page.locator(".tree .this")).to_contain_text(child["agent_name"])
    page.locator(".tree > li > .node").first.click()
    expect(page).to_have_url(re.compile(f"#/run/{parent['event_id']}$"))
    expect(page.locator(".tree .this .node").filter(has_text=child["agent_name"]).first).to_be_visible()


def test_a_running_run_shows_its_age_and_its_end(open_view: OpenPage, url: str) -> None:
    run = make_run(start_time="2026-01-01T00:00:00Z", created_at="2026-01-01T00:00:00Z")
    post(url, run)
    page = open_view(f"#/run/{run['event_id']}")
    expect(page.locator(".note")).to_contain_text("Last heard of just now")
    call(url, "PATCH", f"/api/v1/runs/{run['event_id']}", {"status": "partial", "items_failed": 3})
    expect(page.locator(".run-head .badge")).to_have_text("partial")  # it looks every 3 s
    expect(page.locator(".item-bar")).to_contain_text("3 failed")
    expect(page.locator("main")).not_to_contain_text("Nothing was reported")


@pytest.mark.usefixtures("one_hour")
def test_an_agent_has_a_year_in_squares_that_lead_to_its_runs(open_view: OpenPage, url: str) -> None:
    page = open_view("#/agents?name=seo")
    expect(page.locator(".tally")).to_have_text("1 agent")
    expect(page.locator(".calendar rect")).not_to_have_count(0)
    assert 365 <= page.locator(".calendar rect").count() <= 371
    last = page.locator(".calendar .day").last
    runs = int(re.findall(r": ([\d,]+) run", last.locator("title").text_content() or "")[0])
    last.locator("rect").click()
    expect(page).to_have_url(re.compile(r"#/runs\?agent_name=seo-optimizer&from="))
    expect(page.locator(".tally")).to_have_text(f"{runs} run{'' if runs == 1 else 's'}")


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Asia/Kolkata", "America/St_Johns", "UTC"])
def test_the_year_begins_on_a_monday_and_ends_today_at_any_time_of_day(open_view: OpenPage, zone: str) -> None:
    """In the last half hour before midnight a day was missing, where local time is whole hours from UTC."""
    page = open_view("#/overview", timezone_id=zone)
    moments = [second * 1000 for second in range(1_796_000_000, 1_796_000_000 + 8 * 86_400, 1500)]
    script = """async (moments) => {
        const {firstDay} = await import(new URL("page/calendar.js", document.baseURI));
        const {midnight} = await import(new URL("page/range.js", document.baseURI));
        return moments.map((now) => {
            const first = firstDay(now);
            let days = 0;
            while (midnight(first, days) <= now) days += 1;
            return [new Date(first + 12 * 3600e3).getDay(), days];
        });
    }"""
    found = page.evaluate(script, moments)
    assert {weekday for weekday, _ in found} == {1}
    assert {days for _, days in found} == set(range(365, 372))


def test_what_is_not_there_is_said(open_view: OpenPage, watched: Watched) -> None:
    watched.expected = ("404",)
    page = open_view("#/run/nobody%2Fknows%25it")
    expect(page.locator("h1")).to_have_text("There is no such run")
    expect(page.locator("[role=alert]")).to_contain_text("nobody/knows%it")
    for name in ("nowhere", "constructor", "__proto__"):
        page.goto(f"{page.url.partition('#')[0]}#/{name}")
        expect(page.locator("h1")).to_have_text("There is no such view")
    page.goto(page.url.partition("#")[0] + "#/overview?period=constructor")
    expect(page.locator("h1")).to_have_text("Last 24 hours")


def test_a_proxy_shows_it_under_a_path_of_its_own(open_view: OpenPage, url: str, watched: Watched) -> None:
    """The page, its pages of runs, the stream and /docs need nothing but what is below that path."""
    with sub_path(url) as root:
        page = open_view("", at=root, fresh=True)
        expect(page.locator(".chart svg")).to_be_visible()
        page.get_by_role("link", name="Runs", exact=True).click()
        expect(page.locator(".tally")).to_contain_text("200 runs")
        tally = page.locator(".tally")
        scroll(page, "document.body.scrollHeight", lambda: "200 runs" not in tally.inner_text())
        expect(tally).to_contain_text("400 runs")
        page.get_by_role("button", name="Live").click()
        expect(page.locator("#said")).to_contain_text("Live")
        page.goto(f"{root}/docs")
        page.locator("#getHealth > summary").click()
        page.locator("#getHealth").get_by_role("button", name="Send").click()
        expect(page.locator("#getHealth .answer")).to_contain_text('"status": "ok"')
        expect(page.locator("#getHealth pre").first).to_contain_text(f"{root}/health")
        assert watched.requests
        assert {request for request in watched.requests if not request.startswith((f"{root}/", "data:"))} == set()


# --- The table of runs ---------------------------------------------------------------------------


def scroll(page: Page, place: str, is_enough: Callable[[], bool]) -> None:
    """Scroll again and again: before new lines have their room, it leads nowhere."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_enough():
        assert time.monotonic() < deadline, place
        page.evaluate(f"scrollTo(0, {place})")
        page.wait_for_timeout(50)


def test_filters_stand_in_the_address(open_view: OpenPage, url: str) -> None:
    page = open_view("#/runs")
    page.get_by_label("Agent", exact=True).fill("link-*")
    page.keyboard.press("Enter")
    page.locator(".check.failure").click()
    expect(page).to_have_url(re.compile(r"agent_name=link-\*.*status=failure"))
    expected = get(url, "/api/v1/runs?agent_name=link-*&status=failure&limit=1000")[1]
    expect(page.locator(".tally")).to_have_text(f"{len(expected)} runs")
    page.reload()
    expect(page.get_by_label("Agent", exact=True)).to_have_value("link-*")
    expect(page.get_by_label("failure")).to_be_checked()
    expect(page.locator(".tally")).to_have_text(f"{len(expected)} runs")
    expect(page.locator(".table-body .badge").first).to_be_visible()
    assert set(page.locator(".table-body .badge").all_inner_texts()) == {"failure"}


def test_the_fields_follow_the_address(open_view: OpenPage, url: str) -> None:
    page = open_view("#/runs")
    field = page.get_by_label("Agent", exact=True)
    field.fill("seo-*")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"agent_name=seo-\*"))
    page.goto(f"{url}/#/runs?status=failure")  # a bookmark, while the field has the focus
    expect(page.get_by_label("failure")).to_be_checked()
    expect(field).to_have_value("")


def test_a_filter_without_a_field_can_be_taken_away(open_view: OpenPage) -> None:
    page = open_view("#/runs?host=edge-01&status=failure")
    expect(page.locator(".chip")).to_have_text("host: edge-01 ×")
    page.locator(".chip").click()
    expect(page).to_have_url(re.compile(r"#/runs\?status=failure$"))
    expect(page.locator(".chip")).to_have_count(0)


def test_labels_lead_to_the_runs_that_have_them_and_are_a_filter(open_view: OpenPage, url: str) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    first = make_run(
        labels={"team": "explorers", "a_b": "x, *"}, trace_id=trace, conversation_id="talk-1", job_type="first"
    )
    second = make_run(
        labels={"team": "explorers"}, attempt=2, retry_of=first["event_id"], expected_by="2025-12-24T11:00:00Z"
    )
    for run in (first, second):
        assert post(url, run)[0] == 201
    page = open_view(f"#/run/{second['event_id']}")
    facts = page.locator(".facts div")
    expect(facts.filter(has_text="Attempt")).to_have_text("Attempt2")
    expect(page.locator(".note")).to_contain_text("It should have ended")
    facts.filter(has_text="Tries again").locator("a").click()
    expect(page.locator("h1")).to_have_text("first")
    expect(facts.filter(has_text="Trace").locator("a")).to_have_attribute("href", f"#/runs?trace_id={trace}")
    page.get_by_role("link", name="a_b=x, *").click()
    expect(page.locator(".tally")).to_have_text("1 run")
    expect(page.locator(".chip")).to_have_text("label.a_b: x\\, \\* ×")
    page.locator(".chip").click()
    expect(page.locator(".chip")).to_have_count(0)
    field = page.get_by_label("Label", exact=True)
    field.fill("team")
    page.keyboard.press("Enter")
    assert field.evaluate("element => element.validationMessage") == "Write a label as name=value, such as team=search"
    field.fill(" team = explorers ")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"#/runs\?label.team=explorers$"))
    expect(page.locator(".tally")).to_have_text("2 runs")
    expect(field).to_have_value("")


def test_words_are_searched_only_where_there_is_an_index_of_them(
    open_view: OpenPage, url: str, closed_url: str, watched: Watched
) -> None:
    watched.expected = ("400", "401")
    page = open_view("#/runs?q=canonical_url")  # a bookmark of a daemon that has one
    expect(page.get_by_label("Search", exact=True)).to_be_hidden()
    expect(page.locator(".chip")).to_have_text("q: canonical_url ×")
    expect(page.locator(".foot")).to_contain_text("TELEMETRY_FULL_TEXT")
    page.get_by_role("link", name="in error texts only").click()
    expect(page.get_by_label("Search errors")).to_have_value("canonical_url")
    expect(page.locator(".chip")).to_have_count(0)
    expect(page.locator(".table-body .line").first).to_contain_text("KeyError: 'canonical_url'")
    page = open_view("#/runs", at=closed_url)
    sign_in(page)
    page.get_by_label("Search", exact=True).fill("items done")
    expect(page).to_have_url(re.compile(r"q=items\+done"))
    expect(page.locator(".tally")).to_have_text(re.compile(r"^\d+ runs$"))
    expect(page.get_by_label("Search errors")).to_be_hidden()


def test_a_filter_that_the_daemon_refuses_is_explained(open_view: OpenPage, watched: Watched) -> None:
    watched.expected = ("400",)
    page = open_view("#/runs?agent_name=nobody")
    expect(page.locator(".foot")).to_contain_text("Fewer filters may show more")
    page = open_view("#/runs?created_after=yesterday")
    expect(page.locator(".foot [role=alert]")).to_contain_text("Invalid created_after: 'yesterday'")


def test_scrolling_goes_through_all_pages_with_few_lines_in_the_document(open_view: OpenPage, url: str) -> None:
    everything = get(url, "/metrics")[1]["total_runs"]
    page = open_view("#/runs")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "cursor=" in request.url else None)
    tally = page.locator(".tally")
    expect(tally).to_contain_text("200 runs")
    scroll(page, "document.body.scrollHeight", lambda: "more come" not in tally.inner_text())
    expect(tally).to_have_text(f"{everything:,} runs")
    oldest = get(url, f"/api/v1/runs?offset={everything - 1}")[1][0]
    last = page.locator(".table-body .line a").last
    end = f"#/run/{oldest['event_id']}"
    scroll(page, "document.body.scrollHeight", lambda: last.get_attribute("href") == end)
    assert len(asked) >= RUNS // 200
    assert page.locator(".table-body .line").count() < 80


def test_live_shows_what_comes_and_what_changes(open_view: OpenPage, url: str) -> None:
    page = open_view("#/runs?agent_name=live-agent")
    expect(page.locator(".foot")).to_contain_text("No run matches")
    page.get_by_role("button", name="Live").click()
    expect(page.locator("#said")).to_contain_text("Live")
    run = make_run(agent_name="live-agent", job_type="appear")
    post(url, run)
    line = page.locator(".table-body .line")
    expect(line).to_have_count(1)
    expect(line).to_contain_text("appear")
    expect(line.locator(".badge")).to_have_text("running")
    call(url, "PATCH", f"/api/v1/runs/{run['event_id']}", {"status": "success"})
    expect(line.locator(".badge")).to_have_text("success")
    post(url, make_run(agent_name="somebody-else"))
    post(url, make_run(agent_name="live-agent", job_type="second"))
    expect(line).to_have_count(2)
    expect(line.first).to_contain_text("second")
    page.get_by_role("button", name="Live").click()
    expect(page).to_have_url(re.compile(r"#/runs\?agent_name=live-agent$"))


def test_new_runs_do_not_move_what_is_read(open_view: OpenPage, url: str) -> None:
    page = open_view("#/runs?live=1")
    expect(page.locator("#said")).to_contain_text("Live")
    expect(page.locator(".tally")).to_contain_text("200 runs")
    first = page.locator('.table-body .line[aria-rowindex="2"]')
    expect(first).to_be_visible()
    scroll(page, "3000", lambda: first.count() == 0)
    post(url, make_run(agent_name="late-comer"))
    page.locator(".fresh", has_text="1 new run").click()
    expect(page.locator(".table-body .line").first).to_contain_text("late-comer")


# --- Stale runs, errors, the token ---------------------------------------------------------------


def sign_in(page: Page, token: str = TOKEN) -> None:
    page.get_by_role("textbox", name="Token").fill(token)
    page.get_by_role("button", name="Sign in").click()


def authorized(url: str, method: str, path: str, body: object = None) -> Any:
    """Ask a daemon that wants a token."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    headers: dict[str, Any] = {"Content-Type": "application/json", "X-API-Key": TOKEN.encode()}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    with connection.getresponse() as response:
        answer = json.loads(response.read())
    connection.close()
    return answer


def test_the_page_asks_for_the_token_and_keeps_it_in_the_tab(
    open_view: OpenPage, closed_url: str, watched: Watched
) -> None:
    watched.expected = ("401",)
    page = open_view("#/runs", at=closed_url, fresh=True)
    sign_in(page, "wrong")
    expect(page.locator("#token-hint")).to_contain_text("That token was refused")
    sign_in(page)
    expect(page.locator(".table-body .line").first).to_be_visible()
    expect(page.locator("dialog")).to_have_count(0)
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.reload()
    expect(page.locator(".table-body .line").first).to_be_visible()
    expect(page.locator("dialog")).to_have_count(0)


def test_a_token_that_only_reads_shows_everything_and_cancels_nothing(
    open_view: OpenPage, closed_url: str, watched: Watched
) -> None:
    watched.expected = ("401", "403")
    path = authorized(closed_url, "GET", "/health")["db_path"]

    def token(scope: str) -> str:
        made = telemetryd("tokens", "create", "--name", f"page-{scope}", "--scope", scope, TELEMETRY_DB_PATH=path)
        return made.stdout.strip()

    writes, reads = token("ingest"), token("read")
    page = open_view("#/stale?older_than=1s", at=closed_url, fresh=True)
    sign_in(page, reads)
    page.get_by_role("button", name=re.compile("^Cancel")).click()
    expect(page.locator("[role=alert]")).to_contain_text("This needs a token with the scope admin; this one has read")
    page = open_view("#/runs", at=closed_url, fresh=True)
    sign_in(page, writes)
    expect(page.locator("#token-hint")).to_contain_text("or may not read")


def test_stale_runs_are_cancelled_after_a_question(open_view: OpenPage, closed_url: str, watched: Watched) -> None:
    watched.expected = ("401",)
    run = make_run(agent_name="lost", start_time="2026-01-01T00:00:00Z", created_at="2026-01-01T00:00:00Z")
    authorized(closed_url, "POST", "/api/v1/runs", run)
    page = open_view("#/stale?older_than=1s", at=closed_url)
    sign_in(page)
    silent = page.locator(".panel", has=page.get_by_role("heading", name="Silent"))
    button = silent.get_by_role("button")
    # The list looks again by itself only every few seconds, and the run has to be silent for one.
    while not silent.locator("li", has_text="lost").count():
        page.reload()
        expect(silent.locator("[role=alert], li, .empty").first).to_be_visible()
        expect(silent).not_to_contain_text("Asking")
    button.click()
    page.get_by_role("button", name="Leave them").click()
    expect(page.locator("dialog")).to_have_count(0)
    assert authorized(closed_url, "GET", f"/api/v1/runs/{run['event_id']}")["status"] == "running"
    button.click()
    expect(page.locator("dialog")).to_contain_text("still run, but have not been heard of for 1s")
    page.locator("dialog").get_by_role("button", name=re.compile("^Cancel")).click()
    expect(page.locator(".note")).to_contain_text(re.compile(r"\d+ runs? cancelled"))
    expect(silent).to_contain_text("Every run has been heard of")
    expect(button).to_be_disabled()
    assert authorized(closed_url, "GET", f"/api/v1/runs/{run['event_id']}")["status"] == "cancelled"


def test_without_authentication_the_page_says_how_to_cancel(open_view: OpenPage, url: str, watched: Watched) -> None:
    watched.expected = ("403", "404")
    page = open_view("#/stale?older_than=1s", permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name=re.compile(r"^Cancel \d")).click()
    expect(page.locator(".note.warn")).to_contain_text("Admin endpoints need authentication")
    expect(page.locator(".note.warn p").first).to_have_text(
        "This page may not cancel runs here; on the daemon's machine, this command does the same:"
    )
    command = page.locator(".note.warn code").inner_text()
    assert re.fullmatch(r"telemetryd reap --older-than 1s --unix '/.+/telemetry\.sqlite\.sock'", command)
    page.get_by_role("button", name="Copy the command").click()
    expect(page.locator("#said")).to_have_text("Copied the command")
    assert page.evaluate("navigator.clipboard.readText()") == command
    assert "would be" in telemetryd(*shlex.split(command)[1:], "--dry-run").stdout
    refusal = "Admin endpoints need authentication or the Unix socket (TELEMETRY_API_UNIX), used by root"
    ours = {"Telemetry-Server": "telemetryd/4"}
    page.route("**/admin/reap", lambda route: route.fulfill(status=403, headers=ours, json={"detail": refusal}))
    page.get_by_role("button", name=re.compile(r"^Cancel \d")).click()
    expect(page.locator(".problem")).to_contain_text("This page may not cancel runs here: Admin endpoints need")
    expect(page.locator("code")).to_have_count(0)
    page.route("**/admin/reap", lambda route: route.fulfill(status=404, body="<h1>404 Not Found</h1>"))  # nginx.conf
    page.get_by_role("button", name=re.compile(r"^Cancel \d")).click()
    expect(page.locator(".note.warn code")).to_have_text("telemetryd reap --older-than 1s")
    expect(page.locator(".note.warn")).to_contain_text("A proxy in front of the daemon answered 404.")


def test_an_error_is_copied_as_it_is(open_view: OpenPage, url: str) -> None:
    run = make_run(status="failure", error_summary="It broke", error_details="Traceback\n  <b>&amp;</b> 'x'")
    post(url, run)
    page = open_view(f"#/run/{run['event_id']}", permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy the error").click()
    expect(page.locator("#said")).to_have_text("Copied the error")
    assert page.evaluate("navigator.clipboard.readText()") == "It broke\n\nTraceback\n  <b>&amp;</b> 'x'"


def test_what_agents_write_is_never_markup(open_view: OpenPage, url: str) -> None:
    evil = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
    texts = ("input_summary", "output_summary", "error_summary", "error_details", "host", "git_branch", "item_name")
    run = make_run(
        status="failure",
        **dict.fromkeys(texts, evil),
        agent_name=evil,
        job_type=evil,
        git_repo="javascript:alert(1)//github.com/a/b",
        git_commit_hash=evil[:40],
        metrics_json={evil: evil},
        context_json={evil: [evil]},
    )
    post(url, run)
    call(url, "POST", f"/api/v1/runs/{run['event_id']}/events", {"event_type": evil, "payload": {evil: evil}})
    page = open_view(f"#/run/{run['event_id']}")
    expect(page.locator("h1")).to_have_text(evil)
    expect(page.locator(".timeline li").first).to_contain_text(evil)
    for address in ("#/runs", "#/agents", "#/"):
        assert page.locator("main img, main script").count() == 0
        assert page.locator("a[href^='javascript:' i]").count() == 0
        page.goto(f"{url}/{address}")
        expect(page.locator("main")).to_contain_text(evil[:20])
    assert "owned" not in page.title()


def test_what_would_change_how_a_text_looks_is_shown_as_an_escape(open_view: OpenPage, url: str) -> None:
    """As in photo_exe.jpg, whose name ends with gpj.exe for who sees it; copied is what it is."""
    evil = "photo\u202egpj.exe"
    texts = ("input_summary", "output_summary", "error_summary", "error_details", "host", "git_branch", "item_name")
    run = make_run(
        event_id=f"{evil}-{time.time_ns()}",
        agent_name=f"a {evil}",
        job_type=f"\u2066{evil}\x1b[8m\u200b\U000e0041",
        status="failure",
        **dict.fromkeys(texts, evil),
        metrics_json={evil: evil},
        context_json={evil: [evil]},
    )
    post(url, run)
    event = {"event_type": evil, "payload": {evil: {"x": evil}}}
    call(url, "POST", f"/api/v1/runs/{quote(run['event_id'], safe='')}/events", event)
    page = open_view(permissions=["clipboard-read", "clipboard-write"])
    seen = "photo\\u202egpj.exe"
    for view, where in (("runs", ".line"), ("agents?name=photo", ".panel h2"), ("", ".ranking, .lines")):
        page.goto(f"{url}/#/{view}")
        expect(page.locator(f"main {where}", has_text=seen).first).to_be_visible()
        assert "\u202e" not in page.locator("main").inner_text()
    page.goto(f"{url}/#/run/{quote(run['event_id'], safe='')}")
    expect(page.locator("h1")).to_have_text(f"\\u2066{seen}\\u001b[8m\\u200b\\udb40\\udc41")
    expect(page.locator("h1 .escape")).to_have_text(["\\u2066", "\\u202e", "\\u001b", "\\u200b\\udb40\\udc41"])
    expect(page.locator(".timeline")).to_contain_text(seen)
    page.locator("summary", has_text="All fields").click()
    assert not re.findall("[\u202e\u2066\x1b\u200b\U000e0041]", page.title() + page.locator("main").inner_text())
    assert page.locator("[title*='\u202e'], [aria-label*='\u202e']").count() == 0
    page.get_by_role("button", name="Copy the event_id").click()
    expect(page.locator("#said")).to_have_text("Copied the event_id")
    assert page.evaluate("navigator.clipboard.readText()") == run["event_id"]


def test_a_run_dated_in_the_future_says_so(open_view: OpenPage, url: str) -> None:
    later = (datetime.now(UTC) + timedelta(days=3, hours=1)).isoformat()
    post(url, run := make_run(agent_name="time-traveller", created_at=later, start_time=later))
    page = open_view("#/runs?agent_name=time-traveller")
    line = page.locator(".table-body .line")
    expect(line.locator("time.future")).to_have_text("in 3 d (dated in the future)")
    line.locator("a").click()
    note = page.locator(".future-note")
    expect(note).to_contain_text("This run is dated in the future: created in 3 d")
    expect(page.locator(".note", has_text="Last heard of just now")).not_to_contain_text("-")
    call(url, "PATCH", f"/api/v1/runs/{run['event_id']}", {"status": "success"})


def test_the_daemons_clock_counts_where_the_browsers_is_wrong(open_view: OpenPage, url: str) -> None:
    post(url, make_run(agent_name="punctual", status="success"))
    page = open_view("#/agents?name=punctual", fresh=True)
    page.clock.set_system_time(datetime.now(UTC) - timedelta(hours=5))
    page.goto(f"{url}/#/runs?agent_name=punctual")
    page.reload()
    expect(page.locator(".table-body time")).to_have_text(re.compile("^(just now|\\d+ s ago)$"))


# --- Keyboard, accessibility, phone, size --------------------------------------------------------


def test_the_keyboard_is_enough(page: Page) -> None:
    page.keyboard.press("j")
    expect(page.locator("main [data-item]").first).to_be_focused()
    page.keyboard.press("?")
    expect(page.get_by_role("heading", name="Keyboard")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    page.keyboard.press("/")
    search = page.get_by_label("Search errors")
    expect(search).to_be_focused()
    page.keyboard.type("j?t")
    expect(page).to_have_url(re.compile(r"error=j%3Ft"))
    search.fill("canonical_url")
    page.keyboard.press("Enter")
    expect(page.locator(".table-body .line").first).to_contain_text("KeyError: 'canonical_url'")
    page.keyboard.press("Escape")
    expect(search).not_to_be_focused()
    expect(search).to_have_value("canonical_url")
    lines = page.locator(".table-body .cover")
    expect(lines.nth(2)).to_be_visible()
    for _ in range(3):
        page.keyboard.press("j")
    page.keyboard.press("k")
    expect(lines.nth(1)).to_be_focused()
    wanted = lines.nth(1).get_attribute("href")
    page.keyboard.press("Enter")
    assert wanted is not None
    expect(page).to_have_url(re.compile(f"{re.escape(wanted)}$"))
    page.keyboard.press("g")
    page.keyboard.press("a")
    expect(page.locator("h1")).to_have_text("Agents")
    theme = page.locator("html").get_attribute("data-theme")
    page.keyboard.press("t")
    expect(page.locator("html")).not_to_have_attribute("data-theme", str(theme))


def test_j_goes_on_beyond_the_first_page(open_view: OpenPage) -> None:
    page = open_view("#/runs")
    expect(page.locator(".tally")).to_contain_text("200 runs")
    line = page.locator('.line[aria-rowindex="120"] .cover')
    scroll(page, "document.body.scrollHeight / 2", lambda: line.count() == 1)
    line.focus()
    expect(page.locator(".tally")).to_contain_text("200 runs")
    page.keyboard.type("j" * 70)
    expect(page.locator(".tally")).not_to_contain_text("200 runs")  # the next page has come in time
    page.keyboard.type("j" * 25)
    expect(page.locator(".line:focus-within")).to_have_attribute("aria-rowindex", "215")


def test_the_theme_is_the_systems_until_it_is_chosen(open_view: OpenPage) -> None:
    page = open_view(theme="dark")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.get_by_role("button", name="Change to the light theme").click()
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "light")


ACCESSIBLE = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
COLOURS = {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}
"""All that a theme can change, which is nothing but colours."""


def check_accessibility(page: Page, rules: dict[str, Any] = ACCESSIBLE) -> None:
    found = Axe().run(page, options={"runOnly": rules, "resultTypes": ["violations"]})
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing_in_either_theme(open_view: OpenPage, url: str, view: str) -> None:
    page = opened(open_view, url, view)
    check_accessibility(page)
    page.emulate_media(color_scheme="dark")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    check_accessibility(page, COLOURS)


def test_axe_finds_nothing_in_dialogs(open_view: OpenPage, closed_url: str, watched: Watched) -> None:
    watched.expected = ("401",)
    page = open_view("#/runs", at=closed_url)
    expect(page.get_by_role("textbox", name="Token")).to_be_visible()
    check_accessibility(page)
    sign_in(page)
    expect(page.locator(".table-body .line").first).to_be_visible()
    page.get_by_role("button", name="Keyboard shortcuts").click()
    check_accessibility(page)


def test_a_phone_needs_no_sideways_scrolling(open_view: OpenPage, url: str) -> None:
    page = open_view(is_phone=True)
    for view in VIEWS:
        page.goto(f"{url}/{address_of(view, url)}")
        wait_for(page, view)
        assert page.evaluate("document.documentElement.scrollWidth") == 390, view
        for link in page.locator(".nav a").all():
            expect(link).to_be_in_viewport()
    page.goto(f"{url}/#/stale?older_than=1s")
    wait_for(page, "stale")
    assert page.locator(".lines li").count() > 2
    widths = page.locator(".lines .badge").evaluate_all("all => all.map((each) => each.offsetWidth)")
    assert len({*widths}) == 1, "the mark of a status is as wide as its word, whatever is below it"


def test_long_texts_without_a_blank_do_not_widen_the_page(open_view: OpenPage, url: str, watched: Watched) -> None:
    watched.expected = ("404",)
    wide = "W" * 254
    texts = ("input_summary", "output_summary", "error_summary", "error_details", "host", "environment", "git_branch")
    names = ("product", "website", "platform", "item_name", "source_ref", "git_repo", "git_commit_hash", "insight_id")
    given = dict.fromkeys((*texts, *names), wide) | {"git_commit_hash": "f" * 40, "metrics_json": {wide: wide}}
    parent, child = (
        make_run(event_id=f"{kind}{wide}", run_id=f"{kind}{wide}", agent_name=f"{kind}{wide}", job_type=wide, **given)
        for kind in "ab"
    )
    call(url, "POST", "/api/v1/runs", parent | {"status": "failure", "duration_ms": 10**10})
    call(url, "POST", "/api/v1/runs", child | {"parent_run_id": parent["run_id"]})
    for event_id in (parent["event_id"], child["event_id"]):
        event = {"event_type": wide, "event_key": "x", "payload": {wide: wide, "n": [wide]}}
        call(url, "POST", f"/api/v1/runs/{event_id}/events", event)
    page = open_view("#/agents", fresh=True)
    for address, marker in (
        ("#/agents?name=ww", ".calendar rect"),
        ("#/", f".lines li:has-text('a{wide}')"),
        (f"#/runs?agent_name=a{wide}&host={wide}", ".chip"),
        ("#/stale?older_than=1s", ".lines a"),
        (f"#/run/{parent['event_id']}", ".tree"),
        (f"#/run/{child['event_id']}?find={wide}", ".timeline li"),
        (f"#/run/{wide}", "[role=alert]"),
    ):
        page.goto(f"{url}/{address}")
        expect(page.locator(f"main {marker}").first).to_be_visible()
        expect(page.locator("[aria-busy]")).to_have_count(0)
        for summary in page.locator("main summary").all():
            summary.click()
        for size in (PHONE, DESKTOP):
            page.set_viewport_size(size)  # type: ignore[arg-type]
            assert page.evaluate("document.documentElement.scrollWidth") == size["width"], address


def test_all_assets_together_are_small(open_view: OpenPage, watched: Watched) -> None:
    page = open_view(fresh=True)
    sizes = {path.name: path.stat().st_size for path in (ROOT / "telemetryd/static/page").rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 200_000
    expect(page.locator(".chart svg")).to_be_visible()
    loaded = {request.rpartition("/")[2] for request in watched.requests if "/page/" in request}
    assert {*sizes} - loaded == {"index.html"}
