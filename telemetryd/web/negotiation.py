"""Chooses what an answer looks like by what its client accepts."""

from __future__ import annotations

from typing import Final

import mimeparse
from aiohttp import hdrs, web

_JSON: Final = "application/json"
_PROMETHEUS: Final = ("text/plain", "application/openmetrics-text")
_PAGE: Final = "text/html"


def wants_prometheus(request: web.BaseRequest) -> bool:
    """Return whether a client prefers Prometheus or OpenMetrics text to JSON."""
    return _preferred(request, *_PROMETHEUS) in _PROMETHEUS


def wants_page(request: web.BaseRequest) -> bool:
    """Return whether a client prefers a page to JSON, as browsers do."""
    return _preferred(request, _PAGE) == _PAGE


def _preferred(request: web.BaseRequest, *others: str) -> str:
    """Return the media type that a client prefers: JSON among equals, and if its header cannot be read."""
    accepted = ",".join(request.headers.getall(hdrs.ACCEPT, [])) or "*/*"
    try:
        return str(mimeparse.best_match([*others, _JSON], accepted.lower())) or _JSON
    except mimeparse.MimeTypeParseException:
        return _JSON
