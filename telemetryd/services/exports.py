"""Streams exports to clients, and disconnects clients that read too slowly."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from aiohttp import web

from telemetryd.errors import InvalidRequestError, UnavailableError, sentence
from telemetryd.model import tables
from telemetryd.model.queries import MEDIA_TYPES, SNAPSHOT, CountMatching, ExportRuns, Format
from telemetryd.model.values import utc_now
from telemetryd.ops.logs import log
from telemetryd.store import Store
from telemetryd.web.answers import NOTE, mark, request_id
from telemetryd.web.middleware import leaving

_LEAST_BYTES_PER_S: Final = 1024
_PATIENCE_S: Final = 60.0
"""A client that takes longer for a chunk than this, and at this rate, is disconnected."""


def _headers(form: Format, rows: int, *, exact: bool) -> dict[str, str]:
    return {
        "Content-Type": MEDIA_TYPES[form],
        "Content-Disposition": f'attachment; filename="runs-{utc_now():%Y%m%dT%H%M%SZ}.{form}"',
        "Cache-Control": "no-store",
        "X-Total-Count": str(rows),
        SNAPSHOT: "exact" if exact else "sliced",
    }


async def describe(request: web.Request, query: ExportRuns, store: Store) -> web.StreamResponse:
    """Answer a HEAD: the headers of an export, for which nothing is copied; the runs are counted instead.

    Raises:
        InvalidRequestError: if it cannot be answered in this form, or over HTTP/1.0.
        UnavailableError: if the database cannot be read now.

    """
    await _check_form(request, query)
    total = await store.fetch(CountMatching(query.filters))
    request[NOTE].say("Export described", query_params=query.parameters(), result_count=total.runs)
    return web.StreamResponse(headers=_headers(query.form, total.runs, exact=True))  # its length is unknown


async def _check_form(request: web.Request, query: ExportRuns) -> None:
    if request.version < (1, 1):
        raise InvalidRequestError("An export needs HTTP/1.1: in HTTP/1.0 one that was cut off would look whole")
    if query.form is Format.PARQUET:
        try:
            await asyncio.to_thread(tables.require_parquet)
        except tables.NoParquetError as error:
            raise InvalidRequestError(f"Invalid format: 'parquet'; {sentence(error)}") from error


async def stream(request: web.Request, query: ExportRuns, store: Store) -> web.StreamResponse:
    """Stream an export; one that cannot be brought to its end is cut, so that no client takes it for complete.

    Raises:
        InvalidRequestError: if it cannot be answered in this form, or over HTTP/1.0.
        UnavailableError: if it cannot be made now.

    """
    await _check_form(request, query)
    async with store.export(query) as copy:
        response = web.StreamResponse(headers=_headers(query.form, copy.rows, exact=copy.is_exact))
        mark(response, request_id(request))
        response.enable_chunked_encoding()
        request[NOTE].say("Runs exported", query_params=query.parameters(), result_count=copy.rows)
        await response.prepare(request)
        try:
            with leaving(request):
                async with contextlib.aclosing(copy.chunks()) as chunks:
                    async for chunk in chunks:
                        async with asyncio.timeout(_PATIENCE_S + len(chunk) / _LEAST_BYTES_PER_S):
                            await response.write(chunk)
                await response.write_eof()
        except ConnectionError:
            request[NOTE].say("Export cut off by its reader", query_params=query.parameters())
        except TimeoutError:  # or a few who read a byte now and then would keep all others from exporting
            request[NOTE].say("Export cut off: its reader is too slow", query_params=query.parameters())
            if request.transport is not None:
                request.transport.abort()
        except UnavailableError as error:
            log.error("Export cut off", extra={"error_message": sentence(error)})
            if request.transport is not None:
                request.transport.abort()
    return response
