"""Every setting once: its variable, flag, default, check and help."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)

from telemetryd.client.config import read_token
from telemetryd.client.paths import expanded
from telemetryd.durations import parse_duration
from telemetryd.model.hosts import ANY, HOST_NAME, parse_origins
from telemetryd.ops.logs import LogFormat, LogLevel

PREFIX: Final = "TELEMETRY_"
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


class Sync(StrEnum):
    """What a commit on PostgreSQL waits for (postgresql.org/docs/current/runtime-config-wal.html)."""

    STANDBY = "standby"
    APPLY = "apply"
    LOCAL = "local"
    NONE = "none"


def default_db_path() -> Path:
    """Return where the database is by default: the state directory under systemd, else ./data."""
    state_directory = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    return Path(state_directory or "data") / "telemetry.sqlite"


_URL: Final = re.compile(r"postgres(ql)?://")
_PASSWORDS: Final = (re.compile(r"(?<=password=)[^&]*"), re.compile(r"(?<=:)(?!//).*(?=@)"))
"""Those among the parameters first: they may hold the sign that ends the other one."""


def _upper(value: object) -> object:
    return value.strip().upper() if isinstance(value, str) else value


_LOG_LEVELS: Final = {"TRACE": "DEBUG", "NOTSET": "DEBUG", "WARN": "WARNING", "CRITICAL": "ERROR", "FATAL": "ERROR"}
"""Python's and uvicorn's other names, which 3.x took, and the level of ours that loses no line."""


def read_log_level(value: object) -> object:
    """Return our name of a log level, by whatever name Python, uvicorn or 3.x knew it; anything else as it is."""
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


_ONLY_SQLITE: Final = frozenset(
    {
        "db_path",
        "lock_file",
        "db_journal_mode",
        "db_synchronous",
        "db_busy_timeout_ms",
        "min_free_mb",
        "backup_dir",
        "backup_keep",
    }
)


OF_POSTGRES: Final = frozenset(
    {"db_password_file", "db_schema", "db_sync", "db_commit_timeout_s", "db_poll_ms"},
)
"""What means nothing without `db_url`."""


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
    db_url: SecretStr | None = Field(
        None,
        description="PostgreSQL database that is used in the place of a SQLite file, with all hosts of its cluster: "
        "postgresql://telemetryd@db1,db2/telemetry; a password is better in a file.",
    )
    db_password_file: FilePath | None = Field(None, description="File that holds the password of PostgreSQL's user.")
    db_schema: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,62}$")] = Field(
        "public", description="Schema of the PostgreSQL database that holds the tables."
    )
    db_sync: Sync | None = Field(
        None,
        description="What a commit on PostgreSQL waits for: standby (a synchronous standby has it on disk), apply (and "
        "shows it), local (the primary's disk), none (whatever the server is set to; not durable); if it is not set, "
        "standby where the URL names several hosts, else local.",
    )
    db_commit_timeout_s: Seconds = Field(
        30.0, description="After so many seconds PostgreSQL's answer to a commit counts as lost, and clients repeat."
    )
    db_poll_ms: Annotated[int, Field(ge=10, le=60_000)] = Field(
        200, description="How often PostgreSQL is asked for the changes of other daemons, in milliseconds."
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
    api_auth_enabled: bool = Field(
        False, description="Ask for a token everywhere but on /health and for the files of the page."
    )
    api_auth_token: SecretStr | None = Field(None, description="A token with the scope admin; better in a file.")
    api_auth_token_file: FilePath | None = Field(None, description="File that holds that token.")
    tokens_file: FilePath | None = Field(
        None,
        description="File of the tokens that `telemetryd tokens` makes; none: next to the database (its real path and "
        ".tokens).",
    )
    api_protected_mode: bool = Field(
        True,
        description="While authentication is off, serve loopback peers only, and those that have shown a certificate "
        "of TELEMETRY_TLS_CLIENT_CA.",
    )
    tls_cert: FilePath | None = Field(
        None,
        description="Certificate (PEM, with those between it and its authority): the TCP port speaks TLS then; "
        "none: plain HTTP.",
    )
    tls_key: FilePath | None = Field(
        None, description="Its private key (PEM), unreadable for others; none: in the certificate's file."
    )
    tls_client_ca: FilePath | None = Field(
        None, description="Authorities (PEM) of which every client has to show a certificate; none: clients need none."
    )
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
    rate_limit_enabled: bool = Field(False, description="Limit the requests of each client address and each token.")
    rate_limit_rpm: Positive = Field(
        60, description="Requests per minute and client address, or token that has no limit of its own."
    )
    quota_runs_per_minute: Positive | None = Field(
        None, description="New runs per minute and agent name; beyond it 429. none: no quota."
    )
    quota_bytes_per_day: Positive | None = Field(
        None,
        description="Bytes of runs, changes and events per day and agent name; beyond it 429. none: no quota.",
    )
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
        None,
        description="TOML file with the rules of alerts and their webhooks (docs/how-to/alerts.md); none: no alerts.",
    )
    backup_dir: FilePath | None = Field(None, description="Directory for backups made by POST /api/v1/admin/backup.")
    backup_keep: Positive | None = Field(None, description="How many of those backups are kept; none keeps all.")
    shutdown_timeout_s: Seconds = Field(10.0, description="Longest orderly shutdown, in seconds.")
    log_level: Annotated[LogLevel, BeforeValidator(read_log_level)] = Field(
        LogLevel.INFO, description="DEBUG, INFO, WARNING or ERROR; if it is not set, LOG_LEVEL counts, as in 3.x."
    )
    log_format: LogFormat = Field(LogFormat.AUTO, description="json, text, or auto: text on a terminal only.")

    @field_validator("db_url")
    @classmethod
    def _check_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not _URL.match(value.get_secret_value()):
            raise ValueError("must begin with postgresql://, such as postgresql://telemetryd@db1,db2/telemetry")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.api_auth_token is not None and self.api_auth_token_file is not None:
            raise ValueError(
                "TELEMETRY_API_AUTH_TOKEN: set either the token or TELEMETRY_API_AUTH_TOKEN_FILE, not both"
            )
        if self.api_auth_enabled:
            self.token()
        if self.db_url is not None and (given := _ONLY_SQLITE & self.model_fields_set):
            names = ", ".join(variable(name) for name in Settings.model_fields if name in given)
            raise ValueError(f"{names}: means nothing with TELEMETRY_DB_URL, which chooses PostgreSQL; leave it out")
        if self.db_url is None and (changed := self._not_defaults(OF_POSTGRES)):
            names = ", ".join(map(variable, changed))
            raise ValueError(
                f"{names}: means nothing without TELEMETRY_DB_URL, the address of a database on PostgreSQL"
            )
        for name in ("tls_key", "tls_client_ca"):
            if self.tls_cert is None and getattr(self, name) is not None:
                raise ValueError(f"TELEMETRY_TLS_CERT: must be set when {variable(name)} is")
        return self

    def _not_defaults(self, among: frozenset[str]) -> list[str]:
        return [
            name
            for name, field in Settings.model_fields.items()
            if name in among and getattr(self, name) != field.default
        ]

    def token(self) -> bytes | None:
        """Return the bytes of the token, from wherever it is set, without surrounding blanks.

        Raises:
            ValueError: if the token's file holds none, or the token is too short to protect anything.

        """
        text = self.api_auth_token.get_secret_value().strip() if self.api_auth_token else None
        name, file = "TELEMETRY_API_AUTH_TOKEN", ""
        if self.api_auth_token_file is not None:
            name, file = "TELEMETRY_API_AUTH_TOKEN_FILE", f"{self.api_auth_token_file}: "
            try:
                text = read_token(self.api_auth_token_file)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        if text is None:
            return None
        if len(text) < 8:
            raise ValueError(f"{name}: {file}must have at least 8 characters; make one with: openssl rand -hex 32")
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
        if self.api_unix is not None or self.db_url is not None:
            return None
        real = self.db_path.resolve()
        return real.with_name(f"{real.name}.sock")

    @property
    def tokens_path(self) -> Path:
        """The file of the tokens, which need not be there."""
        if self.tokens_file is not None:
            return self.tokens_file
        real = self.db_path.resolve()
        return real.with_name(f"{real.name}.tokens")

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


def without_password(url: str) -> str:
    """Return the URL of a database as it may be shown."""
    for password in _PASSWORDS:
        url = password.sub("********", url)
    return url


def variable(name: str) -> str:
    """Return the environment variable of a field: db_path → TELEMETRY_DB_PATH."""
    return PREFIX + name.upper()


def flag(name: str) -> str:
    """Return the flag of a field: api_port → --port, db_path → --db-path."""
    return "--" + name.removeprefix("api_").replace("_", "-")
