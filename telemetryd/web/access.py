"""Access checks: Host, Origin, token, protected mode, rate limit."""

from __future__ import annotations

import base64
import contextlib
import hmac
import ipaddress
import math
import os
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from aiohttp import hdrs, web

from telemetryd import flow
from telemetryd.model.hosts import PORTS, Names, split
from telemetryd.model.values import shorten
from telemetryd.settings import Settings
from telemetryd.web.answers import client_address, endpoint_of, error_response, wants_page
from telemetryd.web.browsers import ASSETS, HEALTH, Pages
from telemetryd.web.secure import has_client_certificate, is_for

_CREDENTIALS: Final = struct.Struct("3i")
"""Linux's struct ucred: process, user, group (unix(7), SO_PEERCRED)."""


ADMIN_PREFIX: Final = "/api/v1/admin/"


PAGE_PREFIXES: Final = ("/docs", "/redoc", "/openapi.json")


class RateLimit:
    """A token bucket for each client address, for a bounded number of addresses.

    Args:
        per_minute: requests that an address may send in a minute, and at once after a rest.
        clock: monotonic seconds.
        addresses: how many addresses are remembered; the one not seen for longest is forgotten first.

    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic, addresses: int = 10_000) -> None:
        self._capacity = float(per_minute)
        self._per_second = per_minute / 60
        self._clock = clock
        self._addresses = addresses
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, address: str) -> float:
        """Take a token for a request; return 0, or the seconds until there will be one."""
        now = self._clock()
        tokens, since = self._buckets.pop(address, (self._capacity, now))
        tokens = min(self._capacity, tokens + (now - since) * self._per_second)
        allowed = tokens >= 1
        self._buckets[address] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > self._addresses:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - tokens) / self._per_second


class Gate:
    """Decides whether a request may pass, before its body is read."""

    def __init__(self, settings: Settings) -> None:
        self._token = settings.token() if settings.api_auth_enabled else None
        self._loopback_only = self._token is None and settings.api_protected_mode
        self._own_socket = None if settings.own_socket is None else str(settings.own_socket)
        socket = settings.unix_socket or settings.own_socket
        self._socket = "(TELEMETRY_API_UNIX)" if socket is None else socket.absolute()
        self._limit = RateLimit(settings.rate_limit_rpm) if settings.rate_limit_enabled else None
        self._names = Names(settings.host_names, settings.api_host)
        self._pages = Pages(self._names, settings.reading_origins)
        # A page that has rebound its name does not know the token.
        self._checks_host = self._token is None or settings.host_names is not None

    def refusal(self, request: web.Request) -> web.Response | None:
        """Return the answer that ends a request before its handler, or None."""
        return (
            self._refusal_of_page(request)
            or self._pages.preflight(request)  # which a browser sends without a token
            or self._refusal_of_client(request)
        )

    def may_advise(self, request: web.Request, status: int) -> bool:
        """Return whether an answer may say how busy the daemon is; one over the rate limit has shown no token yet."""
        if status == 429:
            return self._token is None or self._is_authentic(request)
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
        endpoint = endpoint_of(request)
        is_admin = endpoint is not None and (endpoint.startswith(ADMIN_PREFIX) or request.method == hdrs.METH_DELETE)
        socket_of_own = _own_unix_peers_socket(request)
        # Nobody else can open the socket next to the database, and who can may read that and the token as well.
        if socket_of_own is not None and (is_admin or socket_of_own == self._own_socket):
            return None
        if is_admin and self._token is None:
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
        if self._limit is not None:
            wait = self._limit.wait_s(client_address(request))
            if wait:
                return error_response(429, "Too many requests from this address", {"Retry-After": str(math.ceil(wait))})
        if self._token is not None and not _is_open(request) and not self._is_authentic(request):
            return _ask_for_token(request)
        return None

    def _is_authentic(self, request: web.Request) -> bool:
        assert self._token is not None  # noqa: S101 - for the type checker
        sent = [token.encode("utf-8", "surrogateescape") for token in _tokens(request)]
        return any(hmac.compare_digest(token, self._token) for token in sent)


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


def _ask_for_token(request: web.Request) -> web.Response:
    """Return a 401; a browser that opens a page also gets the one scheme by which it can ask its user for the token."""
    if any(_tokens(request)):
        reason = "The token is wrong"
    else:
        reason = "Authorization holds no bearer token" if "Authorization" in request.headers else "No token was sent"
    response = error_response(
        401,
        "A valid token is needed: Authorization: Bearer … or X-API-Key: …",
        {"WWW-Authenticate": 'Bearer realm="telemetryd"'},
        reason,
    )
    if _is_page(request) and "text/html" in request.headers.get("Accept", ""):
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
