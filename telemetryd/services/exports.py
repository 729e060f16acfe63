"""Streams exports to clients, and disconnects clients that read too slowly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass

from aiohttp import web

from telemetryd.errors import InvalidRequestError, TokenGoneError, UnavailableError, sentence
from telemetryd.model import tables
from telemetryd.model.filters import for_log
from telemetryd.model.queries import MEDIA_TYPES, SNAPSHOT, CountMatching, ExportRuns, Format
from telemetryd.model.values import utc_now
from telemetryd.ops.logs import log
from telemetryd.store import Store
from telemetryd.web.answers import NOTE, mark, request_id
from telemetryd.web.compression import Compressor, announce, choose, compressor
from telemetryd.web.middleware import leaving
from telemetryd.web.tokens import TOKENS


@dataclass(frozen=True, slots=True)
class ExportBounds:
    """How long a client may take for a chunk; one that takes longer is disconnected."""

    patience_s: float = 60.0
    least_bytes_per_s: float = 1024
    """At this rate a chunk takes its own time besides."""


def _headers(form: Format, rows: int, *, exact: bool) -> dict[str, str]:
    return {
        "Content-Type": MEDIA_TYPES[form],
        "Content-Disposition": f'attachment; filename="runs-{utc_now():%Y%m%dT%H%M%SZ}.{form}"',
        "Cache-Control": "no-store",
        "X-Total-Count": str(rows),
        SNAPSHOT: "exact" if exact else "sliced",
    }


class Exporter:
    """Answers the exports of one store.

    Args:
        store: what is exported.
        bounds: how slowly clients may read.

    """

    def __init__(self, store: Store, bounds: ExportBounds | None = None) -> None:
        self._store = store
        self.bounds = bounds or ExportBounds()

    async def describe(self, request: web.Request, query: ExportRuns) -> web.StreamResponse:
        """Answer a HEAD: the headers of an export, for which nothing is copied; the runs are counted instead.

        Raises:
            InvalidRequestError: if it cannot be answered in this form, or over HTTP/1.0.
            UnavailableError: if the database cannot be read now.

        """
        await _check_form(request, query)
        total = await self._store.fetch(CountMatching(query.filters))
        request[NOTE].say("Export described", query_params=for_log(query.parameters()), result_count=total.runs)
        response = web.StreamResponse(headers=_headers(query.form, total.runs, exact=True))  # its length is unknown
        _compressed(request, query, response)
        return response

    async def stream(self, request: web.Request, query: ExportRuns) -> web.StreamResponse:
        """Stream an export; one that cannot be brought to its end is cut, so that no client takes it for complete.

        Raises:
            InvalidRequestError: if it cannot be answered in this form, or over HTTP/1.0.
            UnavailableError: if it cannot be made now.

        """
        await _check_form(request, query)
        bounds = self.bounds
        async with self._store.export(query) as copy:
            response = web.StreamResponse(headers=_headers(query.form, copy.rows, exact=copy.is_exact))
            packer = _compressed(request, query, response)
            mark(response, request_id(request))
            response.enable_chunked_encoding()
            request[NOTE].say("Runs exported", query_params=for_log(query.parameters()), result_count=copy.rows)
            await response.prepare(request)
            try:
                with leaving(request):
                    async with contextlib.aclosing(copy.chunks()) as chunks:
                        async for chunk in chunks:
                            request.app[TOKENS].check(request)
                            packed = chunk if packer is None else await asyncio.to_thread(packer.compress, chunk)
                            async with asyncio.timeout(bounds.patience_s + len(packed) / bounds.least_bytes_per_s):
                                await response.write(packed)
                    await response.write_eof(b"" if packer is None else packer.flush())
            except ConnectionError:
                request[NOTE].say("Export cut off by its reader", query_params=for_log(query.parameters()))
            except TimeoutError:  # or a few who read a byte now and then would keep all others from exporting
                request[NOTE].say("Export cut off: its reader is too slow", query_params=for_log(query.parameters()))
                if request.transport is not None:
                    request.transport.abort()
            except TokenGoneError:  # its reader may not have the rest
                request[NOTE].say("Export cut off: its token is not accepted any more", logging.WARNING)
                if request.transport is not None:
                    request.transport.abort()
            except UnavailableError as error:
                log.error("Export cut off", extra={"error_message": sentence(error)})
                if request.transport is not None:
                    request.transport.abort()
        return response


def _compressed(request: web.Request, query: ExportRuns, response: web.StreamResponse) -> Compressor | None:
    """Say in the headers how an export is compressed; return what does it. Parquet is compressed by itself."""
    if query.form is Format.PARQUET:
        return None
    coding = choose(request)
    announce(response, coding)
    return None if coding is None else compressor(coding)


async def _check_form(request: web.Request, query: ExportRuns) -> None:
    if request.version < (1, 1):
        raise InvalidRequestError("An export needs HTTP/1.1: in HTTP/1.0 one that was cut off would look whole")
    if query.form is Format.PARQUET:
        try:
            await asyncio.to_thread(tables.require_parquet)
        except tables.NoParquetError as error:
            raise InvalidRequestError(f"Invalid format: 'parquet'; {sentence(error)}") from error
