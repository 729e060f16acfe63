"""The full-text index over the texts of runs: its name, whether it is there, and queries of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from telemetryd.engine.postgres.connection import Plain
from telemetryd.errors import InvalidRequestError, UnavailableError
from telemetryd.model.filters import Filters

SEARCHED: Final = ("input_summary", "output_summary", "error_summary", "error_details")
"""The fields that are searched."""
INDEX: Final = "idx_runs_words"
WORDS: Final = f"telemetryd_words({', '.join(SEARCHED)})"
"""The words of a run, as they are indexed."""

HAS_TEXT: Final = f"coalesce({', '.join(SEARCHED)}) IS NOT NULL"
"""What is seen of a run in no time, other than its words."""

_STATE: Final = """
    SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(current_schema() || '.' || %s)
"""


def require(plain: Plain, filters: Filters) -> None:
    """Refuse a search for words where there is no index of them.

    Raises:
        InvalidRequestError: if that is so; the sentence names the setting.
        UnavailableError: if it is still being built.

    """
    if filters.words is None:
        return
    state = plain.execute(_STATE, (INDEX,)).fetchone()
    if state is None:
        raise InvalidRequestError(
            "Invalid q: this daemon keeps no full-text index; to search for words it must be started with "
            "TELEMETRY_FULL_TEXT=true"
        )
    if not state[0]:
        raise UnavailableError("The full-text index is being built; search again later")


_BY_INDEX: Final = "SELECT set_config('enable_seqscan', 'off', true), set_config('gin_fuzzy_search_limit', %s, true)"


@contextmanager
def by_index(plain: Plain, *, is_needed: bool, most: int = 0) -> Iterator[None]:
    """Let statements find runs by their indexes if that is needed, whatever PostgreSQL believes.

    What it costs to make words of a text again it does not know; nor that those that match may all be at the end.
    Of words that are in more than about `most` runs, only some of these are found; 0 means that all are.
    """
    if not is_needed:
        yield
        return
    with plain.transaction():
        plain.execute(_BY_INDEX, (str(most),))
        yield


def query(words: str) -> tuple[str, dict[str, str]]:
    """Return words, `prefix*` and "phrases" as a query in SQL, and what is bound to it."""
    parts: list[str] = []
    values: dict[str, str] = {}
    for place, part in enumerate(words.split('"')):
        for term in [part] if place % 2 else part.split():
            if any(map(str.isalnum, term)):
                name = f"q_{len(parts)}"
                values[name] = term
                phrase = f"phraseto_tsquery('pg_catalog.simple', telemetryd_plain(%({name})s::text))"
                is_prefix = place % 2 == 0 and term.endswith("*")
                parts.append(f"(SELECT {_AS_PREFIX} FROM {phrase} AS phrase)" if is_prefix else phrase)
    return f"({' && '.join(parts)})", values


_AS_PREFIX: Final = "CASE WHEN numnode(phrase) = 0 THEN phrase ELSE (phrase::text || ':*')::tsquery END"
"""A prefix is the last word of its phrase; of a sign that no text is made of it is nothing."""
