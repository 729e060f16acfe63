"""Request pipeline: id, access checks, errors, log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from aiohttp import ClientPayloadError, web
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.typedefs import Middleware

from telemetryd import flow, traces
from telemetryd.errors import (
    BodyTooLargeError,
    CommandFailedError,
    CursorGoneError,
    InvalidBodyError,
    InvalidRequestError,
    ItemRefusedError,
    NoMemoryError,
    NotWatchedError,
    RunNotFoundError,
    TelemetrydError,
    TokenGoneError,
    TokenQuotaError,
    UnavailableError,
    UnsupportedBodyError,
    error_type,
    sentence,
)
from telemetryd.model.tokens import Scope
from telemetryd.ops import logs
from telemetryd.ops.logs import log
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings
from telemetryd.traces import Span
from telemetryd.web import compression
from telemetryd.web.access import Gate, ask_for_token
from telemetryd.web.answers import (
    IDENTITY,
    NOTE,
    REASON,
    WAITED,
    Handler,
    Note,
    client_address,
    error_response,
    mark,
    path_of,
    request_id,
    unexpected_detail,
)
from telemetryd.web.tokens import BEARER, Tokens

SLOW_S: Final = 1.0

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
"""The HTTP status of each error; whatever is not listed is a 500 that reveals nothing but its request id."""


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


def middleware(
    settings: Settings,
    metrics: Metrics,
    advice: Callable[[], str],
    tokens: Tokens,
    scopes: Mapping[Handler, Scope | None],
) -> Middleware:
    """Return the one middleware of the app.

    Args:
        settings: who is served.
        metrics: where requests are counted.
        advice: gives the value of the Telemetry-Flow header.
        tokens: who is known.
        scopes: what each handler needs.

    """
    gate = Gate(settings, tokens, scopes, metrics)

    def count(request: web.Request, endpoint: str, status: int, seconds: float) -> None:
        metrics.count_request(request.method, endpoint, status, seconds)
        if (bearer := request[BEARER]) is not None:
            metrics.count_token(bearer.name, status)

    @web.middleware
    async def pass_through(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.perf_counter()
        identity = request[IDENTITY] = request_id(request)
        note = request[NOTE] = Note()
        request[BEARER] = None
        problem: BaseException | None = None
        try:
            response = gate.refusal(request) or await handler(request)
            await compression.apply(request, response)
        except (
            TelemetrydError,
            web.HTTPException,
            ClientPayloadError,
            BadHttpMessage,
            ConnectionError,
        ) as error:
            problem = error
            response = _answer_error(request, error)
        except asyncio.CancelledError:  # the client has left, or the daemon stops
            count(request, await _endpoint(request), _CLIENT_LEFT, time.perf_counter() - started)
            raise
        except MemoryError as error:
            traceback.clear_frames(error.__traceback__)  # which hold what there was no memory for
            problem = NoMemoryError()
            problem.__cause__ = error
            response = _answer_error(request, problem)
        except Exception as error:  # noqa: BLE001 - whatever it is must not reach the client; the log has it in full
            problem = error
            response = _answer_error(request, error)
        mark(response, identity)
        if gate.may_advise(request, response.status):
            response.headers[flow.HEADER] = advice()
        seconds = time.perf_counter() - started - response.get(WAITED, 0.0)
        endpoint = await _endpoint(request)
        count(request, endpoint, response.status, seconds)
        if problem is not None:
            _count_refusal(metrics, request, problem)
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


def _count_refusal(metrics: Metrics, request: web.Request, problem: BaseException) -> None:
    if isinstance(problem, UnavailableError) and request.method in flow.METHODS:
        metrics.refused.labels(problem.reason).inc()
    if isinstance(problem, TokenQuotaError) and (bearer := request[BEARER]) is not None:
        metrics.refuse_token(bearer.name, "quota")
        metrics.refuse_quota("token", problem.quota)


async def _endpoint(request: web.Request) -> str:
    resource: web.AbstractResource | None = request.match_info.route.resource
    if resource is None and isinstance(request.match_info.http_exception, web.HTTPMethodNotAllowed):
        for resource in request.app.router.resources():
            if (await resource.resolve(request))[1]:
                return path_of(resource)
    return path_of(resource) if resource is not None else _NOWHERE


_NOWHERE: Final = "(no such endpoint)"


def _answer_error(request: web.Request, error: BaseException) -> web.Response:
    if isinstance(error, web.HTTPException):
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return error_response(error.status, _HTTP_DETAILS.get(error.status, error.reason), headers)
    if isinstance(error, (ClientPayloadError, BadHttpMessage, ConnectionError)):
        return error_response(400, "The body was cut off or badly framed")
    if isinstance(error, TokenGoneError):
        return ask_for_token(request, sentence(error))
    if isinstance(error, ItemRefusedError):
        headers = None if error.wait_s is None else {"Retry-After": str(math.ceil(error.wait_s))}
        return error_response(error.status, sentence(error), headers)
    status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
    if isinstance(error, InvalidBodyError):
        return error_response(status, error.errors)
    detail = unexpected_detail(request[IDENTITY]) if status == 500 else sentence(error)
    headers = {"Retry-After": str(error.retry_after_seconds)} if isinstance(error, UnavailableError) else None
    return error_response(status, detail, headers)


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
        text = sentence(problem) if problem is not None else reason or f"Answered with status {status}"
        kind = error_type(problem) if problem is not None else "Refused"
        fields |= {"error_type": kind, "error_message": text[:2000]}
        if isinstance(problem, (UnavailableError, NotWatchedError)) and problem.__cause__ is not None:
            fields["error_cause"] = str(problem.__cause__)
        message = f"Error in {endpoint}: {text[:2000]}"
        if endpoint == _NOWHERE:
            fields["path"] = request.path[:200]
    fields |= {
        "request_id": identity,
        "method": request.method,
        "status": status,
        "client": client_address(request) or "unix",
    }
    if (bearer := request[BEARER]) is not None:
        fields["token"] = bearer.name
    if (span := Span.parse(request.headers.get(traces.HEADER))) is not None:
        fields |= {"trace_id": span.trace_id, "span_id": span.span_id}
    if status == 500 and not isinstance(problem, CommandFailedError):
        log.log(level, message, extra=fields, exc_info=problem)
    else:
        logs.write_line(level, message, fields)
