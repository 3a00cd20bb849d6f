"""Pages of the dashboard for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page


@contextmanager
def opened(browser: Browser, address: str, **options: Any) -> Iterator[Page]:
    """A page that has had no error, and no request that failed, by its end."""
    page = browser.new_page(**options)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("response", lambda answer: wrong.append(answer.url) if answer.status >= 400 else None)
    page.goto(address)
    yield page
    assert wrong == []
    page.close()


def drawn(page: Page, count: int = 1) -> None:
    """Wait until charts have been drawn."""
    page.locator("[data-drawn]").nth(count - 1).wait_for(timeout=60_000)
