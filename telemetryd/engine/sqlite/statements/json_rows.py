"""Renders a page of runs as JSON within SQLite, in one step that no other thread interrupts.

A row that comes out of SQLite by itself takes two turns of the interpreter's lock, and a page has up to a thousand.
"""

from __future__ import annotations

import sqlite3
from functools import lru_cache
from typing import Final, NamedTuple

import orjson

from telemetryd.engine import addresses
from telemetryd.engine.addresses import NEEDED_CHARACTERS, apart
from telemetryd.engine.indexes import Values
from telemetryd.model.runs import columns, needed
from telemetryd.model.values import Role

_BETWEEN: Final = "\x1e"
"""Stands between two runs; within JSON no control character stands for itself (RFC 8259 §7)."""


class TooLargeError(Exception):
    """What is rendered does not fit into the room that it is given."""


class Rendered(NamedTuple):
    """Runs as JSON objects, and what a page needs of the last one."""

    runs: list[str]
    places: list[tuple[int, str]]
    """The id of each run, and its value of the column that the order is by."""


def render(
    connection: sqlite3.Connection, select: tuple[str, Values], fields: tuple[str, ...], order: str, room: int | None
) -> Rendered:
    """Return the runs that a statement selects, of each the fields that are named; those that are not stored come last.

    `select` must select the columns that the fields are made from, `id`, and `order`, the column that it orders by.
    `room` is how many bytes the stored fields of all of them may take together; None means any number.

    Raises:
        TooLargeError: if they take more.

    """
    sql, values = select
    stored, made = apart(fields)
    # The whole text would stay in a cache.
    parts = (f"substr({name}, 1, {NEEDED_CHARACTERS})" for name in needed(made))
    # Both aggregates see the rows in the order of the subquery, which SQLite keeps because of its LIMIT.
    text = f"""
        SELECT group_concat({json_object(stored)}, char({ord(_BETWEEN)})),
            json_group_array(json_array({", ".join(("id", order, *parts))}))
        FROM ({sql})
    """
    usual = connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, -1 if room is None else room)  # -1 changes nothing
    try:
        found, places = connection.execute(text, values).fetchone()
    except sqlite3.DataError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_TOOBIG:
            raise
        raise TooLargeError from error
    finally:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, usual)
    if found is None:
        return Rendered([], [])
    known = orjson.loads(places)
    comma = "," if stored and made else ""
    ends = [f"{comma}{addresses.members(made, *of[2:])}}}" for of in known]
    return Rendered(
        [run[:-1] + end for run, end in zip(found.split(_BETWEEN), ends, strict=True)],
        [(of[0], of[1]) for of in known],
    )


def sizes(select: tuple[str, Values], fields: tuple[str, ...]) -> tuple[str, Values]:
    """Return the statement that fetches about how many bytes each run takes in JSON."""
    sql, values = select
    stored, _ = apart(fields)
    return f"SELECT length(CAST({json_object(stored)} AS BLOB)) FROM ({sql})", values


@lru_cache(maxsize=64)  # who asks for fields may ask for any of them, in any order
def json_object(stored: tuple[str, ...]) -> str:
    """Return the SQL expression that makes a JSON object of some columns of a run."""
    named = (f"'{name}', {f'json({name})' if name in columns(Role.JSON) else json_value(name)}" for name in stored)
    return f"json_object({', '.join(named)})"


def json_value(name: str) -> str:
    """Return the SQL expression of a column's value in JSON; JSON itself is a text."""
    return f"json(iif({name}, 'true', 'false'))" if name in columns(Role.BOOLEAN) else name
