"""limit-http: aiohttp on uvloop that answers the same bodies without validation or database.

With a file to sync it is limit-http-fsync: each answer waits for one fdatasync of 4 KiB, the least that is durable.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import click
import orjson
import uvloop
from aiohttp import web
from aiohttp.typedefs import Middleware

from bench.rows import Ids, make_run

_RUNS: Final = [make_run("limit", number, Ids.ORDERED) for number in range(1000)]
_PAGE: Final = bytes(4096)


def _json(payload: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(payload), status=status, content_type="application/json")


async def create_run(request: web.Request) -> web.Response:
    """Answer as if the run were stored."""
    run = orjson.loads(await request.read())
    return _json({"status": "created", "event_id": run["event_id"], "run_id": run["run_id"]}, 201)


async def create_batch(request: web.Request) -> web.Response:
    """Answer as if the batch were stored."""
    runs = orjson.loads(await request.read())
    return _json({"inserted": len(runs), "duplicates": 0, "errors": [], "total": len(runs)})


async def update_run(request: web.Request) -> web.Response:
    """Answer as if the run were changed."""
    changes: dict[str, Any] = orjson.loads(await request.read())
    return _json({"event_id": request.match_info["event_id"], "updated": True, "fields_updated": list(changes)})


async def list_runs(request: web.Request) -> web.Response:
    """Answer so many runs, always the same ones."""
    return _json(_RUNS[: int(request.query.get("limit", "100"))])


async def get_health(_: web.Request) -> web.Response:
    """Answer that all is well."""
    return _json({"status": "ok"})


def syncing(path: Path) -> Middleware:
    """Return a middleware that writes a page to a file and syncs it after each request."""
    file = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)

    @web.middleware
    async def middleware(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        response = await handler(request)
        os.pwrite(file, _PAGE, 0)
        os.fdatasync(file)
        return response

    return middleware


async def _serve(port: int, synced: Path | None) -> None:
    app = web.Application(client_max_size=2**26, middlewares=[syncing(synced)] if synced else [])
    app.router.add_post("/api/v1/runs", create_run)
    app.router.add_post("/api/v1/runs/batch", create_batch)
    app.router.add_patch("/api/v1/runs/{event_id}", update_run)
    app.router.add_get("/api/v1/runs", list_runs)
    app.router.add_get("/health", get_health)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=2048).start()
    await asyncio.Event().wait()


@click.command()
@click.option("--port", type=int, required=True)
@click.option("--sync", type=click.Path(path_type=Path), help="Sync this file after each request.")
def main(port: int, sync: Path | None) -> None:
    """Serve until the process is ended."""
    uvloop.run(_serve(port, sync))


if __name__ == "__main__":
    main()
