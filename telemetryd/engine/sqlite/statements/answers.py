"""Registry of query handlers: which function answers which query."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, TypeVar, cast

from telemetryd.engine.sqlite import statements
from telemetryd.model.queries import Query

A = TypeVar("A")
Q = TypeVar("Q", bound=Query[Any])
Answering = Callable[[sqlite3.Connection, Q], A]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What answers one kind of query."""

    fetch: Callable[[sqlite3.Connection, Any], Any]
    is_long: Callable[[Any], bool]


_ANSWERS: dict[type[Query[Any]], _Answer] = {}


def _never(query: object) -> bool:
    return False


def always(query: object) -> bool:
    """Return that any query of a kind may read many runs."""
    return True


def answers(kind: type[Q], *, is_long: Callable[[Q], bool] = _never) -> Callable[[Answering[Q, A]], Answering[Q, A]]:
    """Make a function the one that answers a kind of query.

    Args:
        kind: the kind of query; the function is given a reader's connection and the query, in the reader's thread.
        is_long: returns whether a query may read many runs to answer few, and so has to keep out of quick ones' way.

    """

    def note(fetch: Answering[Q, A]) -> Answering[Q, A]:
        _ANSWERS[kind] = _Answer(fetch, is_long)
        return fetch

    return note


def load() -> None:
    """Import every module of statements, so that each has said what it answers."""
    for module in iter_modules(statements.__path__, f"{statements.__name__}."):
        import_module(module.name)


def answer(connection: sqlite3.Connection, query: Query[A]) -> A:
    """Answer a query.

    Raises:
        KeyError: if nothing answers its kind.
        sqlite3.Error: if the database cannot be read.

    """
    return cast(A, _ANSWERS[type(query)].fetch(connection, query))


def is_long(query: Query[Any]) -> bool:
    """Return whether a query may read many runs to answer few."""
    return _ANSWERS[type(query)].is_long(query)
