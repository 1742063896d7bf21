"""Apply and Undo in a real browser, on a job that is really running."""

import contextlib
import sqlite3
import time

from live import live
from pages import LONG, open_run, overlapping_texts
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import expect
from stores import write_run

from gradwatch_monitor import Store
from gradwatch_monitor.applying import applied


def tables():
    """Everything in the store but the steps and what the job itself moves on."""
    with sqlite3.connect("file:gradwatch.db?mode=ro", uri=True) as connection:
        return [
            connection.execute(f"SELECT * FROM {name}").fetchall()
            for name in ("findings", "recommendations", "attempts")
        ] + connection.execute("SELECT id, uid, name, tags FROM runs").fetchall()


def marks(page):
    """The heads of the marks, by chart."""
    return page.locator('[data-testid="stVegaLiteChart"] svg .mark-symbol').locator(
        'path[fill="#12806a"]'
    )


def point_at(page, mark):
    """The tooltip of a mark; the charts may be drawn anew while the mouse is on its way."""
    tip = page.locator("#vg-tooltip-element")
    deadline = time.monotonic() + LONG / 1000
    while not tip.is_visible():
        assert time.monotonic() < deadline, "no tooltip came up"
        with contextlib.suppress(PlaywrightError):  # the mark was taken away to be drawn anew
            mark.scroll_into_view_if_needed(timeout=1000)
            box = mark.bounding_box(timeout=1000)
            if box:
                page.mouse.move(0, 0)
                page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_timeout(300)
    return tip


def test_a_recommendation_is_applied_and_undone(page, serve, screenshot):
    """Click, confirm: the job clips at it from a step on, which every chart marks; and back."""
    with live(tags={"lr": 0.001}, middle=0.9) as job, Store() as store:
        job.until(600)
        open_run(page, serve(), "live")
        before = tables()
        page.get_by_role("button", name="Apply").click()
        question = page.get_by_text("Change the running job live from 1 to")
        expect(question).to_be_visible(timeout=LONG)
        page.wait_for_timeout(3000)  # it outlives a refresh
        page.get_by_role("button", name="No", exact=True).click()
        expect(question).not_to_be_visible(timeout=LONG)
        assert store.changes(1) == []
        page.get_by_role("button", name="Apply").click()
        expect(question).to_be_visible(timeout=LONG)
        told = question.inner_text()
        screenshot(page, "apply-question")
        page.get_by_role("button", name="Yes, change it").click()
        done = page.get_by_text("from step", exact=False).filter(has_text="1 →")
        expect(done.first).to_be_visible(timeout=LONG)
        (change,) = applied(store, 1)
        assert job.agent.threshold == change.new
        assert f"to {change.new:.6g}, from its next step on?" in told
        assert change.reason.startswith("recommended (change): ")
        assert change.reason.endswith("in the dashboard")
        assert before == tables()

        job.until(change.step + 600)
        expect(marks(page).first).to_be_visible(timeout=LONG)
        page.wait_for_timeout(3000)
        assert overlapping_texts(page) == []
        charts = page.get_by_test_id("stVegaLiteChart")
        assert "threshold applied" in charts.nth(0).inner_text()
        assert "threshold applied" in charts.nth(1).inner_text()
        job.pause()
        tip = point_at(page, marks(page).first)
        for words in (change.by, f"{change.new:.4g}", f"{change.step:,}", "in the dashboard"):
            expect(tip).to_contain_text(words)
        screenshot(page, "applied")
        job.go_on()

        page.mouse.move(0, 0)
        page.get_by_role("button", name="Undo").click()
        page.get_by_role("button", name="Yes, change it").click(timeout=LONG)
        back = page.get_by_text(f"{change.new:.4g} → 1 from step")
        expect(back).to_be_visible(timeout=LONG)
        assert job.agent.threshold == 1.0
        expect(page.get_by_role("button", name="Undo")).to_be_disabled(timeout=LONG)
    assert page.problems == []


def test_what_does_not_allow_it_is_not_offered(page, serve, screenshot):
    """Both buttons are off, with the reason beside them."""
    write_run(run="ended", steps=100)
    with live("closed", remote_control=None) as job:
        job.until(300)
        address = serve()
        for name, why in (
            ("closed", "start the job with GRADWATCH_REMOTE_CONTROL=1 or wrap(..., remote"),
            ("ended", "its status is finished"),
        ):
            open_run(page, address, name)
            for button in ("Apply", "Undo"):
                expect(page.get_by_role("button", name=button)).to_be_disabled(timeout=LONG)
            expect(page.get_by_text("Apply and Undo are off").filter(has_text=why)).to_be_visible()
            screenshot(page, f"off-{name}")
        assert job.agent.threshold == 1.0
    assert page.problems == []
