"""Bounds the size of an answer: shortens long texts, then leaves out the ends of its lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from telemetryd.model import events, runs
from telemetryd.model.values import Role, names

MOST_BYTES: Final = 32 * 1024
"""What one answer holds at most: some ten thousand tokens, which assistants take without complaint."""
TEXTS: Final = (4000, 1000, 300)
"""Characters that each text keeps: the most with which the answer fits; identifiers are shorter than the least."""
_SHORTEST: Final = 100
"""Characters that each text keeps where even one run would be too large else."""
FREE: Final = frozenset({*names(runs.Run, Role.JSON), *names(events.Event, Role.JSON), "details"})
"""The names of objects whose keys are the agents' own."""

LEFT_OUT: Final = "left_out"
SHORTENED: Final = "shortened"
CUT: Final = "(left out)"
"""The key that stands for those that an object of an agent's own has lost."""


def fit(answer: Mapping[str, Any], most: int = MOST_BYTES) -> dict[str, Any]:
    """Return an answer so that its JSON has at most so many bytes; it says what it has lost.

    Args:
        answer: an object of plain JSON values.
        most: the bytes.

    """
    for longest in TEXTS:
        kept = _with_texts_of(longest, answer)
        if _size(kept) <= most:
            return kept
    kept = _without_ends(kept, most)
    return kept if _size(kept) <= most else _without_ends(_with_texts_of(_SHORTEST, answer), most)


def _with_texts_of(longest: int, answer: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: _shortened(name, value, longest) for name, value in answer.items()}
    return kept if kept == answer else {**kept, SHORTENED: True}


def _size(value: object) -> int:
    return len(orjson.dumps(value))


def _shortened(name: str, value: Any, longest: int) -> Any:
    if isinstance(value, str):
        more = len(value) - longest
        return f"{value[:longest]}… ({more} characters left out)" if more > 0 else value
    if isinstance(value, list):
        return [_shortened(name, each, longest) for each in value]
    if not isinstance(value, dict):
        return value
    if name in FREE:  # of several long texts each keeps something
        return _first_keys({key: _shortened("", each, longest // 4) for key, each in value.items()}, longest)
    return {key: _shortened(key, each, longest) for key, each in value.items()}


def _first_keys(value: dict[str, Any], most: int) -> dict[str, Any]:
    """Return an object of an agent's own with those of its keys, in order, that so many bytes hold."""
    if _size(value) <= most:
        return value
    kept: dict[str, Any] = {}
    room = most
    for key, each in value.items():
        room -= _size({key: each})
        if room < 0:
            break
        kept[key] = each
    kept[CUT] = f"{len(value) - len(kept)} of {len(value)} keys"
    return kept


def _without_ends(answer: dict[str, Any], most: int) -> dict[str, Any]:
    """Leave out the ends of the answer's own lists, of the largest one first, until it fits."""
    lists = {name: list(value) for name, value in answer.items() if isinstance(value, list)}
    sizes = {name: [_size(each) + 1 for each in value] for name, value in lists.items()}
    empty = {name: value for name, value in answer.items() if name not in lists}
    room = most - _size({**empty, **dict.fromkeys(lists, "[]"), LEFT_OUT: dict.fromkeys(lists, 10**9)})
    totals = {name: sum(each) for name, each in sizes.items()}
    left_out: dict[str, int] = {}
    while sum(totals.values()) > room and any(lists.values()):
        name = max(totals, key=totals.__getitem__)
        lists[name].pop()
        totals[name] -= sizes[name].pop()
        left_out[name] = left_out.get(name, 0) + 1
    return {**answer, **lists, LEFT_OUT: left_out}
