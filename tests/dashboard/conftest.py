"""A browser, pages that may not complain, and the count of the results as tests/all.sh reads it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

PICTURES = Path(os.environ["PICTURES"])
# Wide enough for two columns.
VIEW = {"width": 1440, "height": 1000}
# Longest wait for anything, in milliseconds, on a slow and busy machine.
PATIENCE = 60_000

Open = Callable[..., Page]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        # As root, as CI runs, there is no sandbox to be had.
        words = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=words)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens a page that follows. At the end no page may have complained, met its policy, or asked elsewhere."""
    complaints: list[str] = []
    pages: list[Page] = []

    def open_page(url: str, **options: object) -> Page:
        page = browser.new_page(viewport=VIEW, **options)
        pages.append(page)
        page.set_default_timeout(PATIENCE)
        page.add_init_script("window.broken = []; addEventListener('securitypolicyviolation', e => broken.push(e.violatedDirective))")
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: complaints.append(asked.url) if not asked.url.startswith(url) else None)
        page.goto(url)
        page.wait_for_selector("#live[data-state=live]")
        return page

    yield open_page
    for page in pages:
        complaints += page.evaluate("window.broken")
        page.close()
    assert complaints == []


def picture(page: Page, name: str) -> None:
    """Keeps a picture of the whole page, for people."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


def pytest_configure() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what the tests started is ended


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = {kind: terminalreporter.stats.get(kind, []) for kind in ("passed", "failed", "error", "skipped")}
    for report in found["skipped"]:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        terminalreporter.write_line(f"SKIPPED: {report.nodeid}: {reason}")
    passed, failed = len(found["passed"]), len(found["failed"]) + len(found["error"])
    # As cargo says it, for tests/all.sh.
    terminalreporter.write_line(
        f"test result: {'FAILED' if failed else 'ok'}. {passed} passed; {failed} failed; 0 ignored"
    )
    terminalreporter.write_line(f"{passed} passed, {failed} failed")
