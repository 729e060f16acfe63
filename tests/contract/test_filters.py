"""What GET /api/v1/runs offers beyond the guide: filters of every kind, orders, fields, totals, full text."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
from yarl import URL

from telemetryd.engine.sqlite.tools.check import Severity, examine, repair
from telemetryd.errors import UnavailableError
from telemetryd.model.commands import CreateRuns, IndexTexts, PruneRuns, ReapRuns, UpdateRun
from telemetryd.model.filters import Filters
from telemetryd.model.queries import ListRuns
from telemetryd.model.runs import ANSWERED, parse_run
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings
from telemetryd.store import Store
from tests.conftest import Api, MakeApi, Row, make_run
from tests.contract.test_query import at, ids, listed, next_page
from tests.contract.wire import RUNS, check_error, send, send_raw


async def found(api: Api, query: str) -> list[str]:
    answer = await send(api, "GET", f"{RUNS}?{query}")
    assert answer.status == 200, answer.text
    return ids(answer.json)


CONTEXT = (
    "run_id", "product", "website", "git_commit_hash", "host", "environment", "insight_id", "parent_run_id",
    "retry_of", "conversation_id",
)  # fmt: skip


async def test_each_context_field_is_a_filter_with_several_values(api: Api) -> None:
    await api.batch(
        [make_run(event_id=value, **dict.fromkeys(CONTEXT, value)) for value in ("a1b2c3d", "b", "c,d", "E")]
    )
    await api.batch([make_run(event_id=f"other {name}", **{name: "other"}) for name in CONTEXT])
    for name in CONTEXT:
        assert await found(api, f"{name}=a1b2c3d") == ["a1b2c3d"], name
        assert await found(api, f"{name}=b,a1b2c3d,b") == ["b", "a1b2c3d"], name
        assert await found(api, f"{name}=c%5C,d,e") == ["c,d"], name
        assert await found(api, f"{name}=other") == [f"other {name}"], name
        assert await found(api, f"{name}=*") == [], name


async def test_runs_by_their_labels(api: Api) -> None:
    for event_id, labels in (
        ("a", {"team": "search", "env": "prod"}), ("b", {"team": "ads", "env": "prod"}), ("c", {"team": "a,b"}),
        ("d", None),
    ):  # fmt: skip
        await api.post(make_run(event_id=event_id, labels=labels, agent_name=f"agent-{event_id}"))
    assert await found(api, "label.team=search") == ["a"]
    assert await found(api, "label.team=search,ads&label.env=prod") == ["b", "a"]
    assert await found(api, "label.team=a%5C,b") == ["c"]
    assert await found(api, "label.env=prod&agent_name=agent-*&sort=created_at") == ["a", "b"]
    assert await found(api, "label.env=dev") == []
    async with api.client.get(f"{RUNS}?label.env=prod&limit=1&count=exact") as response:
        assert (response.headers["X-Total-Count"], ids(await response.json())) == ("2", ["b"])
        assert await found(api, URL(response.links["next"]["url"]).query_string) == ["a"]
    await api.call("PATCH", f"{RUNS}/a", json={"labels": {"team": "ads", "env": None}}, status=200)
    assert await found(api, "label.team=ads") == ["b", "a"]
    assert await found(api, "label.env=prod") == ["b"]
    for wrong in ("label.Team=x", "label.=x", "label.x", "label.x=", "label.x%20=1", f"label.{'k' * 64}=x"):
        assert "it must be" in check_error(await send(api, "GET", f"{RUNS}?{wrong}"), 400), wrong
    twice = check_error(await send(api, "GET", f"{RUNS}?label.x=1&label.x=2"), 400)
    assert twice == "Query parameter label.x is given more than once; give it once"


async def test_a_commit_that_is_associated_later_is_found(api: Api) -> None:
    await api.post(make_run(event_id="x"))
    commit = {"commit_hash": "abcdef1", "commit_source": "llm"}
    await api.call("POST", f"{RUNS}/x/associate-commit", json=commit, status=200)
    assert await found(api, "git_commit_hash=abcdef1") == ["x"]


async def test_agents_by_wildcards(api: Api) -> None:
    await api.batch(
        [make_run(event_id=name, agent_name=name) for name in ("seo", "seo-blog", "SEO", "blog-seo", "a*c")]
    )
    assert await found(api, "agent_name=seo*") == ["seo-blog", "seo"]
    assert await found(api, "agent_name=*seo") == ["blog-seo", "seo"]
    assert await found(api, "agent_name=*-*,SEO") == ["blog-seo", "SEO", "seo-blog"]
    assert await found(api, "agent_name=a%5C*c") == ["a*c"]
    assert await found(api, "agent_name=nobody*") == []
    assert len(await found(api, "agent_name=*")) == 5


async def test_more_agents_than_one_statement_merges(api: Api) -> None:
    runs = [make_run(agent_name=f"agent-{number}", created_at=at(number)) for number in range(200)]
    await api.batch([*runs, make_run(agent_name="other", created_at=at(500))])
    assert await found(api, "agent_name=agent-*&limit=150") == ids(runs[::-1][:150])


async def test_a_relative_time_stays_where_it_was_on_the_next_pages(api: Api) -> None:
    ago = [datetime.now(UTC) - timedelta(minutes=minutes) for minutes in (10, 50, 70, 300)]
    await api.batch([make_run(event_id=str(n), created_at=moment.isoformat()) for n, moment in enumerate(ago)])
    assert await found(api, "created_after=-1h") == ["0", "1"]
    assert await found(api, "created_before=-1h&created_after=-2h") == ["2"]
    assert await found(api, "created_before=now") == ["0", "1", "2", "3"]
    first = await send(api, "GET", f"{RUNS}?created_after=-2h&limit=2")
    path = next_page(first)
    assert path is not None
    assert "-2h" not in path
    assert ids(first.json) + ids((await send(api, "GET", path)).json) == ["0", "1", "2"]


async def test_runs_by_what_they_took_and_by_their_errors(api: Api) -> None:
    await api.post(make_run(event_id="quick", duration_ms=5, error_summary="Connection RESET by peer"))
    await api.post(make_run(event_id="slow", duration_ms=5000, error_details="Übertragung: 100%_fehlgeschlagen"))
    assert await found(api, "min_duration_ms=6") == ["slow"]
    assert await found(api, "error=reset") == ["quick"]
    assert await found(api, f"error={quote('ÜBERTRAGUNG')}") == ["slow"]
    assert await found(api, f"error={quote('100%_F')}") == ["slow"]
    assert await found(api, f"error={quote('s_t')}") == []


async def test_metrics_raw_and_encoded(api: Api) -> None:
    for name, metrics in (("few", {"tokens": 10}), ("many", {"tokens": 5000, "usage": {"in": 1.5}, "model": "gpt"})):
        await api.post(make_run(event_id=name, metrics_json=metrics))
    for written in ("metrics.tokens>1000", "metrics.tokens%3E1000", "metrics.tokens%3e%3D1000", "metrics.tokens!=10"):
        head = f"GET {RUNS}?{written}&limit=5 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        [answer] = await send_raw(api, head.encode())
        assert (answer.status, ids(answer.json)) == (200, ["many"]), written
    assert await found(api, "metrics.usage.in=1.5") == ["many"]
    assert await found(api, "metrics.model=gpt&metrics.tokens>1") == ["many"]
    assert await found(api, "metrics.tokens<1e4") == ["many", "few"]
    assert "metrics.tokens" in check_error(await send(api, "GET", f"{RUNS}?metrics.tokens>"), 400)
    for parameters, wanted in (
        ({"metrics.tokens>=": "0"}, ["many", "few"]), ({"metrics.tokens": ">1000"}, ["many"]),
        ({"metrics.tokens": "<= 10", "metrics.model!=": "x"}, []), ({"metrics.tokens==": "10"}, ["few"]),
    ):  # fmt: skip
        assert ids(await listed(api, **parameters)) == wanted, parameters


async def test_each_order_and_its_cursors(api: Api) -> None:
    runs: list[Row] = [
        make_run(event_id=f"{n:02}", created_at=at(n // 3), start_time=at(-(n // 4)), host=f"h{n % 2}")
        for n in range(24)
    ]
    await api.batch(runs)
    for name, descending, limit in itertools.product(("created_at", "start_time"), (False, True), (1, 4, 100)):
        order = f"-{name}" if descending else name
        # Runs of equal times are in the order in which they came, which is that of their names.
        ordered = sorted(runs, key=lambda run: (run[name], run["event_id"]), reverse=descending)
        wanted = [run for run in ordered if run["host"] == "h1" and run["start_time"] <= at(-1)]
        path: str | None = f"{RUNS}?sort={order}&limit={limit}&host=h1&start_time_to={at(-1)}"
        walked: list[str] = []
        while path is not None:
            answer = await send(api, "GET", path)
            walked += ids(answer.json)
            path = next_page(answer)
        assert walked == ids(wanted), (order, limit)


async def test_fields_choose_what_is_answered(api: Api) -> None:
    await api.post(make_run(event_id="x", git_repo="https://github.com/a/b.git", git_commit_hash="abcdef1",
                            metrics_json={"tokens": 1}, api_posted=True))  # fmt: skip
    [whole] = await listed(api)
    assert list(whole) == list(ANSWERED)
    for name in ANSWERED:
        assert await listed(api, fields=name) == [{name: whole[name]}]
    [part] = await listed(api, fields="status,commit_url,event_id", sort="start_time")
    assert part == {name: whole[name] for name in ("status", "commit_url", "event_id")}
    await api.call("POST", f"{RUNS}/x/events", json={"event_type": "step"}, status=201)
    [part] = await listed(api, fields="status", include="events")
    assert set(part) == {"status", "events", "more_events"}
    detail = check_error(await send(api, "GET", RUNS, params={"fields": "status,secret"}), 400)
    assert detail.startswith("Invalid fields: 'secret'")


async def total(api: Api, query: str) -> tuple[str, str]:
    answer = await send(api, "GET", f"{RUNS}?limit=1&{query}")
    assert answer.status == 200, answer.text
    return answer.headers["x-total-count"], answer.headers["x-total-count-accuracy"]


async def test_totals(api: Api) -> None:
    runs = [make_run(agent_name=("a", "b")[n % 2], host=f"h{n % 3}", created_at=at(n)) for n in range(60)]
    await api.batch(runs)
    assert "x-total-count" not in (await send(api, "GET", RUNS)).headers
    for count in ("exact", "estimated"):
        assert await total(api, f"count={count}") == ("60", "exact")
        assert await total(api, f"count={count}&agent_name=a*,c") == ("30", "exact")
        assert await total(api, f"count={count}&host=h0,h1&agent_name=b") == ("20", "exact")
        assert await total(api, f"count={count}&agent_name=none*") == ("0", "exact")
    half = f"agent_name=a&created_before={at(30)}"
    assert await total(api, f"count=exact&{half}") == ("15", "exact")
    told, accuracy = await total(api, f"count=estimated&{half}")
    assert accuracy == "estimate"
    assert 13 <= int(told) <= 17
    path = next_page(await send(api, "GET", f"{RUNS}?limit=1&count=exact"))
    assert path is not None
    assert "count" not in path.replace("cursor", "")


# --- Full text -----------------------------------------------------------------------------------


async def test_without_the_index_q_is_refused_and_the_setting_named(api: Api) -> None:
    detail = check_error(await send(api, "GET", f"{RUNS}?q=word"), 400)
    assert detail.startswith("Invalid q: ")
    assert "TELEMETRY_FULL_TEXT" in detail
    assert (await api.get("/health"))["full_text"] == "off"


async def test_words_prefixes_and_phrases(make_api: MakeApi) -> None:
    api = await make_api(full_text=True)
    await api.post(make_run(event_id="1", input_summary="The quick brown fox", output_summary="jumps"))
    await api.post(make_run(event_id="2", error_summary="Fox: QUICK exit", error_details="over the café"))
    await api.post(make_run(event_id="3"))
    for query, wanted in (
        ("quick", ["2", "1"]), ("quick fox", ["2", "1"]), ('"quick brown"', ["1"]), ('"fox quick"', ["2"]),
        ("caf*", ["2"]), ("CAFE", ["2"]), ("jumps brown", ["1"]), ("bro", []), ("fox:", ["2", "1"]),
        ("error_summary", []),
    ):  # fmt: skip
        assert await found(api, f"q={quote(query)}") == wanted, query
    for syntax in ('"', '"fox', "fox OR quick", "NEAR(fox quick)", "error_summary:fox", "^fox", "fox -quick", "(fox",
                   "a AND", "{a b}: fox", "fox + quick", "*fox", "'; DROP TABLE x; --", 'fo"x"*'):  # fmt: skip
        answer = await send(api, "GET", f"{RUNS}?q={quote(syntax)}")
        assert answer.status == (200 if any(map(str.isalnum, syntax)) else 400), syntax
    assert await found(api, "q=quick&status=running&agent_name=*&sort=created_at&limit=1") == ["1"]
    assert await total(api, "q=quick&count=exact") == ("2", "exact")
    assert (await api.get("/health"))["full_text"] == "ready"


def words(path: Path) -> int:
    """How many of the findings of a check are of the full-text index."""
    return sum(finding.check == "full text" for finding in examine(path))


async def test_the_index_follows_every_change(make_api: MakeApi, engine: str) -> None:
    api = await make_api(full_text=True)
    await api.batch([make_run(event_id=str(n), input_summary=f"made{n}", created_at=at(n)) for n in range(5)])
    await api.post(make_run(event_id="0", input_summary="again"), 200)  # a duplicate
    patch = {"output_summary": "patched words", "error_summary": "first"}
    await api.call("PATCH", f"{RUNS}/1", json=patch, status=200)
    await api.call("PATCH", f"{RUNS}/1", json={"error_summary": "second"}, status=200)
    await api.post(make_run(event_id="late"))
    await api.call("PATCH", f"{RUNS}/late", json={"error_details": "afterwards"}, status=200)
    for query, wanted in (("made0", ["0"]), ("again", []), ("patched", ["1"]), ("first", []), ("second made1", ["1"]),
                          ("afterwards", ["late"])):  # fmt: skip
        assert await found(api, f"q={quote(query)}") == wanted, query
    before = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    assert (await api.store.submit(ReapRuns(before, 3))).runs == 3
    assert await found(api, "q=stale") == ["2", "1", "0"]
    assert (await api.store.submit(PruneRuns(before, 2))).runs == 2
    assert await found(api, "q=made*") == ["4", "3", "2"]
    if engine == "sqlite":
        assert words(api.settings.db_path) == 0


async def test_the_setting_makes_and_drops_the_index(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    rows = tuple(parse_run(make_run(output_summary=f"word{n}")).row for n in range(50))
    is_there, stored = False, 0
    for is_wanted, submitted in (
        (False, rows[:10]), (None, rows[10:30]), (True, rows[30:35]), (None, rows[35:]), (True, ()), (False, ()),
        (None, ()),
    ):  # fmt: skip
        is_there, stored = is_there if is_wanted is None else is_wanted, stored + len(submitted)
        store = await Store.open(Settings(db_path=path), Metrics(), full_text=is_wanted)
        if submitted:
            await store.submit(CreateRuns(submitted))
        while is_wanted and (done := await store.submit(IndexTexts())) is not None and done.more:
            pass
        for word in ("word7", f"word{stored - 1}") if is_there else ():
            page = await store.fetch(ListRuns(Filters(words=word)))
            assert len(page.runs) == 1
        await store.close()
        assert examine(path) == []
        with closing(sqlite3.connect(path)) as connection:
            there = connection.execute("SELECT 1 FROM sqlite_master WHERE name LIKE 'runs_text%'").fetchall()
        assert bool(there) is is_there


async def test_an_index_is_built_while_runs_change_and_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    before = "9999-01-01T00:00:00.000000Z"

    async def build(store: Store, slices: int) -> bool:
        for _ in range(slices):
            done = await store.submit(IndexTexts(most_bytes=20))  # some three runs
            if done is None or not done.more:
                return True
        return False

    @asynccontextmanager
    async def opened(*, is_wanted: bool) -> AsyncIterator[Store]:
        store = await Store.open(Settings(db_path=path), Metrics(), full_text=is_wanted)
        try:
            yield store
        finally:
            await store.close()

    def new(*numbers: int) -> CreateRuns:
        made = (make_run(event_id=str(n), output_summary=f"word{n}", agent_name=f"a{n % 2}") for n in numbers)
        return CreateRuns(tuple(parse_run(run).row for run in made))

    async with opened(is_wanted=False) as store:
        await store.submit(new(*range(40)))
    async with opened(is_wanted=True) as store:
        assert not await build(store, 3)
        with pytest.raises(UnavailableError, match=r"being built, \d+% of it"):
            await store.fetch(ListRuns(Filters(words="word3")))
        for number in (1, 30):  # one that is indexed already, and one that is not yet
            await store.submit(UpdateRun(str(number), {"output_summary": f"changed{number}"}))
        await store.submit(new(40))
        await store.submit(PruneRuns(before, 5))
        assert examine(path) == []
    # Closed here, or killed: each slice is committed by itself.
    async with opened(is_wanted=True) as store:
        with closing(sqlite3.connect(path)) as connection:
            how_far = connection.execute("SELECT last FROM runs_text_progress").fetchone()[0]
        assert 3 < how_far < 20
        assert not await build(store, 2)
        await store.submit(new(41))
        assert await build(store, 100)
        expected = {"word2": 0, "word7": 1, "word30": 0, "changed30": 1, "word40": 1, "word41": 1}
        found = {word: len((await store.fetch(ListRuns(Filters(words=word)))).runs) for word in expected}
        assert found == expected
    assert examine(path) == []
    async with opened(is_wanted=True):
        pass


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "harm",
    ["DROP TRIGGER runs_text_changed", "INSERT INTO runs_text (rowid, input_summary) VALUES (3, 'stray')",
     "INSERT INTO runs_text (runs_text) VALUES ('delete-all')", "DROP TABLE runs_text"],
)  # fmt: skip
async def test_check_finds_an_index_that_differs_and_repair_fixes_it(make_api: MakeApi, harm: str) -> None:
    api = await make_api(full_text=True)
    await api.batch([make_run(event_id=str(n), output_summary=f"word{n}") for n in range(50)])
    path = api.settings.db_path
    assert examine(path) == []
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(harm)
    assert [(finding.check, finding.severity) for finding in examine(path)] == [("full text", Severity.PROBLEM)]
    assert "full-text index made again" in repair(path)
    assert examine(path) == []


async def test_a_field_of_the_metrics_may_be_compared_several_times_also_on_the_next_page(api: Api) -> None:
    for state in ("a", "b", "c", "c"):
        await api.post(make_run(metrics_json={"state": state}))
    async with api.client.get("/api/v1/runs?metrics.state!=a&metrics.state!=b&metrics.state>=a&limit=1") as response:
        assert [run["metrics_json"]["state"] for run in await response.json()] == ["c"]
        following = URL(response.links["next"]["url"])
    async with api.client.get(following.relative()) as response:
        assert [run["metrics_json"]["state"] for run in await response.json()] == ["c"]
        assert "next" not in response.links
