"""Access checks: Host, Origin, token, protected mode, rate limit."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import math
import os
import socket
import struct
from collections.abc import Mapping
from typing import Final

from aiohttp import web

from telemetryd import flow
from telemetryd.errors import TokenQuotaError
from telemetryd.model.hosts import PORTS, Names, split
from telemetryd.model.tokens import Scope, is_allowed
from telemetryd.model.values import shorten
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings
from telemetryd.web.answers import Handler, client_address, endpoint_of, error_response
from telemetryd.web.browsers import ASSETS, HEALTH, Pages
from telemetryd.web.limits import Quota, RateLimit
from telemetryd.web.negotiation import wants_page
from telemetryd.web.secure import has_client_certificate, is_for
from telemetryd.web.tokens import BEARER, Bearer, Tokens

_CREDENTIALS: Final = struct.Struct("3i")
"""Linux's struct ucred: process, user, group (unix(7), SO_PEERCRED)."""


PAGE_PREFIXES: Final = ("/docs", "/redoc", "/openapi.json")


class Gate:
    """Decides whether a request may pass, before its body is read.

    Args:
        settings: who is served at all.
        tokens: who is known.
        scopes: what each handler needs; one that is not named needs any token.
        metrics: where refusals are counted.

    """

    def __init__(
        self, settings: Settings, tokens: Tokens, scopes: Mapping[Handler, Scope | None], metrics: Metrics
    ) -> None:
        self._tokens = tokens
        self._scopes = scopes
        self._metrics = metrics
        self._loopback_only = not tokens.is_on and settings.api_protected_mode
        self._own_socket = None if settings.own_socket is None else str(settings.own_socket)
        socket = settings.unix_socket or settings.own_socket
        self._socket = "(TELEMETRY_API_UNIX)" if socket is None else socket.absolute()
        self._limit = RateLimit(settings.rate_limit_rpm) if settings.rate_limit_enabled else None
        self._names = Names(settings.host_names, settings.api_host)
        self._pages = Pages(self._names, settings.reading_origins)
        # A page that has rebound its name does not know the token.
        self._checks_host = not tokens.is_on or settings.host_names is not None

    def refusal(self, request: web.Request) -> web.Response | None:
        """Return the answer that ends a request before its handler, or None.

        Raises:
            TokenQuotaError: if the quota of its token is used up.

        """
        return (
            self._refusal_of_page(request)
            or self._pages.preflight(request)  # which a browser sends without a token
            or self._refusal_of_client(request)
        )

    def may_advise(self, request: web.Request, status: int) -> bool:
        """Return whether an answer may say how busy the daemon is; one over the rate limit has shown no token yet."""
        if status == 429:
            return not self._tokens.is_on or request[BEARER] is not None
        return status == 503 or (request.method in flow.METHODS and status not in flow.NEVER)

    def _refusal_of_page(self, request: web.Request) -> web.Response | None:
        """Keep out what a foreign web page makes a browser send."""
        host = request.headers.get("Host", "")
        if self._checks_host and request.remote and not self._is_called(request, host):
            return error_response(
                403,
                f"Host {shorten(host)!r} is not a name of this daemon; if it is, list it in TELEMETRY_ALLOWED_HOSTS",
            )
        refusal = self._pages.refusal(request)
        return error_response(403, refusal) if refusal is not None else None

    def _is_called(self, request: web.Request, host: str) -> bool:
        return (
            self._names.has_host(host)
            or self._names.may_be_a_proxys(host, _port(request), PORTS[request.scheme])
            or ((parts := split(host)) is not None and is_for(request, parts[0]))
        )

    def _refusal_of_client(self, request: web.Request) -> web.Response | None:
        """Keep out who has no right to ask, or asks too often."""
        needed = self._scopes.get(request.match_info.handler)
        is_admin = needed is Scope.ADMIN
        socket_of_own = _own_unix_peers_socket(request)
        # Nobody else can open the socket next to the database, and who can may read that and the token as well.
        if socket_of_own is not None and (is_admin or socket_of_own == self._own_socket):
            return None
        if is_admin and not self._tokens.is_on:
            return error_response(
                403,
                "Admin endpoints need authentication (TELEMETRY_API_AUTH_ENABLED) or the Unix socket "
                f"{self._socket}, used by the daemon's own user or root",
            )
        if self._loopback_only and not _is_loopback(request.remote) and not has_client_certificate(request):
            return error_response(
                403,
                "Protected mode: only this machine is served while authentication is off; set "
                "TELEMETRY_API_AUTH_ENABLED=true and TELEMETRY_API_AUTH_TOKEN, or TELEMETRY_TLS_CLIENT_CA, or "
                "TELEMETRY_API_PROTECTED_MODE=false",
            )
        return self._refusal_of_bearer(request, needed) if self._tokens.is_on else self._refusal_by_rate(request, None)

    def _refusal_of_bearer(self, request: web.Request, needed: Scope | None) -> web.Response | None:
        """Keep out who brings no token, or one that may not do this, or not now."""
        bearer = self._bearer(request)
        has_expired = bearer is not None and self._tokens.has_expired(bearer)
        if bearer is not None and not has_expired:
            request[BEARER] = bearer
        refusal = self._refusal_by_rate(request, request[BEARER])
        if refusal is not None or _is_open(request):
            return refusal
        if bearer is None:
            reason = _fault(request)
            self._metrics.refuse_token("", "wrong" if reason == _WRONG else "missing")
            return ask_for_token(request, reason)
        if has_expired:
            self._metrics.refuse_token(bearer.name, "expired")
            return ask_for_token(request, f"The token {bearer.name} has expired")
        if needed is not None and not is_allowed(bearer.scopes, needed):
            self._metrics.refuse_token(bearer.name, "scope")
            return _lacks_scope(bearer, needed)
        if bearer.quota is not None and needed is Scope.INGEST:
            _check_quota(request, bearer.quota)
        return None

    def _bearer(self, request: web.Request) -> Bearer | None:
        """Return whose token a request brings, which may have expired."""
        for sent in _tokens(request):
            if sent and (bearer := self._tokens.find(sent.encode("utf-8", "surrogateescape"))) is not None:
                return bearer
        return None

    def _refusal_by_rate(self, request: web.Request, bearer: Bearer | None) -> web.Response | None:
        is_named = bearer is not None and not bearer.is_single
        limit = bearer.requests if bearer is not None and is_named else self._limit
        if limit is None:
            return None
        wait_s = limit.wait_s("" if is_named else client_address(request))
        if not wait_s:
            return None
        if bearer is not None:
            self._metrics.refuse_token(bearer.name, "rate")
        whose = "with this token" if is_named else "from this address"
        return error_response(429, f"Too many requests {whose}", {"Retry-After": str(math.ceil(wait_s))})


def _check_quota(request: web.Request, quota: Quota) -> None:
    exhausted = quota.exhausted(creates="event_id" not in request.match_info)
    if exhausted is not None:
        raise TokenQuotaError(exhausted.quota, exhausted.wait_s)


def _tokens(request: web.Request) -> list[str]:
    """Return what a request brings as its token."""
    scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return [credentials.strip()]
    tokens = [request.headers.get("X-API-Key", "")]
    if scheme.lower() == "basic" and _is_page(request):
        with contextlib.suppress(ValueError):  # it is no base64
            user_and_password = base64.b64decode(credentials, validate=True).decode("utf-8", "surrogateescape")
            tokens.append(user_and_password.partition(":")[2])
    return tokens


def _lacks_scope(bearer: Bearer, needed: Scope) -> web.Response:
    """Return a 403 that says which scope is missing (RFC 6750 section 3.1)."""
    return error_response(
        403,
        f"This needs a token with the scope {needed}; this one has {', '.join(sorted(bearer.scopes))}",
        {"WWW-Authenticate": f'Bearer realm="telemetryd", error="insufficient_scope", scope="{needed}"'},
    )


_WRONG: Final = "The token is wrong"


def _fault(request: web.Request) -> str:
    """Say what is wrong with the token of a request that brings none that is known."""
    if any(_tokens(request)):
        return _WRONG
    return "Authorization holds no bearer token" if "Authorization" in request.headers else "No token was sent"


def ask_for_token(request: web.Request, reason: str) -> web.Response:
    """Return a 401; a browser that opens a page also gets the one scheme by which it can ask its user for the token."""
    response = error_response(
        401,
        "A valid token is needed: Authorization: Bearer … or X-API-Key: …",
        {"WWW-Authenticate": 'Bearer realm="telemetryd"'},
        reason,
    )
    if _is_page(request) and wants_page(request):
        response.headers.add("WWW-Authenticate", 'Basic realm="telemetryd: the token is the password", charset="UTF-8"')
    return response


def _is_open(request: web.Request) -> bool:
    """Return whether a request needs no token: the health, and the page, which holds no data and asks for the token."""
    if request.path.removesuffix("/") == HEALTH:
        return True
    endpoint = endpoint_of(request) or ""
    return endpoint.startswith(ASSETS) or (endpoint == "/" and wants_page(request))


def _is_page(request: web.Request) -> bool:
    """Return whether a request is for a page or the document: these only read, so a browser may remember the token."""
    endpoint = endpoint_of(request)
    return endpoint is not None and (endpoint == "/" or endpoint.startswith(PAGE_PREFIXES))


def _port(request: web.Request) -> int:
    """Return the port where a request came in, 0 if that is not known."""
    name = request.transport.get_extra_info("sockname") if request.transport is not None else None
    return int(name[1]) if isinstance(name, tuple) else 0


def _own_unix_peers_socket(request: web.Request) -> str | None:
    """Return the Unix socket by which a request came from a process of our own user or root, None for any other."""
    if request.remote:  # a Unix socket's client has no address
        return None
    connection = request.transport.get_extra_info("socket") if request.transport is not None else None
    if connection is None or connection.family != socket.AF_UNIX:
        return None
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return str(connection.getsockname()) if _CREDENTIALS.unpack(credentials)[1] in (0, os.geteuid()) else None


def _is_loopback(address: str | None) -> bool:
    if address is None:  # it is not known any more
        return False
    if not address:  # the Unix socket has no address; who may open it is up to the file system
        return True
    if address.startswith("127."):
        return True
    try:
        peer = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = peer.ipv4_mapped if isinstance(peer, ipaddress.IPv6Address) else None
    return (mapped or peer).is_loopback
