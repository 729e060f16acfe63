"""Compresses answers as the client's Accept-Encoding asks for, piece by piece where they are large."""

from __future__ import annotations

import asyncio
import re
import sys
import zlib
from typing import Final, Protocol

from aiohttp import hdrs, web

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LARGE_BYTES: Final = 1024 * 1024
"""Answers from this size on are sent in pieces, and are compressed only then: that would hold a second copy."""
_LEAST_BYTES: Final = 1024
_AT_ONCE_BYTES: Final = 64 * 1024
"""What is larger is compressed in a thread; what is smaller takes less than a millisecond."""
_TYPES: Final = frozenset(
    {"application/json", "application/x-ndjson", "text/csv", "text/plain", "application/openmetrics-text"}
)
_LEVELS: Final = {"zstd": 1, "gzip": 1}
"""The codings, of equal ones the first; their quickest levels make a tenth of runs already."""
_CODING: Final = re.compile(r"\s*([\w*-]+)\s*(?:;\s*q=([01](?:\.[0-9]{0,3})?)\s*)?", re.ASCII | re.IGNORECASE)


class Compressor(Protocol):
    """Compresses what it is given bit by bit."""

    def compress(self, data: bytes, /) -> bytes:
        """Take in some bytes; return what is finished."""

    def flush(self) -> bytes:
        """Return the rest."""


def compressor(coding: str) -> Compressor:
    """Return what makes one stream of a coding."""
    if coding == "zstd":
        return zstd.ZstdCompressor(level=_LEVELS[coding])
    return zlib.compressobj(_LEVELS[coding], wbits=zlib.MAX_WBITS | 16)


def choose(request: web.BaseRequest) -> str | None:
    """Return the coding that a client prefers of those there are, or None; HTTP/1.0 knows no answers in pieces."""
    if hdrs.ACCEPT_ENCODING not in request.headers or request.version < (1, 1):
        return None
    wanted: dict[str, float] = {}
    for part in ",".join(request.headers.getall(hdrs.ACCEPT_ENCODING, [])).split(","):
        if match := _CODING.fullmatch(part):
            wanted[match[1].lower()] = float(match[2] or 1)
    weights = {coding: wanted.get(coding, wanted.get("*", 0.0)) for coding in _LEVELS}
    best = max(weights, key=weights.__getitem__)
    return best if weights[best] > 0 and weights[best] >= wanted.get("identity", 0.0) else None


def announce(response: web.StreamResponse, coding: str | None) -> None:
    """Say in an answer's headers how it is coded, and that another client may get it otherwise."""
    vary = response.headers.get(hdrs.VARY)
    response.headers[hdrs.VARY] = hdrs.ACCEPT_ENCODING if vary is None else f"{vary}, {hdrs.ACCEPT_ENCODING}"
    if coding is not None:
        response.headers[hdrs.CONTENT_ENCODING] = coding


async def apply(request: web.Request, response: web.StreamResponse) -> None:
    """Compress an answer if it is worth it; a large one is only marked, and compressed as it is sent in pieces.

    What has a tag is left alone: it would need another tag for each coding.
    """
    if not isinstance(response, web.Response) or response.prepared or hdrs.ETAG in response.headers:
        return
    body = response.body
    if not isinstance(body, bytes | bytearray) or len(body) < _LEAST_BYTES or response.content_type not in _TYPES:
        return
    coding = choose(request)
    announce(response, coding)
    if coding is None or len(body) >= LARGE_BYTES:
        return
    response.body = (
        _whole(coding, body) if len(body) <= _AT_ONCE_BYTES else await asyncio.to_thread(_whole, coding, body)
    )


def _whole(coding: str, body: bytes | bytearray) -> bytes:
    stream = compressor(coding)
    return stream.compress(bytes(body)) + stream.flush()
