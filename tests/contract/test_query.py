"""GET /api/v1/runs, sentence by sentence: what its queries mean for stored runs."""

from __future__ import annotations

import itertools
import re
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qsl, urlsplit

from telemetryd.model.queries import LIST
from tests.conftest import Api, Row, make_run
from tests.contract.test_runs import FULL, SERVER_FIELDS
from tests.contract.wire import RUNS, STATUSES, Answer, check_error, send

START = datetime(2025, 12, 24, 10, tzinfo=UTC)


def at(minutes: float) -> str:
    return (START + timedelta(minutes=minutes)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def runs_of_two_agents(count: int = 24) -> list[Row]:
    """Runs a minute apart: two agents, three job types, six statuses."""
    return [
        make_run(
            event_id=f"e{number:03}",
            agent_name=("hugo-translator", "seo")[number % 2],
            job_type=("a", "b", "c")[number % 3],
            status=STATUSES[number % 6],
            created_at=at(number),
            start_time=at(-number),
        )
        for number in range(count)
    ]


async def listed(api: Api, **parameters: str) -> list[Row]:
    found: list[Row] = await api.get(RUNS, params=parameters)
    return found


def ids(found: list[Row]) -> list[str]:
    return [run["event_id"] for run in found]


async def test_nothing_is_an_empty_array(api: Api) -> None:
    answer = await send(api, "GET", RUNS)
    assert (answer.status, answer.json) == (200, [])
    assert answer.headers["content-type"] == "application/json"
    assert "link" not in answer.headers


async def test_every_stored_field_is_answered(api: Api) -> None:
    await api.post(make_run(**FULL))
    await api.post(make_run())
    sparse, full = await listed(api)
    assert set(full) == set(sparse) == {"event_id", "run_id", *FULL, *SERVER_FIELDS}
    assert {name: full[name] for name in FULL} == FULL
    assert full["api_posted"] is True
    assert sparse["api_posted"] is False
    assert sparse["metrics_json"] is None
    assert full["repo_url"] == "https://github.com/octo/site"
    assert full["commit_url"].startswith("https://github.com/octo/site/commit/")
    assert sparse == await api.get(f"{RUNS}/{sparse['event_id']}")


async def test_newest_first_and_of_equal_times_the_last_to_arrive(api: Api) -> None:
    for name, minute in (("old", 1), ("new", 3), ("mid-1", 2), ("mid-2", 2), ("mid-3", 2)):
        await api.post(make_run(event_id=name, created_at=at(minute)))
    assert ids(await listed(api)) == ["new", "mid-3", "mid-2", "mid-1", "old"]


async def test_order_is_by_time_and_not_by_text(api: Api) -> None:
    for name, moment in (
        ("1", "2025-12-24T10:00:00+05:30"),
        ("2", "2025-12-24T05:00:00Z"),
        ("3", "2025-12-24 05:00:00.5"),
        ("4", "20251224T010000-0500"),
    ):
        await api.post(make_run(event_id=name, created_at=moment))
    assert ids(await listed(api)) == ["4", "3", "2", "1"]


async def test_each_filter_and_all_combinations(api: Api) -> None:
    runs = runs_of_two_agents()
    await api.batch(runs)
    newest_first = runs[::-1]
    for agent in (None, "hugo-translator", "seo"):
        for job in (None, "a", "b"):
            for status in (None, *STATUSES):
                given = {"agent_name": agent, "job_type": job, "status": status}
                equal = {name: value for name, value in given.items() if value is not None}
                expected = [r for r in newest_first if all(r[name] == value for name, value in equal.items())]
                assert ids(await listed(api, **equal)) == ids(expected), equal


async def test_names_are_matched_exactly(api: Api) -> None:
    for name in ("seo", "SEO", "seo ", "seo.x", "%", "s_o", "ü", "😀+&=?"):
        await api.post(make_run(event_id=name, agent_name=name, job_type=name))
    for name in ("seo", "SEO", "seo ", "%", "s_o", "ü", "😀+&=?"):
        assert ids(await listed(api, agent_name=name)) == [name]
        assert ids(await listed(api, job_type=name)) == [name]
    assert await listed(api, agent_name="se") == []


async def test_a_status_is_forgiven_as_everywhere(api: Api) -> None:
    await api.batch([make_run(status=status) for status in STATUSES])
    for given, canonical in (
        ("failed", "failure"), ("completed", "success"), ("SUCCEEDED", "success"), ("canceled", "cancelled"),
        (" Running ", "running"), ("TIMEOUT", "timeout"),
    ):  # fmt: skip
        assert [run["status"] for run in await listed(api, status=given)] == [canonical], given


async def test_time_bounds(api: Api) -> None:
    await api.batch([make_run(event_id=f"{n}", created_at=at(n), start_time=at(n)) for n in range(5)])
    assert ids(await listed(api, created_before=at(2))) == ["1", "0"]
    assert ids(await listed(api, created_after=at(2))) == ["4", "3"]
    assert ids(await listed(api, start_time_from=at(2))) == ["4", "3", "2"]
    assert ids(await listed(api, start_time_to=at(2))) == ["2", "1", "0"]
    assert ids(
        await listed(api, created_after=at(0), created_before=at(4), start_time_from=at(2), start_time_to=at(2.5))
    ) == ["2"]
    assert await listed(api, created_after=at(3), created_before=at(1)) == []


async def test_an_offset_whose_plus_was_not_encoded_still_means_plus(api: Api) -> None:
    await api.post(make_run(created_at=at(0)))
    for query, count in (
        ("created_after=2025-12-24T11:59:59+02:00", 1),
        ("created_after=2025-12-24T12:00:01+02:00", 0),
        ("created_after=2025-12-24T11:59:59%2B02:00", 1),
    ):
        [*found] = await api.get(f"{RUNS}?{query}")
        assert len(found) == count, query


async def test_limit_and_offset(api: Api) -> None:
    runs = runs_of_two_agents()
    await api.batch(runs)
    expected = ids(runs[::-1])
    assert ids(await listed(api, limit="1")) == expected[:1]
    assert ids(await listed(api, limit="1000")) == expected
    assert ids(await listed(api, limit="5", offset="3")) == expected[3:8]
    assert ids(await listed(api, offset="20")) == expected[20:]
    assert ids(await listed(api, offset="0")) == expected
    assert await listed(api, offset="24") == []


async def test_the_default_limit_is_100_and_the_largest_1000(api: Api) -> None:
    await api.batch([make_run() for _ in range(1100)])
    assert len(await listed(api)) == 100
    assert len(await listed(api, limit="1000")) == 1000
    assert "from 1 to 1000" in check_error(await send(api, "GET", RUNS, params={"limit": "1001"}), 400)


REFUSED = (
    ("status=bogus", "Invalid status: 'bogus'; it must be one of " + ", ".join(STATUSES)),
    ("limit=0", "Invalid limit: '0'; it must be an integer from 1 to 1000"),
    ("offset=-1", "Invalid offset: '-1'; it must be an integer from 0 to 9223372036854775807"),
    (
        "created_before=yesterday",
        "Invalid created_before: 'yesterday'; it must be an ISO 8601 date and time such as "
        "2025-12-24T10:00:00Z, a date, an age such as -24h or -30d, or now",
    ),
    ("limit=1&limit=2", "Query parameter limit is given more than once; give it once"),
    ("Limit=1", f"Unknown query parameter 'Limit'; known are: {', '.join(parameter.name for parameter in LIST)}"),
    ("cursor=AAAA", "Invalid cursor: 'AAAA'; it must be a cursor from the Link header of an earlier answer"),
    ("agent_name=%ff", "The query string must be percent-encoded UTF-8"),
)


async def test_a_bad_parameter_is_400_and_named_with_its_value_and_what_is_allowed(api: Api) -> None:
    """Each value that is refused, of each parameter: tests/test_queries.py."""
    for query, sentence in REFUSED:
        assert check_error(await send(api, "GET", f"{RUNS}?{query}"), 400) == sentence


def next_page(answer: Answer) -> str | None:
    """The address of the next page, from the Link header."""
    if "link" not in answer.headers:
        return None
    match = re.fullmatch(r'<([^>]+)>; rel="next"', answer.headers["link"])
    assert match is not None
    return match[1]


PREFIXES = {
    None: "", "/telemetry": "/telemetry", "/a/b-c.d/": "/a/b-c.d", "/": "", "": "", "//evil.example": "", "/../x": "",
    "https://evil.example": "", "/a>; rel=x, </b": "", "/a,/b": "", "/" + "a/" * 99: "",
}  # fmt: skip


async def test_a_proxy_says_under_which_path_the_next_page_is(api: Api) -> None:
    await api.batch(runs_of_two_agents(3))
    for said, prefix in PREFIXES.items():
        headers = {} if said is None else {"X-Forwarded-Prefix": said}
        following = next_page(await send(api, "GET", f"{RUNS}?limit=1", headers=headers))
        assert following is not None
        assert following.startswith(f"{prefix}{RUNS}?limit=1&cursor="), said


async def test_cursors_walk_through_everything_once(api: Api) -> None:
    runs = [{**run, "created_at": at(number // 4)} for number, run in enumerate(runs_of_two_agents(48))]  # many ties
    await api.batch(runs)
    each: tuple[dict[str, str], ...] = (
        {},
        {"agent_name": "seo"},
        {"status": "failed"},
        {"agent_name": "seo", "job_type": "b"},
        {"job_type": "a"},
        {"created_after": "2025-12-24T10:03:30Z", "start_time_to": "2025-12-24T09:55:00+00:00"},
    )
    for filters, limit in itertools.product(each, (1, 7, 24)):
        await check_walk(api, filters, limit)


async def check_walk(api: Api, filters: dict[str, str], limit: int) -> None:
    expected = ids(await listed(api, **filters, limit="1000"))
    assert expected
    path: str | None = f"{RUNS}?" + "&".join(
        f"{k}={v.replace('+', '%2B')}" for k, v in [*filters.items(), ("limit", str(limit))]
    )
    walked: list[str] = []
    while path is not None:
        answer = await send(api, "GET", path)
        assert answer.status == 200
        assert 1 <= len(answer.json) <= limit
        walked += ids(answer.json)
        path = next_page(answer)
        assert path is None or set(filters) <= {name for name, _ in parse_qsl(urlsplit(path).query)}
    assert walked == expected


async def test_runs_that_arrive_meanwhile_do_not_shift_the_pages(api: Api) -> None:
    await api.batch([make_run(event_id=f"{n}", created_at=at(n)) for n in range(6)])
    first = await send(api, "GET", RUNS, params={"limit": "3"})
    await api.batch([make_run(created_at=at(100 + n)) for n in range(3)])
    path = next_page(first)
    assert path is not None
    second = await send(api, "GET", path)
    assert ids(first.json) + ids(second.json) == ["5", "4", "3", "2", "1", "0"]


async def test_the_last_page_has_no_link(api: Api) -> None:
    await api.batch([make_run() for _ in range(3)])
    assert next_page(await send(api, "GET", RUNS, params={"limit": "2"})) is not None
    assert next_page(await send(api, "GET", RUNS, params={"limit": "3"})) is None
    assert next_page(await send(api, "GET", RUNS, params={"limit": "3", "offset": "1"})) is None


async def test_cursors_walk_through_runs_with_negative_ids_too(api: Api) -> None:
    """Only other programs gave such ids; `migrate` keeps them."""
    await api.batch([make_run(event_id=f"{n}", created_at=at(0)) for n in range(4)])
    api.execute("UPDATE agent_runs SET id = id - 3")
    path: str | None = f"{RUNS}?limit=1"
    walked: list[str] = []
    while path is not None:
        answer = await send(api, "GET", path)
        assert answer.status == 200
        walked += ids(answer.json)
        path = next_page(answer)
    assert walked == ["3", "2", "1", "0"]
