"""Reads request bodies within limits: time, encoding, size of each, and memory for all together."""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from aiohttp import web

from telemetryd.errors import (
    BodyTooLargeError,
    InvalidBodyError,
    InvalidRequestError,
    SlowBodyError,
    TooManyBodiesError,
    UnsupportedBodyError,
)
from telemetryd.model.bodies import parse_body
from telemetryd.model.items import explained
from telemetryd.model.values import shorten
from telemetryd.web.limits import Quota, take
from telemetryd.web.tokens import BEARER, TOKENS

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

JSON_TYPES: Final = ("application/json",)
NDJSON_TYPES: Final = ("application/x-ndjson", "application/ndjson", "application/jsonl")


@dataclass(frozen=True, slots=True)
class BodyBounds:
    """How much bodies may take, besides their size."""

    silence_s: float = 30.0
    """How long a body may pause."""
    slowest_bytes_per_s: float = 1024
    """What a body must bring on average after that time; a byte now and then would hold its connection for ever."""
    together: int = 64 * 1024 * 1024
    """What all bodies may hold while they are being read, besides a first one of any size.

    Decoded JSON takes several times as much.
    """


class _Decoder(Protocol):
    """zstd's decompressor, which keeps what it was given and has not used yet, and how zlib's is made to look."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    @property
    def needs_input(self) -> bool: ...

    def decompress(self, data: ReadableBuffer, max_length: int, /) -> bytes: ...


class _Zlib:
    """gzip, or HTTP's deflate: zlib's format by RFC 9110 §8.4.1.2, raw deflate by what some clients send."""

    def __init__(self, wbits: int) -> None:
        self._inner = zlib.decompressobj(wbits)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    def decompress(self, data: ReadableBuffer, max_length: int, /) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail or data, max_length)


def _deflate(body: bytes) -> _Zlib:
    is_zlib = body[:1] and body[0] & 0x0F == 8
    return _Zlib(zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)


_DECODERS: Final[dict[str, Callable[[bytes], _Decoder]]] = {
    "gzip": lambda _: _Zlib(zlib.MAX_WBITS | 16),
    "x-gzip": lambda _: _Zlib(zlib.MAX_WBITS | 16),
    "deflate": _deflate,
    "zstd": lambda _: zstd.ZstdDecompressor(),
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


class Bodies:
    """Reads bodies, so many at a time that all of them together stay within bounds.

    Args:
        limit: how many bytes a body may have, encoded and decoded.
        bounds: how much they may take besides.

    """

    def __init__(self, limit: int, bounds: BodyBounds | None = None) -> None:
        self._limit = limit
        self.bounds = bounds or BodyBounds()
        self._held = 0

    def read(self, request: web.Request) -> AbstractAsyncContextManager[bytes]:
        """Give the decoded body of a request (gzip, deflate and zstd are known); it counts until the block's end.

        Raises:
            BodyTooLargeError: as soon as the encoded or the decoded bytes pass the limit.
            InvalidRequestError: if the bytes are not in the coding that the request names.
            SlowBodyError: if it pauses for too long, or brings too little in its time (`BodyBounds`).
            TokenGoneError: if its token is not accepted any more when it is there.
            TokenQuotaError: if others have used up its token's quota of bytes in the meantime.
            TooManyBodiesError: if others take all the room.
            UnsupportedBodyError: if the coding is not known.

        """
        return _Reading(request, _Share(self))

    def take(self, size: int, share: _Share) -> None:
        """Count what a body has grown by."""
        if self._held + size > self.bounds.together and self._held > share.held:
            raise TooManyBodiesError
        self._held += size
        share.held += size

    def give_back(self, share: _Share) -> None:
        """Count a body no longer."""
        self._held -= share.held

    @property
    def limit(self) -> int:
        """How many bytes a body may have."""
        return self._limit


class _Share:
    """What one body takes of the room for all."""

    __slots__ = ("bodies", "come", "held")

    def __init__(self, bodies: Bodies) -> None:
        self.bodies = bodies
        self.held = 0
        self.come = 0
        """How many bytes of it have come, or are decoded if these are more."""


class _Reading:
    """The block in which a body is in memory; a class, as a generator would cost each request three times as much."""

    __slots__ = ("_request", "_share")

    def __init__(self, request: web.Request, share: _Share) -> None:
        self._request = request
        self._share = share

    async def __aenter__(self) -> bytes:
        request, share = self._request, self._share
        coding = ", ".join(request.headers.getall("Content-Encoding", [])).strip().lower()
        if coding not in ("", "identity") and coding not in _DECODERS:
            raise UnsupportedBodyError(
                f"Content-Encoding must be gzip, deflate, zstd or identity, not {shorten(coding)!r}"
            )
        if request.headers.get("Transfer-Encoding", "chunked").strip().lower() != "chunked":
            raise UnsupportedBodyError("Transfer-Encoding can only be chunked")  # aiohttp takes others, decodes none
        if (request.content_length or 0) > share.bodies.limit:
            raise _too_large(share.bodies.limit)
        bearer = request[BEARER]
        quota = None if bearer is None else bearer.quota
        try:
            body = await self._paid(coding, quota)
            if bearer is not None:
                request.app[TOKENS].check(request)  # a slow body may take hours
            if quota is not None:
                take(quota, size=len(body))  # whatever becomes of it
        except BaseException:
            share.bodies.give_back(share)
            raise
        return body

    async def _paid(self, coding: str, quota: Quota | None) -> bytes:
        """Return the decoded body; one that is refused, or breaks off, is paid for here: it has cost as much."""
        share = self._share
        try:
            body = await _receive(self._request, share)
            return await _decode(body, coding, share) if coding in _DECODERS else body
        except TooManyBodiesError:
            raise  # which is not its sender's fault
        except BaseException:
            if quota is not None:
                quota.pay(size=share.come)
            raise

    async def __aexit__(self, *_: object) -> None:
        self._share.bodies.give_back(self._share)


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body must not be larger than {limit} bytes (TELEMETRY_MAX_BODY_BYTES)")


async def _receive(request: web.Request, share: _Share) -> bytes:
    stream = request.content
    if stream.is_eof():  # arrived together with the headers: the usual case of a small body
        body = stream.read_nowait()
        share.come = len(body)
        if len(body) > share.bodies.limit:
            raise _too_large(share.bodies.limit)
        return body
    # Take as much room as is announced, and give it back: where there is none, this shows here, where it can be
    # answered, and not within the loop's own reading, which would cut the connection.
    bytes(request.content_length or 0)
    parts: list[bytes] = []
    size = 0
    bounds, loop = share.bodies.bounds, asyncio.get_running_loop()
    started = loop.time()
    try:
        async with asyncio.timeout(bounds.silence_s) as patience:
            while part := await stream.readany():
                share.come = size = size + len(part)
                if size > share.bodies.limit:
                    raise _too_large(share.bodies.limit)
                share.bodies.take(len(part), share)
                parts.append(part)
                latest = started + bounds.silence_s + size / bounds.slowest_bytes_per_s
                patience.reschedule(min(loop.time() + bounds.silence_s, latest))
    except TimeoutError as error:
        raise SlowBodyError from error
    return b"".join(parts)


_SLICE: Final = 1 << 16


async def _decode(body: bytes, coding: str, share: _Share) -> bytes:
    """Decode in small slices, so that neither memory nor the event loop pays for a compression bomb."""
    decoder = _DECODERS[coding](body)
    unread = memoryview(body)
    parts: list[bytes] = []
    size = 0
    try:
        while not decoder.eof:
            is_starved = decoder.needs_input and not unread
            given, unread = (unread[:_SLICE], unread[_SLICE:]) if decoder.needs_input else (b"", unread)
            part = decoder.decompress(given, _SLICE)
            if is_starved and not part:
                break
            size += len(part)
            share.come = max(share.come, size)
            if size > share.bodies.limit:
                raise _too_large(share.bodies.limit)
            share.bodies.take(len(part), share)
            parts.append(part)
            if size >= _SLICE or unread:
                await asyncio.sleep(0)
    except (zlib.error, zstd.ZstdError) as error:
        raise InvalidRequestError(f"The body is not valid {coding} data") from error
    if not decoder.eof or decoder.unused_data or unread:
        raise InvalidRequestError(f"The body is not one complete {coding} stream")
    return b"".join(parts)


BODIES: Final = web.AppKey("bodies", Bodies)


async def json_body(request: web.Request) -> tuple[object, int]:
    """Return the decoded body, and how many bytes it came in."""
    check_media_type(request, JSON_TYPES)
    async with request.app[BODIES].read(request) as body:
        try:
            return parse_body(body), len(body)
        except InvalidBodyError as error:
            raise await asyncio.to_thread(explained, error, body) from None
