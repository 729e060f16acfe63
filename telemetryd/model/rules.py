"""Alert rules and webhooks, read from a TOML file; each error is reported with its position."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from telemetryd.errors import ConfigurationError
from telemetryd.model.change_points import MEASURES, Measure
from telemetryd.model.filters import matches
from telemetryd.model.values import parse_duration

ANY: Final = ("*",)
"""The patterns that let every name through."""

_HOUR_S: Final = 3600.0
_MONTH_S: Final = 30 * 86_400.0
_MAX_RUNS: Final = 1_000_000_000
_LEAST_SECRET: Final = 16
_NAME: Final = re.compile(r"[^\x00-\x1f\x7f]{1,100}")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Webhook:
    """An address that hears of alerts."""

    name: str
    url: str = field(repr=False)
    """It often holds a secret itself."""
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Rule:
    """What all rules have."""

    name: str
    webhooks: tuple[str, ...]
    agent_name: tuple[str, ...]
    """The agents that it is about; `*` stands for any text."""

    @property
    def kind(self) -> str:
        """Its kind, as it stands in the file."""
        return next(kind for kind, made in KINDS.items() if made is type(self))


@dataclass(frozen=True, slots=True)
class Silent(_Rule):
    """Fires for an agent that has created no run for some time, while none of its running runs has changed either."""

    after_s: float


@dataclass(frozen=True, slots=True)
class _WindowRule(_Rule):
    """What rules have that look at the runs of some time."""

    job_type: tuple[str, ...]
    """The job types that it is about; none means all."""
    window_s: float


@dataclass(frozen=True, slots=True)
class FailureRate(_WindowRule):
    """Fires for an agent if too many of its finished runs are failures or timeouts."""

    min_runs: int
    above: float


@dataclass(frozen=True, slots=True)
class Slow(_WindowRule):
    """Fires for a job type of an agent while a run of it is running longer than `factor` times their p99."""

    min_runs: int
    factor: float


@dataclass(frozen=True, slots=True)
class Regression(_WindowRule):
    """Fires for each commit that makes the runs of a job type of an agent fail more often or take longer."""

    measure: tuple[Measure, ...]


@dataclass(frozen=True, slots=True)
class Stale(_Rule):
    """Fires for an agent while it has running runs that were neither created nor changed for some time."""

    after_s: float


Rule = Silent | FailureRate | Slow | Stale | Regression
KINDS: Final[Mapping[str, type[Rule]]] = {
    "silent": Silent,
    "failure-rate": FailureRate,
    "slow": Slow,
    "stale": Stale,
    "regression": Regression,
}


@dataclass(frozen=True, slots=True)
class Rules:
    """What a rule file says."""

    rules: tuple[Rule, ...] = ()
    webhooks: tuple[Webhook, ...] = ()
    every_s: float = 60.0
    """How often the rules are evaluated."""

    def named(self, name: str) -> Rule:
        """Return the rule with a name that is there."""
        return next(rule for rule in self.rules if rule.name == name)


def matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Return a predicate: whether a name is let through by one of the patterns."""
    split = [tuple(each.split("*")) for each in patterns]
    return lambda name: any(matches(pattern, name) if len(pattern) > 1 else name == pattern[0] for pattern in split)


def load_rules(path: Path | None, environment: Mapping[str, str] | None = None) -> Rules:
    """Read a rule file, and the secrets that it names; without a file there are no rules.

    Raises:
        ConfigurationError: with every fault: the file, the rule, the key, its value, and what is allowed.

    """
    if path is None:
        return Rules()
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigurationError([f"TELEMETRY_ALERTS_FILE: {path} cannot be read: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError([f"{path}: is not a TOML file: {error}"]) from error
    faults: list[str] = []
    top = _Table(str(path), document, faults)
    every_s = top.read("every", _duration(1, _HOUR_S, "a duration from 1s to 1h, such as 1m"), 60.0)
    given_hooks = top.read("webhooks", _tables_by_name, {})
    given_rules = top.read("rules", _tables, [])
    top.finish("a rule file")
    variables = os.environ if environment is None else environment
    hooks = [_webhook(path, name, table, variables, faults) for name, table in given_hooks.items()]
    rules = [_rule(path, number, table, tuple(given_hooks), faults) for number, table in enumerate(given_rules, 1)]
    names = [table.get("name") for table in given_rules]
    faults += [
        f"{path}: rule {name!r}: name: must be another one than that of the other rules"
        for name in dict.fromkeys(name for name in names if isinstance(name, str))
        if names.count(name) > 1
    ]
    if faults:
        raise ConfigurationError(faults)
    return Rules(tuple(filter(None, rules)), tuple(filter(None, hooks)), every_s)


class _WrongError(ValueError):
    """A value is not what it must be; the text says what is allowed."""


_REQUIRED: Final = object()


class _Table:
    """One table of the file: hands out its values by name, and collects what is wrong with them."""

    def __init__(self, place: str, values: Mapping[str, Any], faults: list[str]) -> None:
        self._place, self._values, self._faults = place, values, faults
        self._known: list[str] = []
        self._is_good = True

    def read(self, key: str, check: Callable[[Any], T], default: Any = _REQUIRED) -> T:
        """Return the value of a key; what is wrong with it is noted, and the default stands for it."""
        self._known.append(key)
        if key in self._values:
            try:
                return check(self._values[key])
            except _WrongError as error:
                self.complain(key, f"must be {error} (it is {self._values[key]!r:.100})")
        elif default is _REQUIRED:
            try:
                check(None)
            except _WrongError as error:
                self.complain(key, f"is missing; it must be {error}")
        return default  # type: ignore[no-any-return]  # it is not used if something is wrong

    def complain(self, key: str, text: str) -> None:
        """Note a fault."""
        self._faults.append(f"{self._place}: {key}: {text}")
        self._is_good = False

    def finish(self, what: str) -> bool:
        """Note the unknown keys; return whether everything was right."""
        for key in self._values:
            if key not in self._known:
                self.complain(key, f"is no key of {what}; it may have {', '.join(self._known)}")
        return self._is_good


def _webhook(
    path: Path, name: str, values: Mapping[str, Any], variables: Mapping[str, str], faults: list[str]
) -> Webhook | None:
    table = _Table(f"{path}: webhook {name!r}", values, faults)
    if not _NAME.fullmatch(name):
        table.complain("name", "must have 1 to 100 characters")
    url = table.read("url", _url)
    variable = table.read("secret_env", _text("the name of an environment variable"), None)
    file = table.read("secret_file", _text("the path of a file"), None)
    if table.finish("a webhook") and (variable is None) == (file is None):
        table.complain("secret_env", "must be given, or secret_file, but not both: each delivery is signed")
    elif variable is not None:
        text, key, source = variables.get(variable, ""), "secret_env", f"the environment variable {variable}"
    elif file is not None:
        key, source = "secret_file", file
        try:
            text = (path.parent / file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            table.complain(key, f"must be a file that can be read (it is {file!r}: {error})")
            return None
    if not table.finish("a webhook"):
        return None
    if len(text.strip()) < _LEAST_SECRET:
        table.complain(
            key, f"{source} must hold at least {_LEAST_SECRET} characters; make some with: openssl rand -hex 32"
        )
        return None
    return Webhook(name, url, text.strip().encode())


def _rule(
    path: Path, number: int, values: Mapping[str, Any], webhooks: tuple[str, ...], faults: list[str]
) -> Rule | None:
    name = values.get("name")
    table = _Table(f"{path}: rule {name!r:.100}" if isinstance(name, str) else f"{path}: rule {number}", values, faults)
    checked: dict[str, Any] = {"name": table.read("name", _name)}
    kind = table.read("kind", _one_of(KINDS))
    checked["webhooks"] = tuple(table.read("webhooks", _names_among(webhooks), webhooks))
    checked["agent_name"] = table.read("agent_name", _patterns, ANY)
    if kind not in KINDS:
        return None  # which other keys it may have depends on its kind
    if KINDS[kind] in (Silent, Stale):
        checked["after_s"] = table.read("after", _duration(1, None, "a duration such as 6h or 30m"))
    else:
        checked["job_type"] = table.read("job_type", _names, ())
        window = _duration(
            _HOUR_S, None, "a duration of 1h or more, such as 6h or 30d: statistics are kept by the hour"
        )
        checked["window_s"] = table.read("window", window, _MONTH_S if KINDS[kind] is Regression else _REQUIRED)
    if KINDS[kind] in (FailureRate, Slow):
        checked["min_runs"] = table.read("min_runs", _min_runs, 20)
    if KINDS[kind] is Regression:
        checked["measure"] = table.read("measure", _measures, MEASURES)
    if KINDS[kind] is FailureRate:
        checked["above"] = table.read("above", _number("a number from 0 up to, but not, 1", lambda each: 0 <= each < 1))
    if KINDS[kind] is Slow:
        checked["factor"] = table.read(
            "factor", _number("a number from 1 to 1000", lambda each: 1 <= each <= 1000), 1.0
        )
    return KINDS[kind](**checked) if table.finish(f"a rule of the kind {kind}") else None


def _tables(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise _WrongError("tables, each under a line [[rules]]")
    return value


def _tables_by_name(value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or not all(isinstance(each, dict) for each in value.values()):
        raise _WrongError("tables with names, such as [webhooks.team]")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value) or not value.strip():
        raise _WrongError("a text of 1 to 100 characters without control characters")
    return value


def _text(what: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise _WrongError(what)
        return value

    return check


def _url(value: Any) -> str:
    try:
        parts = urlsplit(value if isinstance(value, str) else "")
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good or not str(value).isprintable() or " " in value:
        raise _WrongError("an address that begins with https:// or http://")
    return str(value)


def _one_of(allowed: Iterable[str]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise _WrongError(f"one of {', '.join(allowed)}")
        return value

    return check


def _names_among(allowed: tuple[str, ...]) -> Callable[[Any], list[str]]:
    def check(value: Any) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(each, str) and each in allowed for each in value):
            raise _WrongError(f"an array of names of webhooks; there are {', '.join(allowed) or 'none'}")
        return list(dict.fromkeys(value))

    return check


def _patterns(value: Any) -> tuple[str, ...]:
    return _names(value, "; * stands for any text")


def _names(value: Any, more: str = "") -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(each, str) and 0 < len(each) <= 255 and "\0" not in each for each in names)
    ):
        raise _WrongError(f"a name of 1 to 255 characters, or an array of such{more}")
    return tuple(dict.fromkeys(names))


def _measures(value: Any) -> tuple[Measure, ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not given or not all(each in MEASURES for each in given):
        raise _WrongError(f"{' or '.join(MEASURES)}, or an array of both")
    return tuple(dict.fromkeys(given))


def _duration(least_s: float, most_s: float | None, allowed: str) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        try:
            seconds = parse_duration(value if isinstance(value, str) else "")
        except ValueError as error:
            raise _WrongError(allowed) from error
        if seconds < least_s or (most_s is not None and seconds > most_s):
            raise _WrongError(allowed)
        return seconds

    return check


def _min_runs(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_RUNS:
        raise _WrongError("a whole number, 1 or more")
    return value


def _number(allowed: str, is_good: Callable[[float], bool]) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not is_good(value):
            raise _WrongError(allowed)
        return float(value)

    return check
