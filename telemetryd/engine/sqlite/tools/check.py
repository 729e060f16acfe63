"""Examines a database, says what to do about each finding, and repairs what can be repaired in place."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Final

from telemetryd.engine.sqlite.connection import connect, connect_to_read, is_damage, quoted
from telemetryd.engine.sqlite.files import identify
from telemetryd.engine.sqlite.statements import full_text, labels, runs
from telemetryd.engine.sqlite.tools import foreign, integrity, legacy, migrate, renumbering
from telemetryd.engine.sqlite.tools.backup import Watch, ignore_progress
from telemetryd.errors import DatabaseError
from telemetryd.model.filters import TIME_BOUNDS, Filters
from telemetryd.model.queries import SORTED, ListRuns, Order, Position
from telemetryd.model.runs import FILTERS

_LISTED: Final = 100
_NAMED: Final = 10
_VERSION: Final = "version"
_Examine = Callable[[sqlite3.Connection], Iterator["Finding"]]
REPAIR: Final = "stop the daemon and run: telemetryd check --repair"


class Severity(StrEnum):
    """How bad a finding is."""

    NOTE = "note"
    """Nothing needs to be done."""
    PROBLEM = "problem"
    """`--repair` fixes it in place; no run is lost."""
    DAMAGE = "damage"
    """The file itself is damaged; runs may be lost."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found, and what to do about it."""

    check: str
    severity: Severity
    text: str
    advice: str


def examine(path: Path, watch: Watch = ignore_progress) -> list[Finding]:
    """Run every check on a database, which may be in use: only a read-only connection is opened.

    Raises:
        DatabaseError: if it cannot be examined, for instance because another process locks it.

    """
    checks = (
        _integrity,
        _version,
        _schema,
        _numbers,
        _totals,
        _strays,
        _values,
        _credentials,
        _labels,
        _full_text,
        _space,
        _foreign_keys,
        _index_usage,
    )
    findings: list[Finding] = []
    try:
        with contextlib.closing(connect_to_read(path)) as connection:
            connection.execute("PRAGMA query_only = ON")
            for number, check in enumerate(checks):
                watch("Checking", number, len(checks))
                findings += check(connection)
                # What a damaged file says of itself means nothing, and one of another version knows other tables.
                if any(finding.severity is Severity.DAMAGE or finding.check == _VERSION for finding in findings):
                    break
            watch("Checking", len(checks), len(checks))
    except sqlite3.Error as error:
        if not is_damage(error):
            raise DatabaseError(f"Cannot examine {path}: {error}") from error
        findings.append(_damage(str(error)))
    return findings


def _damage(text: str) -> Finding:
    advice = f"restore a backup (telemetryd restore), or save what can be read: {REPAIR}"
    return Finding("integrity", Severity.DAMAGE, text, advice)


def _integrity(connection: sqlite3.Connection) -> Iterator[Finding]:
    lines = [row[0] for row in connection.execute(f"PRAGMA integrity_check({_LISTED})")]
    if lines == ["ok"]:
        return
    faults = [line for text in lines for line in text.splitlines() if not line.startswith("***")]
    text = f"{len(faults)} faults, the first: {faults[0] if faults else lines[0]}"
    if faults and all("index" in line for line in faults):
        yield Finding("integrity", Severity.PROBLEM, text, f"the indexes disagree with the table; {REPAIR}")
    else:
        yield _damage(text)


def _version(connection: sqlite3.Connection) -> Iterator[Finding]:
    found, needed = connection.execute("PRAGMA user_version").fetchone()[0], migrate.current_version()
    if found != needed:
        advice = "run: telemetryd migrate" if found < needed else "install the newer telemetryd"
        yield Finding(_VERSION, Severity.PROBLEM, f"schema version {found}, not {needed}", advice)


def _schema(connection: sqlite3.Connection) -> Iterator[Finding]:
    actual, expected = migrate.schema_of(connection), migrate.expected_schema()
    for name, sql in expected.items():
        if actual.get(name) != sql:
            state = "different" if name in actual else "missing"
            advice = REPAIR if _is_derived(sql) else "restore a backup, or re-create it as in schema/telemetry.sql"
            yield Finding("schema", Severity.PROBLEM, f"{name} is {state}", advice)
    found = [*foreign.find_foreign(connection)]
    path = connection.execute("SELECT file FROM pragma_database_list WHERE name = 'main'").fetchone()[0]
    for harmful in (one for one in found if one.harm is not None):
        text = f"{harmful} is not telemetryd's own: {harmful.harm}"
        yield Finding("schema", Severity.PROBLEM, text, f"remove it: {harmful.removal(path)}")
    harmless = [str(one) for one in found if one.harm is None]
    if harmless:
        text = f"not telemetryd's own: {', '.join(harmless)}"
        yield Finding("schema", Severity.NOTE, text, "nothing; they are left alone")


def _without_table(check: str, problem: str) -> Callable[[_Examine], _Examine]:
    """Turn the error of a query whose table is missing, which the schema check has reported, into a finding."""

    def decorate(examine: _Examine) -> _Examine:
        @functools.wraps(examine)
        def examine_or_report(connection: sqlite3.Connection) -> Iterator[Finding]:
            try:
                yield from examine(connection)
            except sqlite3.OperationalError as error:
                yield Finding(check, Severity.PROBLEM, f"{problem}: {error}", REPAIR)

        return examine_or_report

    return decorate


@_without_table("numbers", "they cannot be read")
def _numbers(connection: sqlite3.Connection) -> Iterator[Finding]:
    for spent in foreign.find_spent_numbers(connection):
        yield Finding("numbers", Severity.PROBLEM, f"{spent}, and numbers end at 2^63", REPAIR)


def _is_derived(sql: str) -> bool:
    """Return whether what a statement makes holds nothing of its own, so that a repair may make it again."""
    return sql.startswith(("CREATE INDEX", "CREATE UNIQUE INDEX", "CREATE TRIGGER"))


@_without_table("totals", "the totals cannot be read")
def _totals(connection: sqlite3.Connection) -> Iterator[Finding]:
    if wrong := integrity.count_wrong_totals(connection):
        yield Finding("totals", Severity.PROBLEM, f"{wrong} totals differ from the table", REPAIR)


@_without_table("strays", "they cannot be counted")
def _strays(connection: sqlite3.Connection) -> Iterator[Finding]:
    for table, rows in integrity.count_strays(connection).items():
        yield Finding("strays", Severity.PROBLEM, f"{rows} rows of {table} belong to runs that are gone", REPAIR)


@_without_table("values", "they cannot be read")
def _values(connection: sqlite3.Connection) -> Iterator[Finding]:
    if found := list(integrity.find_unstorable(connection)):
        listed = [f"{one.field} of {one.table} {one.number} ({one.reason})" for one in found[:_NAMED]]
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        text = f"an earlier migration kept what no request could bring: {', '.join(listed)}{more}"
        yield Finding("values", Severity.PROBLEM, text, REPAIR)


@_without_table("credentials", "they cannot be looked for")
def _credentials(connection: sqlite3.Connection) -> Iterator[Finding]:
    if found := integrity.find_credentials(connection):
        text = f"{len(found)} addresses in git_repo hold more than host and path, perhaps a password or a token"
        advice = f"{REPAIR}; older backups keep them, so replace passwords and tokens that were in use"
        yield Finding("credentials", Severity.PROBLEM, text, advice)


@_without_table("labels", "their index cannot be read")
def _labels(connection: sqlite3.Connection) -> Iterator[Finding]:
    if wrong := labels.count_wrong(connection):
        yield Finding("labels", Severity.PROBLEM, f"{wrong} labels differ between the runs and their index", REPAIR)


def _full_text(connection: sqlite3.Connection) -> Iterator[Finding]:
    connection.execute("PRAGMA query_only = OFF")  # for temporary tables; the file itself is open for reading only
    wrong = full_text.count_wrong(connection)
    connection.execute("PRAGMA query_only = ON")
    if wrong:
        text = f"the full-text index differs from the table, in {wrong} places or more"
        yield Finding("full text", Severity.PROBLEM, text, REPAIR)


def _space(connection: sqlite3.Connection) -> Iterator[Finding]:
    if not legacy.is_compact(connection):
        text = "deleted runs do not make the file smaller: a migration was cut off before its end, or lacked room"
        yield Finding("space", Severity.PROBLEM, text, REPAIR)


def _foreign_keys(connection: sqlite3.Connection) -> Iterator[Finding]:
    tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    known = migrate.expected_schema()
    for table in (name for name in tables if name not in known and not full_text.is_ours(name)):
        try:
            broken = len(connection.execute(f"PRAGMA foreign_key_check({quoted(table)})").fetchall())
        except sqlite3.OperationalError:
            yield Finding(
                "foreign keys",
                Severity.NOTE,
                f"{table} refers to a column that is not unique, as the replaced service made it",
                "nothing; telemetryd does not use this table, and foreign keys are off",
            )
            continue
        if broken:
            yield Finding(
                "foreign keys",
                Severity.NOTE,
                f"{broken} rows of {table} refer to runs that are gone",
                "nothing, or delete them",
            )


def _index_usage(connection: sqlite3.Connection) -> Iterator[Finding]:
    """Ask SQLite how it would answer every documented query; each must walk an index and sort nothing."""
    for query in documented_queries():
        sql, values = runs.select_page(query, label=next(iter(query.filters.labels), None))
        asked = ", ".join(query.filters.parameters()) or "no filter"
        try:
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
        except sqlite3.OperationalError as error:
            yield Finding("index usage", Severity.PROBLEM, f"query by {asked}: {error}", REPAIR)
            continue
        sorts = "event_id" not in query.filters.equal  # of which there is one run, whatever SQLite does with it
        bad = [
            step for step in plan if (sorts and "TEMP B-TREE" in step) or ("agent_runs" in step and "USING" not in step)
        ]
        if bad:
            yield Finding("index usage", Severity.PROBLEM, f"query by {asked}: {bad[0]}", REPAIR)


def documented_queries() -> Iterator[ListRuns]:
    """Yield each documented combination of filters, alone, with time bounds and with a cursor; and each order."""
    moment = "2026-01-01T00:00:00.000000Z"
    bounds = {name: moment for name, (column, _) in TIME_BOUNDS.items() if column == "created_at"}
    combined = product((False, True), repeat=len(_COMBINED))
    asked = [[name for name, is_given in zip(_COMBINED, chosen, strict=True) if is_given] for chosen in combined]
    for names in [*asked, *([name] for name in FILTERS if name not in _COMBINED)]:
        equal = dict.fromkeys(names, ("x",))
        several = dict.fromkeys(names, ("x", "y"))
        yield ListRuns(Filters(equal))
        yield ListRuns(Filters(equal, bounds))
        yield ListRuns(Filters(several), after=Position(moment, 1))
    yield ListRuns(Filters(labels={"x": ("x",)}))
    yield ListRuns(Filters(labels={"x": ("x",)}, bounds=bounds))
    yield ListRuns(Filters(labels={"x": ("x", "y"), "y": ("x",)}), after=Position(moment, 1))
    for column, is_descending in product(SORTED, (False, True)):
        yield ListRuns(order=Order(column, descending=is_descending))
        yield ListRuns(order=Order(column, descending=is_descending), after=Position(moment, 1))


_COMBINED: Final = ("agent_name", "job_type", "status")
"""The filters that are combined most; each combination of them has an index."""


def repair(path: Path, watch: Watch = ignore_progress) -> list[str]:
    """Fix the indexes and the totals in one transaction, then the file; the caller owns the database.

    Return what was done.

    Raises:
        DatabaseError: if that is not enough; the database is as before.

    """
    done: list[str] = []
    with contextlib.closing(connect(path, "rw")) as connection:
        try:
            connection.execute("BEGIN EXCLUSIVE")
            migrate.refuse_unless_usable(path, identify(connection))
            foreign.refuse_harmful(connection, path, is_current=False)  # a trigger would work on the repair, too
            watch("Repairing", 0, 3)
            done += _fix_indexes(connection)
            watch("Repairing", 1, 3)
            done += _fix_rows(connection)
            watch("Repairing", 2, 3)
            connection.execute("COMMIT")
            watch("Repairing", 3, 3)
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise DatabaseError(f"Cannot repair {path} in place: {error}; it is as before") from error
        if not legacy.is_compact(connection):
            try:
                legacy.compact(connection)
            except sqlite3.OperationalError as error:
                raise DatabaseError(f"{path}: {'; '.join(done)}; but its space stays ({error})") from error
            done.append("free space returned")
    return done


def _fix_rows(connection: sqlite3.Connection) -> Iterator[str]:
    """Fix the rows and what is counted of them; yield what was done."""
    if any(foreign.find_spent_numbers(connection)):
        yield f"{renumbering.free_numbers(connection)} rows numbered anew; subscribers begin anew"
        if full_text.is_there(connection):  # which knows runs by their ids
            full_text.rebuild(connection)
    for table, rows in integrity.delete_strays(connection).items():
        yield f"{rows} rows of {table} deleted, whose runs are gone"
    if replaced := integrity.replace_unstorable(connection):
        yield f"{replaced} values replaced that no request could bring; unconverted_values has the originals"
    if cleared := integrity.drop_credentials(connection):
        yield f"the addresses in git_repo of {cleared} runs cut to host and path; older backups keep them"
    if wrong := integrity.count_wrong_totals(connection):
        integrity.recount_totals(connection)
        yield f"{wrong} totals counted again"
    if wrong := labels.count_wrong(connection):
        labels.rebuild(connection)
        yield f"the index of labels made again, {wrong} differed"
    if full_text.count_wrong(connection):
        full_text.rebuild(connection)
        yield "full-text index made again"


def _fix_indexes(connection: sqlite3.Connection) -> Iterator[str]:
    """Make the indexes and triggers that are missing or different, rebuild every index; yield what was done."""
    actual = migrate.schema_of(connection)
    for name, sql in migrate.expected_schema().items():
        if _is_derived(sql) and actual.get(name) != sql:
            kind = "TRIGGER" if sql.startswith("CREATE TRIGGER") else "INDEX"
            connection.execute(f"DROP {kind} IF EXISTS {name}")
            connection.execute(sql)
            yield f"{kind.lower()} {name} made again"
    connection.execute("REINDEX")
    yield "every index built again from its table"
