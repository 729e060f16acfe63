"""Renders the reference pages from the code: every endpoint, setting, command and metric."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import orjson
from prometheus_client.metrics import MetricWrapperBase

from telemetryd import http
from telemetryd.cli.options import NO_FLAG
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings, flag, variable
from telemetryd.web import openapi
from tests.tools.command_line import contexts

_WIDTH: Final = 110
"""Columns of the help of commands."""
_METHODS: Final = ("get", "post", "patch", "put", "delete")
_ADDRESS: Final = "http://localhost:8765"
_JSON: Final = "application/json"
_FIRST_ERROR: Final = 400
_EVERYWHERE: Final = frozenset({"Telemetry-Server", "X-Request-ID", "Telemetry-Flow"})
"""Headers of every answer, or of every answer to a write, which docs/reference/http.md describes once."""
_DEFAULT_PATH: Final = "./data/telemetry.sqlite; under systemd `$STATE_DIRECTORY/telemetry.sqlite`"


def cell(text: str) -> str:
    marked = re.sub(r"(?<![`(<\w])https?://[^\s,;)`]+", r"`\g<0>`", text)
    return " ".join(marked.split()).replace("|", "\\|")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- Settings ------------------------------------------------------------------------------------


def default(name: str) -> str:
    """Return a setting's default as Markdown, empty if it has none."""
    if name == "db_path":
        return _DEFAULT_PATH
    value = Settings.model_fields[name].get_default(call_default_factory=True)
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def settings() -> str:
    """Return every setting as a Markdown table."""
    rows = (
        (f"`{variable(name)}`", "" if name in NO_FLAG else f"`{flag(name)}`", default(name), setting.description or "")
        for name, setting in Settings.model_fields.items()
    )
    return _table(("Variable", "Flag", "Default", "Meaning"), rows)


# --- Endpoints -----------------------------------------------------------------------------------


def _linked(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _kind(schema: Mapping[str, Any]) -> str:
    """Return a schema's type as Markdown; components are linked to their own section."""
    for key, words in _KINDS.items():
        if key in schema:
            return words(schema[key])
    if schema.get("type") == "array":
        return f"array of {_kind(schema.get('items', {}))}"
    kind = "timestamp" if schema.get("format") == "date-time" else schema.get("type", "any")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _or(schemas: Iterable[Mapping[str, Any]]) -> str:
    return " or ".join(dict.fromkeys(map(_kind, schemas)))


def _literals(values: Iterable[Any]) -> str:
    return " or ".join(f"`{orjson.dumps(value).decode()}`" for value in values)


_KINDS: Final[Mapping[str, Callable[[Any], str]]] = {
    "$ref": lambda reference: _linked(reference.rpartition("/")[2]),
    "enum": _literals,
    "const": lambda value: _literals([value]),
    "anyOf": _or,
    "oneOf": _or,
    "allOf": lambda schemas: " with ".join(map(_kind, schemas)),
}
"""How a type is named, by the keyword that says it."""


def _bounds(schema: Mapping[str, Any]) -> str:
    words = {"minimum": "at least", "maximum": "at most", "minLength": "characters, at least", "default": "default"}
    said = (f"{said} {orjson.dumps(schema[key]).decode()}" for key, said in words.items() if key in schema)
    return ", ".join(said)


def _parameters(parameters: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for each in parameters:
        schema = each.get("schema", {})
        needed = (
            "required" if each.get("required") else "`" + str(schema["default"]) + "`" if "default" in schema else ""
        )
        rows.append((f"`{each['name']}`", each["in"], _kind(schema), needed, each.get("description", "")))
    return _table(("Parameter", "In", "Type", "Default", "Meaning"), rows)


def _body(content: Mapping[str, Mapping[str, Any]]) -> str:
    schema = next(iter(content.values())).get("schema", {})
    return f"Body ({', '.join(f'`{kind}`' for kind in content)}): {_kind(schema)}."


def _example(method: str, path: str, operation: Mapping[str, Any]) -> str:
    """Return a request with curl that works, from the document's own examples."""
    for each in operation.get("parameters", ()):
        if each["in"] == "path":
            path = path.replace(f"{{{each['name']}}}", str(each["example"]))
    words = ["curl"]
    if method != "get":
        words += ["-X", method.upper()]
    content = operation.get("requestBody", {}).get("content", {})
    example = content.get(_JSON, {}).get("example")
    if example is not None:
        words += ["-H", "Content-Type: application/json", "-d", orjson.dumps(example).decode()]
    elif _JSON in content:
        words += ["-H", "Content-Type: application/json", "-d", "{}"]
    return f"```bash\n{shlex.join([*words, _ADDRESS + path])}\n```"


def _answers(responses: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for status, answer in sorted(responses.items()):
        if int(status) < _FIRST_ERROR:
            content = answer.get("content", {})
            kinds = [_kind(each.get("schema", {})) for kind, each in content.items() if kind == _JSON]
            others = [f"`{kind}`" for kind in content if kind != _JSON]
            headers = [f"`{name}`" for name in answer.get("headers", {}) if name not in _EVERYWHERE]
            rows.append((status, answer["description"], ", ".join([*kinds, *others]), ", ".join(headers)))
    yield _table(("Status", "When", "Content", "Headers"), rows)
    errors = [f"`{status}`" for status in sorted(responses) if int(status) >= _FIRST_ERROR]
    if errors:
        yield f"[Errors](#errors): {', '.join(errors)}."


def _errors(operations: Iterable[Mapping[str, Any]]) -> str:
    """Return what each error means, and which header it brings."""
    rows = {}
    for operation in operations:
        for status, answer in operation["responses"].items():
            if int(status) >= _FIRST_ERROR:
                headers = [f"`{name}`" for name in answer["headers"] if name not in _EVERYWHERE]
                kind = _kind(answer["content"][_JSON]["schema"])
                rows[status] = (status, answer["description"], kind, ", ".join(headers))
    return _table(("Status", "When", "Content", "Headers"), (rows[status] for status in sorted(rows)))


def _fields(schema: Mapping[str, Any]) -> str:
    needed = schema.get("required", ())
    rows = []
    for name, field in schema["properties"].items():
        said = " ".join(
            filter(None, (field.get("description", ""), f"({bounds})" if (bounds := _bounds(field)) else ""))
        )
        rows.append((f"`{name}`", _kind(field), "yes" if name in needed else "", said))
    return _table(("Field", "Type", "Always", "Meaning"), rows)


def _component(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {name}"
    if "description" in schema:
        yield " ".join(schema["description"].split())
    if "properties" in schema:
        yield _fields(schema)
    else:
        bounds = _bounds(schema)
        yield f"{_kind(schema)}{f' ({bounds})' if bounds else ''}."


def endpoints() -> str:
    """Return every endpoint with its parameters, body, answers and an example, and every object that they name."""
    document = openapi.document(http.described(), needs_token=True)
    operations = {
        f"{method.upper()} {path}": (method, path, by_method[method])
        for path, by_method in document["paths"].items()
        for method in _METHODS
        if method in by_method
    }
    rows = (
        (f"[`{name}`](#{anchor(name)})", operation["summary"], f"`{operation.get('x-required-scope', 'none')}`")
        for name, (_, _, operation) in operations.items()
    )
    parts = [_table(("Endpoint", "", "Scope"), rows)]
    for name, (method, path, operation) in operations.items():
        parts.append(f"## `{name}`")
        parts.append(f"{operation['summary']}. {operation.get('description', '')}".strip())
        if operation.get("parameters"):
            parts.append(_parameters(operation["parameters"]))
        if "requestBody" in operation:
            parts.append(_body(operation["requestBody"]["content"]))
        parts += (_example(method, path, operation), *_answers(operation["responses"]))
    parts += ("## Errors", _errors(operation for _, _, operation in operations.values()), "## Objects")
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts += _component(name, schema)
    return "\n\n".join(parts)


def anchor(heading: str) -> str:
    """Return the name that GitHub gives to a heading: lower case, without punctuation, blanks as hyphens."""
    shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return "".join(each for each in shown.lower().replace(" ", "-") if each.isalnum() or each in "-_")


# --- Commands ------------------------------------------------------------------------------------


def commands() -> str:
    """Return the help of every command."""
    parts = (
        f"## `{context.command_path}`\n\n```text\n{context.command.get_help(context)}\n```"
        for context in contexts(terminal_width=_WIDTH)
    )
    return "\n\n".join(parts)


# --- Metrics -------------------------------------------------------------------------------------


_ENDINGS: Final = {"counter": "_total", "info": "_info"}
"""What Prometheus' text adds to a metric's name."""


def metrics() -> str:
    """Return every metric of `GET /metrics` for Prometheus as a Markdown table."""
    made = Metrics()
    labels = {
        name: each._labelnames
        for each, names in made.registry._collector_to_names.items()
        if isinstance(each, MetricWrapperBase)
        for name in names
    }
    rows = (
        (
            f"`{each.name}{_ENDINGS.get(each.type, '')}`",
            each.type,
            ", ".join(f"`{label}`" for label in labels.get(each.name, ())),
            each.documentation,
        )
        for each in made.registry.collect()
    )
    return _table(("Metric", "Type", "Labels", "Meaning"), sorted(rows))


# --- Pages ---------------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """Return the text of each page of the reference that is generated as a whole, by its name."""
    return {name: f"{_HEADS[name].strip()}\n\n{render()}\n" for name, render in _RENDER.items()}


_RENDER: Final = {"settings": settings, "endpoints": endpoints, "commands": commands, "metrics": metrics}
_HEADS: Final = {
    "settings": """
# Settings

Settings come from command-line flags, environment variables and `.env` in the working directory, in that order of
precedence. `telemetryd config` prints each effective value, its source, and any warnings; `telemetryd config --check`
does that without a start, and checks the files that settings name. All settings are checked at start. All errors are
reported at once, each with its flag, variable or line of `.env`, and the daemon exits with status 2.

[The operator's handbook](../how-to/operations.md#configuration) explains which ones to change. `make docs` generates
this page from `telemetryd/settings.py`.
""",
    "endpoints": """
# Endpoints

Each endpoint with its parameters, body, answers and an example. A running daemon serves the same at `/docs`, where you
can try it, and as OpenAPI 3.1 at `/openapi.json`. [HTTP conventions](http.md) describes what endpoints have in common:
headers, tokens, what a body may hold, flow control, and the details of exports, events, statistics and feeds.
`make docs` generates this page from the handlers' descriptions and models.
""",
    "commands": """
# Commands

What `telemetryd COMMAND --help` prints. [Where a command works](../how-to/operations.md#where-a-command-works) explains
which commands reach a running daemon and which work on the file. `make docs` generates this page.
""",
    "metrics": """
# Metrics

What `GET /metrics` answers as Prometheus or OpenMetrics text. Without such an `Accept` header or `?format=prometheus`
it answers totals as JSON. Metrics with the prefixes `process_` and `python_` are those of the Prometheus client
library. [The handbook](../how-to/operations.md#monitoring) says which ones to watch. `make docs` generates this page
from `telemetryd/ops/metrics.py`.
""",
}
