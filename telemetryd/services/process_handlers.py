"""The handler that registers the process of a run for its death certificate."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from aiohttp import web

from telemetryd.model import bodies
from telemetryd.model.answers import ProcessWatched
from telemetryd.model.requests import ProcessRequest
from telemetryd.services.admission import check_run
from telemetryd.services.certificates import Certificates
from telemetryd.web.answers import NOTE, json_response, with_warnings
from telemetryd.web.body import json_body

CERTIFICATES: Final = web.AppKey("certificates", Certificates)


async def register_process(request: web.Request) -> web.Response:
    """Watch the process that works on a run."""
    event_id = request.match_info["event_id"]
    body, size = await json_body(request)
    wanted: ProcessRequest = bodies.validate(ProcessRequest, body)
    request[NOTE].say("Process registered", event_id=event_id, pid=wanted.pid)
    await check_run(request, event_id, size)
    await request.app[CERTIFICATES].register(event_id, wanted)
    answer: ProcessWatched = {"event_id": event_id, "pid": wanted.pid, "watched": True}
    return json_response(with_warnings(answer, tuple(wanted.__pydantic_extra__ or ())), 201)


async def watch_processes(app: web.Application) -> AsyncIterator[None]:
    """Go on watching the processes that the database knows, until the app ends."""
    app[CERTIFICATES].resume()
    yield
    await app[CERTIFICATES].close()
