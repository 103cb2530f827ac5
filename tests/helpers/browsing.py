"""The system's own Chromium, driven by Playwright, and a watch over what its pages do.

No browser is downloaded. Where none is installed the tests that need one are skipped, with one line
after the run; under ``CI=1`` they fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-domain-reliability",
    "--metrics-recording-only",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no other machine is found
)
WIDE, NARROW = (1920, 1080), (1280, 800)
skipped: list[str] = []


@dataclass
class Watch:
    """What a page did that no page of ours should.

    Attributes:
        page: the page.
        errors: errors of scripts and of the console.
        outside: requests to other machines.
        expected: parts of error texts that a test brings about itself.
    """

    page: Page
    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))
        self.page.on("request", self._request)

    def _console(self, message: object) -> None:
        if getattr(message, "type", "") == "error":
            text, location = getattr(message, "text", ""), getattr(message, "location", {})
            self.errors.append(f"{text} ({location.get('url')})")

    def _request(self, request: object) -> None:
        address = urlsplit(getattr(request, "url", ""))
        if address.scheme not in ("data", "blob") and address.hostname != "127.0.0.1":
            self.outside.append(address.geturl())

    def check(self) -> None:
        """No error but the expected ones, and no request to another machine."""
        errors = [e for e in self.errors if not any(part in e for part in self.expected)]
        assert not errors
        assert not self.outside


@contextmanager
def launched() -> Iterator[Browser]:
    """A browser; skips without one, fails instead in CI."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    in_ci = os.environ.get("CI", "").lower() in ("1", "true")
    if path is None and not in_ci:
        skipped.append("no Chromium or Chrome on this machine: the browser tests were skipped")
        pytest.skip(skipped[-1])
    if path is None:
        pytest.fail("CI is set and there is no Chromium or Chrome: install one (Debian: chromium)")
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        except Error as error:
            if in_ci:
                raise
            skipped.append(f"{path} does not start: the browser tests were skipped")
            pytest.skip(f"{skipped[-1]} ({error.message.splitlines()[0]})")
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, size: tuple[int, int] = WIDE) -> Iterator[Watch]:
    """A page of its own, checked when it is left."""
    width, height = size
    context = browser.new_context(
        viewport={"width": width, "height": height}, accept_downloads=True
    )
    context.set_default_timeout(10_000)
    try:
        watch = Watch(context.new_page())
        yield watch
        watch.check()
    finally:
        context.close()
