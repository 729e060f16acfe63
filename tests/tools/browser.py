"""Opens Debian's Chromium for the tests of the page and for its screenshots."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

CHROMIUM: Final = "chromium"
DESKTOP: Final = {"width": 1280, "height": 900}
PHONE: Final = {"width": 390, "height": 844}
Theme = Literal["dark", "light"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Give a browser that has no window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which(CHROMIUM), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def new_context(browser: Browser, *, is_phone: bool = False, theme: Theme = "light", **options: Any) -> BrowserContext:
    """Return a context with nothing remembered, in Berlin's time; animations are off."""
    context = browser.new_context(
        viewport=PHONE if is_phone else DESKTOP,  # type: ignore[arg-type]
        is_mobile=is_phone,
        has_touch=is_phone,
        color_scheme=theme,
        reduced_motion="reduce",
        locale="en-GB",
        **{"timezone_id": "Europe/Berlin", **options},
    )
    context.set_default_timeout(60_000)
    return context


def open_page(browser: Browser, *, is_phone: bool = False, theme: Theme = "light") -> Page:
    """Return a new page in a context of its own."""
    return new_context(browser, is_phone=is_phone, theme=theme).new_page()
