from __future__ import annotations

import typing
from typing import Any

from pydantic import BaseModel

from telemetryd.client import fields
from telemetryd.client.config import VARIABLES
from telemetryd.client.context import PARENT_VARIABLE
from telemetryd.client.fields import CHANGES, COUNTS, FIELDS, FLAGS, NAMES, SOURCES, STATUSES, TIMES, Details, Fields
from telemetryd.client.intake import MAX_LABEL_KEY, MAX_LABELS, MAX_NAME
from telemetryd.client.values import MAX_DEPTH, MAX_VALUES
from telemetryd.configuration import CLIENT_VARIABLES
from telemetryd.model import runs, values
from telemetryd.model.values import Role
from telemetryd.settings import Settings, variable


def parts(model: type[BaseModel], name: str) -> list[dict[str, Any]]:
    """What a field may be: the schemas of its kinds, those that have a name included."""
    schema = model.model_json_schema()["properties"][name]
    return [
        definition
        for part in schema.get("anyOf", [schema])
        for definition in (part.get(values.COMPONENT) or {name: part}).values()
    ]


def test_the_fields_are_those_of_a_run() -> None:
    assert set(runs.columns(Role.SET)) == FIELDS
    assert set(runs.columns(Role.PATCH)) == CHANGES


def test_the_keyword_arguments_have_the_types_of_a_run() -> None:
    hints = typing.get_type_hints(fields.NamedFields)
    json_types = {"string": str, "integer": int, "boolean": bool, "object": dict}
    for name in FIELDS:
        kinds = {part["type"] for part in parts(runs.Run, name)} - {"null"}
        plain = typing.get_origin(hints[name]) or hints[name]
        assert plain in {json_types[kind] for kind in kinds}, name


def test_the_daemon_knows_the_clients_variables() -> None:
    own = {variable(name) for name in Settings.model_fields}
    assert {*VARIABLES, PARENT_VARIABLE} - own == CLIENT_VARIABLES


def test_a_start_and_an_end_take_every_field_that_may_be_given_then() -> None:
    assert FIELDS - {"agent_name", "job_type"} == set(typing.get_type_hints(Fields))
    assert CHANGES - {"status"} == set(typing.get_type_hints(Details))


def test_the_kinds_of_fields_and_their_bounds_are_those_of_a_run() -> None:
    kinds = {name: parts(runs.NewRun, name) for name in FIELDS}
    assert {name for name in FIELDS if any(part.get("maxLength") == MAX_NAME for part in kinds[name])} == {*NAMES}
    assert {name for name in FIELDS if any(part.get("type") == "integer" for part in kinds[name])} == {
        *COUNTS,
        "duration_ms",
        "attempt",
    }
    assert {name for name in FIELDS if "date-time" in str(kinds[name])} == {*TIMES}
    assert set(runs.columns(Role.BOOLEAN)) == {*FLAGS}
    assert [str(source) for source in values.CommitSource] == [*SOURCES]
    assert (MAX_LABELS, MAX_LABEL_KEY) == (values.MAX_LABELS, values.MAX_LABEL_KEY)
    assert {str(status): str(status) for status in values.Status} | values.STATUS_ALIASES == STATUSES
    assert (MAX_DEPTH, MAX_VALUES) == (values.MAX_JSON_DEPTH, values.MAX_JSON_VALUES)
