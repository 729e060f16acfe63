"""Serves the web UI and its assets from the package, under a strict content security policy."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath
from typing import Final

from aiohttp import ETag, hdrs, web

from telemetryd.web.answers import NOTE, Handler
from telemetryd.web.browsers import ASSETS
from telemetryd.web.negotiation import wants_page

_TYPES: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Scripts of ours set styles through the DOM, which this policy allows; nothing is inline or foreign.
# The pages show what agents wrote; with trusted types, browsers refuse whatever would make markup of it.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS: Final = {
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def handlers() -> Iterator[tuple[str, Handler]]:
    """Yield each path with what answers for it."""
    yield "/", serve_page
    for folder, prefix in (("page", ASSETS), ("docs", "/docs/static/")):
        for name in _assets(resources.files("telemetryd.static").joinpath(folder), ""):
            yield f"{prefix}{name}", _serve(f"{folder}/{name}", _TYPES[PurePosixPath(name).suffix])
    # Relative, as a proxy may have put a path before ours; /redoc was another page of the replaced service.
    yield "/redoc", _redirect("docs")
    yield from ((path, _redirect("../docs")) for path in ("/docs/", "/redoc/"))
    yield "/docs", _serve("docs/index.html", "text/html")


def _assets(folder: Traversable, prefix: str) -> Iterator[str]:
    """Yield the names of what a page loads, relative to its folder."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _assets(entry, f"{prefix}{entry.name}/")
        elif PurePosixPath(entry.name).suffix in _TYPES:
            yield f"{prefix}{entry.name}"


async def serve_page(request: web.Request) -> web.StreamResponse:
    """Answer a browser with the page, and send anybody else to the description of the API."""
    vary = {"Vary": "Accept"}
    if wants_page(request):
        response = await _serve("page/index.html", "text/html")(request)
        response.headers.update(vary)
        return response
    return _redirected(request, "docs", vary)


def _redirect(to: str) -> Handler:
    async def redirect(request: web.Request) -> web.StreamResponse:
        return _redirected(request, to)

    return redirect


def _redirected(request: web.Request, to: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return a redirect to a relative address, which holds under the sub-path of a proxy as well."""
    request[NOTE].say("Page served", logging.DEBUG)
    return web.Response(status=302, headers={"Location": to, **(headers or {})}, text=f"{to}\n")


def _serve(name: str, media_type: str) -> Handler:
    async def serve(request: web.Request) -> web.StreamResponse:
        request[NOTE].say("Page served", logging.DEBUG)
        body, tag = _read(name)
        response: web.Response
        if any(ETag(tag) == known for known in request.if_none_match or ()):
            response = web.Response(status=304, headers=_HEADERS)
        else:
            response = web.Response(body=body, content_type=media_type, charset="utf-8", headers=_HEADERS)
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers[hdrs.ETAG] = f'"{tag}"'
        return response

    return serve


@cache
def _read(name: str) -> tuple[bytes, str]:
    """Return a file and its tag; an installed package does not change while it runs."""
    body = resources.files("telemetryd.static").joinpath(name).read_bytes()
    return body, hashlib.blake2b(body, digest_size=12).hexdigest()
