from __future__ import annotations

import pytest
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from telemetryd.web.negotiation import wants_page, wants_prometheus

PROMETHEUS_SERVER = "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
CHROMIUM = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accepted", "prometheus", "page"),
    [
        ([], False, False),
        ([""], False, False),
        (["*/*"], False, False),
        (["*"], False, False),  # Java's URLConnection
        (["application/json, text/plain, */*"], False, False),
        (["text/plain"], True, False),
        (["TEXT/Plain; Q=0.9, application/json;q=0.5"], True, False),
        (["text/plain;q=0.1", "application/json"], False, False),
        (["text/plain;q=0"], False, False),
        (["text/*"], True, True),
        ([PROMETHEUS_SERVER], True, False),
        ([CHROMIUM], False, True),
        (["text/html;q=0, */*"], False, False),
        (["application/json, text/html;q=0.5"], False, False),
        (["text/html/x"], False, False),
        ([";;;,,,"], False, False),
    ],
)
def test_what_a_client_prefers_is_chosen(accepted: list[str], prometheus: bool, page: bool) -> None:
    request = make_mocked_request("GET", "/", headers=CIMultiDict(("Accept", text) for text in accepted))
    assert wants_prometheus(request) is prometheus
    assert wants_page(request) is page
