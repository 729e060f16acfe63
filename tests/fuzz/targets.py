"""What is fuzzed: what lies between bytes and a command, a query or a token. Bad input has its own errors."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import ssl
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import orjson
import trustme

from telemetryd.engine.sqlite.statements.runs import select_page
from telemetryd.errors import BodyTooLargeError, ConfigurationError, InvalidBodyError, InvalidRequestError
from telemetryd.mcp import protocol, tools
from telemetryd.mcp.arguments import query_string
from telemetryd.model import bodies, queries, runs, tokens, values
from telemetryd.model.commands import CreateRuns
from telemetryd.settings import Settings
from telemetryd.web.secure import Handshakes, SecureConnection
from telemetryd.web.tls import Tls

CORPUS: Final = Path(__file__).with_name("corpus")


def body(data: bytes) -> None:
    """Read bytes as each kind of body; whatever is let through must be storable."""
    try:
        value = bodies.parse_body(data)
    except (InvalidBodyError, BodyTooLargeError) as error:
        orjson.dumps(str(error))
        return
    for parse in (runs.parse_patch, runs.parse_commit):
        try:
            changes, ignored, *_ = parse(value)
        except InvalidBodyError as error:
            orjson.dumps(error.errors)
        else:
            assert all(_is_storable(change) for change in changes.values())
            orjson.dumps(runs.ignored_field_warnings(ignored))
    for item in value if isinstance(value, list) else [value]:
        try:
            parsed = runs.parse_run(item)
        except InvalidBodyError as error:
            orjson.dumps(error.errors)
            continue
        assert CreateRuns((parsed.row,)).cost == 1
        assert all(map(_is_storable, parsed.row))
        assert len(parsed.row) == len(runs.STORED)
        assert parsed.row[runs.STATUS] in set(values.Status)
        orjson.dumps(runs.ignored_field_warnings(parsed.ignored))


def _is_storable(value: object) -> bool:
    if isinstance(value, str):
        value.encode()
        return "\0" not in value
    return value is None or (isinstance(value, int) and -(2**63) <= value < 2**63)


def query(data: bytes) -> None:
    """Read bytes as the query string of GET /api/v1/runs, and continue after its first page."""
    text = data.decode("latin-1")
    try:
        listed = queries.parse_list(text)
    except InvalidRequestError as error:
        orjson.dumps(str(error))
        return
    select_page(listed)
    following = listed.next_page("/api/v1/runs", queries.Position("2026-01-01T00:00:00.000000Z", 5))
    again = queries.parse_list(following.partition("?")[2])
    assert (again.filters, again.limit) == (listed.filters, listed.limit)
    orjson.dumps(listed.parameters())


class _Socket(asyncio.Transport):
    """A transport that leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.is_over = False
        self.sent = bytearray()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return self.is_over

    def can_write_eof(self) -> bool:
        return True

    def write(self, data: Any) -> None:
        assert not self.is_over
        self.sent += data

    def pause_reading(self) -> None:
        """Nothing comes by itself."""

    resume_reading = pause_reading

    def write_eof(self) -> None:
        self.is_over = True

    abort = close = write_eof


@functools.cache
def _tls() -> Tls:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cert.pem"
        file.touch(0o600)
        trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(file))
        return Tls(Settings(db_path=Path(folder), tls_cert=file))


def handshake(data: bytes) -> None:
    """Read bytes as what a client of TLS sends, who has no way to know what has to be sent last."""

    def never() -> asyncio.Protocol:
        raise AssertionError("a connection is given out before its handshake is done")

    async def shake_hands() -> None:
        failed: list[str] = []
        handshakes = Handshakes(_tls(), never, lambda: False, failed.append, patience_s=60, most_bytes=1 << 30)
        half = len(data) // 2
        for pieces in ((data,), (data[:half], data[half:])):
            connection, transport = cast(SecureConnection, handshakes()), _Socket()
            connection.connection_made(transport)
            for piece in pieces:
                connection.data_received(piece)
                while not transport.is_over and len(connection._waiting) >= 5:  # noqa: ASYNC110 - the turn of others
                    await asyncio.sleep(0)
            assert len(failed) == transport.is_over
            connection.connection_lost(None)
            assert len(failed) == 1
            assert not len(handshakes)
            failed.clear()

    asyncio.run(shake_hands())


class _Pausing(asyncio.Protocol):
    """Takes what comes, and pauses in between."""

    def __init__(self) -> None:
        self.taken = bytearray()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        assert self._transport.is_reading()
        self.taken += data
        if len(self.taken) % 3 == 0:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._transport.resume_reading)


def records(data: bytes) -> None:
    """Send records of the sizes that bytes name, in such pieces; all arrive whole, and none that is made up does."""

    async def send() -> None:
        application = _Pausing()
        handshakes = Handshakes(
            _tls(), lambda: application, lambda: False, lambda _: None, patience_s=60, most_bytes=1 << 30
        )
        connection, transport = handshakes(), _Socket()
        connection.connection_made(transport)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(incoming, outgoing)
        for _ in range(3):
            with contextlib.suppress(ssl.SSLWantReadError):
                client.do_handshake()
            connection.data_received(outgoing.read())
            incoming.write(transport.sent)
            transport.sent.clear()
        sent = b""
        for size in data[:40]:
            sent += bytes([size]) * (size * size)
            for start in range(0, size * size, 1 << 14):
                client.write(sent[len(sent) - size * size + start :][: 1 << 14])
        encrypted, steps, start = outgoing.read(), itertools.cycle(data), 0
        while start < len(encrypted):
            step = 1 + 50 * next(steps)
            connection.data_received(encrypted[start : start + step])
            start += step
        async with asyncio.timeout(20):
            while len(application.taken) < len(sent):  # noqa: ASYNC110 - in the turns that it takes
                await asyncio.sleep(0)
        assert application.taken == sent
        connection.data_received(data)
        await asyncio.sleep(0)
        assert application.taken == sent
        connection.connection_lost(None)

    asyncio.run(send())


def token_file(data: bytes) -> None:
    """Read bytes as a file of tokens; what is let through is written as it was read, and errors show no hash."""
    try:
        found = tokens.parse(data, "tokens")
    except ConfigurationError as error:
        orjson.dumps(error.problems)
        return
    assert tokens.parse(tokens.render(found), "tokens") == found
    for token in found:
        assert token.hash not in repr(token) + str(token.to_json())


def message(data: bytes) -> None:
    """Read bytes as a message of an assistant, without headers and with ones that agree; it is answered or refused."""
    try:
        decoded = bodies.parse_json(data)
    except InvalidBodyError as error:
        orjson.dumps(str(error))
        return

    async def call(name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            made = query_string(arguments, tools.TOOLS[name].parameters)
        except InvalidRequestError as error:
            made = str(error)
        return tools.failed(made)

    asked = decoded if isinstance(decoded, dict) else {}
    params = asked.get("params")
    texts = [asked.get("method"), params.get("name") if isinstance(params, dict) else None]
    said = [[text] if isinstance(text, str) else [] for text in texts]
    for headers in (None, *(protocol.Headers([version], *said) for version in protocol.SUPPORTED)):
        reply = asyncio.run(protocol.answer(decoded, call, headers))
        assert reply.status in (200, 202, 400, 404)
        assert (reply.message is None) is (reply.status == 202)
        orjson.dumps(reply.message)


TARGETS: Final[Mapping[str, Callable[[bytes], None]]] = {
    "body": body,
    "query": query,
    "handshake": handshake,
    "records": records,
    "token_file": token_file,
    "message": message,
}
