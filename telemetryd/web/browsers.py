"""Cross-origin rules: a web page of another origin may do nothing here, unless it is listed.

Browsers say in `Sec-Fetch-Site` whose page asks (w3.org/TR/fetch-metadata), if they reach us by https or by a
loopback address; scripts cannot set that header. Without it a request is judged by its `Origin` alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import hdrs, web

from telemetryd import SERVER_HEADER, flow
from telemetryd.model.hosts import Names, origin_of
from telemetryd.model.queries import SNAPSHOT
from telemetryd.model.values import shorten
from telemetryd.web.answers import endpoint_of

PAGES: Final = frozenset({"/", "/docs", "/redoc", "/openapi.json"})
"""What a link on another page may lead to; none of them holds data."""
ASSETS: Final = "/page/"
"""Where the files of the page at `/` are."""
_ASSETS: Final = (ASSETS, "/docs/static/")
HEALTH: Final = "/health"

_READING: Final = frozenset({"GET", "HEAD"})
SAFE_METHODS: Final = _READING | {"OPTIONS"}
"""Methods that change nothing (RFC 9110 §9.2.1); a browser sends an Origin with all others."""
_SITE: Final = "Sec-Fetch-Site"
_FOREIGN: Final = frozenset({"cross-site", "same-site"})

READABLE: Final = (
    "Link",
    "X-Total-Count",
    "X-Total-Count-Accuracy",
    SNAPSHOT,
    "X-Request-ID",
    "Retry-After",
    "Content-Disposition",
    flow.HEADER,
    SERVER_HEADER,
)
"""Headers of our answers that a listed page may read, besides those that every page may (CORS-safelisted)."""

_PREFLIGHT: Final = {
    "Access-Control-Allow-Methods": "GET, HEAD",
    "Access-Control-Allow-Headers": "Authorization, X-API-Key, X-Request-ID, Last-Event-ID",
    "Access-Control-Max-Age": "600",
}


class Pages:
    """The web pages of other origins, as far as they are known.

    Args:
        names: the names of the daemon, and those that are listed as its proxies'.
        readers: origins that may read (TELEMETRY_CORS_ORIGINS).

    """

    def __init__(self, names: Names, readers: frozenset[str]) -> None:
        self._names = names
        self._readers = readers

    def refusal(self, request: web.Request) -> str | None:
        """Say why what a page asks for is refused, or return None."""
        return self._refusal_by_site(request) or self._refusal_by_origin(request)

    def preflight(self, request: web.Request) -> web.Response | None:
        """Answer a browser that asks whether a listed page may read (CORS preflight), or return None."""
        if request.method != "OPTIONS" or request.headers.get(hdrs.ORIGIN) not in self._readers:
            return None
        if request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_METHOD) not in _READING:
            return None  # the answer that others get, which lets it do nothing
        return web.Response(status=204, headers=_PREFLIGHT)

    def _refusal_by_site(self, request: web.Request) -> str | None:
        if _SITE not in request.headers:  # agents, curl
            return None
        said = {site.strip().lower() for value in request.headers.getall(_SITE) for site in value.split(",")}
        if not said & _FOREIGN or _is_for_all(request):
            return None
        # A script can forge neither; without CORS a GET has a Referer only, unless its page keeps that back.
        page = request.headers.get(hdrs.ORIGIN) or origin_of(request.headers.get(hdrs.REFERER, ""))
        if page and self._names.lists_origin(page):
            return None
        if page in self._readers and request.method in SAFE_METHODS:
            return None
        whose = repr(shorten(page)) if page else "another origin"
        return (
            f"A page of {whose} must not ask anything here; TELEMETRY_CORS_ORIGINS lists the origins that may read, "
            "TELEMETRY_ALLOWED_HOSTS the names of this daemon's proxies"
        )

    def _refusal_by_origin(self, request: web.Request) -> str | None:
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None or request.method in SAFE_METHODS:
            return None
        if self._names.has_origin(origin, request.headers.get("Host", "")):
            return None
        return (
            f"A page of {shorten(origin)!r} must not change anything here; if it is served by a proxy of this "
            "daemon, list its name in TELEMETRY_ALLOWED_HOSTS"
        )


def _is_for_all(request: web.Request) -> bool:
    """Return whether any page may ask for this: it is our page, opened by a link, a file of it, or the health."""
    path = endpoint_of(request)
    if path is None or request.method not in _READING:
        return False
    if path in PAGES:
        # Not in a frame, nor as an image: only what becomes a separate page reveals nothing to the foreign one.
        # Every browser that names the mode says where the answer goes; who leaves that out shows it in no frame.
        destination = request.headers.get("Sec-Fetch-Dest", "document")
        return request.headers.get("Sec-Fetch-Mode") == "navigate" and destination == "document"
    return path == HEALTH or path.startswith(_ASSETS)


def sharing(readers: frozenset[str]) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """Return what lets pages of listed origins read an answer, errors and streams included."""

    async def share(request: web.Request, response: web.StreamResponse) -> None:
        vary = response.headers.get(hdrs.VARY)
        response.headers[hdrs.VARY] = hdrs.ORIGIN if vary is None else f"{vary}, {hdrs.ORIGIN}"
        origin = request.headers.get(hdrs.ORIGIN)
        if origin in readers:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = ", ".join(READABLE)

    return share
