"""Compares runs that were known already with the stored ones, for the warnings of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from telemetryd.errors import TelemetrydError
from telemetryd.model import queries, runs, values
from telemetryd.store import Store

_AT_ONCE: Final = 1000
"""Runs that are compared at once; to read so many takes some 20 ms of a reader."""
_PLACE: Final = runs.COLUMNS.index("event_id")


async def differences(
    store: Store, known: Sequence[values.Row], *, changes_follow: bool = False
) -> dict[int, list[str]]:
    """Return in which fields known runs differ from the stored ones, by their place in the sequence.

    A run whose first body said the same differs in none, whatever has become of it since; one that names no trace is
    taken to be part of the stored one's. Nothing is compared if nothing can be read now: what was asked for is done
    anyway.

    Args:
        store: where they are.
        known: in the order of `runs.STORED`.
        changes_follow: whether their sender is going to PATCH them.

    """
    found: dict[int, list[str]] = {}
    for begin in range(0, len(known), _AT_ONCE):
        part = known[begin : begin + _AT_ONCE]
        digests = [runs.digest(row) for row in part]
        asked = queries.GetOthers(
            tuple((str(row[runs.EVENT_ID]), digest) for row, digest in zip(part, digests, strict=True))
        )
        try:
            others = {other.row[_PLACE]: other for other in await store.fetch(asked)}
        except TelemetrydError:
            return found
        for place, (row, digest) in enumerate(zip(part, digests, strict=True), begin):
            other = others.get(row[runs.EVENT_ID])
            if other is None:
                continue
            said = runs.in_trace_of(row, other.row)
            if other.digest not in (digest, runs.digest(said)):
                knows_body = other.digest is not None
                names = runs.differing_fields(said, other.row, knows_body=knows_body, changes_follow=changes_follow)
                if names:
                    found[place] = names
    return found


def warning(names: Sequence[str]) -> str:
    """Say in which fields a known run differs."""
    return f"The event_id is known, and the stored run, which stays as it is, differs in: {', '.join(names)}"
