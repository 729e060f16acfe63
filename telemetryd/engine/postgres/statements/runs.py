"""SQL for pages of runs: one walk down an index for each combination of values, merged in order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import orjson

from telemetryd.engine import pages
from telemetryd.engine.columns import HOUR
from telemetryd.engine.indexes import MANY, MAX_ARMS
from telemetryd.engine.pages import BEHIND_ALL, Span, check_size, named, walks_far
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
    fix,
    like,
    one,
    plain_name,
    rows_of_arms,
    unguessed,
)
from telemetryd.engine.postgres.statements.rendering import render
from telemetryd.engine.postgres.statements.walks import Walks
from telemetryd.model import events
from telemetryd.model.event_queries import ListEvents
from telemetryd.model.filters import TIME_BOUNDS, Filters, label_parameter
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
    created: Span | None = None
    """When the runs that started in the time that is meant were created."""
    is_sorted: bool = False
    """Whether so few runs started then that it is better to sort them."""


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
    bounds, values = started(filters) if way.created is not None and not way.is_sorted else ([], {})
    found, bound = conditions(filters, {*alone, *values, "q"})
    values |= bound
    # Where they can be created most of them did start then.
    found += [unguessed(condition) for condition in bounds]
    walks = Walks.of(query, moment, number, values, way.created, is_sorted=way.is_sorted)
    values |= {"rows": query.limit + 1, "offset": query.offset}
    if filters.words is not None:
        words, bound = full_text.query(filters.words)
        values |= bound
        if way.is_rare:
            # Made first and by itself, so that it is found by the index of words and not on a walk.
            source = f"(SELECT * FROM agent_runs WHERE {full_text.WORDS} @@ {words} OFFSET 0) AS found"
        else:
            found.append(unguessed(f"{full_text.HAS_TEXT} AND {full_text.WORDS} @@ {words}"))
    fixed = fix(arms, values)
    where = " AND ".join([*walks.conditions(fixed, is_alone=not found), *found]) or "true"
    text = f"FROM {source} WHERE {where} ORDER BY {walks.order(fixed)}"
    select, page = _select(query.columns), "LIMIT %(rows)s OFFSET %(offset)s"
    goes_on = walks.goes_on(fixed, is_alone=not found)
    if len(arms) == 1 and not (goes_on or way.is_sorted or query.offset):
        return f"{select} {text} {page}", values
    # Only those that are in the page are looked at as a whole.
    chosen = f"SELECT {number} AS number, {moment} AS moment"
    order = f"ORDER BY moment {walks.direction}, number {walks.direction}"
    if len(arms) == 1 and not goes_on:
        chosen = f"{chosen} {text}"
    else:
        # Each walk gives as many as the page may need of it. All are one statement of one plan, however many they are.
        values["most"] = min(query.limit + 1 + query.offset, MAX_INTEGER)
        names = ", ".join(f"{name} AS {plain_name(name)}" for name in fixed)
        walk = f"({chosen}, {names} {text} LIMIT %(most)s) AS walk"
        walked = walk if len(arms) == 1 else f"{rows_of_arms(fixed)} CROSS JOIN LATERAL {walk}"
        rest = " AND ".join(f"walk.{condition}" for condition in walks.rest(fixed)) if goes_on else "true"
        chosen = f"SELECT number, moment FROM {walked} WHERE {rest} {order}"
    return f"{select} FROM ({chosen} {page}) AS chosen_runs JOIN agent_runs ON id = number {order}", values


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


def find_agents(plain: Plain, filters: Filters) -> tuple[str, ...] | None:
    """Return the agents that the filters' patterns stand for; None if there are no patterns, or too many agents."""
    return pages.find_agents(
        filters, lambda pattern, bound: plain.execute(_AGENTS, {**bound, "pattern": like(pattern)})
    )


_FEW: Final = 1_000
"""Runs that are sorted in less time than a walk may take, and counted in no time."""
_COUNT_STARTED: Final = f"SELECT count(*) FROM (SELECT 1 FROM agent_runs WHERE {{started}} LIMIT {_FEW}) AS few"
_CREATED: Final = f"""
    SELECT min(hour), max(hour) FROM run_hours
    WHERE last_start >= left(%(from)s, {HOUR}) AND first_start <= left(%(to)s, {HOUR})
"""
_ALWAYS: Final = "~"


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
    if label is not None or is_rare or query.order.column != "created_at":
        return Way(agents, is_rare, label)
    bounds, values = started(filters)
    if not bounds:
        return Way(agents)
    created = created_span(plain, filters)
    if created is None:
        return None
    few = one(plain, _COUNT_STARTED.format(started=" AND ".join(bounds)), values)[0] < _FEW
    return Way(agents, created=created, is_sorted=few)


def started(filters: Filters) -> tuple[list[str], Values]:
    """Return the conditions that runs started within the bounds of the filters, if there are any."""
    bounds = {name: moment for name, moment in filters.bounds.items() if TIME_BOUNDS[name][0] == "start_time"}
    return conditions(Filters(bounds=bounds))


def created_span(plain: Plain, filters: Filters) -> Span | None:
    """Return when the runs were created that started within the bounds of the filters; None if there are none."""
    bounds = filters.bounds
    hours = {"from": bounds.get("start_time_from", ""), "to": bounds.get("start_time_to", _ALWAYS)}
    first, last = one(plain, _CREATED, hours)
    return None if first is None else (first, last + BEHIND_ALL)


def _count_words(plain: Plain, filters: Filters) -> int:
    """Count the runs with the words that are searched for, up to `MANY`."""
    words, values = full_text.query(filters.words or "")
    few = f"SELECT 1 FROM agent_runs WHERE {full_text.WORDS} @@ {words} LIMIT {MANY}"
    with full_text.by_index(plain, is_needed=True, most=4 * MANY):
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
    with full_text.by_index(plain, is_needed=way.is_rare):
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
