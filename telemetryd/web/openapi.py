"""Builds the OpenAPI 3.1 document from the endpoints and the models that validate them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, cast

import orjson

import telemetryd
from telemetryd import SERVER_HEADER, flow, traces
from telemetryd.model import changes, queries, runs
from telemetryd.model.parameters import Parameter
from telemetryd.model.tokens import Scope
from telemetryd.web import components
from telemetryd.web.body import JSON_TYPES
from telemetryd.web.components import STRING, Components, Schema, ref


@dataclass(frozen=True, slots=True)
class Operation:
    """What the document says of one endpoint, and who may ask."""

    summary: str
    description: str = ""
    scope: Scope | None = field(kw_only=True)
    """What a token needs where authentication is on; None where none is asked for."""
    tags: tuple[str, ...] = ("runs",)
    body: Schema | None = None
    body_types: tuple[str, ...] = JSON_TYPES
    example: object = None
    """A body that works; a list is one item a line for NDJSON."""
    parameters: tuple[Parameter[Any], ...] = ()
    """Those of the query string."""
    other_parameters: tuple[Schema, ...] = ()
    """Those of headers."""
    answers: dict[int, tuple[str, object]] = field(default_factory=dict)
    """When each status comes, and the type of its answer (`model/answers.py`)."""
    answer_type: str = "application/json"
    """The media type of a successful answer."""
    other_answer_types: tuple[str, ...] = ()
    """Further media types of a successful answer; they hold text, or bytes if they are applications'."""
    headers: Mapping[str, Schema] = field(default_factory=dict)
    """Those of a successful answer that only some operations have (`HEADERS`)."""
    errors: tuple[int, ...] = ()


EVENT_ID: Final[Schema] = {
    "name": "event_id",
    "in": "path",
    "required": True,
    "description": "The run's event_id, percent-encoded.",
    "schema": STRING,
    "example": runs.example(runs.NewRun, ("event_id",))["event_id"],
}

_ERROR_TEXTS: Final = {
    400: "A query parameter or the request is wrong.",
    401: "A token is needed.",
    403: "The token lacks the scope, or the agent is not its own; without authentication: not for this client.",
    404: "There is no such run.",
    409: "The process cannot be watched; send heartbeats instead.",
    410: "What comes after this cursor is not known any more; begin again, without `after`.",
    413: "The body or the batch is too large.",
    415: "The media type or the content coding is not known.",
    422: "The body is wrong; every fault is listed.",
    429: "Too many requests, or a quota is used up; see Retry-After.",
    500: "Unexpected; the log says more under the request id.",
    503: "Not now; repeat the same request after Retry-After seconds.",
}
_SCOPE: Final = "x-required-scope"
"""Where an operation names its scope: linters take names in `security` for those of OAuth."""
_RETRY_AFTER: Final = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
_FLOW: Final = {
    flow.HEADER: {
        "description": "Advice to writers: most rows in the next request, and milliseconds to pause before it.",
        "schema": {"type": "string", "pattern": r"^batch=\d+, pause=\d+(, \w+=\d+)*$"},
        "example": "batch=5000, pause=0",
    }
}
_CHALLENGE: Final = {
    "WWW-Authenticate": {
        "description": "How to give the token, or which scope it lacks.",
        "schema": STRING,
        "example": "Bearer",
    }
}
_EVERY_ANSWER: Final = {
    SERVER_HEADER: {
        "description": "Every answer of the daemon has it; one without it comes from another server, such as a proxy.",
        "schema": {"type": "string", "pattern": r"^telemetryd/\d+$"},
        "example": "telemetryd/4",
    },
    "X-Request-ID": {
        "description": "The request's own id, or one that the daemon has given it; the log has it as well.",
        "schema": STRING,
    },
}
_BYTES: Final = (queries.MEDIA_TYPES[queries.Format.PARQUET],)
LINK: Final[Mapping[str, Schema]] = {
    "Link": {
        "description": "Where the next page is (rel=next), if more follow; a path, from the root of the daemon.",
        "schema": STRING,
        "example": '</api/v1/runs?limit=100&cursor=WzEsIj>; rel="next"',
    }
}
TOTAL: Final[Mapping[str, Schema]] = {
    "X-Total-Count": {
        "description": "How many runs match.",
        "schema": {"type": "integer", "minimum": 0},
        "example": 4711,
    }
}
ACCURACY: Final[Mapping[str, Schema]] = {
    "X-Total-Count-Accuracy": {
        "description": "How far X-Total-Count can be believed.",
        "schema": {**STRING, "enum": [str(each) for each in queries.Accuracy]},
        "example": str(queries.Accuracy.EXACT),
    }
}
SNAPSHOT: Final[Mapping[str, Schema]] = {
    queries.SNAPSHOT: {
        "description": "What the export is: one snapshot, or each run as it was at some moment of the copying.",
        "schema": {**STRING, "enum": ["exact", "sliced"]},
        "example": "exact",
    }
}
_HEADERS: Final = {**_EVERY_ANSWER, **_FLOW, **_RETRY_AFTER, **_CHALLENGE, **LINK, **TOTAL, **ACCURACY, **SNAPSHOT}
TAGS: Final[Mapping[str, str]] = {
    "runs": "Runs and their events: created, changed, listed, counted and followed.",
    "operation": "How the daemon is.",
    "admin": "What only an operator may do: over TCP it needs a token.",
}
LAST_EVENT_ID: Final[Schema] = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "description": "As after, which it overrules; a browser that comes back sends it by itself.",
    "schema": {**changes.AFTER.schema},
}
TRACEPARENT: Final[Schema] = {
    "name": traces.HEADER,
    "in": "header",
    "required": False,
    "description": "Where the request belongs in a trace (W3C Trace Context). The log names it, and a run that is "
    "created without a trace_id is stored as part of it. What is malformed is ignored.",
    "schema": STRING,
    "example": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
}
_EVERYWHERE: Final = (401, 403, 429, 500)


class Described(NamedTuple):
    """An endpoint as the document lists it."""

    name: str
    """What it does, beginning with a verb: `create_run`."""
    method: str
    path: str
    operation: Operation


def document(described: Iterable[Described], *, needs_token: bool = False) -> Schema:
    """Return the OpenAPI document for each endpoint."""
    endpoints, made = list(described), components.make()
    kinds = {id(kind): kind for each in endpoints for _, kind in each.operation.answers.values()}
    answers = made.add_answers(kinds.values())
    paths: dict[str, Schema] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, made, answers)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "telemetryd",
            "version": telemetryd.__version__,
            "description": "Records the runs of agents and batch jobs. An answer of 200 or 201 to a write means that "
            "everything it names is durable; any other answer means unknown: repeat it with the same event_id.",
            "contact": {"name": "The operator of this daemon"},
            "license": {"name": "No licence is stated", "identifier": "NOASSERTION"},
        },
        "servers": [{"url": ".", "description": "The daemon that serves this document, also under a path of a proxy."}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(made.schemas.items())),
            "headers": _HEADERS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": f"A token with the scope of {_SCOPE}."},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same token."},
            },
        },
        "security": [*([] if needs_token else [{}]), {"bearer": []}, {"key": []}],
    }


def _operation(endpoint: Described, made: Components, answers: Mapping[int, Schema]) -> Schema:
    name, method, path, operation = endpoint
    first, *words = name.split("_")
    described: Schema = {
        "operationId": first + "".join(map(str.capitalize, words)),
        "summary": operation.summary,
        "description": operation.description or f"{operation.summary}.",
        "tags": list(operation.tags),
        "responses": {
            str(status): {
                "description": text,
                "content": {
                    operation.answer_type: {"schema": answers[id(kind)]},
                    **{other: {"schema": _text_or_bytes(other)} for other in operation.other_answer_types},
                },
                "headers": {**operation.headers},
            }
            for status, (text, kind) in operation.answers.items()
        },
    }
    in_path = [EVENT_ID] if "{event_id}" in path else []
    parameters = [*in_path, *(each.to_json() for each in operation.parameters), *operation.other_parameters]
    if parameters:
        described["parameters"] = [{**each, "schema": made.reference(each["schema"])} for each in parameters]
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {kind: _content(operation, kind) for kind in operation.body_types},
        }
    if operation.scope is None:
        described["security"] = []
    else:
        described[_SCOPE] = str(operation.scope)
    responses = described["responses"]
    described["responses"] = responses | {
        status: answer for status, answer in _errors(operation) if status not in responses
    }
    for status, answer in described["responses"].items():
        advice = _FLOW if method in flow.METHODS and int(status) not in flow.NEVER else {}
        headers = _EVERY_ANSWER | advice | answer.get("headers", {})
        answer["headers"] = {each: {"$ref": f"#/components/headers/{each}"} for each in headers}
    return described


def _text_or_bytes(media_type: str) -> Schema:
    return {**STRING, "format": "binary"} if media_type in _BYTES else STRING


def _errors(operation: Operation) -> Iterator[tuple[str, Schema]]:
    for status in sorted({*operation.errors, *_EVERYWHERE}):
        answer: Schema = {
            "description": _ERROR_TEXTS[status],
            "content": {"application/json": {"schema": ref("ValidationErrors" if status == 422 else "Error")}},
        }
        if status in (429, 503):
            answer["headers"] = _RETRY_AFTER | _FLOW
        if status == 401 or (status == 403 and operation.scope is not None):
            answer["headers"] = _CHALLENGE
        yield str(status), answer


def _content(operation: Operation, kind: str) -> Schema:
    if kind == "application/json":
        content: Schema = {"schema": operation.body}
        example = operation.example
    else:
        content = {"schema": STRING}
        example = "\n".join(orjson.dumps(item).decode() for item in cast(list[object], operation.example))
    return content if example is None else {**content, "example": example}
