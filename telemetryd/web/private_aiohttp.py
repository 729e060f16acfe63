"""The private names of aiohttp that we use, and why: `setup.cfg` therefore holds aiohttp to a minor version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp.http_parser import HttpRequestParser
    from aiohttp.web_protocol import RequestHandler


def protocol_arguments(server: web.Server) -> Mapping[str, Any]:
    """Return the arguments with which a server makes the protocol of each connection.

    Only `Server.__call__` reads them, and it makes protocols of aiohttp's own class.
    """
    return server._kwargs


def use_parser(protocol: RequestHandler, parser: HttpRequestParser) -> None:
    """Have a connection's bytes parsed by a parser of ours.

    The protocol makes its parser in its constructor, which takes none; `set_parser` is for what follows an upgrade.
    """
    protocol._parser = parser


def unparsed_bytes(protocol: RequestHandler) -> int:
    """Return how many bytes have come after an upgrade and are not parsed; no public name gives that."""
    return len(protocol._message_tail)


def has_whole_request(protocol: RequestHandler) -> bool:
    """Return whether a request of a connection is complete, or being answered.

    The protocol counts requests, and waits for the next one, without a public name for either.
    """
    waiter = protocol._waiter
    return protocol._request_count > 0 and (waiter is None or waiter.done())


class AppRunner(web.AppRunner):
    """aiohttp's runner, with a server of ours: it makes its own in a private method, and takes none."""

    def replace_server(self, made: web.Server) -> web.Server:
        """Return what serves instead of the server that aiohttp has made."""
        raise NotImplementedError

    async def _make_server(self) -> web.Server:
        return self.replace_server(await super()._make_server())
