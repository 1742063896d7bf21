"""A real Chromium, and the dashboard served over a store of the test's own."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from pages import served
from playwright.sync_api import sync_playwright

ARTEFACTS = Path(__file__).parents[2] / "artefacts"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="session")
def chromium():
    """The system's browser; skips where there is none, naming what to install."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        message = "chromium is not installed: apt-get install chromium"
        if os.environ.get("REQUIRE_TEST_SERVERS") == "required":
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def _elsewhere(url):
    """A request that leaves the machine."""
    return (
        [] if url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")) else [url]
    )


@pytest.fixture
def page(chromium):
    """A page that remembers what went wrong in it."""
    context = chromium.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.problems.extend(_elsewhere(request.url)))
    yield page
    context.close()


@pytest.fixture
def serve():
    """Start `gradwatch ui` on a store; gives the page's address."""
    with contextlib.ExitStack() as stack:

        def start(store="gradwatch.db"):
            address, start.process, start.port = stack.enter_context(served(store, Path("home")))
            return address

        yield start


@pytest.fixture
def screenshot(request):
    """Keep a picture of the page as an artefact."""

    def keep(page, name):
        ARTEFACTS.mkdir(exist_ok=True)
        page.screenshot(path=ARTEFACTS / f"{name}.png", full_page=True)

    return keep
