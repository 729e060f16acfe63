"""Case-insensitive substring search: in SQL, and in short steps where one statement would take long.

A comparison by LIKE or GLOB is one step, which nothing can interrupt, and it begins again at each letter: a text of
15 MB that nearly matches everywhere takes it ten seconds (sqlite.org/c3ref/interrupt.html, lang_expr.html#like).
"""

from __future__ import annotations

import codecs
import sqlite3
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Final

from telemetryd.engine import letter_case

LARGE_BYTES: Final = 8 * 1024
"""Above this size the function is asked, below it SQLite, which takes some milliseconds then at most."""

FUNCTION: Final = "text_holds"

_PIECE_BYTES: Final = 64 * 1024
"""About a millisecond's work, and enough for str.find to take linear time for any text."""
_ENCODINGS: Final = {"UTF-8": "utf-8", "UTF-16le": "utf-16-le", "UTF-16be": "utf-16-be"}
"""Those that a database may have (sqlite.org/pragma.html#pragma_encoding), in Python's words."""


class InterruptedSearchError(Exception):
    """A search was ended before it came to its end."""


def condition(column: str, text: str) -> tuple[str, dict[str, str]]:
    """Return what is in SQL that a column holds a text, and the values that are bound to `:error` and `:error_text`."""
    size = f"length(CAST({column} AS BLOB))"
    operator, pattern = _comparison(text)
    large = f"{FUNCTION}(CAST({column} AS BLOB), :error_text)"
    return f"iif({size} > {LARGE_BYTES}, {large}, {column} {operator})", {"error": pattern, "error_text": text}


def _comparison(text: str) -> tuple[str, str]:
    """Return SQLite's own comparison, and the pattern: LIKE is the faster one, but knows only the case of ASCII."""
    if text.isascii():
        escaped = "".join(f"\\{sign}" if sign in "\\%_" else sign for sign in text)
        return r"LIKE :error ESCAPE '\'", f"%{escaped}%"
    forms = letter_case.forms(text)
    signs = (f"[{''.join(forms[sign])}]" if len(forms[sign]) > 1 or sign in "*?[" else sign for sign in text)
    return "GLOB :error", f"*{''.join(signs)}*"


@lru_cache(maxsize=8)
def _folding(text: str) -> tuple[dict[int, int], str]:
    """Return what makes one of all signs that count as the same, and the text in which that is done."""
    table = {ord(sign): ord(next(iter(same))) for sign, same in letter_case.forms(text).items()}
    return table, text.translate(table)


def holds(raw: bytes, text: str, *, encoding: str, is_over: Callable[[], bool]) -> bool:
    """Return whether a large text holds another one; the time grows only with their lengths.

    Raises:
        InterruptedSearchError: soon after `is_over` says so.

    """
    table, wanted = _folding(text)
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    end = ""
    for start in range(0, len(raw), _PIECE_BYTES):
        if is_over():
            raise InterruptedSearchError
        piece = end + decoder.decode(raw[start : start + _PIECE_BYTES]).translate(table)
        if wanted in piece:
            return True
        end = piece[len(piece) - len(wanted) + 1 :] if len(piece) >= len(wanted) else piece
    return False


def add_to(connection: sqlite3.Connection, is_over: Callable[[], bool]) -> None:
    """Let a connection search large texts, until `is_over` says that its statement shall end."""
    (encoding,) = connection.execute("PRAGMA encoding").fetchone()
    search = partial(holds, encoding=_ENCODINGS[encoding], is_over=is_over)
    connection.create_function(FUNCTION, 2, search, deterministic=True)
