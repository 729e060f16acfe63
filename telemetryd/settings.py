"""Every setting once: its variable, flag, default, check and help."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Self

from dotenv.parser import parse_stream
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from telemetryd.client.config import read_token
from telemetryd.client.old_variables import WITHOUT_EFFECT, remarks
from telemetryd.client.paths import expanded
from telemetryd.errors import ConfigurationError
from telemetryd.model.hosts import ANY, HOST_NAME, parse_origins
from telemetryd.model.values import duration_text, parse_duration
from telemetryd.ops.logs import LogFormat, LogLevel

PREFIX: Final = "TELEMETRY_"
CLIENT_VARIABLES: Final = frozenset(
    {
        "METRICS_API_URL",
        "TELEMETRY_API_CA_FILE",
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


SYSTEM_SOCKET: Final = Path("/run/telemetryd/telemetryd.sock")
"""Where the service of the package listens; commands look there, too."""
NO_SOCKET: Final = Path(os.devnull)
"""What TELEMETRY_API_UNIX=none stands for."""


class JournalMode(StrEnum):
    """How SQLite keeps a transaction atomic (sqlite.org/pragma.html#pragma_journal_mode)."""

    DELETE = "DELETE"
    TRUNCATE = "TRUNCATE"
    PERSIST = "PERSIST"
    WAL = "WAL"


class Synchronous(StrEnum):
    """How hard SQLite syncs (sqlite.org/pragma.html#pragma_synchronous)."""

    NORMAL = "NORMAL"
    FULL = "FULL"
    EXTRA = "EXTRA"


class Origin(StrEnum):
    """Where a value came from, strongest first."""

    FLAG = "flag"
    ENVIRONMENT = "environment"
    DOTENV = ".env"
    DEFAULT = "default"


def default_db_path() -> Path:
    """Return where the database is by default: the state directory under systemd, else ./data."""
    state_directory = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    return Path(state_directory or "data") / "telemetry.sqlite"


def _upper(value: object) -> object:
    return value.strip().upper() if isinstance(value, str) else value


_LOG_LEVELS: Final = {"TRACE": "DEBUG", "NOTSET": "DEBUG", "WARN": "WARNING", "CRITICAL": "ERROR", "FATAL": "ERROR"}
"""Python's and uvicorn's other names, which 3.x took, and the level of ours that loses no line."""


def _log_level(value: object) -> object:
    name = _upper(value)
    return _LOG_LEVELS.get(name, name) if isinstance(name, str) else name


def _one(value: int) -> int:
    if value != 1:
        raise ValueError(f"must be 1, not {value}: one writer is the whole point, more would corrupt the database")
    return value


def _text(value: object) -> object:
    if isinstance(value, str) and not value.strip():
        raise ValueError("must not be blank")
    if isinstance(value, str) and not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError("must be UTF-8")  # answers and log lines contain it
    return value


def _path(value: object) -> object:
    value = _text(value)
    return expanded(value) if isinstance(value, str | Path) else value


def _socket(value: object) -> object:
    return NO_SOCKET if isinstance(value, str) and value.strip().lower() == "none" else _path(value)


def _host_names(text: str) -> str:
    names = [name.strip().lower() for name in text.split(",")]
    if not all(name == ANY or HOST_NAME.fullmatch(name) for name in names):
        raise ValueError("must be host names without ports, separated by commas, or *")
    return ",".join(names)


FilePath = Annotated[Path, BeforeValidator(_path)]
SocketPath = Annotated[Path, BeforeValidator(_socket)]
Upper = BeforeValidator(_upper)
Positive = Annotated[int, Field(ge=1)]
Duration = Annotated[float, BeforeValidator(parse_duration)]
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]


class Settings(BaseModel):
    """The configuration of one daemon; each field is the variable TELEMETRY_<NAME>."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    db_path: FilePath = Field(default_factory=default_db_path, description="SQLite database file.")
    lock_file: FilePath | None = Field(
        None, description="Lock file of the single writer; the database's real path is locked as well."
    )
    db_journal_mode: Annotated[JournalMode, Upper] = Field(
        JournalMode.DELETE,
        description="SQLite journal mode; WAL is faster, DELETE works on Docker and Windows mounts.",
    )
    db_synchronous: Annotated[Synchronous, Upper] = Field(
        Synchronous.FULL, description="SQLite synchronous mode; NORMAL survives a crash but not a power cut."
    )
    db_busy_timeout_ms: Annotated[int, Field(ge=0, le=600_000)] = Field(
        30_000, description="How long to wait for another process that locks the database, in milliseconds."
    )
    db_readers: Annotated[int, Field(ge=1, le=64)] = Field(
        4,
        description="Read-only connections: queries that may run at once, half of them long ones.",
    )
    query_timeout_s: Seconds = Field(10.0, description="A query is interrupted after so many seconds.")
    api_host: Annotated[str, BeforeValidator(_text)] = Field(
        "0.0.0.0",  # noqa: S104 - the guide's default; protected mode keeps others out
        description="Address to listen on; 0.0.0.0 is every IPv4 address, :: every one of IPv6 and IPv4.",
    )
    api_port: Annotated[int, Field(ge=0, le=65535)] = Field(8765, description="Port to listen on; 0 takes a free one.")
    api_unix: SocketPath | None = Field(
        None,
        description="Unix socket to listen on as well, for the daemon's group; if it is not set, one next to the "
        "database (its real path and .sock), for the daemon's own user and root only; none: no socket.",
    )
    api_workers: Annotated[int, AfterValidator(_one)] = Field(1, description="Must be 1.")
    api_auth_enabled: bool = Field(False, description="Ask for a token everywhere except on /health.")
    api_auth_token: SecretStr | None = Field(None, description="The token; better in a file.")
    api_auth_token_file: FilePath | None = Field(None, description="File that holds the token.")
    api_protected_mode: bool = Field(True, description="While authentication is off, serve loopback peers only.")
    allowed_hosts: Annotated[str, AfterValidator(_host_names)] | None = Field(
        None,
        description="Names by which clients and proxies may call (Host), separated by commas; * means any; "
        "none: localhost, this machine's name, and a proxy's name while authentication is off, any while it is on.",
    )
    cors_origins: Annotated[str, AfterValidator(parse_origins)] | None = Field(
        None,
        description="Origins of other web pages that may read (CORS), such as https://dashboard.example.com, "
        "separated by commas; none: no other page may.",
    )
    rate_limit_enabled: bool = Field(False, description="Limit the requests of each client address.")
    rate_limit_rpm: Positive = Field(60, description="Requests per minute and client address.")
    queue_max: Positive = Field(10_000, description="Writes that may wait for the writer; beyond it 503.")
    commit_target_ms: Annotated[int, Field(ge=1, le=60_000)] = Field(
        100, description="Commit latency that Telemetry-Flow headers keep clients within, in milliseconds."
    )
    max_body_bytes: Annotated[int, Field(ge=1024)] = Field(
        16 * 1024 * 1024, description="Largest request body, decoded; beyond it 413."
    )
    max_batch: Positive = Field(10_000, description="Most runs in one batch; beyond it 413.")
    min_free_mb: Annotated[int, Field(ge=0, le=1024 * 1024)] = Field(
        64, description="MiB of disk that new runs leave free; beyond it 503, before SQLite fails. 0: no reserve."
    )
    prune_after: Duration | None = Field(
        None,
        description="Delete runs of this age (90d), by itself, once the age is confirmed for the database: "
        "telemetryd prune --confirm-automatic 90d; none keeps them for ever.",
    )
    stale_after: Duration | None = Field(
        None, description="Cancel running runs without a change for so long (1h, 30m), by itself; none leaves them."
    )
    full_text: bool = Field(
        False,
        description="Index the words of summaries and errors for q=; new runs cost more then. The daemon's start "
        "follows a change: on indexes the runs that are there while it serves (503 until then), off drops the index.",
    )
    death_certificates: bool = Field(
        True,
        description="Fail a run at once when its process, registered by its client, has ended without finishing it.",
    )
    watched_processes: Positive = Field(
        4096, description="Most processes watched for that; at most a quarter of the open files that are allowed."
    )
    alerts_file: FilePath | None = Field(
        None, description="TOML file with the rules of alerts and their webhooks (docs/alerts.md); none: no alerts."
    )
    backup_dir: FilePath | None = Field(None, description="Directory for backups made by POST /api/v1/admin/backup.")
    backup_keep: Positive | None = Field(None, description="How many of those backups are kept; none keeps all.")
    shutdown_timeout_s: Seconds = Field(10.0, description="Longest orderly shutdown, in seconds.")
    log_level: Annotated[LogLevel, BeforeValidator(_log_level)] = Field(
        LogLevel.INFO, description="DEBUG, INFO, WARNING or ERROR; if it is not set, LOG_LEVEL counts, as in 3.x."
    )
    log_format: LogFormat = Field(LogFormat.AUTO, description="json, text, or auto: text on a terminal only.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.api_auth_enabled and self.api_auth_token is None and self.api_auth_token_file is None:
            raise ValueError(
                "TELEMETRY_API_AUTH_TOKEN: must be set (or TELEMETRY_API_AUTH_TOKEN_FILE) "
                "when TELEMETRY_API_AUTH_ENABLED is true"
            )
        if self.api_auth_token is not None and self.api_auth_token_file is not None:
            raise ValueError(
                "TELEMETRY_API_AUTH_TOKEN: set either the token or TELEMETRY_API_AUTH_TOKEN_FILE, not both"
            )
        if self.api_auth_enabled:
            self.token()
        return self

    def token(self) -> bytes | None:
        """Return the bytes of the token, from wherever it is set, without surrounding blanks.

        Raises:
            ValueError: if the token's file holds none, or the token is too short to protect anything.

        """
        text = self.api_auth_token.get_secret_value().strip() if self.api_auth_token else None
        name, file = "TELEMETRY_API_AUTH_TOKEN", ""
        if self.api_auth_token_file is not None:
            name, file = "TELEMETRY_API_AUTH_TOKEN_FILE", f" in {self.api_auth_token_file}"
            try:
                text = read_token(self.api_auth_token_file)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        if text is None:
            return None
        if len(text) < 8:
            raise ValueError(f"{name}: must hold at least 8 characters{file}; make one with: openssl rand -hex 32")
        if not text.isprintable():
            raise ValueError(f"{name}: must be printable text of one line")
        return text.encode()

    @property
    def unix_socket(self) -> Path | None:
        """The Unix socket that TELEMETRY_API_UNIX names, or None."""
        return None if self.api_unix in (None, NO_SOCKET) else self.api_unix

    @property
    def own_socket(self) -> Path | None:
        """The Unix socket next to the database, or None if another one or none at all is wanted."""
        if self.api_unix is not None:
            return None
        real = self.db_path.resolve()
        return real.with_name(f"{real.name}.sock")

    @property
    def host_names(self) -> frozenset[str] | None:
        """The names of TELEMETRY_ALLOWED_HOSTS, or None if it is not set."""
        return None if self.allowed_hosts is None else frozenset(self.allowed_hosts.split(","))

    @property
    def reading_origins(self) -> frozenset[str]:
        """The origins of TELEMETRY_CORS_ORIGINS."""
        return frozenset(self.cors_origins.split(",") if self.cors_origins is not None else ())

    @property
    def durable(self) -> bool:
        """Whether an acknowledged write survives a power cut, and not only a crash."""
        return self.db_synchronous is not Synchronous.NORMAL


def variable(name: str) -> str:
    """Return the environment variable of a field: db_path → TELEMETRY_DB_PATH."""
    return PREFIX + name.upper()


def flag(name: str) -> str:
    """Return the flag of a field: api_port → --port, db_path → --db-path."""
    return "--" + name.removeprefix("api_").replace("_", "-")


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """The settings, where each came from, and remarks that are worth a line in the log."""

    settings: Settings
    origins: Mapping[str, Origin]
    remarks: tuple[str, ...]

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
    return LoadedSettings(settings, origins, tuple(noted))


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
    return _log_level(value) in set(LogLevel)


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
