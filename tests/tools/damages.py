"""Damages databases in the ways in which disks and copies do, and says what can still be read."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from random import Random

from telemetryd.engine.sqlite.connection import lenient_text

KINDS = ("bits", "zeroed", "noise", "cut", "swapped", "copied")


def damage(path: Path, kind: str, random: Random, page_size: int = 4096) -> None:
    """Damage some pages of a file, but not its first one, of which everything depends."""
    content = bytearray(path.read_bytes())
    pages = len(content) // page_size
    chosen = [random.randrange(1, pages) * page_size for _ in range(random.choice((1, 3, pages // 50 + 2)))]
    for start in chosen:
        other = random.randrange(1, pages) * page_size
        one, two = content[start : start + page_size], content[other : other + page_size]
        if kind == "bits":
            for _ in range(random.choice((1, 8, 200))):
                content[start + random.randrange(page_size)] ^= 1 << random.randrange(8)
        elif kind == "zeroed":
            content[start : start + page_size] = bytes(page_size)
        elif kind == "noise":
            length = random.choice((20, 600, page_size))
            begin = start + random.randrange(page_size - length + 1)
            content[begin : begin + length] = random.randbytes(length)
        elif kind in ("swapped", "copied"):
            content[start : start + page_size] = two
            if kind == "swapped":
                content[other : other + page_size] = one
    if kind == "cut":
        del content[random.randrange(len(content) // 3, len(content)) :]
    path.write_bytes(content)


def readable(path: Path, table: str, numbers: list[int]) -> set[int]:
    """Return which rows SQLite can read by their number, one by one, as far as they look like rows of the table."""
    found = set()
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        connection.text_factory = lenient_text
        connection.execute("PRAGMA writable_schema = ON")  # or a file that was cut short is refused as a whole
        for number in numbers:
            try:
                row = connection.execute(f"SELECT * FROM {table} WHERE id = ?", (number,)).fetchone()
            except (sqlite3.Error, MemoryError):
                continue
            if row is not None and row[0] == number and isinstance(row[_NAME[table]], (str, bytes)):
                found.add(number)
    return found


_NAME = {"agent_runs": 1, "run_events": 2}
"""Where a text has to be, which a page of another table does not have there."""
