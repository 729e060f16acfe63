"""Reads the rows of a damaged database around the damage: every one that SQLite can still read by its number."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import mean
from typing import Final, NamedTuple

from telemetryd.engine.sqlite.connection import quoted
from telemetryd.engine.sqlite.tools.btree import Leaf, TableFile
from telemetryd.engine.sqlite.tools.conversion import RawValue

Row = tuple[RawValue, ...]
"""The values of a row, after its number."""

_LEAVES: Final = 16
"""Leaf pages that are read at once where nothing is damaged: some hundred rows."""
_SLICE: Final = 500
"""Rows that are passed on at once, where no page says how many belong together."""
_UNREADABLE: Final = (sqlite3.Error, MemoryError, OverflowError)
"""What a damaged row can end in: it may say that it is a gigabyte long."""
_ROW_NUMBER: Final = ("rowid", "_rowid_", "oid")


class _Column(NamedTuple):
    name: str
    key: int
    """Its place in the primary key, from 1, or 0."""


@dataclass(slots=True)
class Table:
    """One table of a damaged database, and what is known of how much it had."""

    name: str
    columns: list[_Column]
    """Those that can be written; others are computed from them."""
    row_number: str | None
    """How SQL calls the number of a row, or None if its rows have none."""
    root: int
    is_whole: bool = True
    """Whether everything could be read."""
    estimates: list[int] = field(default_factory=list)
    """How many rows there were, by different witnesses."""
    estimate: int | None = None
    """How many there were if the pages that are gone were like those that are left."""

    @property
    def selected(self) -> str:
        """The columns as they stand in SQL."""
        return ", ".join(quoted(column.name) for column in self.columns)

    @property
    def key(self) -> list[str]:
        """The columns of the primary key, in its order."""
        return [column.name for column in sorted(self.columns, key=lambda column: column.key) if column.key]

    def there(self, read: int) -> tuple[int | None, bool]:
        """Return how many rows there were, as most witnesses say, and whether that is only an estimate.

        Args:
            read: how many could be read.

        """
        witnesses = [*([read] if self.is_whole else []), *self.estimates]
        if witnesses:
            return max(Counter(witnesses).most_common(1)[0][0], read), False
        return (None, False) if self.estimate is None else (max(self.estimate, read), True)


class Entry(NamedTuple):
    """A line of the schema."""

    kind: str
    name: str
    table: str
    root: int
    sql: str


def read_schema(source: sqlite3.Connection, file: TableFile) -> tuple[list[Entry], bool]:
    """Return what can be read of the schema, tables first, but SQLite's own, and whether that is all of it."""
    columns = [_Column(name, 0) for name in ("type", "name", "tbl_name", "rootpage", "sql")]
    table = Table("sqlite_master", columns, "rowid", root=1)
    found = [row[1:] for rows in _Numbered(source, file, table).slices() for row in rows]
    entries = [
        Entry(kind, name, of, root, sql)
        for kind, name, of, root, sql in found
        if isinstance(kind, str)
        and isinstance(name, str)
        and not name.startswith("sqlite_")
        and isinstance(of, str)
        and isinstance(root, int)
        and isinstance(sql, str)
    ]
    return sorted(set(entries), key=lambda entry: (entry.kind != "table", entry.name)), table.is_whole


def look(source: sqlite3.Connection, entry: Entry) -> Table:
    """Return what is known of a table.

    Raises:
        sqlite3.DatabaseError: if SQLite does not know it.

    """
    found = source.execute(f"PRAGMA table_xinfo({quoted(entry.name)})").fetchall()
    columns = [_Column(row[1], row[5]) for row in found if not row[6]]
    without = source.execute("SELECT wr FROM pragma_table_list WHERE schema = 'main' AND name = ?", (entry.name,))
    has_none = any(row[0] for row in without.fetchall())
    taken = {row[1].lower() for row in found}
    free = next((name for name in _ROW_NUMBER if name not in taken), None)
    return Table(entry.name, columns, None if has_none else free, entry.root)


def read(source: sqlite3.Connection, file: TableFile, table: Table) -> Iterator[list[Row]]:
    """Yield the rows of a table in slices, each with its number first (None if it has none); some may come twice."""
    if table.row_number is None:
        yield from _read_by_key(source, table)
    else:
        yield from _Numbered(source, file, table).slices()
    table.estimates += _count_in_indexes(source, table.name)


def _count_in_indexes(source: sqlite3.Connection, name: str) -> Iterator[int]:
    """Yield the number of entries of each index that has one for every row, and that can be read."""
    with contextlib.suppress(sqlite3.DatabaseError):
        indexes = source.execute(f"PRAGMA index_list({quoted(name)})").fetchall()
        for index in (row[1] for row in indexes if not row[4] and row[3] == "c"):
            with contextlib.suppress(sqlite3.DatabaseError):
                # count(*) alone would take the smallest index, whichever is named.
                counted = f"SELECT sum(1) FROM {quoted(name)} INDEXED BY {quoted(index)}"
                yield int(source.execute(counted).fetchone()[0] or 0)


# --- Tables whose rows have numbers --------------------------------------------------------------


class _Numbered:
    """Reads page after page: a leaf that does not give what it says it has is tried row by row.

    Where the keys above a leaf lie, SQLite finds none of its rows by number, so a scan of the whole table from both
    ends reads those that are still missing. Each row is read a few times at most: the ranges of the leaves do not
    overlap, and no number is tried twice.
    """

    def __init__(self, source: sqlite3.Connection, file: TableFile, table: Table) -> None:
        self._source = source
        self._file = file
        self._table = table
        rows = f"SELECT {table.row_number}, {table.selected} FROM {quoted(table.name)} NOT INDEXED"
        self._span = f"{rows} WHERE {table.row_number} BETWEEN ? AND ? ORDER BY {table.row_number}"
        self._one = f"{rows} WHERE {table.row_number} = ?"
        self._all = f"{rows} ORDER BY {table.row_number}"
        self._tried: set[RawValue] = set()
        """The numbers of the rows that were read or tried near a damage."""
        self._missing: set[RawValue] = set()
        """Those of them that were not found."""

    def slices(self) -> Iterator[list[Row]]:
        cells: list[int] = []
        missing: list[Leaf] = []
        deepest = 0
        leaves: list[Leaf] = []
        for leaf in self._file.leaves(self._table.root):
            if leaf.cells is None:
                missing.append(leaf)
            else:
                cells.append(leaf.cells)
                deepest = max(deepest, leaf.depth)
            leaves.append(leaf)
            if len(leaves) == _LEAVES:
                yield from self._group(leaves)
                leaves = []
        if leaves:
            yield from self._group(leaves)
        for order in ("", " DESC"):
            yield from self._scan_for_missing(order, sum(cells))
        if not missing:
            self._table.estimates.append(sum(cells))
        elif cells:
            pages = sum(self._file.pages_below(leaf, deepest) for leaf in missing)
            self._table.estimate = sum(cells) + round(mean(cells) * pages)

    def _group(self, leaves: list[Leaf]) -> Iterator[list[Row]]:
        numbers = [number for leaf in leaves for number in self._file.numbers(leaf)]
        is_sound = all(leaf.cells is not None and not leaf.is_lie for leaf in leaves)
        rows, is_end = self._scan(leaves[0].low, leaves[-1].high, len(numbers)) if is_sound else ([], False)
        if not is_end or [row[0] for row in rows] != numbers:
            rows = [row for leaf in leaves for row in self._leaf(leaf)]
        if rows:
            yield rows

    def _leaf(self, leaf: Leaf) -> Iterable[Row]:
        most = _SLICE if leaf.cells is None else leaf.cells
        rows, is_end = ([], True) if leaf.is_lie else self._scan(leaf.low, leaf.high, most)
        numbers = self._file.numbers(leaf)
        if is_end and leaf.cells is not None and [row[0] for row in rows] == numbers:
            return rows
        found = {row[0]: row for row in rows}
        if leaf.cells is None and not is_end:
            found |= {row[0]: row for row in self._scan(leaf.low, leaf.high, most, " DESC")[0]}
        if leaf.cells is None:
            self._table.is_whole = False
            return found.values()
        self._tried.update(found)
        self._missing.difference_update(found)
        for number in numbers:
            if number in self._tried:
                continue
            self._tried.add(number)
            if (row := self._row(number)) is None:
                self._missing.add(number)
            else:
                found[number] = row
        # Others may stand here, too, where another page has taken the place of this one.
        if sum(leaf.is_lie or leaf.low <= int(number or 0) <= leaf.high for number in found) < leaf.cells:
            self._table.is_whole = False
        return found.values()

    def _scan_for_missing(self, order: str, most: int) -> Iterator[list[Row]]:
        """Yield the rows that are missing, in slices, from one end of the table up to the first damage.

        Args:
            order: of the numbers, as SQL says it.
            most: how many rows the leaves say they have; a scan that gives more reads the same pages again.

        """
        if not self._missing:
            return
        rows: list[Row] = []
        with contextlib.suppress(*_UNREADABLE):
            for row in itertools.islice(self._source.execute(self._all + order), most):
                if row[0] in self._missing:
                    self._missing.remove(row[0])
                    rows.append(row)
                if not self._missing:
                    break
                if len(rows) == _SLICE:
                    yield rows
                    rows = []
        if rows:
            yield rows

    def _scan(self, low: int, high: int, most: int, order: str = "") -> tuple[list[Row], bool]:
        """Return the rows of a range up to the first damage, and whether there was none.

        A damaged page may give a number that is none, is out of the range, or is not the next one in order. More
        rows than the most that can stand there are damage, too: a key above them lies.
        """
        rows: list[Row] = []
        try:
            for row in self._source.execute(self._span + order, (low, high)):
                number = row[0]
                if not isinstance(number, int) or not low <= number <= high or len(rows) == most:
                    return rows, False
                if order:
                    high = number - 1
                else:
                    low = number + 1
                rows.append(row)
        except _UNREADABLE:
            return rows, False
        return rows, True

    def _row(self, number: int) -> Row | None:
        try:
            row: Row | None = self._source.execute(self._one, (number,)).fetchone()
        except _UNREADABLE:
            return None
        return row if row is not None and row[0] == number else None


# --- Tables whose rows have none -----------------------------------------------------------------


def _read_by_key(source: sqlite3.Connection, table: Table) -> Iterator[list[Row]]:
    """Yield the rows from the front, and where that ends at damage, from the back."""
    for order in ("", " DESC"):
        by = ", ".join(f"{quoted(name)}{order}" for name in table.key)
        sql = f"SELECT NULL, {table.selected} FROM {quoted(table.name)}" + (f" ORDER BY {by}" if by else "")
        rows: list[Row] = []
        try:
            for row in source.execute(sql):
                rows.append(row)
                if len(rows) == _SLICE:
                    yield rows
                    rows = []
        except _UNREADABLE:
            table.is_whole = False
        if rows:
            yield rows
        if table.is_whole:
            return


def read_of_runs(
    source: sqlite3.Connection, table: Table, keys: Iterable[tuple[object, ...]], where: str
) -> Iterator[list[Row]]:
    """Yield those rows of a damaged table without row numbers that belong to the given runs."""
    sql = f"SELECT NULL, {table.selected} FROM {quoted(table.name)} WHERE {where}"
    for key in keys:
        with contextlib.suppress(*_UNREADABLE):
            if rows := source.execute(sql, key).fetchall():
                yield rows
