"""JSON responses and errors, and the notes that a handler leaves for the log line."""

from __future__ import annotations

import itertools
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import orjson
from aiohttp import web

import telemetryd
from telemetryd import SERVER_HEADER
from telemetryd.model import runs
from telemetryd.model.answers import Warned

W = TypeVar("W", bound=Warned)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


_REQUEST_ID: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,126}[\x21-\x7e])?")


# Never what a client would take for the name of a host or for a step upwards.
_PREFIX: Final = re.compile(r"(?:/\w[\w.~-]*){1,16}", re.ASCII)


_JSON: Final = "application/json"


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


def with_warnings(answer: W, ignored: tuple[str, ...], notes: Sequence[str] = ()) -> W:
    """Add what is to be said of a body that was taken: the fields that were not used, and other notes."""
    if ignored or notes:
        more = len(notes) - runs.MAX_WARNINGS
        cut = [*notes[: runs.MAX_WARNINGS], f"{more} more warnings"] if more > 0 else notes
        answer["warnings"] = [*runs.ignored_field_warnings(ignored), *cut]
    return answer


def endpoint_of(request: web.Request) -> str | None:
    """Return the path of the endpoint that answers, as the OpenAPI document has it; None if there is none."""
    resource = request.match_info.route.resource
    return None if resource is None else path_of(resource)


def path_of(resource: web.AbstractResource) -> str:
    """Return the path of a resource, without the slash at its end, which is ignored."""
    return resource.canonical.rstrip("/") or "/"


IDENTITY: Final = web.RequestKey("identity", str)
"""The request's id, for an answer that is sent before its handler returns."""


WAITED: Final = web.ResponseKey("waited", float)
"""The seconds in which a handler only waited for something to report; they do not count as its duration."""


REASON: Final = web.ResponseKey("reason", str)
"""Why a request was refused, for the log."""


def error_response(
    status: int, detail: object, headers: Mapping[str, str] | None = None, reason: str = ""
) -> web.Response:
    """Return an error in the one shape that all errors have: `{"detail": …}`; the log may know more of the reason."""
    response = json_response({"detail": detail}, status, headers)
    response[REASON] = reason or str(detail)
    return response


def mark(response: web.StreamResponse, identity: str) -> None:
    """Give an answer what every answer carries: its request id, who gives it, and nothing that helps an attacker."""
    headers = response.headers
    headers["X-Request-ID"] = identity
    headers[SERVER_HEADER] = _SERVER
    headers["Server"] = "telemetryd"  # aiohttp would name its own version and Python's
    headers["X-Content-Type-Options"] = "nosniff"


_MAPPED: Final = "::ffff:"


def client_address(request: web.BaseRequest) -> str:
    """Return a client's address, one of IPv4 as such also on a socket of IPv6; "" on the Unix socket."""
    address = request.remote or ""
    return address.removeprefix(_MAPPED) if address.startswith(_MAPPED) and "." in address else address


def next_page(request: web.Request, address: str) -> dict[str, str]:
    """Return the header that leads to the next page, under the sub-path that a proxy says it shows us at."""
    given = request.headers.get("X-Forwarded-Prefix", "").rstrip("/")
    prefix = given if _PREFIX.fullmatch(given) else ""
    return {"Link": f'<{prefix}{address}>; rel="next"'}


def unexpected_detail(identity: str) -> str:
    """Return all that a client learns of an unexpected error."""
    return f"Internal error; the log has more under request id {identity}"


# A random word and a counter: asking the system for randomness each time would give the interpreter's lock
# away in the middle of a request.
_PROCESS: Final = secrets.token_hex(6)


_numbers: Final = itertools.count(1)


def request_id(request: web.BaseRequest) -> str:
    """Return the client's own request id if it is usable, else a new one."""
    given = request.headers.get("X-Request-ID", "")
    return given if _REQUEST_ID.fullmatch(given) else f"{_PROCESS}-{next(_numbers):x}"


_SERVER: Final = f"telemetryd/{telemetryd.__version__.partition('.')[0]}"
