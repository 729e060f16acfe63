from __future__ import annotations

import json
import re
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
    assert {reference.rpartition("/")[2] for reference in references} <= set(SCHEMAS)
    assert all(reference.startswith("#/components/schemas/") for reference in references)
    named = {reference.rpartition("/")[2] for reference in references}
    assert set(SCHEMAS) == named  # and nothing is left over


def test_every_route_is_in_it() -> None:
    served = {(route.method.lower(), route.path) for route in ROUTES}
    pages = {
        (method, path)
        for method, path in served
        if path == "/" or path.startswith(("/docs", "/redoc", "/openapi.json", "/page/"))
    }
    assert {(method, path) for method, path, _ in described()} == served - pages
    assert len(served - pages) == 24


def test_every_operation_and_field_is_described() -> None:
    identifiers = [spoken["operationId"] for _, _, spoken in described()]
    assert len(set(identifiers)) == len(identifiers)
    for method, path, spoken in described():
        assert spoken["summary"], (method, path)
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
    for name in set(runs.COLUMNS) - {"status", "api_posted"}:
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
    assert SCHEMAS["NewRun"]["properties"]["status"]["default"] == "running"
    for name in ("items_discovered", "duration_ms", "api_retry_count"):
        assert SCHEMAS["NewRun"]["properties"][name]["default"] == 0


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("event_id", ["a", "x" * 255, " a"], ["", " ", "x" * 256, "a\0", None, 5]),
        ("start_time", ["2025-12-24T10:00:00Z", "2025-12-24T10:00:00.5+01:00"], ["yesterday", "", None, 5]),
        ("end_time", ["2025-12-24T10:00:00Z", None], ["yesterday", 5]),
        ("status", ["running", "FAILED", " Completed\n", "canceled", None], ["", "ok", 1]),
        ("items_failed", [0, 2**63 - 1, 12.0, None], [-1, 2**63, 1.5, "x", True]),
        ("duration_ms", [0, None, 7], [-1, 2**63, "x"]),
        ("metrics_json", [{}, {"a": [1]}, None], [[], "{}", 5]),
        ("api_posted", [True, False, 0, 1, None], [2, "x"]),
        ("product", ["", "ä", None], ["a\0b", 5]),
        ("git_commit_source", ["llm", None], ["LLM", "", 5]),
    ],
)
def test_the_document_and_the_validation_agree(field: str, good: list[object], bad: list[object]) -> None:
    def is_valid(value: object) -> bool:
        try:
            runs.parse_run(make_run(**{field: value}))
        except InvalidBodyError:
            return False
        return True

    for value in good:
        assert validator("NewRun").is_valid(make_run(**{field: value})), value
        assert is_valid(value), value
    for value in bad:
        assert not validator("NewRun").is_valid(make_run(**{field: value})), value
        assert not is_valid(value), value


def test_the_parameters_of_a_query_are_those_that_are_read() -> None:
    parameters = DOCUMENT["paths"]["/api/v1/runs"]["get"]["parameters"]
    assert [parameter["name"] for parameter in parameters] == [parameter.name for parameter in queries.LIST]
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
