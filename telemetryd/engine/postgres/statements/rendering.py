"""Renders runs as JSON within PostgreSQL: each comes out as one text, and no value becomes one of Python's."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import orjson

from telemetryd.engine import addresses
from telemetryd.engine.addresses import NEEDED_CHARACTERS, apart
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements.predicates import Values
from telemetryd.model.runs import columns, needed
from telemetryd.model.values import Role

_ANY: Final = 2**62


class Rendered(NamedTuple):
    """Runs as JSON objects, and what a page needs of them."""

    runs: list[str]
    places: list[tuple[int, str]]
    """The id of each run, and its value of the column that the order is by."""
    sizes: list[int]
    """How many bytes the stored fields of each run take."""
    fit: bool
    """Whether they took no more than they may; if they did, `runs` is empty."""


def render(plain: Plain, select: tuple[str, Values], fields: tuple[str, ...], order: str, room: int | None) -> Rendered:
    """Return the runs that a statement selects, of each the fields that are named; those that are not stored come last.

    `select` must select the columns that the fields are made from, `id`, and `order`, the column that it orders by.
    `room` is how many bytes the stored fields of all of them may take together; None means any number.
    """
    sql, values = select
    stored, made = apart(fields)
    # The whole text would stay in a cache.
    parts = "".join(f", left({name}, {NEEDED_CHARACTERS})" for name in needed(made))
    # A subquery with an OFFSET is not merged into the one around it, which would render each run three times.
    text = f"""
        SELECT CASE WHEN total <= %(room)s THEN run END, size, place FROM (
            SELECT run, place, octet_length(run) AS size,
                sum(octet_length(run)) OVER (ROWS UNBOUNDED PRECEDING) AS total
            FROM (
                SELECT {json_object(stored)} AS run, json_build_array(id, {order}{parts}) AS place
                FROM ({sql}) AS page OFFSET 0
            ) AS rendered
        ) AS measured
    """
    rows = plain.execute(text, {**values, "room": _ANY if room is None else room}).fetchall()
    sizes = [size for _, size, _ in rows]
    if rows and rows[-1][0] is None:
        return Rendered([], [], sizes, fit=False)
    known = [orjson.loads(place) for _, _, place in rows]
    comma = "," if stored and made else ""
    ends = [f"{comma}{addresses.members(made, *of[2:])}}}" for of in known]
    runs = [run[:-1] + end for (run, _, _), end in zip(rows, ends, strict=True)]
    return Rendered(runs, [(of[0], of[1]) for of in known], sizes, fit=True)


@lru_cache(maxsize=64)  # who asks for fields may ask for any of them, in any order
def json_object(stored: tuple[str, ...]) -> str:
    """Return the SQL expression that makes a JSON object of some columns of a run, without blanks."""
    if not stored:
        return "'{}'"
    named = (f"{name} <> 0 AS {name}" if name in columns(Role.BOOLEAN) else name for name in stored)
    return f"row_to_json((SELECT run FROM (SELECT {', '.join(named)}) AS run))::text"
