"""Reads a request body: in time, decoded, and never larger than the limit while it is being decoded."""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import Callable
from typing import Final, Protocol

from aiohttp import web

from telemetryd.errors import BodyTooLargeError, InvalidRequestError, SlowBodyError, UnsupportedBodyError
from telemetryd.runs import shorten

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BODY_TIMEOUT_S: Final = 30.0
JSON_TYPES: Final = ("application/json",)
NDJSON_TYPES: Final = ("application/x-ndjson", "application/ndjson", "application/jsonl")


class _Decoder(Protocol):
    """What zlib's and zstd's decompressors have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Deflate:
    """HTTP's deflate: zlib's format by RFC 9110 §8.4.1.2, raw deflate by what some clients send."""

    def __init__(self) -> None:
        self._inner: zlib._Decompress | None = None

    @property
    def eof(self) -> bool:
        return self._inner is not None and self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data if self._inner is not None else b""

    @property
    def unconsumed_tail(self) -> bytes:
        return self._inner.unconsumed_tail if self._inner is not None else b""

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        if self._inner is None:
            is_zlib = data[:1] and data[0] & 0x0F == 8
            self._inner = zlib.decompressobj(zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)
        return self._inner.decompress(data, max_length)


_DECODERS: Final[dict[str, Callable[[], _Decoder]]] = {
    "gzip": lambda: zlib.decompressobj(zlib.MAX_WBITS | 16),
    "x-gzip": lambda: zlib.decompressobj(zlib.MAX_WBITS | 16),
    "deflate": _Deflate,
    "zstd": zstd.ZstdDecompressor,
}


def check_media_type(request: web.Request, allowed: tuple[str, ...]) -> str:
    """Return the media type of a body if it is allowed. Required, which also keeps forms of web pages out.

    Raises:
        UnsupportedBodyError: if it is missing, another one, or not UTF-8.

    """
    declared = request.headers.getall("Content-Type", [])
    if len(declared) == 1:
        media_type = request.content_type
        is_json = media_type in allowed or (media_type.endswith("+json") and "application/json" in allowed)
        if is_json and (request.charset or "utf-8").lower() in ("utf-8", "utf8", "us-ascii"):
            return media_type
    said = shorten(", ".join(declared)) or "none"
    raise UnsupportedBodyError(f"Content-Type must be {' or '.join(allowed)} in UTF-8, not {said!r}")


async def read_body(request: web.Request, limit: int) -> bytes:
    """Return the decoded body of a request (gzip, deflate and zstd are known), at most `limit` bytes.

    Raises:
        BodyTooLargeError: as soon as the encoded or the decoded bytes pass the limit.
        InvalidRequestError: if the bytes are not in the coding that the request names.
        SlowBodyError: if the whole body has not arrived after `BODY_TIMEOUT_S` seconds.
        UnsupportedBodyError: if the coding is not known.

    """
    coding = ", ".join(request.headers.getall("Content-Encoding", [])).strip().lower()
    if coding not in ("", "identity") and coding not in _DECODERS:
        raise UnsupportedBodyError(f"Content-Encoding must be gzip, deflate, zstd or identity, not {shorten(coding)!r}")
    if request.headers.get("Transfer-Encoding", "chunked").strip().lower() != "chunked":
        raise UnsupportedBodyError("Transfer-Encoding can only be chunked")  # aiohttp takes others and decodes none
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    body = await _receive(request, limit)
    return await _decode(body, coding, limit) if coding in _DECODERS else body


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body must not be larger than {limit} bytes (TELEMETRY_MAX_BODY_BYTES)")


async def _receive(request: web.Request, limit: int) -> bytes:
    stream = request.content
    if stream.is_eof():  # arrived together with the headers: the usual case of a small body
        body = stream.read_nowait()
        if len(body) > limit:
            raise _too_large(limit)
        return body
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while part := await stream.readany():
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                parts.append(part)
    except TimeoutError as error:
        raise SlowBodyError(f"The body did not arrive within {BODY_TIMEOUT_S:g} seconds") from error
    return b"".join(parts)


_SLICE: Final = 1 << 16


async def _decode(body: bytes, coding: str, limit: int) -> bytes:
    """Decode in small slices, so that neither memory nor the event loop pays for a compression bomb."""
    decoder = _DECODERS[coding]()
    parts: list[bytes] = []
    size = 0
    pending = body
    try:
        while not decoder.eof:
            part = decoder.decompress(pending, _SLICE)
            pending = getattr(decoder, "unconsumed_tail", b"")
            if not part and not pending and not decoder.eof:
                break
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
            if size >= _SLICE:
                await asyncio.sleep(0)
    except (zlib.error, zstd.ZstdError) as error:
        raise InvalidRequestError(f"The body is not valid {coding} data") from error
    if not decoder.eof or decoder.unused_data:
        raise InvalidRequestError(f"The body is not one complete {coding} stream")
    return b"".join(parts)
