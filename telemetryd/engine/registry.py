"""Registries of query handlers: which function of an engine answers which query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, Generic, TypeVar, cast

from telemetryd.model.queries import Query

A = TypeVar("A")
C = TypeVar("C")
Q = TypeVar("Q", bound=Query[Any])


@dataclass(frozen=True, slots=True)
class Handler(Generic[C]):
    """What answers one kind of query."""

    fetch: Callable[[C, Any], Any]
    is_long: Callable[[Any], bool]


def _never(query: object) -> bool:
    return False


def always(query: object) -> bool:
    """Return that any query of a kind may read many runs."""
    return True


class Registry(Generic[C]):
    """What answers the queries of one engine, whose connections are a `C`.

    Args:
        package: its modules of statements, each of which says what it answers when it is imported.

    """

    def __init__(self, package: ModuleType) -> None:
        self._package = package
        self.handlers: dict[type[Query[Any]], Handler[C]] = {}

    def answers(
        self, kind: type[Q], *, is_long: Callable[[Q], bool] = _never
    ) -> Callable[[Callable[[C, Q], A]], Callable[[C, Q], A]]:
        """Make a function the one that answers a kind of query.

        Args:
            kind: the kind of query; the function is given a reader's connection and the query, in the reader's thread.
            is_long: returns whether a query may read many runs to answer few, and so has to keep out of quick ones'
                way.

        """

        def note(fetch: Callable[[C, Q], A]) -> Callable[[C, Q], A]:
            self.handlers[kind] = Handler(fetch, is_long)
            return fetch

        return note

    def load(self) -> None:
        """Import every module of statements, so that each has said what it answers."""
        for module in iter_modules(self._package.__path__, f"{self._package.__name__}."):
            import_module(module.name)

    def answer(self, connection: C, query: Query[A]) -> A:
        """Answer a query.

        Raises:
            KeyError: if nothing answers its kind.

        """
        return cast(A, self.handlers[type(query)].fetch(connection, query))

    def is_long(self, query: Query[Any]) -> bool:
        """Return whether a query may read many runs to answer few."""
        return self.handlers[type(query)].is_long(query)
