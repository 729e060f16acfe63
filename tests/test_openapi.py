from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
from pydantic import BaseModel
from schemathesis.specs.openapi.definitions import OPENAPI_31

from telemetryd import http
from telemetryd.errors import InvalidBodyError
from telemetryd.http import ROUTES
from telemetryd.model import bodies, events, queries, runs
from telemetryd.web import openapi
from tests.conftest import Api, make_run

DOCUMENT: dict[str, Any] = json.loads(json.dumps(openapi.document(http.described())))
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]


def described() -> list[tuple[str, str, dict[str, Any]]]:
    return [(method, path, spoken) for path, item in DOCUMENT["paths"].items() for method, spoken in item.items()]


def validator(name: str) -> jsonschema_rs.Draft202012Validator:
    schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": SCHEMAS}}
    return jsonschema_rs.Draft202012Validator(schema, validate_formats=True)


def test_the_document_is_openapi_3_1() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    faults = list(jsonschema_rs.validator_for(OPENAPI_31).iter_errors(DOCUMENT))
    assert [fault.message for fault in faults] == []
    broken = {**DOCUMENT, "paths": {"/health": {"get": {"parameters": [{"name": "x"}], "responses": {}}}}}
    assert not jsonschema_rs.validator_for(OPENAPI_31).is_valid(broken)  # so the check can fail


def test_every_schema_in_it_is_json_schema_2020_12() -> None:
    found = list(SCHEMAS.values())
    for _, _, spoken in described():
        found += [parameter["schema"] for parameter in spoken.get("parameters", [])]
        contents = [answer["content"] for answer in spoken["responses"].values()]
        contents += [spoken["requestBody"]["content"]] if "requestBody" in spoken else []
        found += [media["schema"] for content in contents for media in content.values()]
    assert len(found) > 60
    for schema in found:
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})


def test_every_reference_leads_somewhere() -> None:
    references = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(DOCUMENT)))
    defined = {
        f"#/components/{kind}/{name}" for kind in ("schemas", "headers") for name in DOCUMENT["components"][kind]
    }
    assert references == defined  # and nothing is left over


def test_every_route_is_in_it() -> None:
    served = {(route.method.lower(), route.path) for route in ROUTES}
    pages = {
        (method, path)
        for method, path in served
        if path == "/" or path.startswith(("/docs", "/redoc", "/openapi.json", "/page/", "/mcp"))
    }
    assert {(method, path) for method, path, _ in described()} == served - pages
    assert len(served - pages) == 26


def test_the_names_of_operations_begin_with_a_verb_and_stay_as_they_are() -> None:
    assert {spoken["operationId"] for _, _, spoken in described()} == {
        *("createRun", "createBatch", "listRuns", "streamRuns", "exportRuns", "getRun", "updateRun"),
        *("associateCommit", "createEvents", "listEvents", "registerProcess", "getCommitUrl", "getRepoUrl"),
        *("listChanges", "getStats", "getRegressions", "listAlerts", "getMetadata", "getHealth", "getMetrics"),
        *("pruneRuns", "reapRuns", "deleteRun", "redactRun", "confirm", "makeBackup"),
    }


def parts(schema: object) -> Iterator[dict[str, Any]]:
    """Yield a schema and every schema in it."""
    if isinstance(schema, dict):
        yield schema
        for key, value in schema.items():
            if key == "properties":
                for each in value.values():
                    yield from parts(each)
            elif key not in ("examples", "example"):
                yield from parts(value)
    elif isinstance(schema, list):
        for each in schema:
            yield from parts(each)


def test_every_request_and_answer_has_a_name_from_which_generators_make_a_type() -> None:
    for method, path, spoken in described():
        contents = [answer["content"] for answer in spoken["responses"].values()]
        contents += [spoken["requestBody"]["content"]] if "requestBody" in spoken else []
        for content in contents:
            if "application/json" in content:
                assert set(content["application/json"]["schema"]) == {"$ref"}, (method, path)
        for parameter in spoken.get("parameters", []):
            assert parameter["schema"].get("type") != "object", "it would be named after the operation"
    for name, schema in SCHEMAS.items():
        assert name.isalpha(), name  # two classes of one name would get those of their modules as well
        assert "enum" not in schema or len(schema["enum"]) > 1
        inner = [part for part in parts(schema) if part is not schema]
        assert not [part for part in inner if "enum" in part], name
        for part in [part for part in inner if part.get("type") == "object"]:
            # A map of values of one kind has no fields that could be named.
            assert part.keys() <= {"type", "additionalProperties"}, (name, part)
            assert isinstance(part["additionalProperties"], dict), (name, part)


def test_types_are_what_is_sent() -> None:
    for name, schema in SCHEMAS.items():
        # In Python a class and a property of one name get into each other's way.
        assert re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower() not in schema.get("properties", {}), name
        for part in parts(schema):
            # TypeScript requires a property with a default, and generators call a type by its title.
            assert not part.keys() & {"default", "title"}, (name, part)
            if part.get("type") == "object" and not part.get("properties"):
                assert "additionalProperties" in part, (name, part)  # else its type is an empty record
            if part.get("type") == "object" and part.get("properties"):
                # With it, a type in TypeScript takes fields by any name, so that it notices no wrong one.
                assert part.get("additionalProperties") in (None, False), (name, part)
            variants = [each for each in part.get("anyOf", []) if each.get("type") == "string"]
            assert len(variants) < 2, (name, part)  # an enumeration or any text is any text
    assert SCHEMAS["RunList"]["items"] == {"$ref": "#/components/schemas/ListedRun"}
    assert "required" not in SCHEMAS["ListedRun"]
    free = {"anyOf": [{"$ref": "#/components/schemas/JsonObject"}, {"type": "null"}]}
    for model, field in (("NewRun", "metrics_json"), ("RunPatch", "context_json"), ("Run", "metrics_json")):
        assert SCHEMAS[model]["properties"][field]["anyOf"] == free["anyOf"]
    assert SCHEMAS["JsonObject"]["additionalProperties"] is True
    for model in ("NewRun", "NewEvent", "RunPatch"):
        for name, schema in SCHEMAS[model]["properties"].items():
            is_optional = name not in SCHEMAS[model].get("required", [])
            assert ({"type": "null"} in schema.get("anyOf", [])) == is_optional, (model, name)


def test_filters_are_described_as_they_are_written() -> None:
    parameters = {each["name"]: each for each in DOCUMENT["paths"]["/api/v1/runs"]["get"]["parameters"]}
    status = jsonschema_rs.validator_for(parameters["status"]["schema"])
    assert all(map(status.is_valid, ["failure", "failure,timeout,cancelled"]))
    assert not any(map(status.is_valid, ["", "nope", "failure,nope", "failure,"]))
    metrics = parameters["metrics"]
    assert (metrics["in"], metrics["style"], metrics["explode"]) == ("query", "form", True)  # each is a parameter
    assert metrics["schema"] == {"$ref": "#/components/schemas/MetricFilters"}
    assert validator("MetricFilters").is_valid({"metrics.tokens": "1000", "metrics.a.b>": "0"})
    assert not validator("MetricFilters").is_valid({"tokens": "1000"})


def test_the_headers_of_answers_are_described() -> None:
    for path, names in (
        ("/api/v1/runs", {"Link", "X-Total-Count", "X-Total-Count-Accuracy"}),
        ("/api/v1/runs/{event_id}/events", {"Link"}),
        ("/api/v1/runs/export", {"X-Total-Count", "Telemetry-Snapshot"}),
    ):
        responses = DOCUMENT["paths"][path]["get"]["responses"]
        everywhere = {"Telemetry-Server", "X-Request-ID"}
        assert set(responses["200"]["headers"]) == names | everywhere
        assert "WWW-Authenticate" in responses["401"]["headers"]
        assert "Retry-After" in responses["503"]["headers"]
    assert all(header["description"] and header["schema"] for header in DOCUMENT["components"]["headers"].values())


def test_it_says_where_it_holds_and_what_its_tags_mean() -> None:
    assert DOCUMENT["servers"][0]["url"] == "."  # where the document is, also under a path of a proxy
    used = {tag for _, _, spoken in described() for tag in spoken["tags"]}
    assert {tag["name"] for tag in DOCUMENT["tags"]} == used
    assert all(tag["description"] for tag in DOCUMENT["tags"])
    assert DOCUMENT["info"]["contact"]["name"]
    assert DOCUMENT["info"]["license"]["name"]


def test_every_operation_and_field_is_described() -> None:
    identifiers = [spoken["operationId"] for _, _, spoken in described()]
    assert len(set(identifiers)) == len(identifiers)
    for method, path, spoken in described():
        assert spoken["summary"], (method, path)
        assert spoken["description"], (method, path)
        assert all(answer["description"] for answer in spoken["responses"].values())
        assert all(parameter["description"] for parameter in spoken.get("parameters", []))
        for name in re.findall(r"{(\w+)}", path):
            assert name in [parameter["name"] for parameter in spoken["parameters"] if parameter["in"] == "path"]
    for model in ("NewRun", "RunPatch", "CommitAssociation"):
        assert SCHEMAS[model]["description"]
    for name, properties in (
        (model, SCHEMAS[model]["properties"]) for model in ("NewRun", "RunPatch", "CommitAssociation")
    ):
        assert [field for field, schema in properties.items() if not schema.get("description")] == [], name
    for name in runs.ANSWERED:
        assert SCHEMAS["Run"]["properties"][name]["description"], name


def test_the_fields_of_a_run_are_those_of_the_definition() -> None:
    assert list(SCHEMAS["NewRun"]["properties"]) == list(runs.STORED)
    assert SCHEMAS["NewRun"]["required"] == ["event_id", "run_id", "start_time", "agent_name", "job_type"]
    assert list(SCHEMAS["RunPatch"]["properties"]) == list(runs.PATCHABLE)
    assert "required" not in SCHEMAS["RunPatch"]
    assert SCHEMAS["Run"]["required"] == [*runs.COLUMNS, "commit_url", "repo_url"]
    assert list(SCHEMAS["Run"]["properties"]) == [*SCHEMAS["Run"]["required"], "events", "more_events"]
    assert list(SCHEMAS["NewEvent"]["properties"]) == list(events.STORED)
    assert SCHEMAS["NewEvent"]["required"] == ["event_type"]
    assert list(SCHEMAS["Event"]["properties"]) == list(events.COLUMNS)
    assert SCHEMAS["NewRun"]["properties"]["status"]["description"].endswith("Default: running.")
    for name in ("items_discovered", "duration_ms", "api_retry_count"):
        assert SCHEMAS["NewRun"]["properties"][name]["description"].endswith("Default: 0.")


@pytest.mark.parametrize(
    ("field", "good", "forgiven", "bad"),
    [
        ("event_id", ["a", "x" * 255, " a"], [], ["", " ", "x" * 256, "a\0", None, 5]),
        ("start_time", ["2025-12-24T10:00:00Z", "2025-12-24T10:00:00.5+01:00"], [], ["yesterday", "", None, 5]),
        ("created_at", ["2025-12-24T10:00:00Z", None], [], ["yesterday", "", 5]),
        ("end_time", ["2025-12-24T10:00:00Z", None], [], ["yesterday", 5]),
        ("status", ["running", "cancelled", None], ["FAILED", " Completed\n", "canceled"], ["", "ok", 1]),
        ("items_failed", [0, 2**63 - 1, 12.0, None], ["5"], [-1, 2**63, 1.5, "x", True]),
        ("duration_ms", [0, None, 7], ["7"], [-1, 2**63, "x"]),
        ("metrics_json", [{}, {"a": [1]}, None], [], [[], "{}", 5]),
        ("api_posted", [True, False, None], [0, 1, "yes"], [2, "maybe"]),
        ("product", ["", "ä", None], [], ["a\0b", 5]),
        ("git_commit_source", ["llm", None], [], ["LLM", "", 5]),
    ],
)
def test_the_document_and_the_validation_agree(
    field: str, good: list[object], forgiven: list[object], bad: list[object]
) -> None:
    """What is forgiven is validated, but no client that is made from the document writes it."""

    def is_valid(value: object) -> bool:
        try:
            runs.parse_run(make_run(**{field: value}))
        except InvalidBodyError:
            return False
        return True

    for value in good:
        assert validator("NewRun").is_valid(make_run(**{field: value})), value
        assert is_valid(value), value
    for value in forgiven:
        assert not validator("NewRun").is_valid(make_run(**{field: value})), value
        assert is_valid(value), value
    for value in bad:
        assert not validator("NewRun").is_valid(make_run(**{field: value})), value
        assert not is_valid(value), value


def test_null_means_not_given_wherever_a_field_need_not_be_given() -> None:
    bare = make_run()
    nulls = dict.fromkeys(name for name in runs.STORED if name not in bare)
    assert runs.parse_run(bare | nulls) == runs.parse_run(bare)
    event = {"event_type": "started"}
    assert events.parse_events({**dict.fromkeys(events.STORED), **event}) == events.parse_events(event)


def test_the_parameters_of_a_query_are_those_that_are_read() -> None:
    parameters = DOCUMENT["paths"]["/api/v1/runs"]["get"]["parameters"]
    assert [each["name"] for each in parameters] == [each.name.removesuffix(".NAME") for each in queries.LIST]
    assert not any(parameter["required"] for parameter in parameters)
    limit = next(parameter["schema"] for parameter in parameters if parameter["name"] == "limit")
    assert limit == {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}


async def test_it_is_served_and_holds_for_a_stored_run(api: Api) -> None:
    assert await api.get("/openapi.json") == DOCUMENT
    full = make_run(
        end_time="2025-12-24T11:00:00+01:00",
        metrics_json={"tokens": 5},
        git_repo="git@github.com:acme/tool.git",
        git_commit_hash="abc1234",
        git_commit_source="llm",
        api_posted=1,
    )
    await api.batch([full, make_run()])
    answered = await api.list()
    assert len(answered) == 2
    for run in answered:
        assert [fault.message for fault in validator("Run").iter_errors(run)] == []
    assert not validator("Run").is_valid({**answered[0], "duration_ms": "5"})
    for body in ({}, {**full, "status": "nope"}):
        assert validator("ValidationErrors").is_valid(await api.post(body, 422))
    assert validator("Error").is_valid(await api.get("/api/v1/runs/none", 404))


@pytest.mark.parametrize("model", [runs.NewRun, runs.RunPatch, runs.CommitAssociation])
def test_every_field_has_examples_that_the_document_and_the_validation_admit(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        assert field.examples, name
        assert SCHEMAS[model.__name__]["properties"][name]["examples"] == field.examples
        for value in field.examples:
            others = runs.example(runs.NewRun, runs.BEGUN) if model is runs.NewRun else runs.example(model)
            body = {**others, name: value}
            assert [fault.message for fault in validator(model.__name__).iter_errors(body)] == []
            assert bodies.validate(model, body)


async def test_every_example_of_a_body_works_as_it_stands(api: Api) -> None:
    tried = []
    for method, path, spoken in described():
        for kind, content in spoken.get("requestBody", {}).get("content", {}).items():
            if path.startswith("/api/v1/admin/") or path.endswith("/process"):  # refused: no token, no such process
                continue
            target = path.replace("{event_id}", openapi.EVENT_ID["example"])
            body = content["example"] if isinstance(content["example"], str) else json.dumps(content["example"])
            async with api.client.request(method, target, data=body, headers={"Content-Type": kind}) as response:
                assert response.status in (200, 201), f"{method} {path}: {await response.text()}"
                answer = await response.json()
            assert "warnings" not in answer
            assert not answer.get("errors")
            tried.append((method, path, kind, response.status))
    assert [(path, status) for _, path, _, status in tried] == [
        ("/api/v1/runs", 201),
        ("/api/v1/runs/batch", 200),
        ("/api/v1/runs/batch", 200),
        ("/api/v1/runs/{event_id}", 200),
        ("/api/v1/runs/{event_id}/associate-commit", 200),
        ("/api/v1/runs/{event_id}/events", 201),
    ]
    first, second = sorted(await api.list(), key=lambda run: str(run["event_id"]))
    assert first["event_id"] == openapi.EVENT_ID["example"]
    assert (first["status"], first["git_commit_source"], second["status"]) == ("success", "llm", "success")


async def test_docs_shows_it_with_assets_of_its_own(api: Api) -> None:
    async with api.client.get("/docs") as response:
        assert (response.status, response.content_type) == (200, "text/html")
        page = await response.text()
    assert "//" not in re.sub(r"<!--.*?-->", "", page, flags=re.DOTALL).replace("http://www.w3.org/", "")
    assets = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(assets) >= 3
    for asset in assets:
        async with api.client.get(asset if asset.startswith("/") else f"/{asset}") as response:
            assert response.status == 200, asset
            assert await response.read()
