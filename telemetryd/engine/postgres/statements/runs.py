"""SQL for pages of runs: one walk down an index for each combination of values, merged in order."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import orjson

from telemetryd.engine import pages
from telemetryd.engine.indexes import MANY, MAX_ARMS
from telemetryd.engine.pages import Bound, check_size, ends, is_within, named, walks_far
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements import full_text
from telemetryd.engine.postgres.statements.answers import answers
from telemetryd.engine.postgres.statements.events import read_events
from telemetryd.engine.postgres.statements.predicates import (
    CHOSEN,
    CHOSEN_LABEL,
    Arm,
    Values,
    arms_of,
    arms_of_label,
    choose_label,
    conditions,
    conditions_of_arm,
    like,
    one,
)
from telemetryd.engine.postgres.statements.rendering import render
from telemetryd.model import events
from telemetryd.model.event_queries import ListEvents
from telemetryd.model.filters import TIME_BOUNDS, WILDCARD, Filters, label_parameter
from telemetryd.model.queries import DEFAULT_LIMIT, ListRuns, Page, Position
from telemetryd.model.values import MAX_INTEGER


def select_page(
    query: ListRuns, agents: tuple[str, ...] | None = None, *, is_rare: bool = False, label: str | None = None
) -> tuple[str, Values]:
    """Return the SQL text and the parameters that fetch a page, and one row more to see if others follow.

    `agents` are the names that the patterns stand for, `is_rare` says that few runs have the words that are searched
    for, and `label` is the one whose runs are walked.
    """
    filters = query.filters if agents is None else named(query.filters, agents)
    if label is None:
        source, (columns, arms) = "agent_runs", _arms(query, filters, is_rare=is_rare)
        moment, number = query.order.column, "id"
    else:
        source, columns, arms = CHOSEN, CHOSEN_LABEL, arms_of_label(label, filters.labels[label])
        moment, number = "chosen.created", "chosen.run"
    bounds = {name for name, (column, _) in TIME_BOUNDS.items() if column == query.order.column}
    found, values = conditions(
        filters, {*columns, *bounds, *(["q"] if is_rare else []), *([] if label is None else [label_parameter(label)])}
    )
    values |= {
        "rows": query.limit + 1,
        "offset": query.offset,
        "most": min(query.limit + 1 + query.offset, MAX_INTEGER),
    }
    direction = "DESC" if query.order.descending else "ASC"
    walk = _walk(query, values, moment, number)
    select = f"{_select(query.columns)} FROM {source}"
    order = f"ORDER BY {moment} {direction}, {number} {direction}"
    whole = f"ORDER BY {query.order.column} {direction}, id {direction} LIMIT %(rows)s OFFSET %(offset)s"
    if is_rare:
        words, bound = full_text.query(filters.words or "")
        values |= bound
        where = " AND ".join([*found, *walk]) or "true"
        # Made first and by itself, so that it is found by the index of words and not on a walk.
        rare = f"WITH found AS MATERIALIZED (SELECT * FROM agent_runs WHERE {full_text.WORDS} @@ {words})"
        return f"{rare} {_select(query.columns)} FROM found WHERE {where} {whole}", values
    texts = []
    for place, arm in enumerate(arms):
        where = " AND ".join([*conditions_of_arm(place, arm, values), *found, *walk]) or "true"
        texts.append(f"({select} WHERE {where} {order} LIMIT %(most)s)")
    if len(texts) == 1:
        return texts[0].removesuffix("%(most)s)").removeprefix("(") + "%(rows)s OFFSET %(offset)s", values
    return f"{' UNION ALL '.join(texts)} {whole}", values


def _arms(query: ListRuns, filters: Filters, *, is_rare: bool) -> tuple[tuple[str, ...], list[Arm]]:
    """Return the columns that have one value in each walk, and these values for each of them."""
    if is_rare or query.order.column != "created_at":
        return (), [{}]
    # A search for words would be done again in each arm.
    return arms_of(filters, MAX_ARMS if filters.words is None else 1)


@lru_cache(maxsize=64)
def _select(columns: tuple[str, ...]) -> str:
    return f"SELECT {', '.join(columns)}"


def _walk(query: ListRuns, values: Values, column: str, number: str) -> list[str]:
    """Return the conditions on the order's column: where a walk begins and ends.

    One that continues after a cursor begins with a comparison of rows, which leads straight to its place. `column` and
    `number` are what the index calls the order's column and the id.
    """
    after = query.after
    lower, upper = ends(query)
    near, far, beyond = (upper, lower, "<") if query.order.descending else (lower, upper, ">")
    walk = [_end(column, far, "far", values)] if far is not None else []
    if after is not None and (near is None or is_within(after.moment, near)):
        values |= {"moment": after.moment, "after_id": after.id}
        walk.append(f"({column}, {number}) {beyond} (%(moment)s, %(after_id)s)")
    elif near is not None:
        walk.append(_end(column, near, "near", values))
    return walk


def _end(column: str, bound: Bound, place: str, values: Values) -> str:
    comparison, values[place] = bound
    return f"{column} {comparison} %({place})s"


_AGENTS: Final = """
    WITH RECURSIVE found (name) AS (
        (
            SELECT agent_name FROM agent_runs WHERE agent_name >= %(first)s AND agent_name < %(last)s
            ORDER BY agent_name LIMIT 1
        )
        UNION ALL
        SELECT (
            SELECT agent_name FROM agent_runs WHERE agent_name > name AND agent_name < %(last)s
            ORDER BY agent_name LIMIT 1
        )
        FROM found WHERE name IS NOT NULL
    )
    SELECT name FROM found WHERE name LIKE %(pattern)s LIMIT %(most)s
"""
"""The agents of a pattern: one step down the index for each name between the ends, however many runs it has."""
_BEHIND_ALL: Final = chr(0x10FFFF)


def find_agents(plain: Plain, filters: Filters) -> tuple[str, ...] | None:
    """Return the agents that the filters' patterns stand for; None if there are no patterns, or too many agents."""
    if not filters.patterns:
        return None
    names = set(filters.equal.get(WILDCARD, ()))
    for pattern in filters.patterns:
        prefix = pattern[0]
        bound = {"first": prefix, "last": prefix + _BEHIND_ALL, "pattern": like(pattern), "most": MAX_ARMS + 1}
        names.update(name for (name,) in plain.execute(_AGENTS, bound))
    return tuple(sorted(names)) if len(names) <= MAX_ARMS else None


def is_rare(plain: Plain, filters: Filters) -> bool:
    """Return whether few runs have the words that are searched for."""
    if filters.words is None:
        return False
    words, values = full_text.query(filters.words)
    some = f"SELECT 1 FROM agent_runs WHERE {full_text.WORDS} @@ {words} LIMIT {MANY}"
    return bool(one(plain, f"SELECT count(*) FROM ({some}) AS few", values)[0] < MANY)


def _label(plain: Plain, query: ListRuns, *, is_rare: bool) -> str | None:
    """Return the label whose runs are walked, if the answer is in the order of their index."""
    if is_rare or query.order.column != "created_at":
        return None
    return choose_label(plain, query.filters, MAX_ARMS if query.filters.words is None else 1)


@answers(ListRuns, is_long=walks_far)
def fetch_page(plain: Plain, query: ListRuns) -> Page:
    """Fetch one page of runs.

    Raises:
        InvalidRequestError: if they hold more than `pages.PAGE_BYTES`.

    """
    full_text.require(plain, query.filters)
    agents = find_agents(plain, query.filters)
    if agents == ():
        return Page([], None)
    rare = is_rare(plain, query.filters)
    select = select_page(query, agents, is_rare=rare, label=_label(plain, query, is_rare=rare))
    rendered = render(plain, select, query.answered, query.order.column, pages.PAGE_BYTES)
    if not rendered.fit:
        check_size(rendered.sizes, query.limit)
        rendered = render(plain, select, query.answered, query.order.column, None)
    shown = rendered.runs[: query.limit]
    if query.with_events:
        shown = _with_events(plain, shown, [run for run, _ in rendered.places])
    if len(rendered.runs) <= query.limit:
        return Page(shown, None)
    run, moment = rendered.places[query.limit - 1]
    return Page(shown, Position(moment, run))


def _with_events(plain: Plain, shown: list[str], ids: list[int]) -> list[str]:
    """Return runs, each a JSON object, with their first events, which hold about `pages.PAGE_BYTES` together."""
    room = pages.PAGE_BYTES
    whole: list[str] = []
    for run, id_ in zip(shown, ids, strict=False):
        page, room = read_events(plain, ListEvents("", DEFAULT_LIMIT), id_, room, is_first=not whole)
        whole.append(f"{run[:-1]},{orjson.dumps(events.page_fields(page)).decode()[1:]}")
    return whole
