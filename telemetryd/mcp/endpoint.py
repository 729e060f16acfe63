"""The HTTP endpoint of assistants: one message in, one answer out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from aiohttp import web

from telemetryd.errors import BodyTooLargeError, InvalidBodyError, sentence
from telemetryd.mcp import protocol, tools
from telemetryd.model import alerts
from telemetryd.model.bodies import parse_json
from telemetryd.model.queries import Query
from telemetryd.services.alerting import Alerting
from telemetryd.store import Store
from telemetryd.web.answers import NOTE, json_response
from telemetryd.web.body import BODIES, JSON_TYPES, check_media_type

A = TypeVar("A")

PATH: Final = "/mcp"
LONGEST_MESSAGE: Final = 64 * 1024
"""Bytes of a message; what an assistant asks takes some hundred."""


@dataclass(frozen=True, slots=True)
class StoreSource:
    """The store of a daemon, for the tools."""

    store: Store
    alerting: Alerting

    async def fetch(self, query: Query[A]) -> A:
        """Answer a query."""
        return await self.store.fetch(query)

    async def alerts(self) -> alerts.Alerts:
        """Return the rules of alerts with what they are firing for."""
        return await self.alerting.shown()


SOURCE: Final = web.AppKey("mcp_source", StoreSource)


async def answer_assistant(request: web.Request) -> web.Response:
    """Answer one message of the Model Context Protocol."""
    source = request.app[SOURCE]

    async def call(name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        return await tools.call(source, name, arguments)

    check_media_type(request, JSON_TYPES)
    async with request.app[BODIES].read(request) as body:
        if len(body) > LONGEST_MESSAGE:
            raise BodyTooLargeError(f"A message must not be larger than {LONGEST_MESSAGE} bytes")
        try:
            reply = await protocol.answer(parse_json(body), call, _headers(request))
        except InvalidBodyError as error:
            reply = protocol.unreadable(sentence(error))
    level = logging.WARNING if reply.status >= 400 else logging.INFO
    request[NOTE].say("Assistant answered", level, **reply.said)
    if reply.message is None:
        return web.Response(status=reply.status)
    return json_response(reply.message, reply.status)


def _headers(request: web.Request) -> protocol.Headers:
    of = request.headers
    return protocol.Headers(
        of.getall(protocol.VERSION_HEADER, ()),
        of.getall(protocol.METHOD_HEADER, ()),
        of.getall(protocol.NAME_HEADER, ()),
    )
