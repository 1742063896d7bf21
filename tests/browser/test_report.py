"""The report in a real browser, from a file: nothing leaves it, nothing in it runs."""

from pathlib import Path

import pytest
from pages import overlapping_texts
from playwright.sync_api import expect
from stores import lognormal, write_run

from gradwatch_dashboards import report
from gradwatch_monitor import Store

HOSTILE = "<script>document.title='gone'</script><img src=//127.0.0.1:9/x onerror=\"document.title='gone'\">"


def written(name="page.html"):
    path = Path(name).absolute()
    with Store() as store:
        report.write(store, store.run(1), path)
    return path


@pytest.fixture
def opened(chromium):
    """A page from a file, with all that it asked for and all that went wrong."""
    contexts = []

    def open_file(path, scheme="light"):
        contexts.append(
            chromium.new_context(color_scheme=scheme, viewport={"width": 1200, "height": 900})
        )
        page = contexts[-1].new_page()
        page.asked, page.problems = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_timeout(500)
        return page

    yield open_file
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_stands_alone(opened, screenshot, scheme):
    """One request, for the file itself; charts whose texts do not lie on each other; readable."""
    norms = lognormal(900, middle=1.2)
    norms[500] *= 100
    write_run(norms=norms, nan_at=(300, 301), tags={"lr": 0.001})
    path = written()
    page = opened(path, scheme)
    assert page.asked == [path.as_uri()]
    assert page.problems == []
    expect(page.locator("svg")).to_have_count(5)
    assert overlapping_texts(page, "svg") == []
    colour, back = page.evaluate(
        """() => [getComputedStyle(document.querySelector('svg text')).fill,
                  getComputedStyle(document.body).backgroundColor]"""
    )
    light = [sum(int(part) for part in rgb[4:-1].split(",")) for rgb in (colour, back)]
    assert (light[0] < 200 and light[1] > 700) or (light[0] > 600 and light[1] < 120)
    assert (light[1] < 120) == (scheme == "dark")
    screenshot(page, f"report-{scheme}")


def test_nothing_in_it_runs(opened):
    """What a run is called, its tags and a message are text; even markup that got in would not run."""
    write_run(run=HOSTILE, steps=80, tags={HOSTILE: HOSTILE})
    path = written()
    page = opened(path)
    expect(page.get_by_role("heading", name=HOSTILE)).to_be_visible()
    assert page.title() == f"{HOSTILE} · gradwatch"
    assert page.asked == [path.as_uri()]
    assert page.problems == []
    # The policy alone, without the escaping.
    broken = path.with_name("broken.html")
    broken.write_text(path.read_text().replace("</header>", f"</header>{HOSTILE}"))
    page = opened(broken)
    assert page.title() != "gone"
    assert page.asked == [broken.as_uri()]
    assert any("Content Security Policy" in problem for problem in page.problems)
