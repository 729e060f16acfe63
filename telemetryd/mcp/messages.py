"""Messages of JSON-RPC 2.0: reads requests and notifications strictly, and writes results and errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602

_LONGEST: Final = 255
"""Characters of an id or a method; what is longer would only be echoed."""
_LARGEST: Final = 2**53 - 1
"""The largest id that every JSON parser keeps as it is (RFC 8259 section 6)."""

Id = str | int
Object = dict[str, Any]


class RpcError(Exception):
    """What is wrong with a message.

    Args:
        code: one of JSON-RPC or of the protocol.
        message: a sentence.
        data: more for programs.

    """

    def __init__(self, code: int, message: str, data: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.data = data


@dataclass(frozen=True, slots=True)
class Message:
    """A request, or a notification if it has no id."""

    id: Id | None
    method: str
    params: Object


def read(message: object) -> Message:
    """Read one decoded message.

    Raises:
        RpcError: if it is none. Batches are none since version 2025-06-18 of the protocol.

    """
    if not isinstance(message, dict):
        raise RpcError(INVALID_REQUEST, "The message must be one JSON object; batches are not taken")
    method, params, is_request = message.get("method"), message.get("params", {}), "id" in message
    if message.get("jsonrpc") != "2.0":
        raise RpcError(INVALID_REQUEST, 'jsonrpc must be "2.0"')
    if is_request and id_of(message) is None:
        raise RpcError(INVALID_REQUEST, f"id must be an integer or a string of at most {_LONGEST} characters")
    if not isinstance(method, str) or not 1 <= len(method) <= _LONGEST:
        raise RpcError(INVALID_REQUEST, f"method must be a string of at most {_LONGEST} characters")
    if not isinstance(params, dict):
        raise RpcError(INVALID_REQUEST, "params must be an object")
    return Message(id_of(message), method, params)


def id_of(message: object) -> Id | None:
    """Return the id of a message that may be none, if it is one that can be answered to."""
    given = message.get("id") if isinstance(message, dict) else None
    if isinstance(given, str):
        return given if len(given) <= _LONGEST else None
    if isinstance(given, int) and not isinstance(given, bool):
        return given if abs(given) <= _LARGEST else None
    return None


def result(number: Id, content: Mapping[str, Any]) -> Object:
    """Return the answer to a request."""
    return {"jsonrpc": "2.0", "id": number, "result": content}


def error(number: Id | None, problem: RpcError) -> Object:
    """Return the answer to a request that is wrong; the id is null if it could not be read."""
    said: Object = {"code": problem.code, "message": str(problem)}
    if problem.data is not None:
        said["data"] = problem.data
    return {"jsonrpc": "2.0", "id": number, "error": said}
