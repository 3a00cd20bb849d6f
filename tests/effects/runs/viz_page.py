"""Pages of the dashboard for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page

COUNT_REQUESTS = """(() => {
    const send = window.fetch;
    window.pending = 0;
    window.fetch = async (...asked) => {
        window.pending += 1;
        try { return await send(...asked); } finally { setTimeout(() => { window.pending -= 1; }); }
    };
})()"""
"""Counts the requests without an answer, an init script: `window.pending`."""

UNTIL_DRAWN = """async ([patience, frames]) => {
    const began = performance.now();
    const inSight = (node) => {
        const { top, bottom, width } = node.getBoundingClientRect();
        return width > 0 && bottom > 0 && top < innerHeight;
    };
    const all = (selector) => [...document.querySelectorAll(selector)].filter(inSight);
    const awaited = () => {
        if (window.pending) return `${window.pending} answers`;
        const page = document.getElementById("app"), main = page?.querySelector("main");
        if (page && (!main || main.textContent.trim() === "loading")) return "the list of runs";
        if (page?.querySelector(".progress")) return "what the server has yet to read";
        const empty = all(".lazy").filter((node) => !node.firstElementChild).length;
        const blank = all(".plot").filter((node) => !node.dataset.drawn).length + all(".waiting").length;
        return empty || blank ? `${empty} charts to begin and ${blank} to be drawn` : "";
    };
    for (let quiet = 0; quiet < frames; quiet = awaited() ? 0 : quiet + 1) {
        if (performance.now() - began > patience) return awaited();
        await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    }
    return "";
}"""
"""What is still awaited after `patience` milliseconds; nothing once it was nothing in `frames` frames in a row."""

PATIENCE_MS = 60_000
QUIET_FRAMES = 6
"""An answer is in the page one frame after it has come, and what is asked for by what it shows, two frames later."""


@contextmanager
def opened(browser: Browser, address: str, **options: Any) -> Iterator[Page]:
    """A page that is drawn at first, and by its end has had no error, and no request that failed."""
    page = browser.new_page(**options)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("response", lambda answer: wrong.append(answer.url) if answer.status >= 400 else None)
    page.add_init_script(COUNT_REQUESTS)
    goto(page, address)
    yield page
    assert wrong == []
    page.close()


def goto(page: Page, address: str) -> None:
    """Open an address, and wait until it is drawn."""
    page.goto(address)
    drawn(page)


def drawn(page: Page) -> None:
    """Wait until nothing is awaited: every answer the page asked for is there, and every chart in sight is drawn."""
    awaited = page.evaluate(UNTIL_DRAWN, [PATIENCE_MS, QUIET_FRAMES])
    assert not awaited, f"{page.url} after {PATIENCE_MS} ms: expected nothing awaited, got {awaited}"
