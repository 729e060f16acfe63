"""Handlers of what only the operator may do: prune, reap, confirm, back up, delete and redact a run."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from telemetryd.errors import InvalidRequestError
from telemetryd.model import values
from telemetryd.model.parameters import accept_none
from telemetryd.services import admin
from telemetryd.services.subscriptions import FEED
from telemetryd.services.upkeep import Upkeep
from telemetryd.store import Store
from telemetryd.web.answers import NOTE, json_response
from telemetryd.web.body import json_body

STORE: Final = web.AppKey("store", Store)
UPKEEP: Final = web.AppKey("upkeep", Upkeep)


async def prune_runs(request: web.Request) -> web.Response:
    """Delete one slice of old runs."""
    body, _ = await json_body(request)
    answer = await admin.prune(request.app[STORE], body, values.utc_now())
    request[NOTE].say("Runs pruned", **answer)
    return json_response(answer)


async def reap_runs(request: web.Request) -> web.Response:
    """Cancel one slice of stale runs."""
    body, _ = await json_body(request)
    answer = await admin.reap(request.app[STORE], body, values.utc_now())
    request[NOTE].say("Runs reaped", **answer)
    return json_response(answer)


async def confirm(request: web.Request) -> web.Response:
    """Take note of what the operator confirms."""
    body, _ = await json_body(request)
    answer = await admin.confirm(request.app[STORE], body, values.utc_now())
    request.app[UPKEEP].look_again()
    request[NOTE].say("Confirmed", **answer)
    return json_response(answer)


async def make_backup(request: web.Request) -> web.Response:
    """Make a verified backup in the configured directory."""
    body, _ = await json_body(request)
    if not isinstance(body, dict) or body.keys() - {"compress"}:
        raise InvalidRequestError(
            'The body must be {} or {"compress": false}: where backups go is a setting, TELEMETRY_BACKUP_DIR'
        )
    answer = await admin.back_up(request.app[STORE], body)
    request[NOTE].say("Backup made", **answer)
    return json_response(answer)


async def delete_run(request: web.Request) -> web.Response:
    """Delete one run with its events."""
    accept_none(request.rel_url.raw_query_string, values.utc_now())
    event_id = request.match_info["event_id"]
    request[NOTE].say("Run deleted", event_id=event_id)
    answer = await admin.delete(request.app[STORE], event_id)
    await request.app[FEED].forget()
    request[NOTE].say("Run deleted", **answer)
    return json_response(answer)


async def redact_run(request: web.Request) -> web.Response:
    """Remove what fields of a run, or its events, hold."""
    body, _ = await json_body(request)
    answer = await admin.redact(request.app[STORE], body)
    await request.app[FEED].forget()
    request[NOTE].say("Run redacted", **answer)
    return json_response(answer)
