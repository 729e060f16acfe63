"""Finds foreign objects in a database: those that can change or reject writes, and harmless ones."""

from __future__ import annotations

import re
import shlex
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from telemetryd.engine.sqlite.connection import quoted
from telemetryd.engine.sqlite.statements import full_text
from telemetryd.engine.sqlite.tools import migrate
from telemetryd.errors import DatabaseError

HIGHEST_NUMBER: Final = 2**62
"""Ids and numbers beyond it leave too little room: SQLite gives no row an id beyond 2**63 - 1."""

_OBJECTS: Final = (
    "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT GLOB 'sqlite_*' "
    "ORDER BY type, name"
)
_IS_UNIQUE: Final = 'SELECT "unique" FROM pragma_index_list(?) WHERE name = ?'
_INDEXED: Final = "SELECT cid, coll FROM pragma_index_xinfo(?) WHERE key"
_EXPRESSION: Final = -2
_COLLATIONS: Final = frozenset({"BINARY", "NOCASE", "RTRIM"})
"""Those of SQLite itself; any other one is missing in our process, and then nothing can be written."""

_TOKEN: Final = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | `(?:[^`]|``)*` | \[[^\]]*\] | --[^\n]* | /\*.*?\*/ | ->>? | \w+ | [^\s\w]""",
    re.VERBOSE | re.DOTALL,
)
_BEFORE_BRACKETS: Final = frozenset({"AND", "OR", "NOT", "IN", "BETWEEN", "IS", "LIKE", "GLOB", "WHERE"})

_NUMBERS: Final = (
    ("an id of agent_runs", "SELECT max(id) FROM agent_runs"),
    ("an id of run_events", "SELECT max(id) FROM run_events"),
    ("a number of run_changes", "SELECT max(seq) FROM run_changes"),
    ("a number of run_deletions", "SELECT max(seq) FROM run_deletions"),
    ("a number of change_feed", "SELECT max(max(floor, horizon, event_floor)) FROM change_feed"),
    ("a number of followed_feed", "SELECT max(max(seq, begun)) FROM followed_feed"),
    ("an id of run_stats_log", "SELECT max(max(id, total)) FROM run_stats_log"),
    ("a number of alert_deliveries", "SELECT max(number) FROM alert_deliveries"),
)


@dataclass(frozen=True, slots=True)
class Foreign:
    """Something in the schema that is not ours."""

    kind: str
    name: str
    table: str
    harm: str | None
    """What it can do to our writes, or None if it may stay."""

    def __str__(self) -> str:
        """Return what it is."""
        place = "" if self.kind in ("table", "view") else f" on {self.table}"
        return f"{self.kind} {self.name}{place}"

    def removal(self, path: str) -> str:
        """Return the command that removes it."""
        statement = f"DROP {self.kind.upper()} {quoted(self.name)}"
        return f"sqlite3 {shlex.quote(path)} {shlex.quote(statement)}"


def find_foreign(connection: sqlite3.Connection) -> Iterator[Foreign]:
    """Yield everything in the schema that is not ours; what has a name of ours `migrate.check_schema` compares."""
    ours = migrate.expected_schema()
    tables = {name for name, sql in ours.items() if sql.startswith("CREATE TABLE")}
    for kind, name, table, sql in connection.execute(_OBJECTS).fetchall():
        if full_text.is_part(kind, name, sql) or (name in ours if kind != "trigger" else ours.get(name) == sql):
            continue
        harm = None
        if table.lower() in tables:
            if kind == "trigger":
                harm = "it can change or swallow what is stored"
            elif kind == "index":
                harm = _harm_of_index(connection, name, table, sql)
        yield Foreign(kind, name, table, harm)


def _harm_of_index(connection: sqlite3.Connection, name: str, table: str, sql: str) -> str | None:
    if connection.execute(_IS_UNIQUE, (table, name)).fetchone()[0]:
        return "it is UNIQUE, so it can refuse what is to be stored"
    indexed = connection.execute(_INDEXED, (name,)).fetchall()
    if any(column == _EXPRESSION for column, _ in indexed) or _computes(sql):
        return "it is on an expression, which can fail when something is stored"
    if any(collation.upper() not in _COLLATIONS for _, collation in indexed):
        return "it needs an order of text that SQLite does not have, so nothing can be stored"
    return None


def _computes(sql: str) -> bool:
    """Return whether the WHERE of an index calls a function, or an operator that is one."""
    tokens = [token.upper() for token in _TOKEN.findall(sql) if not token.startswith(("--", "/*"))]
    if "WHERE" not in tokens:
        return False
    where = tokens[tokens.index("WHERE") :]
    calls = any(
        after == "(" and before not in _BEFORE_BRACKETS and re.fullmatch(r"\w+|\".*\"|`.*`|\[.*\]", before, re.DOTALL)
        for before, after in pairwise(where)
    )
    return calls or any(token in ("->", "->>", "MATCH", "REGEXP", "COLLATE") for token in where)


def find_spent_numbers(connection: sqlite3.Connection) -> Iterator[str]:
    """Yield each kind of numbers that has come too near to the end of 63 bits, with its highest one."""
    for what, sql in _NUMBERS:
        highest = connection.execute(sql).fetchone()[0]
        if highest is not None and highest > HIGHEST_NUMBER:
            yield f"{what} is {highest}"


def refuse_harmful(connection: sqlite3.Connection, path: Path, *, is_current: bool = True) -> None:
    """Stop at what others have put into a database of ours that can change, swallow or refuse our writes.

    Args:
        connection: is open on it.
        path: what it is called.
        is_current: whether it has the current schema; an older one may lack tables whose numbers are looked at.

    Raises:
        DatabaseError: that names it, and the command that removes it.

    """
    for found in find_foreign(connection):
        if found.harm is not None:
            raise DatabaseError(
                f"{path} has a {found} that is not telemetryd's own: {found.harm}; nothing was changed. "
                f"Remove it: {found.removal(str(path))}"
            )
    if is_current and (spent := next(find_spent_numbers(connection), None)) is not None:
        raise DatabaseError(
            f"{path} cannot take new runs: {spent}, and numbers end at 2^63; nothing was changed: "
            "run telemetryd check --repair, or restore a backup"
        )
