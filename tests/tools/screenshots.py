"""Takes the pictures of docs/screenshots/, of a daemon that `telemetryd demo` has filled."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from playwright.sync_api import Browser

from telemetryd.cli.sample_data import LOOKED_BACK, World, finished
from tests.conftest import Daemon
from tests.http_client import call, get
from tests.tools.browser import Theme, chromium, open_page
from tests.tools.docs import ROOT
from tests.tools.process import telemetryd

FOLDER: Final = ROOT / "docs" / "screenshots"
MAX_BYTES: Final = 160_000
PAST: Final = timedelta(days=300)
PAST_RUNS: Final = 40_000
BATCH: Final = 5000
WAYS: Final[tuple[tuple[str, Theme, bool], ...]] = (
    ("light", "light", False),
    ("dark", "dark", False),
    ("phone", "dark", True),
)


def views(url: str) -> dict[str, tuple[str, str]]:
    """Return the address of each view, and what stands there when it is drawn."""
    child = next(run for run in get(url, "/api/v1/runs?status=success&limit=1000")[1] if run["parent_run_id"])
    orchestrator = get(url, f"/api/v1/runs?run_id={child['parent_run_id']}")[1][0]
    failed = get(url, "/api/v1/runs?agent_name=seo-optimizer&status=failure&limit=1")[1][0]
    return {
        "overview": ("#/", "main .chart svg"),
        "runs": ("#/runs", "main .table-body .line"),
        "failed": (f"#/run/{failed['event_id']}", "main .timeline"),
        "family": (f"#/run/{orchestrator['event_id']}", "main .tree"),
        "stale": ("#/stale?older_than=1s", "main .lines"),
        "agents": ("#/agents", "main .calendar"),
    }


def take(browser: Browser, url: str, folder: Path) -> None:
    """Take every picture."""
    for name, (address, marker) in views(url).items():
        for way, theme, is_phone in WAYS:
            page = open_page(browser, is_phone=is_phone, theme=theme)
            page.goto(f"{url}/{address}")
            page.wait_for_selector(marker)
            page.wait_for_selector("[aria-busy]", state="detached")
            if name == "family":
                page.locator(marker).scroll_into_view_if_needed()
                page.evaluate("scrollBy(0, 400)")
            path = folder / f"{name}-{way}.png"
            page.screenshot(path=path)
            page.context.close()
            if path.stat().st_size > MAX_BYTES:
                raise SystemExit(f"{path.name} has {path.stat().st_size} bytes; {MAX_BYTES} are allowed")


def fill_the_past(url: str) -> None:
    """Post what was before the time of `telemetryd demo`: the days before any commit broke something."""
    end = datetime.now(UTC) - LOOKED_BACK
    world = World(3, end - PAST, end)
    runs = [
        finished(story)
        for story in world.runs(PAST_RUNS)
        if story.finish and story.ends_at < world.breaks.get(story.run["agent_name"], end)
    ]
    for first in range(0, len(runs), BATCH):
        status, answer = call(url, "POST", "/api/v1/runs/batch", runs[first : first + BATCH])
        if status != 200 or answer["duplicates"]:
            raise SystemExit(f"The runs of the past were answered {status}: {answer}")


def main() -> None:
    """Start a daemon, fill it, and take the pictures."""
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(Path(folder), TELEMETRY_DB_JOURNAL_MODE="WAL")
        try:
            fill_the_past(daemon.url)
            telemetryd("demo", "--url", daemon.url, "--no-live", timeout_s=600)
            FOLDER.mkdir(exist_ok=True)
            with chromium() as browser:
                take(browser, daemon.url, FOLDER)
        finally:
            daemon.close()


if __name__ == "__main__":
    main()
