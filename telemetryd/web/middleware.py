"""What every request passes: request id, host, peer and token checks, rate limit, errors to JSON, log and counters."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import ipaddress
import itertools
import logging
import math
import os
import re
import secrets
import socket
import struct
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final

import orjson
from aiohttp import ClientPayloadError, web
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.typedefs import Middleware

import telemetryd
from telemetryd import SERVER_HEADER, flow
from telemetryd.errors import (
    BodyTooLargeError,
    CommandFailedError,
    CursorGoneError,
    InvalidBodyError,
    InvalidRequestError,
    NoMemoryError,
    NotWatchedError,
    RunNotFoundError,
    TelemetrydError,
    UnavailableError,
    UnsupportedBodyError,
    sentence,
)
from telemetryd.model.runs import shorten
from telemetryd.ops.logs import log
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings
from telemetryd.web.browsers import ASSETS, HEALTH, Pages
from telemetryd.web.hosts import Names

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SLOW_S: Final = 1.0
_REQUEST_ID: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,126}[\x21-\x7e])?")
_CREDENTIALS: Final = struct.Struct("3i")
"""Linux's struct ucred: process, user, group (unix(7), SO_PEERCRED)."""
_SERVER: Final = f"telemetryd/{telemetryd.__version__.partition('.')[0]}"
ADMIN_PREFIX: Final = "/api/v1/admin/"
PAGE_PREFIXES: Final = ("/docs", "/openapi.json")
_JSON: Final = "application/json"

_CLIENT_LEFT: Final = 499
"""The status under which a request is counted that ended without an answer, as nginx calls it."""

STATUSES: Final[tuple[tuple[type[TelemetrydError], int], ...]] = (
    (InvalidBodyError, 422),
    (InvalidRequestError, 400),
    (RunNotFoundError, 404),
    (NotWatchedError, 409),
    (CursorGoneError, 410),
    (BodyTooLargeError, 413),
    (UnsupportedBodyError, 415),
    (UnavailableError, 503),
)
"""The HTTP status of each error; whatever is not listed is a 500 that tells nothing but its request id."""


class Note:
    """What a handler has to say about its request for the log: a message and the guide's fields."""

    __slots__ = ("fields", "level", "message")

    def __init__(self) -> None:
        self.message = "Request answered"
        self.level = logging.INFO
        self.fields: dict[str, Any] = {}

    def say(self, message: str, level: int = logging.INFO, **fields: Any) -> None:
        """Set the line's message and fields."""
        self.message = message
        self.level = level
        self.fields = fields


NOTE: Final = web.RequestKey("note", Note)


def json_response(payload: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return an answer in JSON."""
    return web.Response(body=orjson.dumps(payload), status=status, headers=headers, content_type=_JSON)


IDENTITY: Final = web.RequestKey("identity", str)
"""The request's id, for an answer that is sent before its handler returns."""

WAITED: Final = web.ResponseKey("waited", float)
"""For how many seconds a handler only waited for something to tell; they do not count as time that it took."""

REASON: Final = web.ResponseKey("reason", str)
"""Why a request was refused, for the log."""


def error_response(
    status: int, detail: object, headers: Mapping[str, str] | None = None, reason: str = ""
) -> web.Response:
    """Return an error in the one shape that all errors have: `{"detail": …}`; the log may know more of the reason."""
    response = json_response({"detail": detail}, status, headers)
    response[REASON] = reason or str(detail)
    return response


@contextlib.contextmanager
def leaving(request: web.Request) -> Iterator[None]:
    """Raise ConnectionResetError, as a write would, in the place of the cancellation when the client leaves.

    For those who have something to say then; `connections.py` cancels what nobody waits for any more.
    """
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if request.transport is not None or task is None:
            raise
        task.uncancel()
        raise ConnectionResetError("The client has left") from error


def mark(response: web.StreamResponse, identity: str) -> None:
    """Give an answer what every answer carries: its request id, who gives it, and nothing that helps an attacker."""
    headers = response.headers
    headers["X-Request-ID"] = identity
    headers[SERVER_HEADER] = _SERVER
    headers["Server"] = "telemetryd"  # aiohttp would name its own version and Python's
    headers["X-Content-Type-Options"] = "nosniff"


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
        """Tell whether an answer may say how busy the daemon is; who asks too often has not shown a token yet."""
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
        return self._names.has_host(host) or self._names.may_be_a_proxys(host, _port(request))

    def _refusal_of_client(self, request: web.Request) -> web.Response | None:
        """Keep out who has no right to ask, or asks too often."""
        resource = request.match_info.route.resource
        if resource is not None and resource.canonical.startswith(ADMIN_PREFIX):
            if _is_own_unix_peer(request):
                return None
            if self._token is None:
                return error_response(
                    403,
                    "Admin endpoints need authentication (TELEMETRY_API_AUTH_ENABLED) or the Unix socket "
                    "(TELEMETRY_API_UNIX), used by the daemon's own user or root",
                )
        if self._loopback_only and not _is_loopback(request.remote):
            return error_response(
                403,
                "Protected mode: only this machine is served while authentication is off; set "
                "TELEMETRY_API_AUTH_ENABLED=true and TELEMETRY_API_AUTH_TOKEN, or TELEMETRY_API_PROTECTED_MODE=false",
            )
        if self._limit is not None:
            wait = self._limit.wait_s(request.remote or "")
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
    """Return a 401; a browser that opens a page is also told the one way that it can ask its user for the token."""
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


def wants_page(request: web.Request) -> bool:
    """Tell whether the bare address is opened in a browser."""
    return "text/html" in request.headers.get("Accept", "")


def _is_open(request: web.Request) -> bool:
    """Tell whether a request needs no token: the health, and the page, which holds no data and asks for the token."""
    if request.path == HEALTH:
        return True
    resource = request.match_info.route.resource
    if resource is None:
        return False
    return resource.canonical.startswith(ASSETS) or (resource.canonical == "/" and wants_page(request))


def _is_page(request: web.Request) -> bool:
    """Tell whether a request is for a page or the document: these only read, so a browser may remember the token."""
    resource = request.match_info.route.resource
    return resource is not None and (resource.canonical == "/" or resource.canonical.startswith(PAGE_PREFIXES))


def _port(request: web.Request) -> int:
    """Return the port where a request came in, 0 if that is not known."""
    name = request.transport.get_extra_info("sockname") if request.transport is not None else None
    return int(name[1]) if isinstance(name, tuple) else 0


def _is_own_unix_peer(request: web.Request) -> bool:
    """Tell whether a request came over the Unix socket from a process of our own user or root."""
    connection = request.transport.get_extra_info("socket") if request.transport is not None else None
    if connection is None or sys.platform != "linux" or connection.family != socket.AF_UNIX:
        return False
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(credentials)[1] in (0, os.geteuid())


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


def unexpected_detail(identity: str) -> str:
    """Return all that a client learns of an error that nobody foresaw."""
    return f"Internal error; the log tells more under request id {identity}"


# A random word and a counter: asking the system for randomness each time would give the interpreter's lock
# away in the middle of a request.
_PROCESS: Final = secrets.token_hex(6)
_numbers: Final = itertools.count(1)


def request_id(request: web.BaseRequest) -> str:
    """Return the client's own request id if it is usable, else a new one."""
    given = request.headers.get("X-Request-ID", "")
    return given if _REQUEST_ID.fullmatch(given) else f"{_PROCESS}-{next(_numbers):x}"


def middleware(settings: Settings, metrics: Metrics, advice: Callable[[], str]) -> Middleware:
    """Return the one middleware of the app; `advice` gives the value of the Telemetry-Flow header."""
    gate = Gate(settings)

    @web.middleware
    async def pass_through(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.perf_counter()
        identity = request[IDENTITY] = request_id(request)
        note = request[NOTE] = Note()
        problem: BaseException | None = None
        try:
            response = gate.refusal(request) or await handler(request)
        except (
            TelemetrydError,
            web.HTTPException,
            ClientPayloadError,
            BadHttpMessage,
            ConnectionError,
        ) as error:
            problem = error
            response = _answer_error(error, identity)
        except asyncio.CancelledError:  # the client has left, or the daemon stops
            metrics.count_request(request.method, await _endpoint(request), _CLIENT_LEFT, time.perf_counter() - started)
            raise
        except MemoryError as error:
            traceback.clear_frames(error.__traceback__)  # which hold what there was no memory for
            problem = NoMemoryError()
            problem.__cause__ = error
            response = _answer_error(problem, identity)
        except Exception as error:  # noqa: BLE001 - whatever it is must not reach the client; the log has it in full
            problem = error
            response = _answer_error(error, identity)
        mark(response, identity)
        if gate.may_advise(request, response.status):
            response.headers[flow.HEADER] = advice()
        seconds = time.perf_counter() - started - response.get(WAITED, 0.0)
        endpoint = await _endpoint(request)
        metrics.count_request(request.method, endpoint, response.status, seconds)
        if isinstance(problem, UnavailableError) and request.method in flow.METHODS:
            metrics.refused.labels(_reason(problem)).inc()
        _log(
            request,
            note,
            problem,
            endpoint=endpoint,
            status=response.status,
            seconds=seconds,
            identity=identity,
            reason=response.get(REASON, ""),
        )
        return response

    return pass_through


async def _endpoint(request: web.Request) -> str:
    resource: web.AbstractResource | None = request.match_info.route.resource
    if resource is None and isinstance(request.match_info.http_exception, web.HTTPMethodNotAllowed):
        for resource in request.app.router.resources():
            if (await resource.resolve(request))[1]:
                return resource.canonical
    return resource.canonical if resource is not None else _NOWHERE


_NOWHERE: Final = "(no such endpoint)"


def _reason(error: UnavailableError) -> str:
    """Return why a write was refused, in words: QueueFullError → queue full."""
    return re.sub(r"\B(?=[A-Z])", " ", type(error).__name__.removesuffix("Error")).lower()


def _answer_error(error: BaseException, identity: str) -> web.Response:
    if isinstance(error, web.HTTPException):
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return error_response(error.status, _HTTP_DETAILS.get(error.status, error.reason), headers)
    if isinstance(error, (ClientPayloadError, BadHttpMessage, ConnectionError)):
        return error_response(400, "The body was cut off or badly framed")
    status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
    if isinstance(error, InvalidBodyError):
        return error_response(status, error.errors)
    if isinstance(error, UnavailableError):
        return error_response(status, sentence(error), {"Retry-After": str(error.retry_after_seconds)})
    if status == 500:
        return error_response(status, unexpected_detail(identity))
    return error_response(status, sentence(error))


_HTTP_DETAILS: Final = {
    404: "No such endpoint; /docs lists them all",
    405: "Method not allowed here; see Allow",
}


def _log(
    request: web.Request,
    note: Note,
    problem: BaseException | None,
    *,
    endpoint: str,
    status: int,
    seconds: float,
    identity: str,
    reason: str,
) -> None:
    is_write = request.method in flow.METHODS
    level = note.level if status < 400 else logging.ERROR if status in (400, 422) or status >= 500 else logging.WARNING
    if not log.isEnabledFor(level):
        return
    fields: dict[str, Any] = {"endpoint": endpoint, **note.fields, "duration_ms": round(seconds * 1000, 3)}
    fields["success" if is_write else "is_slow"] = status < 400 if is_write else seconds > SLOW_S
    message = note.message
    if status >= 400:
        kind = (
            "ValidationError"
            if isinstance(problem, (InvalidBodyError, InvalidRequestError))
            else type(problem).__name__
        )
        text = sentence(problem) if problem is not None else reason or f"Answered with status {status}"
        fields |= {"error_type": kind if problem is not None else "Refused", "error_message": text[:2000]}
        if isinstance(problem, (UnavailableError, NotWatchedError)) and problem.__cause__ is not None:
            fields["error_cause"] = str(problem.__cause__)
        message = f"Error in {endpoint}: {text[:2000]}"
        if endpoint == _NOWHERE:
            fields["path"] = request.path[:200]
    fields |= {
        "request_id": identity,
        "method": request.method,
        "status": status,
        "client": request.remote or "unix",
    }
    unexpected = status == 500 and not isinstance(problem, CommandFailedError)
    log.log(level, message, extra=fields, exc_info=problem if unexpected else None)
