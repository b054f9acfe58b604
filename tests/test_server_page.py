"""The page in a headless browser: needs Playwright and a Chromium, and is skipped where either is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_gemma_mtp.server.guard import Rules

from .serving import Fake, Live, demo_server

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: install one, or name it in CHROMIUM")
# Where to keep a picture of the page, for the README.
PICTURE = os.environ.get("PAGE_PICTURE")
# The page lets no text be run as a script, so nothing can wait for a condition in JavaScript.
DONE = '.chat:first-child .log[aria-busy="false"]'


def test_the_page_asks_nobody_else() -> None:
    got = Fake().ask("/", method="GET")
    policy = got.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http://" not in got.text.replace("http://www.w3.org", "")
    assert "https://" not in got.text
    assert len(got.content) < 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, live: Live) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
    context.set_default_timeout(30_000)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.goto(live.url)
    page.get_by_text("· demo").wait_for()
    yield page
    context.close()
    # The one that a test asks for.
    assert not [p for p in problems if "status of 400" not in p]


@needs_browser
class TestPage:
    def test_sends_streams_and_shows_colours_and_numbers(self, page: Any) -> None:
        box = page.get_by_label("Message", exact=True).first
        box.fill("Tell me a story about a squirrel.")
        box.press("Enter")
        page.wait_for_selector(".chat:first-child .turn.model .drafted")
        page.wait_for_selector(DONE)
        first = page.locator(".chat").first
        answer = first.locator(".turn.model").inner_text()
        assert "Once upon a time" in answer
        assert first.locator(".turn.model .own").count() > 0
        assert float(first.locator(".rate").inner_text()) > 0
        assert float(first.locator(".per-round").inner_text()) > 0
        assert int(first.locator(".count").inner_text()) > 30
        assert "exact" in first.locator(".contract").inner_text()
        assert "complete" in page.locator("#status").inner_text()

    def test_stops(self, page: Any, live: Live) -> None:
        page.get_by_label("Tokens").fill("7000")
        page.get_by_label("Temperature").fill("2")
        box = page.get_by_label("Message", exact=True).first
        box.fill("Tell me a story about a fox.")
        page.get_by_role("button", name="Send", exact=True).first.click()
        page.wait_for_selector(".chat:first-child .turn.model span:not(.who)")
        box.press("Escape")
        page.wait_for_selector(DONE)
        live.wait_idle()

    def test_several_conversations_at_once(self, page: Any) -> None:
        page.get_by_role("button", name="New conversation").click()
        assert page.locator(".chat").count() == 3
        assert page.evaluate("document.activeElement.id") == "message-3"
        animals = ["owl", "bear", "squirrel"]
        for i, animal in enumerate(animals):
            article = "an" if animal == "owl" else "a"
            page.locator(f"#message-{i + 1}").fill(f"Tell me a story about {article} {animal}.")
        for i in range(3):
            page.locator(f"#message-{i + 1}").press("Enter")
        for i in (1, 2, 3):
            page.wait_for_selector(f".chat:nth-child({i}) .turn.model .drafted")
        if PICTURE:
            page.wait_for_timeout(600)
            page.screenshot(path=PICTURE)
        for i in (1, 2, 3):
            page.wait_for_selector(DONE.replace("first-child", f"nth-child({i})"))
        texts = [c.inner_text() for c in page.locator(".turn.model").all()]
        assert [a for a, text in zip(animals, texts, strict=True) if a not in text] == []

    def test_one_message_to_all(self, page: Any) -> None:
        page.get_by_label("Message to all conversations").fill("What is the capital of France?")
        page.get_by_role("button", name="Send to all").click()
        for i in (1, 2):
            page.wait_for_selector(f".chat:nth-child({i}) .turn.model .drafted")
        page.get_by_role("button", name="Stop all").click()

    def test_depth_and_errors(self, page: Any) -> None:
        slider = page.get_by_label("Depth")
        slider.focus()
        slider.press("ArrowRight")
        assert slider.get_attribute("aria-valuetext") == "0"
        box = page.get_by_label("Message", exact=True).first
        box.fill("What is the capital of France?")
        box.press("Enter")
        page.wait_for_selector(DONE)
        assert page.locator(".turn.model .drafted").count() == 0
        page.get_by_label("Tokens").fill("99999999999")
        box.fill("Hello")
        box.press("Enter")
        page.wait_for_selector(".turn.model .error")

    def test_keyboard_labels_and_themes(self, page: Any) -> None:
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll('input, textarea, button')].filter((e) =>
                !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label'))).length"""
        )
        assert unnamed == 0
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        for dark in (False, True):
            assert page.evaluate(CONTRAST) == []
            assert page.evaluate("document.documentElement.dataset.theme") == ("dark" if dark else "light")
            page.get_by_role("button", name="Dark").click()


@needs_browser
def test_a_key_is_asked_for(browser: Any) -> None:
    with demo_server(Rules(key="sesame")) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.get_by_label("API key").wait_for(timeout=20_000)
        page.get_by_label("API key").fill("sesame")
        page.get_by_label("API key").press("Enter")
        page.get_by_text("· demo").wait_for()
        page.close()


# Texts whose contrast with what is behind them is below 4.5.
CONTRAST = """() => {
  const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (c !== 'rgba(0, 0, 0, 0)') return c; } return 'rgb(255, 255, 255)'; };
  return [...document.querySelectorAll('body *')].filter((e) => e.offsetParent && !e.disabled &&
    [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())).filter((e) => {
      const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05) < 4.5; }).map((e) => e.outerHTML);
}"""
