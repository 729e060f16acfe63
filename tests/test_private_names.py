"""The private names of aiohttp and aiosqlite that we use are there, and do what we rely on."""

from __future__ import annotations

import ast
import asyncio
import re
import socket
import sqlite3
import threading
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import aiosqlite
import pytest
from aiohttp import ClientSession, web
from aiohttp.web_protocol import RequestHandler
from packaging.requirements import Requirement

from telemetryd.engine.sqlite import private_aiosqlite
from telemetryd.web import private_aiohttp
from telemetryd.web.heads import Parser

ROOT = Path(__file__).parents[1]
MODULES = {"aiohttp": private_aiohttp, "aiosqlite": private_aiosqlite}


@pytest.mark.parametrize("name", MODULES)
def test_the_pin_holds_the_package_to_the_minor_version_that_is_tested(name: str) -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split("\n")
    (requirement,) = (Requirement(line) for line in lines if re.match(rf"{name}\W", line))
    major, minor, *_ = map(int, metadata.version(name).split("."))
    assert requirement.specifier.contains(f"{major}.{minor}.99")
    assert not requirement.specifier.contains(f"{major}.{minor + 1}.0")


def test_nobody_else_uses_a_private_name_of_theirs() -> None:
    """Neither on another's object nor, in a class that inherits from theirs, on its own."""
    private = re.compile(r"_[a-z]\w*")
    theirs = {name for kind in (web.Server, RequestHandler, web.AppRunner, aiosqlite.Connection) for name in dir(kind)}
    theirs |= {"_connections", "_kwargs", "_loop", "_size", "_tx", "_value"}  # which are only there in instances
    for folder in ("web", "engine/sqlite", "services"):
        for path in (ROOT / "telemetryd" / folder).rglob("*.py"):
            if path.stem.startswith("private_"):
                continue
            tree = ast.parse(path.read_text())
            made = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_stored(node)}
            made |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
            used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not {name for name in used - made if private.fullmatch(name)} & theirs, path


def is_stored(node: ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store)


async def test_a_server_of_ours_makes_protocols_that_tell_whether_a_request_is_there() -> None:
    told: list[bool] = []
    made: list[RequestHandler] = []
    parsers: list[Parser] = []

    class Protocol(RequestHandler):
        def __init__(self, server: web.Server) -> None:
            super().__init__(server, loop=asyncio.get_running_loop(), **private_aiohttp.protocol_arguments(server))
            parser = Parser(self, asyncio.get_running_loop())
            private_aiohttp.use_parser(self, parser)
            parsers.append(parser)

        def data_received(self, data: bytes) -> None:
            told.append(private_aiohttp.has_whole_request(self))
            super().data_received(data)
            told.append(private_aiohttp.has_whole_request(self))

    class Server(web.Server):
        def __call__(self) -> RequestHandler:
            made.append(Protocol(self))
            return made[-1]

    class Runner(private_aiohttp.AppRunner):
        def replace_server(self, made: web.Server) -> web.Server:
            arguments = private_aiohttp.protocol_arguments(made)
            assert arguments["keepalive_timeout"] == 12.0
            return Server(made.request_handler, request_factory=made.request_factory, **arguments)

    async def answer(request: web.Request) -> web.Response:
        told.append(private_aiohttp.has_whole_request(made[0]))
        held.append(parsers[0].held)
        return web.Response(text="here")

    held: list[int] = []
    app = web.Application()
    app.router.add_get("/", answer)
    runner = Runner(app, keepalive_timeout=12.0)
    await runner.setup()
    try:
        assert runner.server is not None
        listening = socket.create_server(("127.0.0.1", 0))
        await private_aiohttp.Site(runner, listening, runner.server, 16).start()
        async with ClientSession() as session:
            for _ in range(2):
                async with session.get(f"http://127.0.0.1:{runner.addresses[0][1]}/") as response:
                    assert await response.text() == "here"
    finally:
        await runner.cleanup()
    assert told == [False, True, True] * 2
    assert [protocol.keepalive_timeout for protocol in made] == [12.0]
    assert [private_aiohttp.unparsed_bytes(protocol) for protocol in made] == [0]
    assert min(held) > 0, "our parser parsed nothing"


async def test_a_function_runs_in_the_thread_of_a_connection_and_can_be_interrupted() -> None:
    begun = threading.Event()

    def seven(plain: sqlite3.Connection) -> tuple[int, object]:
        return threading.get_ident(), plain.execute("SELECT 7").fetchone()

    def endless(plain: sqlite3.Connection) -> object:
        begun.set()
        return plain.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT i + 1 FROM n) SELECT max(i) FROM n"
        ).fetchone()

    loop = asyncio.get_running_loop()
    async with aiosqlite.connect(":memory:") as connection:
        quick: asyncio.Future[tuple[int, object]] = loop.create_future()
        private_aiosqlite.put(connection, quick, seven)
        thread, row = await quick
        assert row == (7,)
        assert thread != threading.get_ident()
        answer: asyncio.Future[object] = loop.create_future()
        private_aiosqlite.put(connection, answer, endless)
        assert await asyncio.to_thread(begun.wait, 10)
        while not answer.done():
            private_aiosqlite.plain(connection).interrupt()
            await asyncio.sleep(0.01)
        with pytest.raises(sqlite3.OperationalError, match="interrupted"):
            await answer
    with pytest.raises(ValueError, match="no active connection"):
        private_aiosqlite.plain(connection)
    with pytest.raises(ValueError, match="no active connection"):
        private_aiosqlite.put(connection, loop.create_future(), seven)
