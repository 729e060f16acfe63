from __future__ import annotations

import typing

from telemetryd.client import fields
from telemetryd.client.config import VARIABLES
from telemetryd.client.context import PARENT_VARIABLE
from telemetryd.client.fields import CHANGES, COUNTS, FIELDS, FLAGS, NAMES, SOURCES, STATUSES, TIMES, Details, Fields
from telemetryd.client.intake import MAX_NAME
from telemetryd.client.values import MAX_DEPTH, MAX_VALUES
from telemetryd.model import runs, values
from telemetryd.model.values import Role
from telemetryd.settings import CLIENT_VARIABLES, Settings, variable


def test_the_fields_are_those_of_a_run() -> None:
    assert set(runs.columns(Role.SET)) == FIELDS
    assert set(runs.columns(Role.PATCH)) == CHANGES


def test_the_keyword_arguments_have_the_types_of_a_run() -> None:
    hints = typing.get_type_hints(fields.NamedFields)
    schema = runs.Run.model_json_schema()["properties"]
    json_types = {"string": str, "integer": int, "boolean": bool, "object": dict}
    for name in FIELDS:
        kinds = {part.get("type") for part in schema[name].get("anyOf", [schema[name]])} - {"null"}
        plain = typing.get_origin(hints[name]) or hints[name]
        assert plain in {json_types[kind] for kind in kinds}, name


def test_the_daemon_knows_the_clients_variables() -> None:
    own = {variable(name) for name in Settings.model_fields}
    assert {*VARIABLES, PARENT_VARIABLE} - own == CLIENT_VARIABLES


def test_a_start_and_an_end_take_every_field_that_may_be_given_then() -> None:
    assert FIELDS - {"agent_name", "job_type"} == set(typing.get_type_hints(Fields))
    assert CHANGES - {"status"} == set(typing.get_type_hints(Details))


def test_the_kinds_of_fields_and_their_bounds_are_those_of_a_run() -> None:
    schema = runs.NewRun.model_json_schema()["properties"]
    assert {name for name in FIELDS if schema[name].get("maxLength") == MAX_NAME} == {*NAMES}
    assert {name for name in FIELDS if schema[name].get("type") == "integer"} == {*COUNTS}
    assert {name for name in FIELDS if "date-time" in str(schema[name])} == {*TIMES}
    assert set(runs.columns(Role.BOOLEAN)) == {*FLAGS}
    assert [str(source) for source in values.CommitSource] == [*SOURCES]
    assert {str(status): str(status) for status in values.Status} | values.STATUS_ALIASES == STATUSES
    assert (MAX_DEPTH, MAX_VALUES) == (values.MAX_JSON_DEPTH, values.MAX_JSON_VALUES)
