"""Serves subscribers: pages of changes with long polling, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Final

from aiohttp import hdrs, web

from telemetryd.errors import StoppingError
from telemetryd.model import runs
from telemetryd.model.changes import RunChanged, RunDeleted, answer_with, parse_changes, parse_stream
from telemetryd.ops.logs import log
from telemetryd.ops.metrics import Metrics
from telemetryd.services.feed import Feed
from telemetryd.store import Store
from telemetryd.web.answers import IDENTITY, NOTE, WAITED, json_response, mark
from telemetryd.web.middleware import leaving
from telemetryd.web.tokens import TOKENS

FEED: Final = web.AppKey("feed", Feed)

_HEADERS: Final = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would keep events back until there are some kilobytes
}


async def list_changes(request: web.Request) -> web.Response:
    """Answer what comes after a number of the sequence, at once or as soon as there is something."""
    asked = parse_changes(request.rel_url.raw_query_string)
    if request.method == hdrs.METH_HEAD:  # an answer without content has no news to wait for
        asked = replace(asked, wait_s=0)
    began = time.perf_counter()
    changes = await request.app[FEED].wait(asked)
    waited = time.perf_counter() - began if asked.wait_s else 0.0
    if asked.wait_s:
        request.app[TOKENS].check(request)
    request[NOTE].say("Changes queried", logging.DEBUG if asked.wait_s else logging.INFO, changes=len(changes.found))
    found: list[RunChanged | RunDeleted] = [
        {"seq": seq, "run": runs.to_json(what)} if isinstance(what, tuple) else {"seq": seq, "deleted": what}
        for seq, what in changes.found
    ]
    response = json_response(answer_with(changes, found))
    response[WAITED] = waited
    return response


async def stream_runs(request: web.Request) -> web.StreamResponse:
    """Send each run that was created or changed after its commit, until the client leaves or the daemon stops."""
    after, filters = parse_stream(request.rel_url.raw_query_string, request.headers.get("Last-Event-ID"))
    response = web.StreamResponse(headers=_HEADERS)
    async with request.app[FEED].open(after, filters) as subscriber:
        began = await subscriber.begin()
        mark(response, request[IDENTITY])
        await response.prepare(request)
        if request.method == hdrs.METH_HEAD:
            return response
        opened = time.perf_counter()
        with contextlib.suppress(ConnectionError), leaving(request):
            await response.write(began)
            async with contextlib.aclosing(subscriber.chunks()) as chunks:
                async for chunk in chunks:
                    if not request.app[TOKENS].still_accepts(request):
                        break  # the token was revoked, or has expired
                    await response.write(chunk)
    if not response.prepared:
        raise StoppingError
    open_s = response[WAITED] = time.perf_counter() - opened
    request[NOTE].say(
        "Stream ended", runs_sent=subscriber.sent, changes_missed=subscriber.missed, open_s=round(open_s, 1)
    )
    response.force_close()
    transport = request.transport
    if transport is not None and transport.get_write_buffer_size():
        transport.abort()  # the client does not read, and would delay a stop
    return response


def _close_after(feed: Feed) -> Callable[[asyncio.Task[None]], None]:
    """Return a callback that ends every subscriber when the feed's task has ended: none would get anything any more."""

    def close(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            log.critical("The feed has died: streams end, until a restart", exc_info=task.exception())
        feed.close()

    return close


def add_feed(app: web.Application, store: Store, metrics: Metrics) -> None:
    """Give an app's handlers the feed of a store, for as long as the app runs."""
    app[FEED] = feed = Feed(store, metrics)

    async def run(_: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(feed.run(), name="feed")
        task.add_done_callback(_close_after(feed))
        yield
        task.cancel()
        await asyncio.wait((task,))

    async def close(_: web.Application) -> None:
        feed.close()

    app.cleanup_ctx.append(run)
    app.on_shutdown.append(close)
