"""Rows of runs as arrays: what `unnest` takes, one parameter for each column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from telemetryd.model.runs import TEXTS, columns
from telemetryd.model.values import Role

_JSON: Final = frozenset(columns(Role.JSON))


def arrays(names: Sequence[str]) -> str:
    """Return the parameters of these columns of the runs."""
    return ", ".join(f"%s::{'text' if name in TEXTS else 'bigint'}[]" for name in names)


def selected(names: Sequence[str]) -> str:
    """Return these columns of what `unnest` gives, as their table takes them."""
    return ", ".join(f"{name}::json" if name in _JSON else name for name in names)


def by_column(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Return rows, of which there is one at least, column by column."""
    return [[*column] for column in zip(*rows, strict=True)]
