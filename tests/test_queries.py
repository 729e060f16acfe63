"""What a query string means, and which are refused; over HTTP it is tests/contract/test_query.py."""

from __future__ import annotations

import base64
import itertools
import json
import re
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetryd.errors import InvalidRequestError
from telemetryd.model.filters import OPERATORS, TIME_BOUNDS, Comparison, Filters, for_log, quoted
from telemetryd.model.queries import LIST, Count, ListRuns, Order, Position, parse_list
from telemetryd.model.values import MAX_INTEGER, canonical_timestamp

CANONICAL = "2025-12-24T10:00:00.000000Z"


def refusal(query_string: str) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        parse_list(query_string)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 700
    return sentence


def pack(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def unpack(cursor: str) -> list[Any]:
    decoded: list[Any] = json.loads(base64.urlsafe_b64decode(cursor + "=="))
    return decoded


# --- Parameters ----------------------------------------------------------------------------------


def test_nothing_asked_means_the_newest_hundred() -> None:
    assert parse_list("") == ListRuns(Filters(), limit=100, offset=0, after=None)


def test_every_parameter_of_the_guide_is_read_and_made_canonical() -> None:
    query = parse_list(
        "agent_name=hugo-translator&status=FAILED&job_type=a%20b&created_before=2025-12-24T12:00:00%2B02:00"
        "&created_after=2025-12-24T10:00:00&start_time_from=2025-12-24t10:00:00z&start_time_to=2025-12-24%2010:00"
        "&limit=50&offset=7"
    )
    assert query == ListRuns(
        Filters(
            {"agent_name": ("hugo-translator",), "job_type": ("a b",), "status": ("failure",)},
            dict.fromkeys(("created_before", "created_after", "start_time_from", "start_time_to"), CANONICAL),
        ),
        limit=50,
        offset=7,
    )


@pytest.mark.parametrize(
    "text",
    ["2025-12-24T12:00:00+02:00", "2025-12-24T12:00:00+0200", "2025-12-24 12:00+02:00", "2025-12-24T12:00:00.0+02:00"],
)
def test_a_plus_that_was_not_encoded_is_found_again(text: str) -> None:
    assert parse_list(f"created_before={text}").filters.bounds == {"created_before": CANONICAL}
    assert parse_list(urlencode({"created_before": text})).filters.bounds == {"created_before": CANONICAL}


@given(st.datetimes(timezones=st.timezones(no_cache=True).filter(lambda zone: "Etc" not in str(zone))))
def test_a_bound_means_the_same_with_and_without_its_plus_encoded(moment: Any) -> None:
    text = moment.isoformat()
    try:
        canonical = canonical_timestamp(text)
    except ValueError:
        return  # an offset with seconds (local mean time), or outside the years 1 to 9999
    for form in (text, quote(text)):
        assert parse_list(f"start_time_to={form}").filters.bounds["start_time_to"] == canonical


def test_a_bound_is_brought_to_the_stored_form() -> None:
    for text in (
        "2025-12-24T10:00:00Z", "2025-12-24T10:00:00", "2025-12-24 10:00", "2025-12-24T10:00:00.000Z",
        "2025-12-24T12:00:00+02:00", "20251224T100000Z", "2025-12-24t10:00:00z", "2025-12-24T10:00:00-00:00",
    ):  # fmt: skip
        bounds = dict.fromkeys(TIME_BOUNDS, text)
        assert parse_list(urlencode(bounds)).filters.bounds == dict.fromkeys(TIME_BOUNDS, CANONICAL), text


@pytest.mark.parametrize("blank", ["2025-12-24 10:00", "2025-12-24 10:00:00", "2025-12-24T10:00:00Z"])
def test_a_blank_between_date_and_time_is_no_lost_plus(blank: str) -> None:
    assert parse_list(f"created_after={quote(blank)}").filters.bounds["created_after"] == CANONICAL
    assert parse_list(f"created_after={blank.replace(' ', '+')}").filters.bounds["created_after"] == CANONICAL


NO_NUMBERS = (
    "", "-1", "+1", "1e3", "1.0", "1.5", "0x10", "1_0", "９", "٣", " 1", "1 ", "abc", "null", "NaN", "9" * 19,
    "9" * 1000, "1" * 5000, str(2**63),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *(("limit", value, "from 1 to 1000") for value in ("0", "1001", "-0", *NO_NUMBERS)),
        *(("offset", value, f"to {MAX_INTEGER}") for value in NO_NUMBERS),
        *(("status", value, "one of running, success, failure") for value in ("", "ok", "running,ok", ",", "\0")),
        *(("agent_name", value, "1 to 255 characters") for value in ("", " ", "x" * 256, "a\0b")),
        *(("job_type", value, "1 to 255 characters") for value in ("", "\t", "x" * 100_000, "\0")),
        *(
            (name, value, "an ISO 8601 date and time")
            for name in ("created_before", "created_after", "start_time_from", "start_time_to")
            for value in ("", "yesterday", "2025-12-32", "1766570400", "2025-02-30T10:00:00Z", "x" * 9999)
        ),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_parameter_and_what_is_allowed(name: str, value: str, allowed: str) -> None:
    sentence = refusal(urlencode({name: value}))
    assert sentence.startswith(f"Invalid {name}: ")
    assert allowed in sentence
    value = value.rpartition(",")[2]  # of several values, the one that is wrong
    assert (repr(value) if len(value) <= 200 else repr(value[:100])[:-1]) in sentence


def test_bounds_of_numbers_are_allowed() -> None:
    assert parse_list("limit=1").limit == 1
    assert parse_list("limit=1000").limit == 1000
    assert parse_list("limit=0007").limit == 7
    assert parse_list(f"offset={MAX_INTEGER}").offset == MAX_INTEGER
    assert "offset" in refusal(f"offset={MAX_INTEGER + 1}")


@pytest.mark.parametrize(
    "name",
    ["Agent_name", "Limit", "limits", "agent", "order", "id", "", " limit", "limit ", "x" * 5000, "\0", "__proto__"],
)
def test_an_unknown_parameter_is_named_with_the_known_ones(name: str) -> None:
    sentence = refusal(urlencode({name: "1"}))
    assert sentence.startswith("Unknown query parameter ")
    assert sentence.endswith(f"; known are: {', '.join(parameter.name for parameter in LIST)}")


def test_every_fault_of_a_query_is_reported() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_list(
            "limit=0&status=ok,success&created_before=soon&nope=1&other=2&offset=-1&job_type=a&job_type=b&host=&q=-"
            "&fields=x&sort=y&count=z&min_duration_ms=-1&metrics.a=&error=%20&created_after=-1y"
        )
    told = str(caught.value).split(". ")
    assert [sentence.partition(":")[0] for sentence in told] == [
        "Query parameter job_type is given more than once; give it once",
        "Unknown query parameter 'nope', 'other'; known are",
        "Invalid status",
        "Invalid host",
        "Invalid created_before",
        "Invalid created_after",
        "Invalid min_duration_ms",
        "Invalid error",
        "Invalid metrics.a",
        "Invalid q",
        "Invalid limit",
        "Invalid offset",
        "Invalid sort",
        "Invalid fields",
        "Invalid count",
    ]


@pytest.mark.parametrize("name", ["agent_name", "limit", "cursor", "created_before"])
def test_a_parameter_given_twice_is_refused(name: str) -> None:
    assert refusal(f"{name}=1&{name}=1") == f"Query parameter {name} is given more than once; give it once"


def test_a_query_string_that_is_no_utf8_or_too_long_a_list_is_refused() -> None:
    assert "UTF-8" in refusal("agent_name=%ff")
    assert "UTF-8" in refusal("agent_name=%ed%a0%80")
    for count in (33, 500):
        assert "more than 32" in refusal("&".join(f"a{n}=1" for n in range(count)))


@given(
    st.text()
    | st.lists(st.sampled_from(["limit", "offset", "cursor", "status", "=", "&", "%", "%00", "5", "+", ";"])).map(
        "".join
    )
)
def test_any_query_string_is_read_or_refused_in_one_sentence(text: str) -> None:
    try:
        parse_list(text)
    except InvalidRequestError as error:
        sentence = str(error)
    else:
        return
    assert "\n" not in sentence
    assert len(sentence) < 700


# --- Filters -------------------------------------------------------------------------------------


CLOCK = datetime(2025, 12, 24, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "moment"),
    [("now", "24T12:00:00"), ("-30s", "24T11:59:30"), ("-30m", "24T11:30:00"), ("-2h", "24T10:00:00"),
     ("-7d", "17T12:00:00"), ("-2w", "10T12:00:00"), ("-0h", "24T12:00:00")],
)  # fmt: skip
def test_a_relative_time_counts_from_one_reading_of_the_clock(text: str, moment: str) -> None:
    readings = itertools.count()

    def clock() -> datetime:
        next(readings)
        return CLOCK

    filters = parse_list(f"created_after={text}&start_time_to={text}", clock).filters
    assert filters.bounds == dict.fromkeys(("created_after", "start_time_to"), f"2025-12-{moment}.000000Z")
    assert next(readings) == 1


@pytest.mark.parametrize(
    "text", ["-2", "2h", "-2y", "--2h", "-2H", "- 2h", "-99999999999h", "-999999999d", "Now", "-h"]
)
def test_what_is_no_relative_time(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="Invalid created_after"):
        parse_list(f"created_after={text}")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("text", "value"),
    [("1000", 1000), ("-2.5e3", -2500.0), ("a=4", "a=4"), ('"5"', "5"), ("true", True), ("9" * 20, 1e20)],
)
def test_a_comparison_may_be_encoded_or_not(operator: str, text: str, value: object) -> None:
    expected = Comparison(("usage", "tok ens"), operator, value)  # type: ignore[arg-type]
    raw = f"metrics.usage.tok%20ens{operator}{text}"
    for written in (raw, quote(raw, safe="%"), raw.replace(">", "%3E").replace("<", "%3c")):
        filters = parse_list(written).filters
        assert filters.metrics == (expected,)
        assert parse_list(urlencode(filters.parameters())).filters == filters


@pytest.mark.parametrize(
    "text",
    ["metrics.a", "metrics.=1", "metrics.a>", "metrics.a..b=1", "metrics.a=%00", "metrics.a%00=1",
     'metrics."a"=1', "metrics.a%5C=1", "metrics.a=1e999", "metrics.a=" + "x" * 256, "metrics." + "a." * 8 + "b=1",
     "metrics.a>1&metrics.a>1", "metrics=1", "metrics.a==", "metrics.a===", "metrics.a>>1", "metrics.a<>1",
     "metrics.a>=>1", "metrics.a=!x", "metrics.a====1", "metrics.a=>==1", "metrics.a=>", "metrics.a!1", "metrics.a+>1",
     "metrics.+a>1"],
)  # fmt: skip
def test_what_is_no_comparison(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse_list(text)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("text", "value"), [("0", 0), ("-2.5", -2.5), ("gpt", "gpt"), ('">0"', ">0"), ("true", True)])
def test_a_comparison_may_come_as_a_key_and_a_value(operator: str, text: str, value: object) -> None:
    """As every HTTP library sends it: the operator is the begin of the value, or the end of the key."""
    expected = (Comparison(("a",), operator, value),)  # type: ignore[arg-type]
    for blank in ("", " "):
        assert parse_list(urlencode({"metrics.a": f"{operator}{blank}{text}"})).filters.metrics == expected
    assert parse_list(urlencode({f"metrics.a{operator}{text}": ""})).filters.metrics == expected
    if operator not in ("<", ">"):  # of which a key and a value cannot be distinguished from the text metrics.a>=0
        assert parse_list(urlencode({f"metrics.a{operator}": text})).filters.metrics == expected
    assert parse_list(urlencode({"metrics.a=": f"={text}", "limit": "1"})).filters.metrics[0].operator == "="


def test_the_log_has_no_keys_of_a_clients_own() -> None:
    parameters = parse_list("metrics.a>5&metrics.b.c=x&host=h").parameters()
    assert for_log(parameters) == {"host": "h", "limit": 100, "metrics": ["a>5", 'b.c="x"']}
    assert for_log({"limit": 1}) == {"limit": 1}


AGENTS = st.text(min_size=1, max_size=20).filter(lambda text: text.strip() and "\0" not in text)


@given(st.lists(AGENTS, min_size=1, max_size=32, unique=True))
def test_any_names_can_be_asked_for_one_by_one(names: list[str]) -> None:
    filters = parse_list(urlencode({"agent_name": ",".join(map(quoted, names))})).filters
    assert filters == Filters({"agent_name": tuple(names)})
    assert dict(parse_qsl(urlencode(filters.parameters()))) == filters.parameters()


def test_a_filter_has_a_bounded_number_of_values() -> None:
    assert len(parse_list("host=" + ",".join(map(str, range(32)))).filters.equal["host"]) == 32
    with pytest.raises(InvalidRequestError, match=r"Invalid host: .*at most 32 values"):
        parse_list("host=" + ",".join(map(str, range(33))))


def test_only_agents_have_wildcards() -> None:
    filters = parse_list("agent_name=a*,b%5C*&host=a*").filters
    assert filters == Filters({"agent_name": ("b*",), "host": ("a*",)}, patterns=(("a", ""),))


def test_an_order_and_fields_are_read() -> None:
    query = parse_list("sort=start_time&fields=status,commit_url,status&count=exact")
    assert query == ListRuns(
        order=Order("start_time", descending=False), fields=("status", "commit_url"), count=Count.EXACT
    )
    assert query.columns == ("id", "start_time", "status", "git_repo", "git_commit_hash")
    for wrong in ("sort=duration_ms", "sort=", "sort=--created_at", "fields=", "fields=status,nope", "count=yes"):
        with pytest.raises(InvalidRequestError, match=f"Invalid {wrong.partition('=')[0]}: "):
            parse_list(wrong)


# --- Cursors -------------------------------------------------------------------------------------

POSITIONS = st.builds(
    Position, st.datetimes().map(lambda moment: canonical_timestamp(moment.isoformat())), st.integers(0, MAX_INTEGER)
)
NAMES = st.text(min_size=1, max_size=20).filter(lambda text: text.strip() and "\0" not in text).map(quoted)
FILTERS = st.fixed_dictionaries(
    {},
    optional={
        "agent_name": NAMES,
        "job_type": NAMES,
        "status": st.sampled_from(["running", "success"]),
        "created_before": st.just(CANONICAL),
        "start_time_from": st.just(CANONICAL),
    },
)


@given(FILTERS, st.integers(1, 1000), POSITIONS)
def test_the_next_page_is_the_same_query_behind_the_position(
    given_filters: dict[str, str], limit: int, last: Position
) -> None:
    query = parse_list(urlencode({**given_filters, "limit": limit}))
    address = urlsplit(query.next_page("/api/v1/runs", last))
    assert address.path == "/api/v1/runs"
    assert re.fullmatch(r"[!-~]+", address.query)
    assert parse_list(address.query) == ListRuns(query.filters, limit, 0, last)


@given(FILTERS, FILTERS, POSITIONS)
def test_a_cursor_belongs_to_its_filters(ours: dict[str, str], theirs: dict[str, str], last: Position) -> None:
    cursor = parse_list(urlencode(ours)).cursor(last)
    asked = urlencode({**theirs, "cursor": cursor})
    if ours == theirs:
        assert parse_list(asked).after == last
    else:
        assert refusal(asked).endswith("it must be one that was given for the same filters")


def test_a_cursor_may_change_its_limit_but_not_its_order_and_has_no_offset() -> None:
    cursor = parse_list("limit=5").cursor(Position(CANONICAL, 7))
    assert parse_list(f"limit=9&cursor={cursor}").limit == 9
    assert parse_list(f"offset=0&cursor={cursor}").after == Position(CANONICAL, 7)
    assert refusal(f"sort=start_time&cursor={cursor}").endswith("given for the same filters")
    assert "cursor" in refusal(f"offset=1&cursor={cursor}")
    assert "offset" in refusal(f"offset=1&cursor={cursor}")


def forgeries() -> list[str]:
    genuine = parse_list("").cursor(Position(CANONICAL, 7))
    version, mark, moment, number = unpack(genuine)
    assert parse_list(f"cursor={pack([version, mark, moment, number])}").after == Position(CANONICAL, 7)
    changed = [
        [version + 1, mark, moment, number], ["1", mark, moment, number], [None, mark, moment, number],
        [version, "", moment, number], [version, None, moment, number], [version, mark[::-1] + "0", moment, number],
        [version, mark, "", number], [version, mark, "yesterday", number], [version, mark, None, number],
        [version, mark, 5, number], [version, mark, [moment], number], [version, mark, moment + "' OR 1=1", number],
        [version, mark, moment, -(2**63)], [version, mark, moment, 2**63], [version, mark, moment, 1.5],
        [version, mark, moment, 10**300], [version, "x", moment, number], [version, [mark], {}, []],
        [version, mark, moment, "7"], [version, mark, moment, None], [version, mark, moment, [7]],
        [version, mark, moment], [version, mark, moment, number, 1], [], {}, None, 5, "text", "four",
        {"a": 1, "b": 2, "c": 3, "d": 4}, [[version, mark, moment, number]],
    ]  # fmt: skip
    texts = [
        "",
        "=",
        "====",
        "a",
        "!",
        "....",
        "ä",
        "\0",
        " ",
        "AAAA",
        "x" * 5000,
        "😀",
        genuine[:-3],
        genuine + "AAAA",
        genuine[:-1],
        genuine[1:],
        genuine + "A",
        genuine + "x" * 9999,
    ]
    texts += [genuine + " ", " " + genuine, genuine.replace(genuine[4], "+"), base64.b64encode(b"\xff" * 30).decode()]
    texts += [base64.urlsafe_b64encode(b"[" * 5000).decode(), base64.urlsafe_b64encode(b"[1,2").decode()]
    return texts + [pack(value) for value in changed]


@pytest.mark.parametrize("cursor", forgeries(), ids=range(len(forgeries())))
def test_a_forged_cursor_is_refused(cursor: str) -> None:
    sentence = refusal(urlencode({"cursor": cursor}))
    assert sentence.startswith("Invalid cursor: ")
    assert "it must be " in sentence


@given(st.text() | st.binary().map(lambda raw: base64.urlsafe_b64encode(raw).decode()))
def test_no_text_is_a_cursor_by_chance(text: str) -> None:
    assert refusal(urlencode({"cursor": text})).startswith("Invalid cursor: ")
