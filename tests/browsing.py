"""Chromium for the tests of pages: without a network, and attentive to errors."""

import shutil
from contextlib import contextmanager

import pytest


CHROMIUM = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
CHROMIUM += " --disable-component-update --disable-sync"
WAIT = 15_000  # ms, the timeout of a page


@contextmanager
def chromium():
    """A browser. Skips the test if it or playwright is missing."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if not shutil.which("chromium"):
        pytest.skip("chromium is not on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM.split())
        yield browser
        browser.close()


@contextmanager
def watched_page(browser, address: str | tuple[str, ...], width: int, height: int, errors: int = 0):
    """A new page, not yet at `address`: it must log exactly `errors` errors and contact no other host."""
    said, asked = [], []
    allowed = (*([address] if isinstance(address, str) else address), "data:", "blob:")
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(WAIT)
    page.on("console", lambda each: said.append((each.text, each.location["url"])) if each.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    yield page
    page.close()
    assert len(said) == errors, said
    assert not [url for url in asked if not url.startswith(allowed)]
