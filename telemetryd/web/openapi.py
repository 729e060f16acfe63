"""Builds the OpenAPI 3.1 document from the endpoints and the models that validate them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, cast

import orjson
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

import telemetryd
from telemetryd import SERVER_HEADER, flow
from telemetryd.model import (
    changes,
    events,
    requests,
    runs,
    values,
)
from telemetryd.model.answers import REFERENCE
from telemetryd.model.parameters import Parameter
from telemetryd.web.body import JSON_TYPES

_REF: Final = "#/components/schemas/{model}"
Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Operation:
    """What the document says of one endpoint."""

    summary: str
    description: str = ""
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
    """Further media types of a successful answer; they hold text."""
    errors: tuple[int, ...] = ()
    open: bool = False
    """Whether it answers without a token even where authentication is on."""


def ref(name: str) -> Schema:
    """Return a reference to a named schema of the document."""
    return {"$ref": _REF.format(model=name)}


def obj(properties: dict[str, Schema], required: Iterable[str] | None = None) -> Schema:
    """Return the schema of an object; every property is required by default."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties if required is None else required),
    }


STRING: Final[Schema] = {"type": "string"}
INTEGER: Final[Schema] = {"type": "integer", "minimum": 0}
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
    403: "Protected mode: only this machine is served.",
    404: "There is no such run.",
    409: "The process cannot be watched; send heartbeats instead.",
    410: "What comes after this cursor is not known any more; begin again, without `after`.",
    413: "The body or the batch is too large.",
    415: "The media type or the content coding is not known.",
    422: "The body is wrong; every fault is listed.",
    429: "Too many requests from this address; see Retry-After.",
    500: "Unexpected; the log says more under the request id.",
    503: "Not now; repeat the same request after Retry-After seconds.",
}
_RETRY_AFTER: Final = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
_FLOW: Final = {
    flow.HEADER: {
        "description": "Advice to writers: most rows in the next request, and milliseconds to pause before it.",
        "schema": {"type": "string", "pattern": r"^batch=\d+, pause=\d+(, \w+=\d+)*$"},
        "example": "batch=5000, pause=0",
    }
}
_SERVER: Final = {
    SERVER_HEADER: {
        "description": "Every answer of the daemon has it; one without it comes from another server, such as a proxy.",
        "schema": {"type": "string", "pattern": r"^telemetryd/\d+$"},
        "example": "telemetryd/4",
    }
}
LAST_EVENT_ID: Final[Schema] = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "description": "As after, which it overrules; a browser that comes back sends it by itself.",
    "schema": {**changes.AFTER.schema},
}
_EVERYWHERE: Final = (401, 403, 429, 500)


def schema_of(kind: Any) -> Schema:
    """Return the schema of a typed answer (`model/answers.py`), with every part of it in its place."""
    schema = TypeAdapter(kind).json_schema(mode="serialization")
    return cast(Schema, _inline(schema, schema.pop("$defs", {})))


def _inline(schema: object, parts: dict[str, Schema]) -> object:
    if isinstance(schema, list):
        return [_inline(each, parts) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if (component := schema.get(REFERENCE)) is not None:
        return ref(component)
    if (part := schema.get("$ref")) is not None:
        schema = {**parts[part.rsplit("/", 1)[1]], **{key: value for key, value in schema.items() if key != "$ref"}}
    left_out = {"title"}
    if "const" in schema or "enum" in schema:
        left_out.add("type")
    if schema.get("type") == "object":
        left_out.add("description")  # that of the class, which is for those who read the code
        if schema.get("additionalProperties") is True:
            left_out.add("additionalProperties")
    return {
        key: {name: _inline(each, parts) for name, each in value.items()}
        if key == "properties"
        else _inline(value, parts)
        for key, value in schema.items()
        if key not in left_out
    }


def document(operations: Iterable[tuple[str, str, Operation]], *, needs_token: bool = False) -> Schema:
    """Return the OpenAPI document for (method, path, operation) of each endpoint."""
    paths: dict[str, Schema] = {}
    for method, path, operation in operations:
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "telemetryd",
            "version": telemetryd.__version__,
            "description": "Records the runs of agents and batch jobs. An answer of 200 or 201 to a write means that "
            "everything it names is durable; any other answer means unknown: repeat it with the same event_id.",
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "The daemon's token."},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same token."},
            },
        },
        "security": [*([] if needs_token else [{}]), {"bearer": []}, {"key": []}],
    }


def _operation(method: str, path: str, operation: Operation) -> Schema:
    described: Schema = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}_{path.removeprefix('/api/v1')}").strip("_"),
        "summary": operation.summary,
        "tags": list(operation.tags),
        "responses": {
            str(status): {
                "description": text,
                "content": {
                    operation.answer_type: {"schema": schema_of(kind)},
                    **{other: {"schema": STRING} for other in operation.other_answer_types},
                },
            }
            for status, (text, kind) in operation.answers.items()
        },
    }
    if operation.description:
        described["description"] = operation.description
    in_path = [EVENT_ID] if "{event_id}" in path else []
    parameters = [*in_path, *(each.to_json() for each in operation.parameters), *operation.other_parameters]
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {kind: _content(operation, kind) for kind in operation.body_types},
        }
    if operation.open:
        described["security"] = []
    responses = described["responses"]
    described["responses"] = responses | {
        status: answer for status, answer in _errors(operation) if status not in responses
    }
    for status, answer in described["responses"].items():
        advice = _FLOW if method in flow.METHODS and int(status) not in flow.NEVER else {}
        answer["headers"] = _SERVER | advice | answer.get("headers", {})
    return described


def _errors(operation: Operation) -> Iterator[tuple[str, Schema]]:
    for status in sorted({*operation.errors, *_EVERYWHERE}):
        answer: Schema = {
            "description": _ERROR_TEXTS[status],
            "content": {"application/json": {"schema": ref("ValidationErrors" if status == 422 else "Error")}},
        }
        if status in (429, 503):
            answer["headers"] = _RETRY_AFTER | _FLOW
        yield str(status), answer


def _content(operation: Operation, kind: str) -> Schema:
    if kind == "application/json":
        content: Schema = {"schema": operation.body}
        example = operation.example
    else:
        content = {"schema": STRING}
        example = "\n".join(orjson.dumps(item).decode() for item in cast(list[object], operation.example))
    return content if example is None else {**content, "example": example}


_NULL: Final[Schema] = {"type": "null"}
_SAID: Final = ("title", "description", "default", "examples")
"""What a schema says besides what it allows."""


def _or_null(schema: Schema) -> Schema:
    """Return the schema of a field that may be null, which means that it is not given."""
    said = {key: value for key, value in schema.items() if key in _SAID}
    allowed = {key: value for key, value in schema.items() if key not in _SAID}
    kinds = allowed.get("anyOf", [allowed])
    return {"anyOf": kinds if _NULL in kinds else [*kinds, _NULL], **said}


@cache  # the parameters of five operations look into it as well, and it takes some 15 ms
def _schemas() -> dict[str, Schema]:
    models: list[tuple[type[BaseModel], str]] = [
        (runs.NewRun, "validation"),
        (runs.RunPatch, "validation"),
        (events.NewEvent, "validation"),
        (requests.ProcessRequest, "validation"),
        (runs.CommitAssociation, "validation"),
        (requests.PruneRequest, "validation"),
        (requests.ReapRequest, "validation"),
        (requests.ConfirmRequest, "validation"),
    ]
    _, made = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]  # the modes are literals
    schemas: dict[str, Schema] = made["$defs"]
    stored = runs.Run.model_json_schema(ref_template=_REF, mode="serialization")["properties"]
    stored["status"] = {"type": "string", "enum": [str(status) for status in values.Status]}
    stored["api_posted"] = {"type": "boolean"}
    url = {"anyOf": [{"type": "string", "format": "uri"}, {"type": "null"}]}
    event = events.Event.model_json_schema(ref_template=_REF, mode="serialization")["properties"]
    schemas["Event"] = obj(event)
    for schema in (schemas["NewEvent"]["properties"], event):
        for name in ("id", "event_key", "timestamp"):
            schema.get(name, {}).pop("default", None)
    shown: Schema = {"events": {"type": "array", "items": ref("Event")}, "more_events": {"type": "boolean"}}
    always: Schema = {**stored, "commit_url": url, "repo_url": url}
    schemas["Run"] = obj({**always, **shown}, always)
    schemas["RunPart"] = obj({**always, **shown}, ())  # what `fields` chooses of a run
    for schema in (schemas["NewRun"]["properties"], stored):
        schema["created_at"].pop("default", None)
        schema.get("updated_at", {}).pop("default", None)
        schema.get("id", {}).pop("default", None)
    for name in ("NewRun", "NewEvent"):
        properties, required = schemas[name]["properties"], schemas[name]["required"]
        schemas[name]["properties"] = {
            field: schema if field in required else _or_null(schema) for field, schema in properties.items()
        }
    schemas["ErrorItem"] = obj(
        {"loc": {"type": "array", "items": {"anyOf": [STRING, INTEGER]}}, "msg": STRING, "type": STRING}
    )
    schemas["Error"] = obj({"detail": STRING})
    schemas["ValidationErrors"] = obj({"detail": {"type": "array", "items": ref("ErrorItem")}})
    return schemas
