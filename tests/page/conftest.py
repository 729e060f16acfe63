"""A real daemon with invented runs, and Debian's Chromium that opens its page and watches what it says and asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from telemetryd.cli.sample_data import LOOKED_BACK, Story, World, finished
from telemetryd.model.values import format_timestamp
from tests.conftest import PATIENCE_S, Daemon
from tests.http_client import call
from tests.needs import require_program
from tests.tools.browser import CHROMIUM, chromium, new_context
from tests.tools.process import telemetryd

TOKEN = "correct-horse-bättery"
RUNS = 1500
"""About how many runs the last day has."""
WITH_A_PAST = {"seo-optimizer", "link-checker"}
"""Agents whose runs of two weeks are posted: one that a commit breaks, and one that does well at the same time."""
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
"""When the invented time ends: what its agents do depends on the hour, and the tests may run at any."""
MOMENTS = {"created_at", "start_time", "end_time", "git_commit_timestamp", "timestamp"}

expect.set_options(timeout=PATIENCE_S * 1000)


def fill(url: str) -> None:
    """Post what `telemetryd demo` would post at noon, brought to now: one day of all agents, two weeks of some."""
    moved = datetime.now(UTC) - NOON

    def bring(fields: dict[str, Any]) -> dict[str, Any]:
        return {
            name: format_timestamp(datetime.fromisoformat(value) + moved) if name in MOMENTS else value
            for name, value in fields.items()
        }

    day = timedelta(days=1)

    def is_posted(story: Story) -> bool:
        return story.run["agent_name"] in WITH_A_PAST or datetime.fromisoformat(story.run["start_time"]) >= NOON - day

    stories = [*filter(is_posted, World(1, NOON - LOOKED_BACK, NOON).runs(RUNS * LOOKED_BACK // day))]
    runs = [bring(finished(story) if story.ends_at <= NOON else story.run) for story in stories]
    status, answer = call(url, "POST", "/api/v1/runs/batch", runs)
    assert (status, answer["inserted"]) == (200, len(runs))
    for story in stories:
        if story.events and datetime.fromisoformat(story.run["start_time"]) >= NOON - day:
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
    """The address of a daemon with invented runs."""
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
    telemetryd("demo", "--url", daemon.url, "--no-live", "--days", "1", "--runs", "60", TELEMETRY_API_AUTH_TOKEN=TOKEN)
    yield daemon.url
    daemon.close()


class Watched:
    """What a page has said on its console, and asked for elsewhere."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.expected: tuple[str, ...] = ()
        """Parts of messages that a test means to provoke, such as a refused request."""
        self._listeners: tuple[tuple[Any, Callable[[Any], None]], ...] = (
            ("console", lambda message: self.errors.append(message.text) if message.type == "error" else None),
            ("pageerror", lambda error: self.errors.append(str(error))),
            ("request", lambda request: self.requests.append(request.url)),
        )

    def watch(self, page: Page) -> None:
        for event, listener in self._listeners:
            page.on(event, listener)

    def leave(self, page: Page) -> None:
        for event, listener in self._listeners:
            page.remove_listener(event, listener)

    def check(self, origins: set[str]) -> None:
        surprising = [text for text in self.errors if not any(part in text for part in self.expected)]
        assert not surprising
        foreign = [url for url in self.requests if urlsplit(url).netloc not in origins and not url.startswith("data:")]
        assert not foreign


_GO = """async address => {
    const isAsItBegan = document.documentElement.dataset.theme === "light" && !document.querySelector("dialog");
    localStorage.clear();
    sessionStorage.clear();
    if (isAsItBegan) {
        for (const place of ["#/nothing", address]) {
            if (location.hash === place) continue;
            const shown = new Promise((resolve) => addEventListener("hashchange", resolve, { once: true }));
            location.hash = place;
            await shown;
        }
        scrollTo(0, 0);
    }
    return isAsItBegan;
}"""
_LOAD_ANEW = """address => {
    scrollTo(0, 0);
    history.replaceState(null, "", address);
    location.reload();
}"""


class Tabs:
    """One tab for each address of a daemon: another view costs a quarter of a load, and that a third of a new tab."""

    def __init__(self, browser: Browser) -> None:
        self._context = new_context(browser)
        self._pages: dict[str, Page] = {}

    def at(self, url: str) -> Page:
        """Return the tab of a daemon."""
        if url not in self._pages:
            self._pages[url] = self._context.new_page()
        return self._pages[url]

    @staticmethod
    def open(page: Page, url: str, address: str) -> None:
        """Open an address, with nothing remembered of what was done in the tab before."""
        if not page.url.startswith(f"{url}/#"):
            page.goto(f"{url}/{address}")
            return
        page.emulate_media(color_scheme="light")
        page.mouse.move(0, 0)
        if not page.evaluate(_GO, address):
            with page.expect_navigation():
                page.evaluate(_LOAD_ANEW, f"/{address}")

    def close(self) -> None:
        self._context.close()


@pytest.fixture(scope="package")
def tabs(browser: Browser) -> Iterator[Tabs]:
    opened = Tabs(browser)
    yield opened
    opened.close()


OpenPage = Callable[..., Page]


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def open_view(browser: Browser, tabs: Tabs, url: str, watched: Watched) -> Iterator[OpenPage]:
    """Return a function that opens an address; at the end nothing went wrong, and nothing left the origin.

    The page is in a tab that other tests have used, unless `fresh` or an option of the browser's context is given.
    """
    used: list[Page] = []
    contexts: list[BrowserContext] = []
    origins = {urlsplit(url).netloc}

    def open_one(address: str = "#/", *, at: str = url, fresh: bool = False, **options: Any) -> Page:
        origins.add(urlsplit(at).netloc)
        is_shared = not fresh and not options
        if is_shared:
            page = tabs.at(at)
        else:
            contexts.append(new_context(browser, **options))
            page = contexts[-1].new_page()
        if page not in used:
            used.append(page)
            watched.watch(page)
        tabs.open(page, at, address)
        return page

    yield open_one
    for page in used:
        watched.leave(page)
    for context in contexts:
        context.close()
    watched.check(origins)


@pytest.fixture
def page(open_view: OpenPage) -> Page:
    """The overview on a desktop, with everything on it."""
    opened = open_view()
    for panel in ("#alerts", "#regressions", ".ranking"):  # the first ones come late, and move the others
        expect(opened.locator(f"{panel} [data-item]").first).to_be_visible()
    expect(opened.locator("[aria-busy]")).to_have_count(0)
    return opened
