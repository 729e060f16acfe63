"""The tokens that are accepted now: found by their hash, and read again within a second of a change of their file."""

from __future__ import annotations

import hmac
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from aiohttp import web

from telemetryd.errors import ConfigurationError, TokenGoneError
from telemetryd.model.tokens import SINGLE, Scope, Token, digest
from telemetryd.ops import token_file
from telemetryd.ops.logs import log
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings
from telemetryd.web.limits import Quota, RateLimit


class Bearer:
    """Somebody with a token: what it may do, and what it has used up."""

    __slots__ = ("entry", "expires", "hash", "name", "prefix", "quota", "requests", "scopes")

    def __init__(self, name: str, hashed: bytes, scopes: Iterable[Scope]) -> None:
        self.name = name
        self.hash = hashed
        self.scopes = frozenset(scopes)
        self.prefix = ""
        self.expires = math.inf
        self.requests: RateLimit | None = None
        """Its limit of requests; one that has none of its own, as the single token, is limited by address."""
        self.quota: Quota | None = None
        self.entry: Token | None = None

    @classmethod
    def of(cls, token: Token, per_minute: int | None) -> Bearer:
        """Return the bearer of a token of the file; it may send so many requests if the token sets no other limit."""
        bearer = cls(token.name, bytes.fromhex(token.hash), token.scopes)
        bearer.entry = token
        bearer.prefix = token.agent_prefix
        if token.expires_at is not None:
            bearer.expires = token.expires_at.timestamp()
        limits = token.limits
        if (most := limits.requests_per_minute or per_minute) is not None:
            bearer.requests = RateLimit(most, addresses=1)
        if limits.runs_per_minute is not None or limits.bytes_per_day is not None:
            bearer.quota = Quota(limits.runs_per_minute, limits.bytes_per_day)
        return bearer

    @property
    def is_single(self) -> bool:
        """Whether it is the one token of the settings."""
        return self.entry is None


BEARER: Final = web.RequestKey[Bearer | None]("bearer", Bearer)
"""Who sent a request, None if it brought no token that is accepted; the middleware sets it for every request."""

Known = dict[bytes, Bearer]
_UNSEEN: Final = (0, 0, 0, 0)
"""No file's state."""


class Tokens:
    """The tokens of the settings and of their file, if authentication is on.

    The file is looked at when a request brings a token, at most once a second. One that is broken changes nothing.

    Args:
        settings: name the file, and hold the single token.
        metrics: where its state is shown.
        now: seconds since the epoch, for expiry.

    Raises:
        ConfigurationError: if there is no token at all although authentication is on, or the file is broken.

    """

    def __init__(self, settings: Settings, metrics: Metrics, now: Callable[[], float] = time.time) -> None:
        self.is_on = settings.api_auth_enabled
        self._metrics = metrics
        self._now = now
        self._known: Known = {}
        self._path: Path | None = None
        self._seen: token_file.Signature | None = None
        """The state of the file that was read last, or `_UNSEEN`."""
        self._problem: str | None = None
        """Why the file cannot be used now."""
        self.look_every_s = 1.0
        """How often the state of the file is looked at, at most."""
        self._look_at = 0.0
        self._per_minute = settings.rate_limit_rpm if settings.rate_limit_enabled else None
        if (put_into_effect := self.prepare(settings)) is not None:
            put_into_effect()

    def find(self, secret: bytes) -> Bearer | None:
        """Return who has a secret, also if the token has expired; None if nobody has."""
        self._follow()
        hashed = digest(secret)
        bearer = self._known.get(hashed)
        if bearer is None or not hmac.compare_digest(bearer.hash, hashed):
            return None
        return bearer

    def has_expired(self, bearer: Bearer) -> bool:
        """Return whether a token is not accepted any more because of its age."""
        return bearer.expires <= self._now()

    def still_accepts(self, request: web.Request) -> bool:
        """Return whether an answer may go on: the token of its request is neither revoked, changed nor expired."""
        bearer = request[BEARER]
        if bearer is None:
            return True
        self._follow()
        return not self.has_expired(bearer) and self._known.get(bearer.hash) is bearer

    def check(self, request: web.Request) -> None:
        """See that a request that has waited, for news or for its own body, is still to be answered.

        Raises:
            TokenGoneError: if its token is not accepted any more.

        """
        if not self.still_accepts(request):
            raise TokenGoneError

    def prepare(self, settings: Settings) -> Callable[[], None] | None:
        """Read the file and the single token anew; return what puts them into effect, or None if they are the same.

        Whether authentication is on stays as it was at the start.

        Raises:
            ConfigurationError: with every problem, each naming its variable or file.

        """
        if not self.is_on:
            return None
        path = settings.tokens_path
        problems: list[str] = []
        single: bytes | None = None
        named: tuple[Token, ...] = ()
        try:
            single = settings.token()
        except ValueError as error:
            problems.append(str(error))
        seen = _signature(path)
        try:
            named = token_file.read(path)
        except ConfigurationError as error:
            problems += error.problems
        if not problems and single is None and not named:
            problems.append(
                "TELEMETRY_API_AUTH_ENABLED: is true, but there is no token: make one with telemetryd tokens create "
                f"(for {path}), or set TELEMETRY_API_AUTH_TOKEN or TELEMETRY_API_AUTH_TOKEN_FILE"
            )
        if problems:
            raise ConfigurationError(problems)
        before = self._known
        known = self._merge(self._single(single), named)
        if (path, seen, known) == (self._path, self._seen, before):
            return None

        def put_into_effect() -> None:
            if self._known is before or self._path != path:
                self._seen = seen
                self._use(known if self._known is before else self._merge(self._single(single), named))
            else:  # it has been followed since it was read here: who was revoked then stays so
                entries = [each.entry for each in self._known.values() if each.entry is not None]
                self._use(self._merge(self._single(single), entries))
            self._path, self._look_at = path, 0.0

        return put_into_effect

    def _follow(self) -> None:
        """Read the file again if it has changed; its state is looked at once a second at most."""
        moment = time.monotonic()
        if moment < self._look_at or self._path is None:
            return
        self._look_at = moment + self.look_every_s
        seen = _signature(self._path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            named = token_file.read(self._path)
        except ConfigurationError as error:
            if isinstance(error, token_file.UnreadableError):
                self._seen = _UNSEEN  # it may be read in a moment, as it is: somebody may have been revoked
            problem, said = "; ".join(error.problems), self._problem
            self._problem = problem
            self._metrics.tokens_broken.set(1)
            if problem != said:
                log.error(
                    "The file of tokens cannot be used; those known before stay", extra={"error_message": problem}
                )
            return
        self._use(self._merge([each for each in self._known.values() if each.is_single], named))
        log.info("Tokens read again", extra={"tokens": len(named)})

    def _single(self, secret: bytes | None) -> list[Bearer]:
        if secret is None:
            return []
        made = Bearer(SINGLE, digest(secret), (Scope.ADMIN,))
        known = self._known.get(made.hash)
        return [known if known is not None and known.is_single else made]

    def _merge(self, single: Iterable[Bearer], named: Iterable[Token]) -> Known:
        """Return all by their hashes; who is the same as before keeps what it has used up."""
        found = {each.hash: each for each in single}
        for token in named:
            known = self._known.get(bytes.fromhex(token.hash))
            bearer = known if known is not None and known.entry == token else Bearer.of(token, self._per_minute)
            found.setdefault(bearer.hash, bearer)
        return found

    def _use(self, known: Known) -> None:
        self._known = known
        self._problem = None
        self._metrics.know_tokens({each.name for each in known.values()})
        self._metrics.tokens_broken.set(0)


TOKENS: Final = web.AppKey("tokens", Tokens)


def _signature(path: Path) -> token_file.Signature | None:
    try:
        return token_file.signature(path)
    except OSError:  # to read it will say why
        return None


def unused(settings: Settings) -> int:
    """Return how many tokens the file holds that nobody is asked for, because authentication is off."""
    if settings.api_auth_enabled:
        return 0
    try:
        return len(token_file.read(settings.tokens_path))
    except ConfigurationError:
        return 0
