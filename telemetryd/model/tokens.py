"""Tokens: what each may do, and the form of the file that holds them; never the secrets themselves."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Final, Literal, Self

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from telemetryd.errors import ConfigurationError
from telemetryd.model.values import shorten

BEGIN: Final = "tmd_"
"""How each secret of ours begins, so that scanners recognise one that leaked."""
SINGLE: Final = "TELEMETRY_API_AUTH_TOKEN"
"""The name of the one token that is set by a variable and not in the file."""
MAX_FILE_BYTES: Final = 4 << 20
"""Far more than ten thousand tokens take."""
_ID: Final = "[0-9a-f]{8}"
_NAME: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?"
NAME_RULE: Final = "1 to 64 letters, digits, dots, hyphens and underscores, with a letter or digit at either end"
_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
_VERSION: Final = 1
_MOST_PROBLEMS: Final = 10


class Scope(StrEnum):
    """What a token may do."""

    INGEST = "ingest"
    """Create runs, and change those of agents with the token's prefix."""
    READ = "read"
    """Read everything."""
    ADMIN = "admin"
    """Everything, also what only an operator may do."""


def is_allowed(scopes: frozenset[Scope], needed: Scope) -> bool:
    """Return whether somebody with some scopes may do what needs one."""
    return needed in scopes or Scope.ADMIN in scopes


def _name(text: str) -> str:
    if re.fullmatch(_NAME, text) is None:
        raise ValueError(f"must have {NAME_RULE}")
    if text == SINGLE or re.fullmatch(_ID, text):
        raise ValueError("must be neither the name of a variable nor look like an id")
    return text


def _time(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return datetime.strptime(value, _TIME).replace(tzinfo=UTC)
    except ValueError:
        raise ValueError("must be a time in UTC, such as 2027-01-31T12:00:00Z") from None


_Time = Annotated[datetime, BeforeValidator(_time, json_schema_input_type=str)]
LARGEST_LIMIT: Final = 1 << 53
_Limit = Annotated[int, Field(ge=1, le=LARGEST_LIMIT)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class Limits(_Entry):
    """How much a token may be used; None is no limit of its own."""

    requests_per_minute: _Limit | None = None
    runs_per_minute: _Limit | None = None
    bytes_per_day: _Limit | None = None


class Token(_Entry):
    """A token as the file holds it."""

    id: Annotated[str, Field(pattern=f"^{_ID}$")]
    name: Annotated[str, AfterValidator(_name)]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1, strict=False)]
    agent_prefix: Annotated[str, Field(max_length=1000)] = ""
    """What the agent_name of each run begins with that it may create or change."""
    created_at: _Time
    expires_at: _Time | None
    hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.agent_prefix and (Scope.INGEST not in self.scopes or Scope.ADMIN in self.scopes):
            raise ValueError("agent_prefix is for tokens with the scope ingest and without admin")
        if self.agent_prefix and not self.agent_prefix.isprintable():
            raise ValueError("agent_prefix must be printable")
        return self

    def has_expired(self, now: datetime) -> bool:
        """Return whether it is not accepted any more."""
        return self.expires_at is not None and self.expires_at <= now

    def to_json(self) -> dict[str, object]:
        """Return what may be shown of it: everything but the hash."""
        shown = self.model_dump(exclude={"hash"})
        return {**shown, "created_at": _text(self.created_at), "expires_at": _text(self.expires_at)}


class _File(_Entry):
    version: Literal[1]
    tokens: tuple[Token, ...] = Field(strict=False)


@dataclass(frozen=True, slots=True)
class Asked:
    """A token to be made."""

    name: str
    scopes: tuple[Scope, ...]
    agent_prefix: str
    lifetime: timedelta | None
    limits: Limits


def digest(secret: bytes) -> bytes:
    """Return what stands for a secret: with 256 random bits it needs no slow hash."""
    return hashlib.sha256(secret).digest()


def make(asked: Asked, now: datetime) -> tuple[Token, str]:
    """Return a new token, and its secret, which nobody can find out again.

    Raises:
        ConfigurationError: with everything that is wrong with what is asked for.

    """
    secret = BEGIN + secrets.token_urlsafe(32)
    now = now.replace(microsecond=0)
    try:
        token = Token(
            id=secrets.token_hex(4),
            name=asked.name,
            scopes=tuple(dict.fromkeys(asked.scopes)),
            agent_prefix=asked.agent_prefix,
            created_at=now,
            expires_at=None if asked.lifetime is None else now + asked.lifetime,
            hash=digest(secret.encode()).hex(),
            limits=asked.limits,
        )
    except ValidationError as error:
        raise ConfigurationError(_problems(error, "The token")) from None
    return token, secret


def parse(data: bytes, name: str) -> tuple[Token, ...]:
    """Return the tokens of a file.

    Args:
        data: its bytes.
        name: what errors call it.

    Raises:
        ConfigurationError: with what is wrong in it, which never shows a hash.

    """
    try:
        tokens = _File.model_validate_json(data).tokens
    except ValidationError as error:
        raise ConfigurationError(_problems(error, name)) from None
    problems = [
        f"{name}: two tokens have the {what} {value!r}"
        for what, values in (("id", [each.id for each in tokens]), ("name", [each.name for each in tokens]))
        for value in _repeated(values)
    ]
    if _repeated([each.hash for each in tokens]):
        problems.append(f"{name}: two tokens have the same secret")
    if problems:
        raise ConfigurationError(problems)
    return tokens


def render(tokens: Sequence[Token]) -> bytes:
    """Return the bytes of a file that holds these tokens."""
    entries = [{**each.to_json(), "hash": each.hash} for each in tokens]
    return orjson.dumps({"version": _VERSION, "tokens": entries}, option=orjson.OPT_INDENT_2) + b"\n"


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.strftime(_TIME).zfill(20)


def _repeated(values: Iterable[str]) -> list[str]:
    return [value for value, times in Counter(values).items() if times > 1]


def _problems(error: ValidationError, name: str) -> list[str]:
    """Say what is wrong; the input is left out, which may be a hash, or a secret in the wrong place."""
    problems = []
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        place = shorten(".".join(map(str, fault["loc"])))
        problems.append(f"{name}: {f'{place}: ' if place else ''}{fault['msg'].removeprefix('Value error, ')}")
    more = len(problems) - _MOST_PROBLEMS
    return [*problems[:_MOST_PROBLEMS], f"{name}: and {more} more problems"] if more > 0 else problems
