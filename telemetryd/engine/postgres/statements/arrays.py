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


def creating(names: Sequence[str]) -> str:
    """Return the statement that makes runs of these columns and returns the event_id and id of each that is new.

    Ids are in the order in which the runs are given; rows are stored in the order of their event_ids.
    """
    return f"""
        INSERT INTO agent_runs (id, {", ".join(names)})
        SELECT id, {selected(names)} FROM (
            SELECT nextval('numbers') AS id, given.* FROM unnest({arrays(names)}) AS given ({", ".join(names)})
        ) AS numbered
        ORDER BY event_id COLLATE "C", id
        ON CONFLICT (event_id) DO NOTHING
        RETURNING event_id, id
    """


def by_column(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Return rows, of which there is one at least, column by column."""
    return [[*column] for column in zip(*rows, strict=True)]
