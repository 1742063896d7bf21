"""The pages in a real browser, over stores written by real runs: what is shown equals SQL."""

import re
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from live import live
from pages import LONG, open_run, overlapping_texts, served
from playwright.sync_api import expect
from stores import lognormal, write_run

from gradwatch_monitor import Store, recommend


def metric(page, label):
    """The number under a label."""
    tile = page.get_by_test_id("stMetric").filter(has_text=re.compile(f"^{label}"))
    expect(tile).to_be_visible(timeout=LONG)
    return tile.get_by_test_id("stMetricValue").inner_text().strip()


def query(sql):
    with sqlite3.connect("file:gradwatch.db?mode=ro", uri=True) as connection:
        return connection.execute(sql).fetchall()


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """A real run with a NaN, a spike and losses, and the dashboard: its folder and its address."""
    folder = tmp_path_factory.mktemp("spoilt")
    norms = lognormal(900, middle=1.2)
    norms[500] *= 100
    store = str(folder / "gradwatch.db")
    write_run(store, norms=norms, nan_at=(300, 301), tags={"lr": 0.001})
    with served(store, folder / "home") as (address, *_):
        yield folder, address


@pytest.fixture
def shown(page, spoilt, monkeypatch):
    """That run's page."""
    folder, address = spoilt
    monkeypatch.chdir(folder)
    open_run(page, address, "first")
    return page


def test_the_numbers_equal_sql(shown, screenshot):
    """Every tile of the run page."""
    ((steps, finite, clipped, nonfinite, skipped),) = query(
        "SELECT count(*), count(pre_norm), sum(clipped), sum(nonfinite), sum(skipped) FROM steps"
    )
    assert metric(shown, "Steps") == f"{steps:,}"
    assert metric(shown, "Clipped") == f"{100 * clipped / finite:.1f} %"
    assert metric(shown, "NaN or inf") == str(nonfinite)
    assert metric(shown, "Skipped") == str(skipped)
    ((norm, loss),) = query("SELECT pre_norm, loss FROM steps WHERE step = 899")
    assert metric(shown, "Last norm") == f"{norm:.4g}"
    assert metric(shown, "Last loss") == f"{loss:.4g}"
    assert metric(shown, "Threshold") == "1"
    with Store("gradwatch.db") as store:
        expected = recommend(store, 1)
    expect(shown.get_by_text(expected.sentence)).to_be_visible()
    shown.set_viewport_size({"width": 1000, "height": 1000})
    values = shown.get_by_test_id("stMetricValue").locator("> *")
    assert (
        values.evaluate_all("them => them.map(it => it.scrollWidth > it.clientWidth)")
        == [False] * 8
    )
    screenshot(shown, "run")
    assert shown.problems == []


def test_charts_have_legends_units_and_no_text_on_text(shown):
    """All five charts are drawn, with titles on their axes."""
    charts = shown.get_by_test_id("stVegaLiteChart")
    expect(charts).to_have_count(5, timeout=LONG)
    words = " ".join(charts.locator("svg text").all_text_contents())
    for expected in (
        "gradient norm (log scale)", "optimizer step", "before clipping", "after clipping",
        "threshold", "clipped step", "NaN or inf", "norm spike",
        "clip ratio", "clipped of the last 100 steps", "band 10–30 %",
        "loss", "threshold (log scale)", "would have been clipped",
        "learning rate",
    ):  # fmt: skip
        assert expected in words
    assert overlapping_texts(shown) == []


def test_the_slider_gives_numpys_ratio(shown, screenshot):
    """Moved with the keyboard, it shows the share numpy finds above the threshold."""
    norms = [row[0] for row in query("SELECT pre_norm FROM steps ORDER BY step")]
    finite = np.array([norm for norm in norms[len(norms) // 5 :] if norm is not None])
    slider = shown.get_by_role("slider")
    sentence = shown.get_by_text("fifth would have been clipped.")
    seen = set()
    for key, times in (("ArrowLeft", 25), ("ArrowRight", 60), ("ArrowLeft", 7)):
        before = sentence.inner_text()
        slider.focus()
        for _ in range(times):
            shown.keyboard.press(key)
        expect(sentence).not_to_have_text(before, timeout=LONG)
        shown.wait_for_timeout(1500)  # whatever keys it has not heard of yet
        said = sentence.inner_text()
        match = re.fullmatch(r"At ([\d.e+-]+), ([\d.]+) % of the ([\d,]+) steps .*", said)
        threshold = float(match[1])
        # What is shown has three digits, and so has every threshold of the slider but those asked for.
        assert float(match[2]) == pytest.approx(100 * np.mean(finite > threshold), abs=0.06)
        assert int(match[3].replace(",", "")) == len(finite) == 718
        seen.add(threshold)
    assert len(seen) == 3
    screenshot(shown, "what-if")


def test_the_nan_is_in_the_table_of_events(shown):
    """With its parameter and where it entered."""
    table = shown.get_by_test_id("stDataFrame")
    table.scroll_into_view_if_needed()
    assert query("SELECT count(*) FROM events WHERE kind = 'nonfinite_gradient'") == [(2,)]
    # The grid is drawn; what it shows is in the table it keeps for screen readers.
    rows = table.locator("[role=grid] tbody tr").filter(has_text="nonfinite_gradient")
    expect(rows).to_have_count(2, timeout=LONG)
    for step, row in zip((301, 300), rows.all(), strict=True):
        cells = row.locator("td").all_text_contents()
        assert cells[0] == f"{step}"
        assert cells[4] == cells[6] == "2.weight"
        assert cells[5].startswith("NaN in the gradient of 1 of 6 parameters (2.weight)")


def test_the_runs_page_leads_to_a_run(page, serve, screenshot):
    """A row is picked, and its run is shown."""
    write_run(run="older", steps=20)
    write_run(run="newer", steps=30)
    page.goto(serve())
    expect(page.get_by_role("heading", name="Runs")).to_be_visible(timeout=LONG)
    expect(page.get_by_test_id("data-grid-canvas")).to_be_visible(timeout=LONG)
    page.wait_for_timeout(1500)
    screenshot(page, "runs")
    box = page.get_by_test_id("stDataFrame").bounding_box()
    page.mouse.click(box["x"] + 16, box["y"] + 35 + 18)  # the first row's box
    expect(page.get_by_role("heading", name="newer", exact=True)).to_be_visible(timeout=LONG)
    ((uid,),) = query("SELECT uid FROM runs WHERE name = 'newer'")
    assert parse_qs(urlsplit(page.url).query)["run"] == [f"uid:{uid}"]
    assert metric(page, "Steps") == "30"


def test_the_row_that_was_clicked_is_opened(page, serve):
    """Though runs were added since the table was drawn, which are above it by now."""
    write_run(run="older", steps=20)
    write_run(run="newer", steps=30)
    page.goto(serve())
    expect(page.get_by_test_id("data-grid-canvas")).to_be_visible(timeout=LONG)
    page.wait_for_timeout(1500)
    for number in range(5):
        added = f"added-{number}"
        write_run(run=added, steps=2)
        box = page.get_by_test_id("stDataFrame").bounding_box()
        name = page.get_by_test_id("glide-cell-1-0").text_content()
        if name != added:  # the table has not been drawn anew
            break
    assert name != added
    page.mouse.click(box["x"] + 16, box["y"] + 35 + 18)
    expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible(timeout=LONG)


def test_an_address_tells_ids_names_and_uids_apart(page, serve):
    """A run named "1" does not stand in for the run with the id 1; the picker leads to either."""
    write_run(run="first", steps=20)
    write_run(run="1", steps=30)
    address = serve()
    page.goto(f"{address}/run?run=1")
    expect(page.get_by_role("heading", name="first", exact=True)).to_be_visible(timeout=LONG)
    page.goto(f"{address}/run?run=name:1")
    expect(page.get_by_role("heading", name="1", exact=True)).to_be_visible(timeout=LONG)
    page.get_by_role("combobox").first.click()
    page.get_by_role("option", name="first (run 1)").click()
    expect(page.get_by_role("heading", name="first", exact=True)).to_be_visible(timeout=LONG)
    ((uid,),) = query("SELECT uid FROM runs WHERE id = 1")
    assert parse_qs(urlsplit(page.url).query)["run"] == [f"uid:{uid}"]


def test_the_empty_state_says_how_to_start_and_ends_by_itself(page, serve, screenshot):
    """Without a store: the line to put in; with the first run the page changes by itself."""
    page.goto(serve())
    expect(page.get_by_role("heading", name="No runs yet")).to_be_visible(timeout=LONG)
    expect(page.get_by_text("gradwatch.wrap(optimizer")).to_be_visible()
    screenshot(page, "empty")
    write_run(steps=20)
    expect(page.get_by_role("heading", name="Runs")).to_be_visible(timeout=LONG)


JOB = """
import sys, time, torch, gradwatch
weight = torch.nn.Parameter(torch.ones(10))
optimizer = torch.optim.SGD([weight], lr=1e-3)
agent = gradwatch.Agent(optimizer, run="live", store="gradwatch.db", metrics_port=None)
generator = torch.Generator().manual_seed(0)
for line in sys.stdin:
    for _ in range(int(line)):
        weight.grad = torch.randn(10, generator=generator)
        optimizer.step()
    assert agent.flush()
    print("stored", flush=True)
"""


def test_a_live_run_is_refreshed(page, serve):
    """New steps show without a reload; the end of the run too."""
    job = subprocess.Popen(
        [sys.executable, "-c", JOB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def steps(count):
        job.stdin.write(f"{count}\n")
        job.stdin.flush()
        assert job.stdout.readline() == "stored\n"

    steps(150)
    open_run(page, serve(), "live")
    assert metric(page, "Steps") == "150"
    expect(page.get_by_text("running", exact=True)).to_be_visible()
    steps(1000)
    tile = page.get_by_test_id("stMetric").filter(has_text=re.compile("^Steps"))
    expect(tile.get_by_test_id("stMetricValue")).to_have_text("1,150", timeout=LONG)
    job.stdin.close()
    assert job.wait(timeout=60) == 0
    expect(page.get_by_text("finished", exact=True)).to_be_visible(timeout=LONG)
    job.stdout.close()


def test_text_is_shown_as_text(page, serve):
    """A run's name and tags are nobody's markup."""
    name = "<b>x</b> :red[**y**] $a$ `z` [l](http://e)"
    write_run(run=name, steps=60, tags={"<script>alert(1)</script>": "*t*"})
    page.goto(f"{serve()}/run?run=1")
    expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible(timeout=LONG)
    expect(page.get_by_text("<script>alert(1)</script>=*t*")).to_be_visible()
    assert page.problems == []


def test_the_server_goes_with_the_command(serve):
    """Told to end, `gradwatch ui` leaves no server behind: the port is free, status 0."""
    serve()
    serve.process.terminate()
    assert serve.process.wait(30) == 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", serve.port))


def test_the_server_is_bound_to_loopback(serve):
    """Nobody else on the network sees the page, and nothing is asked at the start."""
    write_run(steps=5)
    serve()
    table = Path("/proc/net/tcp").read_text().split()
    listening = {field for field in table if field.endswith(f":{serve.port:04X}")}
    assert f"0100007F:{serve.port:04X}" in listening
    assert f"00000000:{serve.port:04X}" not in listening


def test_a_store_that_is_none_is_said_on_the_page(page, serve):
    """Not a traceback."""
    Path("gradwatch.db").write_text("no database " * 999)
    page.goto(serve())
    expect(page.get_by_text("file is not a database")).to_be_visible(timeout=LONG)


def test_a_run_that_is_not_there_is_said_on_the_page(page, serve):
    """With the latest run shown instead."""
    write_run(steps=60)
    page.goto(f"{serve()}/run?run=nix")
    expect(page.get_by_text("no run 'nix'")).to_be_visible(timeout=LONG)
    expect(page.get_by_role("heading", name="first", exact=True)).to_be_visible()


def test_a_loop_that_hangs_is_shown_as_stalled(page, serve):
    """With when its last step was; as soon as the loop goes on it is running again."""
    with live(run="hangs") as job:
        job.until(100)
        job.pause()
        assert job.agent.flush()
        with sqlite3.connect("gradwatch.db", timeout=20) as connection:
            connection.execute("UPDATE step_records SET time = time - 300")
        connection.close()
        address = serve()
        open_run(page, address, "hangs")
        expect(page.get_by_text("stalled", exact=True).first).to_be_visible(timeout=LONG)
        expect(page.get_by_text("no step has been taken for")).to_be_visible()
        expect(page.get_by_text(re.compile(r"last step \d+ min ago"))).to_be_visible()
        job.go_on()
        expect(page.get_by_text(re.compile(r"last step \d+ s ago"))).to_be_visible(timeout=LONG)
        expect(page.get_by_text("stalled", exact=True)).to_have_count(0, timeout=LONG)
    assert page.problems == []
