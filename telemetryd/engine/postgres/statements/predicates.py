"""Turns filters into SQL predicates of PostgreSQL, and into walks down an index."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Any, Final

from telemetryd.engine import letter_case
from telemetryd.engine.indexes import MANY, MAX_ARMS, choose
from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements import full_text
from telemetryd.model.filters import TIME_BOUNDS, WILDCARD, Comparison, Filters, Pattern, label_parameter
from telemetryd.model.runs import FILTERS, REDACTABLE
from telemetryd.model.values import MAX_INTEGER

Values = dict[str, Any]
"""What is bound to the names of a statement."""

_LIMITED: Final = frozenset(FILTERS) & frozenset(REDACTABLE)
"""Filters by fields that may hold a text of any length, of which only the short ones are in their index."""
_LONGEST: Final = 255


def is_short(name: str) -> str:
    """Return the condition that a field's text is in its index; nothing for fields whose texts always are."""
    return f"length({name}) <= {_LONGEST}" if name in _LIMITED else ""


def are_short(equal: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the conditions that what fields equal is in their indexes, for those of which that is not so anyway."""
    return [
        is_short(name)
        for name, values in equal.items()
        if name in _LIMITED and all(len(value) <= _LONGEST for value in values)
    ]


def equals(name: str, value: str) -> str:
    """Return the condition that a field equals a value, said so that its index can be used."""
    return " AND ".join(filter(None, (is_short(name), f"{name} = {value}")))


def unguessed(condition: str) -> str:
    """Return a condition of which PostgreSQL guesses that every other run meets it.

    It knows nothing of these, and would take one for so rare that it rather sorts all runs than walks past some.
    """
    return f"CASE WHEN {condition} THEN true END"


def conditions(filters: Filters, but: Collection[str] = ()) -> tuple[list[str], Values]:
    """Return what the filters are in SQL, to be joined by AND, and the values that are bound to them.

    Columns stand without their table's name, and what is bound is named after its parameter. `but` are names of
    parameters that the caller sees to.
    """
    found: list[str] = []
    values: Values = {}
    for name in FILTERS:
        if name not in but:
            _any_of(name, filters.equal.get(name, ()), filters.patterns if name == WILDCARD else (), found, values)
    for name, moment in filters.bounds.items():
        if name not in but:
            column, comparison = TIME_BOUNDS[name]
            found.append(f"{column} {comparison} %({name})s")
            values[name] = moment
    if filters.min_duration_ms is not None:
        found.append("duration_ms >= %(min_duration_ms)s")
        values["min_duration_ms"] = filters.min_duration_ms
    if filters.error is not None:
        found.append(unguessed("error_summary ~ %(error)s OR error_details ~ %(error)s"))
        values["error"] = any_case(filters.error)
    found += [_metric(number, metric, values) for number, metric in enumerate(filters.metrics)]
    for number, (key, wanted) in enumerate(filters.labels.items()):
        if label_parameter(key) not in but:
            found.append(unguessed(f"labels ->> %(label_{number})s::text = ANY(%(label_{number}_values)s)"))
            values |= {f"label_{number}": key, f"label_{number}_values": [*wanted]}
    if filters.words is not None and "q" not in but:
        query, bound = full_text.query(filters.words)
        found.append(f"{full_text.WORDS} @@ {query}")
        values |= bound
    return found, values


def _any_of(name: str, equal: tuple[str, ...], patterns: tuple[Pattern, ...], found: list[str], values: Values) -> None:
    either: list[str] = []
    if len(equal) == 1:
        either.append(f"{name} = %({name}_0)s")
        values[f"{name}_0"] = equal[0]
    elif equal:
        either.append(f"{name} = ANY(%({name})s)")
        values[name] = [*equal]
    for number, pattern in enumerate(patterns):
        either.append(f"{name} LIKE %({name}_like_{number})s")
        values[f"{name}_like_{number}"] = like(pattern)
    if either:
        found.append(either[0] if len(either) == 1 else f"({' OR '.join(either)})")


def like(pattern: Pattern) -> str:
    """Return a pattern as LIKE has it, in which `_` and the backslash are special as well."""
    return "%".join("".join(f"\\{sign}" if sign in "\\%_" else sign for sign in piece) for piece in pattern)


def any_case(text: str) -> str:
    """Return the regular expression of a text in any case; its time grows only with the lengths."""
    forms = letter_case.forms(text)
    return "".join(
        f"[{''.join(forms[sign])}]" if len(forms[sign]) > 1 else f"\\{sign}" if _is_special(sign) else sign
        for sign in text
    )


def _is_special(sign: str) -> bool:
    return sign.isascii() and not sign.isalnum()


# --- Figures -------------------------------------------------------------------------------------

_SQL_OPERATORS: Final = {"!=": "<>"}
_IS_WHOLE: Final = f"given ~ '^-?[0-9]+$' AND abs(given::numeric) <= {MAX_INTEGER}"
_EXACT_DIGITS: Final = 15
"""So many any number of 64 bits holds exactly."""
_NOWHERE: Final = float("-inf")


def _metric(number: int, comparison: Comparison, values: Values) -> str:
    """Return one comparison in SQL; what JSON has of another kind is less or greater than nothing."""
    names = [f"metric_{number}_{place}" for place in range(len(comparison.path))]
    values |= dict(zip(names, comparison.path, strict=True))
    # A name is given as a text, so that it does not count the members of a list.
    found = "metrics_json" + "".join(f" -> %({name})s::text" for name in names)
    kind, compared = _compared(f"metric_{number}", comparison, values)
    # What a value is its first sign says. Only in a CASE one thing is surely done before another
    # (postgresql.org/docs/current/sql-expressions.html).
    return (
        f"(SELECT CASE WHEN {kind} THEN {compared} END "
        f'FROM (SELECT ({found})::text COLLATE "C" AS given OFFSET 0) AS member)'
    )


def _compared(place: str, comparison: Comparison, values: Values) -> tuple[str, str]:
    """Return how it is seen that a value is of the kind that is compared, and the comparison with it."""
    operator = _SQL_OPERATORS.get(comparison.operator, comparison.operator)
    wanted = values[place] = comparison.value
    if isinstance(wanted, bool):
        return "given IN ('true', 'false')", f"given::boolean {operator} %({place})s::boolean"
    if isinstance(wanted, str):
        return "left(given, 1) = '\"'", f"(given::json #>> '{{}}') COLLATE \"C\" {operator} %({place})s::text"
    # Whole numbers are compared as such, and reals as numbers of 64 bits: 0.1 is one that is not quite a tenth.
    of_reals, values[f"{place}_real"] = _among_reals(operator, wanted)
    values[place] = Decimal(wanted)
    real = f"given::float8 {of_reals} %({place}_real)s::float8"
    return "given >= '-' AND given < ':'", (
        f"CASE WHEN length(given) <= {_EXACT_DIGITS} THEN {real} "
        f"WHEN {_IS_WHOLE} THEN given::numeric {operator} %({place})s::numeric ELSE {real} END"
    )


def _among_reals(operator: str, wanted: float) -> tuple[str, float]:
    """Return a comparison with a number of 64 bits that says of every real what is true of the number itself."""
    real = float(wanted)
    beyond = Decimal(real) - Decimal(wanted)
    if not beyond:
        return operator, real
    if operator in ("=", "<>"):
        return ("<" if operator == "=" else ">="), _NOWHERE
    return operator[0] + ("=" if (beyond < 0) is (operator[0] == "<") else ""), real


# --- Walks ---------------------------------------------------------------------------------------

Arm = dict[str, Any]
"""The values that the columns of an index have on one of its walks."""

CHOSEN: Final = "run_labels AS chosen JOIN agent_runs ON agent_runs.id = chosen.run"
"""The runs of a label, which have its key and its value in the columns of `CHOSEN_LABEL`."""
CHOSEN_LABEL: Final[tuple[str, ...]] = ("chosen.key", "chosen.value")


def arms_of(filters: Filters, most: int = MAX_ARMS) -> tuple[tuple[str, ...], list[Arm]]:
    """Return the columns of the index that serves some filters best, and the values of these on each of its walks."""
    _, columns, arms = choose({} if filters.patterns else filters.equal, most)
    return columns, [*arms]


def arms_of_label(key: str, wanted: tuple[str, ...]) -> list[Arm]:
    """Return the values of `CHOSEN_LABEL` for each walk through the runs of a label."""
    return [dict(zip(CHOSEN_LABEL, (key, value), strict=True)) for value in wanted]


def fix(arms: list[Arm], values: Values) -> dict[str, str]:
    """Return what the columns of some walks equal in SQL: a value, or of several walks a column of `arm`.

    These, or lists of them for `rows_of_arms`, are added to `values`.
    """
    if len(arms) == 1:
        places = {name: f"{plain_name(name)}_arm" for name in arms[0]}
        values |= {place: arms[0][name] for name, place in places.items()}
        return {name: f"%({place})s" for name, place in places.items()}
    values |= {f"{plain_name(name)}_arms": [arm[name] for arm in arms] for name in arms[0]}
    return {name: f"arm.{plain_name(name)}" for name in arms[0]}


def rows_of_arms(names: Collection[str]) -> str:
    """Return the table of the values of several walks, one row for each walk."""
    lists = ", ".join(f"%({plain_name(name)}_arms)s::text[]" for name in names)
    return f"unnest({lists}) AS arm ({', '.join(map(plain_name, names))})"


def plain_name(column: str) -> str:
    """Return the name of a column without that of its table, for places and for what is selected from a walk."""
    return column.rpartition(".")[2]


_COUNT_LABEL: Final = f"""
    SELECT count(*) FROM (
        SELECT 1 FROM run_labels WHERE key = %s AND value = ANY(%s) LIMIT {MANY}
    ) AS few
"""


def choose_label(plain: Plain, filters: Filters, most: int = MAX_ARMS) -> str | None:
    """Return the key of the label whose runs are to be walked: that with fewest; None if another index is better.

    Another one is that of event_id, which finds one run; or any, if even that label has many runs.
    """
    if "event_id" in filters.equal:
        return None
    counted = {
        key: one(plain, _COUNT_LABEL, (key, [*wanted]))[0]
        for key, wanted in filters.labels.items()
        if len(wanted) <= most
    }
    if not counted:
        return None
    rarest = min(counted, key=counted.__getitem__)
    return None if counted[rarest] == MANY and (filters.equal or filters.patterns) else rarest


def one(plain: Plain, statement: str, values: Any = None) -> tuple[Any, ...]:
    """Return the one row that a statement always has."""
    row = plain.execute(statement, values).fetchone()
    assert row is not None  # noqa: S101 - it counts or adds up
    return row


def may_be_stored(text: str) -> bool:
    """Return whether any column can hold a text: PostgreSQL knows no NUL, and takes none to compare with either."""
    return "\0" not in text
