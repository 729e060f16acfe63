"""SQL for pages of runs: one walk down an index for each combination of values, merged in order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import orjson

from telemetryd.engine import pages
from telemetryd.engine.indexes import MANY, MAX_ARMS
from telemetryd.engine.pages import check_size, named, walks_far
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements import full_text
from telemetryd.engine.postgres.statements.answers import answers
from telemetryd.engine.postgres.statements.events import read_events
from telemetryd.engine.postgres.statements.predicates import (
    CHOSEN,
    Arm,
    Values,
    arms_of,
    arms_of_label,
    choose_label,
    conditions,
    like,
    one,
    unguessed,
)
from telemetryd.engine.postgres.statements.rendering import render
from telemetryd.engine.postgres.statements.walks import Walks
from telemetryd.model import events
from telemetryd.model.event_queries import ListEvents
from telemetryd.model.filters import TIME_BOUNDS, WILDCARD, Filters, label_parameter
from telemetryd.model.queries import DEFAULT_LIMIT, ListRuns, Page, Position
from telemetryd.model.values import MAX_INTEGER


@dataclass(frozen=True, slots=True)
class Way:
    """How a page is found."""

    agents: tuple[str, ...] | None = None
    """The names that the patterns of the filters stand for."""
    is_rare: bool = False
    """Whether few runs have the words that are searched for."""
    label: str | None = None
    """The label whose runs are walked."""
    is_sorted: bool = False
    """Whether few runs started in the time that is meant, so that it is better to sort them."""


def select_page(query: ListRuns, way: Way = Way()) -> tuple[str, Values]:
    """Return the SQL text and the parameters that fetch a page, and one row more to see if others follow."""
    filters = query.filters if way.agents is None else named(query.filters, way.agents)
    source, moment, number = ("agent_runs", query.order.column, "id") if way.label is None else _OF_LABEL
    arms = [Arm()]
    alone = {name for name, (column, _) in TIME_BOUNDS.items() if column == query.order.column}
    if way.label is not None:
        arms = arms_of_label(way.label, filters.labels[way.label])
        alone.add(label_parameter(way.label))
    elif query.order.column == "created_at" and not (way.is_rare or way.is_sorted):
        # A search for words would be done again in each arm.
        columns, arms = arms_of(filters, MAX_ARMS if filters.words is None else 1)
        alone.update(columns)
    found, values = conditions(filters, {*alone, "q"})
    walks = Walks.of(query, moment, number, values, is_sorted=way.is_sorted)
    values |= {"rows": query.limit + 1, "offset": query.offset}
    if filters.words is not None:
        words, bound = full_text.query(filters.words)
        values |= bound
        if way.is_rare:
            # Made first and by itself, so that it is found by the index of words and not on a walk.
            source = f"(SELECT * FROM agent_runs WHERE {full_text.WORDS} @@ {words} OFFSET 0) AS found"
        else:
            found.append(unguessed(f"{full_text.WORDS} @@ {words}"))
    texts = []
    for place, arm in enumerate(arms):
        where = " AND ".join([*walks.conditions(place, arm, values), *found]) or "true"
        texts.append(f"FROM {source} WHERE {where} ORDER BY {walks.order(arm)}")
    select, page = _select(query.columns), "LIMIT %(rows)s OFFSET %(offset)s"
    if len(texts) == 1 and not way.is_sorted:
        return f"{select} {texts[0]} {page}", values
    # Each gives as many as the page may need of it; only those that are in the page are looked at as a whole.
    values["most"] = min(query.limit + 1 + query.offset, MAX_INTEGER)
    narrow = f"SELECT {number} AS number, {moment} AS moment"
    each = " UNION ALL ".join(f"({narrow} {text} LIMIT %(most)s)" for text in texts)
    order = f"ORDER BY moment {walks.direction}, number {walks.direction}"
    chosen = f"SELECT number, moment FROM ({each}) AS each {order} {page}"
    return f"{select} FROM ({chosen}) AS chosen_runs JOIN agent_runs ON id = number {order}", values


_OF_LABEL: Final = (CHOSEN, "chosen.created", "chosen.run")


@lru_cache(maxsize=64)
def _select(columns: tuple[str, ...]) -> str:
    return f"SELECT {', '.join(columns)}"


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


_COUNT_STARTED: Final = f"SELECT count(*) FROM (SELECT 1 FROM agent_runs WHERE {{started}} LIMIT {10 * MANY}) AS few"


def find_way(plain: Plain, query: ListRuns) -> Way | None:
    """Find out how a page is found best; None if the patterns stand for no agent, so that there is no run."""
    filters = query.filters
    agents = find_agents(plain, filters)
    if agents == ():
        return None
    is_rare = filters.words is not None and _count_words(plain, filters) < MANY
    label = None
    if not is_rare and query.order.column == "created_at":
        label = choose_label(plain, filters, MAX_ARMS if filters.words is None else 1)
    is_sorted = False
    if label is None and not is_rare and query.order.column == "created_at":
        bounds = {name: moment for name, moment in filters.bounds.items() if TIME_BOUNDS[name][0] != "created_at"}
        started, values = conditions(Filters(bounds=bounds))
        if started:
            is_sorted = one(plain, _COUNT_STARTED.format(started=" AND ".join(started)), values)[0] < 10 * MANY
    return Way(agents, is_rare, label, is_sorted)


def _count_words(plain: Plain, filters: Filters) -> int:
    """Count the runs with the words that are searched for, up to `MANY`."""
    words, values = full_text.query(filters.words or "")
    few = f"SELECT 1 FROM agent_runs WHERE {full_text.WORDS} @@ {words} LIMIT {MANY}"
    with full_text.by_index(plain, filters, 4 * MANY):
        return int(one(plain, f"SELECT count(*) FROM ({few}) AS few", values)[0])


@answers(ListRuns, is_long=walks_far)
def fetch_page(plain: Plain, query: ListRuns) -> Page:
    """Fetch one page of runs.

    Raises:
        InvalidRequestError: if they hold more than `pages.PAGE_BYTES`.

    """
    full_text.require(plain, query.filters)
    way = find_way(plain, query)
    if way is None:
        return Page([], None)
    select = select_page(query, way)
    with full_text.by_index(plain, query.filters if way.is_rare else Filters()):
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
