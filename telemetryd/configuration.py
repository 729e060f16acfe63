"""Collects the settings from flags, environment, `.env` and defaults, and says what is wrong with them."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from dotenv.parser import parse_stream
from pydantic import SecretStr, ValidationError

from telemetryd.client.old_variables import WITHOUT_EFFECT, remarks
from telemetryd.durations import duration_text
from telemetryd.errors import ConfigurationError
from telemetryd.ops.logs import LogLevel
from telemetryd.settings import NO_SOCKET, PREFIX, Settings, flag, read_log_level, variable, without_password

CLIENT_VARIABLES: Final = frozenset(
    {
        "METRICS_API_URL",
        "TELEMETRY_API_CA_FILE",
        "TELEMETRY_API_CLIENT_CERT",
        "TELEMETRY_API_CLIENT_KEY",
        "TELEMETRY_API_URL",
        "TELEMETRY_BUFFER_DIR",
        "TELEMETRY_BUFFER_DURABILITY",
        "TELEMETRY_BUFFER_KEEP_HOURS",
        "TELEMETRY_BUFFER_MAX_DAYS",
        "TELEMETRY_BUFFER_MAX_MB",
        "TELEMETRY_FLUSH_TIMEOUT_S",
        "TELEMETRY_PARENT_RUN_ID",
        "TELEMETRY_SEND",
        "TELEMETRY_TIMEOUT_S",
    }
)
"""Variables of the same family that belong to the agents' side and may be set next to ours."""

OLD_LOG_LEVEL: Final = "LOG_LEVEL"
"""The variable of 3.x that counts where TELEMETRY_LOG_LEVEL is not set; other programs use it, too."""


class Origin(StrEnum):
    """Where a value came from, strongest first."""

    FLAG = "flag"
    ENVIRONMENT = "environment"
    DOTENV = ".env"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """The settings, where each came from, and remarks that are worth a line in the log."""

    settings: Settings
    origins: Mapping[str, Origin]
    remarks: tuple[str, ...]
    unread: tuple[str, ...] = ()
    """What of the `.env` file could not be read, if that does not matter."""

    def shown(self) -> dict[str, dict[str, Any]]:
        """Return variable → value and origin, with absolute paths and the token masked."""
        values = self.settings.model_dump(mode="json")
        values |= {name: str(path.absolute()) for name, path in self.settings if isinstance(path, Path)}
        values |= {
            name: duration_text(values[name]) for name in ("prune_after", "stale_after") if values[name] is not None
        }
        if self.settings.api_unix == NO_SOCKET:
            values["api_unix"] = "none"
        if values["api_auth_token"] is not None:
            values["api_auth_token"] = "********"  # noqa: S105 - a mask
        if self.settings.db_url is not None:
            values["db_url"] = without_password(self.settings.db_url.get_secret_value())
        return {variable(name): {"value": values[name], "origin": str(self.origins[name])} for name in values}


def load(
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    dotenv: Path | None = Path(".env"),
    *,
    names: Collection[str] | None = None,
    needs_dotenv: bool = True,
) -> LoadedSettings:
    """Collect every setting: flag > environment > `.env` > default. An empty variable counts as not set.

    Args:
        flags: values from the command line by field name; None means "not given".
        environment: variables, by default those of the process.
        dotenv: the `.env` file; None or a missing file means none.
        names: the settings that are read; by default all. The others have their defaults.
        needs_dotenv: whether it matters if the `.env` file cannot be read: it may be another program's.

    Raises:
        ConfigurationError: with every problem at once, each naming its variable.

    """
    variables = os.environ if environment is None else environment
    file = _read_dotenv(dotenv) if dotenv is not None and dotenv.is_file() else _DotEnv({}, {}, ())
    given: dict[str, _Given] = {}
    for name in Settings.model_fields if names is None else names:
        sources = (
            _Given(Origin.FLAG, (flags or {}).get(name), flag(name)),
            _Given(Origin.ENVIRONMENT, variables.get(variable(name)) or None, "the environment"),
            _Given(Origin.DOTENV, file.values.get(variable(name)) or None, file.places.get(variable(name), "")),
        )
        if (strongest := next((source for source in sources if source.value is not None), None)) is not None:
            given[name] = strongest
    old_level = _old_log_level(variables, file)
    if old_level is not None and _is_level(old_level.value):
        given.setdefault("log_level", old_level)
    problems = list(file.problems) if needs_dotenv else []
    try:
        settings = Settings.model_validate({name: source.value for name, source in given.items()})
    except ValidationError as error:
        problems += [*_problems(error, given), *_problems_of_the_rest(error, given)]
    if problems:
        raise ConfigurationError(problems)
    origins = {name: given[name].origin if name in given else Origin.DEFAULT for name in Settings.model_fields}
    noted = _remarks(settings, {**file.values, **variables})
    if old_level is not None and "log_level" not in given:
        noted.append(f"LOG_LEVEL={old_level.value!r:.50} is no level of telemetryd and has no effect")
    return LoadedSettings(settings, origins, tuple(noted), file.problems)


@dataclass(frozen=True, slots=True)
class _Given:
    """A value that is not checked yet, and the place that an error message names."""

    origin: Origin
    value: Any
    place: str


@dataclass(frozen=True, slots=True)
class _DotEnv:
    """What a `.env` file says: values and their places by variable, and what could not be understood."""

    values: Mapping[str, str]
    places: Mapping[str, str]
    problems: tuple[str, ...]


def _read_dotenv(path: Path) -> _DotEnv:
    """Read a `.env` file. A line that cannot be read is a problem: it may be the one that sets the token."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        return _DotEnv({}, {}, (f"{path}: is not UTF-8 text (byte {error.start + 1} cannot be)",))
    except OSError as error:
        return _DotEnv({}, {}, (f"{path}: cannot be read: {error.strerror}",))
    values, places, problems = {}, {}, []
    for binding in parse_stream(io.StringIO(text)):
        text = binding.original.string  # begins with the blank lines above it
        blank_lines = text[: len(text) - len(text.lstrip())].count("\n")
        place = f"{path} line {binding.original.line + blank_lines}"
        if binding.error or (binding.key is not None and binding.value is None and binding.key.startswith(PREFIX)):
            problems.append(f"{place}: must be NAME=value, with quotes closed")  # not shown: it may hold the token
        elif binding.key is not None and binding.value is not None:
            values[binding.key], places[binding.key] = binding.value, place
    return _DotEnv(values, places, tuple(problems))


def _old_log_level(variables: Mapping[str, str], file: _DotEnv) -> _Given | None:
    """Return what LOG_LEVEL gives, if it is set; it may be meant for another program, so no value of it is wrong."""
    if text := variables.get(OLD_LOG_LEVEL):
        return _Given(Origin.ENVIRONMENT, text, "the environment")
    text = file.values.get(OLD_LOG_LEVEL)
    return _Given(Origin.DOTENV, text, file.places[OLD_LOG_LEVEL]) if text else None


def _is_level(value: object) -> bool:
    return read_log_level(value) in set(LogLevel)


def _problems(error: ValidationError, given: Mapping[str, _Given]) -> list[str]:
    problems = []
    for fault in error.errors():
        own_words = fault["msg"].removeprefix("Value error, ") if fault["type"] == "value_error" else None
        if fault["loc"]:
            name = str(fault["loc"][0])
            is_secret = Settings.model_fields[name].annotation == SecretStr | None
            shown = "" if is_secret else f" (it is {given[name].value!r:.100}, from {given[name].place})"
            problems.append(f"{variable(name)}: {own_words or _rule(name)}{shown}")
        elif own_words is not None:
            problems.append(own_words)
    return problems


def _rule(name: str) -> str:
    """Say what a setting may be, from its type: must be a whole number from 0 to 65535."""
    schema = Settings.model_json_schema()
    parts = schema["properties"][name].get("anyOf", [schema["properties"][name]])
    rule = next(part for part in parts if part.get("type") != "null")
    if "$ref" in rule:
        *others, last = schema["$defs"][rule["$ref"].rpartition("/")[2]]["enum"]
        return f"must be {', '.join(others)} or {last}"
    if rule["type"] == "boolean":
        return "must be true or false"
    number = "a whole number" if rule["type"] == "integer" else "a number"
    above, low, high = (rule.get(bound) for bound in ("exclusiveMinimum", "minimum", "maximum"))
    if above is not None:
        return f"must be {number} above {above:g} and up to {high:g}"
    if high is not None:
        return f"must be {number} from {low} to {high}"
    return f"must be {number}" if low is None else f"must be {number}, {low} or more"


def _problems_of_the_rest(error: ValidationError, given: Mapping[str, _Given]) -> list[str]:
    """Return what is wrong with values that are fine alone but not together; pydantic looks no further than alone."""
    wrong_alone = {str(fault["loc"][0]) for fault in error.errors() if fault["loc"]}
    if not wrong_alone or any(name.startswith("api_auth") for name in wrong_alone):
        return []
    rest = {name: source for name, source in given.items() if name not in wrong_alone}
    try:
        Settings.model_validate({name: source.value for name, source in rest.items()})
    except ValidationError as together:
        return _problems(together, rest)
    return []


def _remarks(settings: Settings, variables: Mapping[str, str | None]) -> list[str]:
    known = {variable(name) for name in Settings.model_fields} | CLIENT_VARIABLES | WITHOUT_EFFECT.keys()
    noted = [
        f"{name} is not a setting of telemetryd and has no effect"
        for name in sorted(variables)
        if name.startswith(PREFIX) and name not in known
    ]
    noted += [text for _, text in sorted(remarks(variables))]
    if not settings.api_auth_enabled and (settings.api_auth_token or settings.api_auth_token_file):
        noted.append("A token is set but not asked for, because TELEMETRY_API_AUTH_ENABLED is false")
    if re.match(r"[A-Za-z]:[/\\]", str(settings.db_path)):
        noted.append(
            f"TELEMETRY_DB_PATH={settings.db_path} is a Windows path; here it means {settings.db_path.absolute()}"
        )
    return noted
