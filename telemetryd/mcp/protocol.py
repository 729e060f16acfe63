"""The Model Context Protocol: versions, methods, and which messages are answered how, over any transport.

Version 2026-07-28 is stateless: each request says its version in `_meta`, and over HTTP in headers as well. Clients of
earlier versions begin with `initialize`; over HTTP they are known by their version header, as there are no sessions.
Source: modelcontextprotocol.io/specification/2026-07-28, "Versioning and Compatibility" and "Streamable HTTP".
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import telemetryd
from telemetryd.mcp.messages import (
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    Message,
    Object,
    RpcError,
    error,
    id_of,
    read,
    result,
)
from telemetryd.mcp.tools import INSTRUCTIONS, TOOLS, listed
from telemetryd.model.values import shorten

MODERN: Final = "2026-07-28"
EARLIER: Final = ("2025-11-25", "2025-06-18")
"""The earlier versions that are answered, the newest first; for tools alone they are the same."""
SUPPORTED: Final = (MODERN, *EARLIER)

HEADER_MISMATCH: Final = -32020
UNSUPPORTED_VERSION: Final = -32022

VERSION_KEY: Final = "io.modelcontextprotocol/protocolVersion"
CAPABILITIES_KEY: Final = "io.modelcontextprotocol/clientCapabilities"
_SERVER_KEY: Final = "io.modelcontextprotocol/serverInfo"
VERSION_HEADER: Final = "MCP-Protocol-Version"
METHOD_HEADER: Final = "Mcp-Method"
NAME_HEADER: Final = "Mcp-Name"

SERVER_INFO: Final = {"name": "telemetryd", "title": "telemetryd", "version": telemetryd.__version__}
_CAPABILITIES: Final[Mapping[str, Any]] = {"tools": {}}
_CACHED: Final[Mapping[str, Any]] = {"ttlMs": 300_000, "cacheScope": "public"}
"""How long clients may keep the list of tools: it is the same for everybody, and changes only with the release."""

_STATUSES: Final = {
    PARSE_ERROR: 400,
    INVALID_REQUEST: 400,
    INVALID_PARAMS: 400,
    METHOD_NOT_FOUND: 404,
    HEADER_MISMATCH: 400,
    UNSUPPORTED_VERSION: 400,
}
"""The HTTP status with which each error is answered."""
_ENCODED: Final = re.compile(r"=\?base64\?(.*)\?=")

Caller = Callable[[str, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""Calls a tool by its name with its arguments; returns the result of `tools/call`.

It raises an `RpcError` where what it asks in turn refuses the call as such.
"""


@dataclass(frozen=True, slots=True)
class Headers:
    """What HTTP headers say of a message: every value of each that was sent."""

    version: Sequence[str] = ()
    method: Sequence[str] = ()
    name: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """What is answered to a message."""

    message: Object | None
    """None for a notification, to which there is no answer."""
    status: int = 200
    """The status over HTTP."""
    said: Mapping[str, Any] = field(default_factory=dict)
    """What was asked, for the log."""


async def answer(message: object, call: Caller, headers: Headers | None = None, earlier: str | None = None) -> Reply:
    """Answer one decoded message.

    Args:
        message: what was sent.
        call: calls a tool.
        headers: those of HTTP; None where the transport has none.
        earlier: the version that was agreed on by `initialize`, where the transport has no headers.

    """
    is_earlier = False
    said: dict[str, Any] = {}
    try:
        asked = read(message)
        said["rpc_method"] = asked.method if asked.method in _NAMED else "(unknown)"
        is_earlier = _is_of_earlier(asked, headers, earlier)
        if asked.id is None:
            if headers is not None and headers.version:
                _check_supported(_only(headers.version, VERSION_HEADER))
            return Reply(None, 202, said)
        if not is_earlier:
            _check(asked, headers)
        content = await _content(asked, call, said, is_earlier=is_earlier)
        return Reply(result(asked.id, content), said=said)
    except RpcError as problem:
        status = _STATUSES.get(problem.code, 200)
        if is_earlier and problem.code in (METHOD_NOT_FOUND, INVALID_PARAMS):
            status = 200  # where these clients take 404 for the end of a session
        return Reply(error(id_of(message), problem), status, {**said, "rpc_error": str(problem)})


def unreadable(problem: str) -> Reply:
    """Return the answer to what is no JSON."""
    return Reply(error(None, RpcError(PARSE_ERROR, problem)), 400, {"rpc_error": problem})


# --- Versions ------------------------------------------------------------------------------------


def _is_of_earlier(asked: Message, headers: Headers | None, earlier: str | None) -> bool:
    """Return whether a message is of a client of an earlier version."""
    if asked.method == "initialize":
        return True
    if headers is None:
        return earlier is not None and VERSION_KEY not in _meta(asked)
    return len(headers.version) == 1 and headers.version[0] in EARLIER and VERSION_KEY not in _meta(asked)


def _meta(asked: Message) -> Mapping[str, Any]:
    meta = asked.params.get("_meta")
    return meta if isinstance(meta, dict) else {}


def _check(asked: Message, headers: Headers | None) -> None:
    """See that a request says what each has to say, and the same in headers as in itself."""
    meta = _meta(asked)
    if headers is not None:
        version_of_headers = _only(headers.version, VERSION_HEADER)
        if VERSION_KEY not in meta:
            _check_supported(version_of_headers)
    if missing := [key for key in (VERSION_KEY, CAPABILITIES_KEY) if key not in meta]:
        raise RpcError(
            INVALID_PARAMS,
            f"params._meta must hold {' and '.join(missing)}; clients of versions before {MODERN} begin with "
            f"initialize and send {VERSION_HEADER}: {EARLIER[0]}",
            {"supported": list(SUPPORTED)},
        )
    version = meta[VERSION_KEY]
    if not isinstance(version, str) or not isinstance(meta[CAPABILITIES_KEY], dict):
        raise RpcError(INVALID_PARAMS, f"{VERSION_KEY} must be a string, {CAPABILITIES_KEY} an object")
    if headers is not None:
        _check_header(VERSION_HEADER, _only(headers.version, VERSION_HEADER), version)
        _check_header(METHOD_HEADER, _only(headers.method, METHOD_HEADER), asked.method)
        name = asked.params.get("name")
        if asked.method == _CALL and isinstance(name, str):
            _check_header(NAME_HEADER, _decoded(_only(headers.name, NAME_HEADER)), name)
    if version != MODERN:
        raise _unsupported(version)


def _only(values: Sequence[str], header: str) -> str:
    if len(values) != 1:
        raise RpcError(HEADER_MISMATCH, f"The header {header} must be sent {'once' if values else 'with each request'}")
    return values[0]


def _check_header(header: str, value: str, expected: str) -> None:
    if value != expected:
        raise RpcError(
            HEADER_MISMATCH, f"The header {header} says {shorten(value)!r}, the message itself {shorten(expected)!r}"
        )


def _decoded(value: str) -> str:
    """Return what a header says that may be encoded, as it has to be if it is not ASCII."""
    encoded = _ENCODED.fullmatch(value)
    if encoded is None:
        return value
    try:
        return base64.b64decode(encoded[1], validate=True).decode()
    except (binascii.Error, ValueError) as problem:
        raise RpcError(HEADER_MISMATCH, f"The header {NAME_HEADER} is no valid base64") from problem


def _check_supported(version: str) -> None:
    if version not in SUPPORTED:
        raise _unsupported(version)


def _unsupported(version: str) -> RpcError:
    requested = shorten(version)
    return RpcError(
        UNSUPPORTED_VERSION, "Unsupported protocol version", {"supported": list(SUPPORTED), "requested": requested}
    )


# --- Methods -------------------------------------------------------------------------------------


async def _content(asked: Message, call: Caller, said: dict[str, Any], *, is_earlier: bool) -> Mapping[str, Any]:
    """Return the result of a request."""
    methods = _METHODS_OF_EARLIER if is_earlier else _METHODS_OF_MODERN
    if asked.method == _CALL:
        content = await _call(asked.params, call, said)
    elif asked.method in methods:
        # In a thread, as the first list of tools takes long to make: its schemas derive from the models.
        content = await asyncio.to_thread(methods[asked.method], asked.params)
    else:
        raise RpcError(METHOD_NOT_FOUND, f"There is no method {shorten(asked.method)!r}")
    if is_earlier:
        return content
    return {"resultType": "complete", "_meta": {_SERVER_KEY: SERVER_INFO}, **content}


async def _call(params: Object, call: Caller, said: dict[str, Any]) -> Mapping[str, Any]:
    name, arguments = params.get("name"), params.get("arguments")
    if not isinstance(name, str) or name not in TOOLS:
        raise RpcError(INVALID_PARAMS, f"Unknown tool: {shorten(str(name))!r}; known are: {', '.join(TOOLS)}")
    said["tool"] = name
    if arguments is not None and not isinstance(arguments, dict):
        raise RpcError(INVALID_PARAMS, "arguments must be an object")
    content = await call(name, arguments or {})
    said["is_error"] = content.get("isError", False)
    return content


def _discover(params: Object) -> Mapping[str, Any]:
    return {
        "supportedVersions": [MODERN],
        "capabilities": _CAPABILITIES,
        "instructions": INSTRUCTIONS,
        **_CACHED,
    }


def _initialize(params: Object) -> Mapping[str, Any]:
    version = params.get("protocolVersion")
    if not isinstance(version, str):
        raise RpcError(INVALID_PARAMS, "protocolVersion must be a string")
    return {
        "protocolVersion": version if version in EARLIER else EARLIER[0],
        "capabilities": _CAPABILITIES,
        "serverInfo": SERVER_INFO,
        "instructions": INSTRUCTIONS,
    }


def _list(params: Object) -> Mapping[str, Any]:
    if params.get("cursor") is not None:
        raise RpcError(INVALID_PARAMS, "There is no such cursor: all tools are in one answer")
    return {"tools": listed()}


def _list_cached(params: Object) -> Mapping[str, Any]:
    return {**_list(params), **_CACHED}


def _ping(params: Object) -> Mapping[str, Any]:
    return {}


_CALL: Final = "tools/call"
_METHODS_OF_MODERN: Final = {"server/discover": _discover, "tools/list": _list_cached}
_METHODS_OF_EARLIER: Final = {"initialize": _initialize, "ping": _ping, "tools/list": _list}
_NAMED: Final = frozenset({_CALL, *_METHODS_OF_MODERN, *_METHODS_OF_EARLIER, "notifications/initialized"})
"""The methods that the log names."""
