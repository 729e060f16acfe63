"""The private names of aiohttp that we use, and why: `setup.cfg` therefore holds aiohttp to a minor version."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

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


class Site(web.SockSite):
    """aiohttp's listening socket, with protocols of ours: it makes those of its runner's server, and takes no others.

    Args:
        runner: stops it.
        listening: a socket that is bound.
        make: makes the protocol of each connection.
        backlog: how many connections may wait to be accepted.

    """

    __slots__ = ("_listening", "_make")

    def __init__(
        self,
        runner: web.BaseRunner,
        listening: socket.socket,
        make: Callable[[], asyncio.BaseProtocol],
        backlog: int,
    ) -> None:
        super().__init__(runner, listening, backlog=backlog)
        self._listening = listening
        self._make = make

    async def start(self) -> None:
        """Listen."""
        await web.BaseSite.start(self)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._make, sock=self._listening, backlog=self._backlog)
