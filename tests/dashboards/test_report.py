"""`gradwatch report`: what the page says is what SQL says, and it needs nothing else."""

import html
import json
import math
import re
import sqlite3
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from live import live
from stores import lognormal, write_run

from gradwatch_dashboards.web import charts
from gradwatch_monitor import Store, recommend, views
from gradwatch_monitor.applying import applied, recommended, wait

HOSTILE = '<script>document.title="gone"</script>"><img src=http://127.0.0.1:9/x onerror=alert(1)>'


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_says_what_sql_says(run):
    """Numbers, recommendation, events, settings; where the file is, is said at the end."""
    norms = lognormal(900, middle=5.0)
    norms[500] *= 100
    write_run(norms=norms, nan_at=(300,), tags={"lr": 0.001})
    status, text, _ = run("report", "first", "-o", "page.html")
    path = Path("page.html").absolute()
    assert status == 0
    assert text.startswith(f"Report: {path} (")
    page = Page(path.read_text())
    with sqlite3.connect("gradwatch.db") as connection:
        steps, finite, clipped, uid = connection.execute(
            "SELECT count(*), count(pre_norm), sum(clipped), uid FROM steps JOIN runs ON id = run_id"
        ).fetchone()
    with Store() as store:
        made = recommend(store, 1)
    for words in (
        f"steps {steps:,} clipped {100 * clipped / finite:.1f} %", "NaN or inf 1", uid,
        made.sentence, *made.reasons, "it entered at 2.weight", "optimizer AdamW", "tag lr 0.001",
        "gradient norm (log scale)", "clip ratio", "band 10–30 %", "learning rate", "loss",
        "would have been clipped", "norm spike", "No threshold was applied",
    ):  # fmt: skip
        assert words in page.text, words
    assert sum(tag == "svg" for tag, _ in page.tags) == 5
    assert not Path("page.html.part").exists()


def test_the_page_needs_nothing_else_and_runs_nothing(run):
    """No script, no address, no id twice; a policy of its own against what could slip through."""
    write_run(norms=lognormal(300), run="a")
    assert run("report", "a")[0] == 0
    page = Page(Path("report.html").read_text())
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
    }
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in {"src", "href", "xlink:href", "action"}:
                assert value.startswith(("#", "data:")), (tag, value)
    (policy,) = (a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 3
    used = re.findall(r"url\(#([^)]+)\)", Path("report.html").read_text())
    assert set(used) <= set(ids)
    assert Path("report.html").stat().st_size < 2_000_000


def test_text_is_shown_as_text(run):
    """The run's name, tags, reasons and messages are nobody's markup."""
    write_run(run=HOSTILE, steps=60, nan_at=(30,), tags={HOSTILE: HOSTILE})
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute(
            "INSERT INTO findings (run_id, finding, severity, first_step, last_step, found_at, "
            "message, advice, data) VALUES (1, ?1, 'critical', 0, 2, 0, ?1, ?1, '{}')", (HOSTILE,)
        )  # fmt: skip
        connection.execute(
            "INSERT INTO threshold_changes (run_id, requested_at, requested_by, reason, refused, "
            "policy) VALUES (1, 0, ?1, ?1, ?1, ?2)", (HOSTILE, json.dumps({"policy": HOSTILE}))
        )  # fmt: skip
        connection.execute("UPDATE events SET message = ?1, kind = 'grad_norm_spike'", (HOSTILE,))
    assert run("report", "1")[0] == 0
    source = Path("report.html").read_text()
    page = Page(source)
    assert source.count(html.escape(HOSTILE, quote=False)) + page.text.count(HOSTILE) >= 8
    assert not {"script", "img"} & {tag for tag, _ in page.tags}


def test_no_secret_is_in_it(run):
    """Not of the store's URL, nor of tags that are called one or hold one."""
    write_run(
        steps=60,
        tags={
            "hf_token": "s3cret", "data": "postgresql://me:s3cret@host/d", "tokens": 5,
            "db": {"password": "s3cret", "port": 1234}, "apiToken": "s3cret",
            "dsn": "host=h password=s3cret", "links": ["https://me:s3cret@host/"],
            "command": "train.py --token s3cret --lr 0.1",
        },
    )  # fmt: skip
    assert run("report", "first")[0] == 0
    text = Page(Path("report.html").read_text()).text
    assert "s3cret" not in text
    assert "postgresql://me:***@host/d" in text
    assert "tag tokens 5" in text
    assert "'port': 1234" in text
    assert "train.py --token *** --lr 0.1" in text


def test_what_was_applied_is_marked_and_held_against_its_promise(run):
    """The table names who and why; the share since then is numpy's."""
    with live() as job, Store() as store:
        job.until(400)
        change = recommended(recommend(store, 1)).ask(store, 1, by="ada@lab", reason="as told")
        assert wait(store, 1, change, 60).applied_step
        job.until(job.step + 200)
        (made,) = applied(store, 1)
    assert run("report", "live")[0] == 0
    source = Path("report.html").read_text()
    with Store() as store:
        steps = store.steps(1)
    since = steps[steps["step"] >= made.step]
    words = f"{100 * since['clipped'].mean():.0f} % of the {len(since):,} steps since then"
    text = Page(source).text
    assert words in text
    assert "as stated (" in text
    assert f"Step {made.step:,}: 1 → {made.new:.4g}" in text
    assert "ada@lab" in text
    # A head of a mark in each of the charts over steps: norms, clip ratio, loss, learning rate.
    svgs = re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    marked = [svg for svg in svgs if 'fill="#12806a"' in svg]
    assert (len(svgs), len(marked)) == (5, 4)


def test_gaps_stay_gaps(run):
    """Where records were lost, the line of the norms is two lines."""
    write_run(norms=lognormal(900), loss=False)

    def pieces():
        assert run("report", "first")[0] == 0
        svg = re.search(r"<svg.*?</svg>", Path("report.html").read_text(), re.DOTALL)[0]
        paths = re.findall(r'd="([^"]*)"[^>]*stroke="#8da0b8"', svg)
        return max(path.count("M") for path in paths)

    assert pieces() == 1
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute("DELETE FROM step_records WHERE step BETWEEN 400 AND 600")
    assert pieces() == 2


@pytest.mark.parametrize(
    "options", [{"steps": 1}, {"steps": 60, "loss": False}, {"norms": np.full(80, 0.5)}]
)
def test_little_to_show_is_shown(run, options):
    """One step, no loss, norms that are all the same."""
    write_run(**options)
    status, text, _ = run("report", "first", "--json")
    assert (status, json.loads(text)["run"]) == (0, "first")
    assert Path(json.loads(text)["path"]).stat().st_size == json.loads(text)["bytes"]


def test_errors_are_one_line(run):
    """A run that is not there, a folder that is not there."""
    write_run(steps=2)
    for arguments, code, words in (
        (("nix",), 1, "no run 'nix'"),
        (("first", "-o", "nowhere/page.html"), 2, "No such file or directory; name another file"),
    ):
        status, text, errors = run("report", *arguments)
        assert (status, text, errors.count("\n")) == (code, "", 1)
        assert words in errors


def test_a_run_of_which_only_summaries_are_left(run):
    """Its steps were pruned: it is told all the same."""
    from stores import NOW, records, write

    from gradwatch_monitor import retention

    write("sqlite:///gradwatch.db", records(0, 5500))
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute(
            "INSERT INTO events (run_id, attempt, step, time, kind, severity, message, data) "
            "VALUES (1, 1, 1, ?, 'loss_spike', 'info', 'kept', '{}')", (NOW + 86_400 * 9,)
        )  # fmt: skip
    retention.prune("sqlite:///gradwatch.db", 1, now=NOW + 86_400 * 8)
    with Store() as store:
        assert len(store.steps(1)) == 0
    assert run("report", "1")[0] == 0
    assert "5,500" in Page(Path("report.html").read_text()).text


def test_a_value_with_nothing_beside_it_is_a_dot():
    """No line is drawn to it: where every other step had a NaN, and of a run of one step."""
    nothing = pd.DataFrame({"step": [], "kind": [], "message": []})

    def dotted(chart):
        names = [part["data"]["name"] for part in chart["layer"] if part["mark"]["type"] == "point"]
        return [[row["step"] for row in chart["datasets"][name]] for name in names]

    frame = pd.DataFrame({"step": range(6), "loss": [1.0, math.nan, 2.0, math.nan, 3.0, 4.0]})
    assert dotted(charts.loss(frame, nothing).to_dict()) == [[0, 2]]
    one = {
        "step": [0],
        "pre_norm": [2.0],
        "post_norm": [1.0],
        "threshold": [1.0],
        "clipped": [True],
    }
    alone, clipped = dotted(charts.norms(pd.DataFrame(one), nothing).to_dict())
    assert (alone, clipped) == ([0, 0, 0], [0])


@pytest.mark.parametrize("rate", [0.1, 0.0])
def test_a_learning_rate_that_never_changes_is_seen(rate):
    """Not on the chart's upper edge."""
    drawn = charts.lr(pd.DataFrame({"step": range(6), "lr": rate})).to_dict()
    least, most = drawn["layer"][0]["encoding"]["y"]["scale"]["domain"]
    assert least <= rate < most


def test_marks_that_are_not_all_say_so():
    """Else trouble would seem to begin where they do."""
    frame = pd.DataFrame({"step": range(900), "loss": 1.0})
    for count, said in ((199, "loss spike"), (views.MARKS_AT_MOST, "loss spike (the latest)")):
        marks = pd.DataFrame({"step": range(count), "kind": "loss_spike", "message": ""})
        assert f'"{said}"' in charts.loss(frame, marks).to_json()


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([2.3, 110.0, math.nan, 2.2], "log"),
        ([2.3, 1.0, 0.2], None),
        ([-3.0, 110.0, 2.0], None),
        ([math.nan, math.nan], None),
    ],
)
def test_a_loss_that_spans_powers_of_ten_is_drawn_on_a_log_scale(losses, scale):
    """One leap to a hundred would leave a flat line; what is not above 0 has no logarithm."""
    frame = pd.DataFrame({"step": range(len(losses)), "loss": losses})
    events = pd.DataFrame({"step": [], "kind": [], "message": []})
    drawn = charts.loss(frame, events).to_dict()
    (y,) = [part["encoding"]["y"] for part in drawn["layer"] if part["mark"]["type"] == "line"]
    assert y["scale"].get("type") == scale
    assert ("log" in y["title"]) == (scale == "log")
