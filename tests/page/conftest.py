"""A real daemon with invented runs, and Debian's Chromium that opens its page and watches what it says and asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from telemetryd.cli.sample_data import World, finished
from telemetryd.model.values import format_timestamp
from tests.conftest import PATIENCE_S, Daemon, require_program
from tests.http_client import call
from tests.tools.browser import CHROMIUM, chromium, open_page
from tests.tools.process import telemetryd

TOKEN = "correct-horse-bättery"
RUNS = 1500
RULES = """
every = "1s"

[[rules]]
name = "nothing heard"
kind = "silent"
agent_name = "nobody, <b>at all</b>"
after = "1h"

[[rules]]
name = "broken by a commit"
kind = "regression"
agent_name = "broken-agent"
"""

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)
"""When the invented day ends: what its agents do depends on the hour, and the tests may run at any."""
MOMENTS = {"created_at", "start_time", "end_time", "git_commit_timestamp", "timestamp"}

expect.set_options(timeout=PATIENCE_S * 1000)


def fill(url: str) -> None:
    """Post what `telemetryd demo` would post at noon, brought to now."""
    moved = datetime.now(UTC) - NOON

    def bring(fields: dict[str, Any]) -> dict[str, Any]:
        return {
            name: format_timestamp(datetime.fromisoformat(value) + moved) if name in MOMENTS else value
            for name, value in fields.items()
        }

    stories = list(World(1, NOON - timedelta(days=1), NOON).runs(RUNS))
    runs = [bring(finished(story) if story.ends_at <= NOON else story.run) for story in stories]
    status, answer = call(url, "POST", "/api/v1/runs/batch", runs)
    assert (status, answer["inserted"]) == (200, len(runs))
    for story in stories:
        if story.events:
            path = f"/api/v1/runs/{story.run['event_id']}/events"
            assert call(url, "POST", path, [*map(bring, story.events)])[0] in (200, 201)


@pytest.fixture
def one_hour() -> None:
    """See to it that the hour, and with it the day, does not change while the test counts what belongs to it."""
    left = 3600 - time.time() % 3600
    if left < 30:
        time.sleep(left)


# Playwright's event loop runs in this thread until its browser is closed, which other tests could not bear: so
# everything here ends with this folder.


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    require_program(CHROMIUM, CHROMIUM)
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="package")
def url(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[str]:
    """The address of a daemon with a day of invented runs."""
    folder = tmp_path_factory.mktemp("open")
    (folder / "alerts.toml").write_text(RULES)
    daemon = Daemon(folder, TELEMETRY_DB_JOURNAL_MODE="WAL", TELEMETRY_ALERTS_FILE="alerts.toml")
    fill(daemon.url)
    yield daemon.url
    daemon.close()


@pytest.fixture(scope="package")
def closed_url(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[str]:
    """The address of a daemon that wants a token, and that can search for words."""
    folder: Path = tmp_path_factory.mktemp("closed")
    daemon = Daemon(
        folder,
        TELEMETRY_DB_JOURNAL_MODE="WAL",
        TELEMETRY_API_AUTH_ENABLED="true",
        TELEMETRY_API_AUTH_TOKEN=TOKEN,
        TELEMETRY_FULL_TEXT="true",
    )
    telemetryd("demo", "--url", daemon.url, "--no-live", "--runs", "60", TELEMETRY_API_AUTH_TOKEN=TOKEN)
    yield daemon.url
    daemon.close()


class Watched:
    """What a page has said on its console, and asked for elsewhere."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.expected: tuple[str, ...] = ()
        """Parts of messages that a test means to provoke, such as a refused request."""

    def watch(self, page: Page) -> None:
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def check(self, origins: tuple[str, ...]) -> None:
        surprising = [text for text in self.errors if not any(part in text for part in self.expected)]
        assert not surprising
        foreign = [url for url in self.requests if urlsplit(url).netloc not in origins and not url.startswith("data:")]
        assert not foreign


OpenPage = Callable[..., Page]


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def open_view(browser: Browser, url: str, watched: Watched) -> Iterator[OpenPage]:
    """Return a function that opens an address; at the end nothing went wrong, and nothing left the origin."""
    pages: list[Page] = []
    origins = [urlsplit(url).netloc]

    def open_one(address: str = "#/", *, at: str = url, **options: Any) -> Page:
        page = open_page(browser, **options)
        watched.watch(page)
        pages.append(page)
        origins.append(urlsplit(at).netloc)
        page.goto(f"{at}/{address}")
        return page

    yield open_one
    for page in pages:
        page.context.close()
    watched.check(tuple(origins))


@pytest.fixture
def page(open_view: OpenPage) -> Page:
    """The overview on a desktop."""
    return open_view()
