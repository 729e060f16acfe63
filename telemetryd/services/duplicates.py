"""Compares runs that were known already with the stored ones, for the warnings of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from telemetryd.errors import TelemetrydError
from telemetryd.model import queries, runs, values
from telemetryd.store import Store

_MOST: Final = 1000
"""Runs of one request that are compared; to read so many takes some 20 ms of a reader."""
_PLACE: Final = runs.COLUMNS.index("event_id")
_TEXT: Final = "The event_id is known, and the stored run, which stays as it is, differs in: "


async def differences(store: Store, known: Sequence[values.Row]) -> dict[int, list[str]]:
    """Say of runs that were known already where they differ from the stored ones, by their place in the sequence.

    Only the first ones are compared, and none if nothing can be read now: what was asked for is done anyway.
    """
    known = known[:_MOST]
    try:
        rows = await store.fetch(queries.GetRows(tuple(str(row[runs.EVENT_ID]) for row in known)))
    except TelemetrydError:
        return {}
    stored = {row[_PLACE]: row for row in rows}
    found = {
        place: runs.differing_fields(row, stored[row[runs.EVENT_ID]])
        for place, row in enumerate(known)
        if row[runs.EVENT_ID] in stored
    }
    return {place: [_TEXT + ", ".join(names)] for place, names in found.items() if names}
