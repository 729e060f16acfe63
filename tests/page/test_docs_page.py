"""The page of docs: every operation of the OpenAPI document, and a form that sends it."""

from __future__ import annotations

import json
import re

from playwright.sync_api import expect

from tests.conftest import make_run
from tests.http_client import call
from tests.page.conftest import OpenPage, Watched
from tests.page.test_page import COLOURS, check_accessibility


def test_every_operation_is_there_with_its_fields(open_view: OpenPage, url: str) -> None:
    page = open_view("docs", fresh=True)
    document = call(url, "GET", "/openapi.json")[1]
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    expect(page.locator("details[data-words]")).to_have_count(len(operations))
    page.locator("#createRun > summary").click()
    create = page.locator("#createRun")
    create.locator("summary", has_text="NewRun").first.click()
    expect(create.locator("tr", has_text="agent_name").first).to_contain_text("required")
    expect(create.locator("tr", has_text="agent_name").first).to_contain_text(
        "Which agent ran. (at least 1 characters,"
    )
    expect(create).to_contain_text("Needs the scope ingest")
    page.get_by_label("Find").fill("patch runs")
    expect(page.locator("details[data-words]:visible")).to_have_count(1)
    page.goto(f"{url}/docs#getRun")
    page.reload()
    expect(page.locator("#getRun .operation")).to_be_visible()


def test_a_run_is_created_read_and_followed_with_the_forms(open_view: OpenPage, url: str) -> None:
    page = open_view("docs", fresh=True)
    run = make_run(event_id="from docs/%?", output_summary="<img src=x onerror=alert(1)>")
    create = page.locator("#createRun")
    create.locator(":scope > summary").click()
    create.get_by_label("Body").fill(json.dumps(run))
    create.get_by_role("button", name="Send").click()
    expect(create.locator(".result [role=status]")).to_contain_text(re.compile("^201"))
    expect(create.locator(".result pre").first).to_contain_text(f"curl -X POST '{url}/api/v1/runs'")
    read = page.locator("#getRun")
    read.locator(":scope > summary").click()
    read.get_by_label("event_id").fill("from docs/%?")
    read.get_by_role("button", name="Send").click()
    expect(read.locator(".answer")).to_contain_text('"output_summary": "<img src=x onerror=alert(1)>"')
    stream = page.locator("#streamRuns")
    stream.locator(":scope > summary").click()
    stream.get_by_role("button", name="Send").click()
    expect(stream.locator(".result [role=status]")).to_contain_text("200")
    stream.get_by_role("button", name="Stop").click()
    expect(stream.locator(".result [role=status]")).to_contain_text("Stopped.")


def test_an_operation_that_needs_a_token_asks_for_it(open_view: OpenPage, url: str, watched: Watched) -> None:
    watched.expected = ("401",)
    page = open_view("docs", fresh=True)
    page.route(
        "**/api/v1/metadata", lambda route: route.fulfill(status=401) if not _token(route) else route.continue_()
    )
    metadata = page.locator("#getMetadata")
    metadata.locator(":scope > summary").click()
    metadata.get_by_role("button", name="Send").click()
    page.get_by_role("textbox", name="Token").fill("secret")
    page.get_by_role("button", name="Sign in").click()
    expect(metadata.locator(".answer")).to_contain_text("agent_names")


def _token(route: object) -> str | None:
    headers: dict[str, str] = route.request.headers  # type: ignore[attr-defined]
    return headers.get("authorization")


def test_it_is_accessible_in_either_theme_and_on_a_phone(open_view: OpenPage, url: str) -> None:
    page = open_view("docs", fresh=True)
    page.locator("#createRun > summary").click()
    page.locator("#listRuns > summary").click()
    check_accessibility(page)
    page.emulate_media(color_scheme="dark")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    check_accessibility(page, COLOURS)
    phone = open_view(is_phone=True)
    phone.goto(f"{url}/docs#listRuns")
    expect(phone.locator("#listRuns .operation")).to_be_visible()
    assert phone.evaluate("document.documentElement.scrollWidth") == 390
