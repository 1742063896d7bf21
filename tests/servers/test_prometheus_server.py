"""A real Prometheus scrapes a real job: what it has, and every Grafana panel shows, is what SQL says."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from alerting import ask
from jobs import wait_until
from watched_job import Watched

import gradwatch
import gradwatch_dashboards
from gradwatch import metrics

DASHBOARDS = Path(gradwatch_dashboards.__file__).parent / "grafana" / "dashboards"
RUNS = ("noisy", "scaled")
KINDS = {
    "steps": "1",
    "finite_gradient_steps": "pre_norm IS NOT NULL",
    "clipped_steps": "clipped",
    "nonfinite_steps": "nonfinite",
    "nonfinite_loss_steps": "nonfinite_loss",
    "skipped_steps": "skipped",
    "amp_overflow_steps": "skipped AND NOT nonfinite AND pre_norm IS NULL",
}
WINDOW = 10  # seconds that the panels' rates are of


@pytest.fixture(scope="module")
def watched(server_program, tmp_path_factory):
    """Fifteen seconds of two runs, their monitor, and the Prometheus that scraped all."""
    program = server_program("prometheus", "prometheus")
    made = Watched(program, tmp_path_factory.mktemp("watched"))
    yield made
    made.stop()


def test_counters_of_every_scrape_equal_sql(watched):
    """Each scrape's counters, taken mid-run, are exactly the counts by SQL over the same steps."""
    assert watched.count("noisy") == watched.taken
    for run in RUNS:
        series = {}
        for name in KINDS:
            (result,) = watched.query(f'gradwatch_{name}_total{{run="{run}"}}[5m]')
            series[name] = {when: float(value) for when, value in result["values"]}
        scrapes = sorted(set.intersection(*(set(s) for s in series.values())))
        seen = {tuple(int(series[name][t]) for name in KINDS) for t in scrapes}
        assert len(seen) >= 6  # of which most in the middle of the run
        for scrape in seen:
            assert (
                tuple(watched.count(run, kind, stop=scrape[0]) for kind in KINDS.values()) == scrape
            )


def test_everything_scraped_is_finite(watched):
    """No sample of any gradwatch series is NaN or inf, though every 97th gradient is."""
    results = watched.query('{__name__=~"(run:)?gradwatch_.*"}')
    assert len({r["metric"]["__name__"] for r in results}) > 20
    assert all(r["value"][1] not in {"NaN", "+Inf", "-Inf"} for r in results)


# -- the panels of the dashboards --------------------------------------------------------------


class Truth:
    """What SQL says of the steps that had been scraped by then."""

    def __init__(self, watched):
        self.w = watched
        self.scrapes = {run: watched.scrapes(run, WINDOW) for run in RUNS}
        self.seen = {run: scrapes[-1][1] for run, scrapes in self.scrapes.items()}

    def total(self, kind):
        return {run: self.w.count(run, KINDS[kind], stop=self.seen[run]) for run in RUNS}

    def last(self, column):
        values = {run: self.w.column(run, column, stop=self.seen[run]) for run in RUNS}
        return {run: of_it[-1] for run, of_it in values.items() if of_it}

    def span(self, run):
        """First and last step of the window's scrapes, and the seconds between these."""
        (began, first), *_, (ended, stop) = self.scrapes[run]
        return first, stop, ended - began

    def increase(self, run, kind="steps"):
        """As `increase()` has it: what was counted between two scrapes, drawn out to the window."""
        first, stop, seconds = self.span(run)
        return self.w.count(run, KINDS[kind], first, stop) * WINDOW / seconds

    def rate(self, run):
        return self.increase(run) / WINDOW

    def ratio(self, run, seconds=300):
        """Of the steps between the first scrape and the last."""
        scrapes = self.w.scrapes(run, seconds)
        first, stop = scrapes[0][1], scrapes[-1][1]
        finite = self.w.count(run, KINDS["finite_gradient_steps"], first, stop)
        return self.w.count(run, "clipped", first, stop) / finite

    def norms(self, run, column="pre_norm"):
        first, stop, _ = self.span(run)
        return np.array(self.w.column(run, column, first, stop))

    def greatest(self, run, column="pre_norm"):
        """Of the last 60 to 75 seconds, by the worker's clock, which is a little behind."""
        last_minute, longer = (
            [
                value
                for value, when in zip(
                    self.w.column(run, column, stop=self.seen[run]),
                    self.w.column(run, "time", stop=self.seen[run], where=f"{column} IS NOT NULL"),
                    strict=True,
                )
                if when > self.w.at - seconds
            ]
            for seconds in (metrics.PEAK_SECONDS - 2, 1.25 * metrics.PEAK_SECONDS + 2)
        )
        return Between(max(last_minute), max(longer))

    def spikes(self, kind, run, first=0, stop=None):
        """Events of steps that had been scraped by then."""
        ((count,),) = self.w.sql(
            "SELECT count(*) FROM events JOIN runs ON runs.id = run_id "
            "WHERE name = ? AND kind = ? AND step >= ? AND step < ?",
            run, kind, first, self.seen[run] if stop is None else stop,
        )  # fmt: skip
        return count

    def spikes_increase(self, kind, run):
        """As `increase()` has it."""
        first, stop, seconds = self.span(run)
        return self.spikes(kind, run, first, stop) * WINDOW / seconds

    def stalled_after(self, run):
        times = np.diff(self.w.column(run, "time", stop=self.seen[run]))
        return max(30.0, 10 * np.median(times), 1.5 * times.max())

    def age(self, run):
        return self.w.at - self.last("time")[run]

    def overhead(self, run):
        """Seconds a step, by the agent itself."""
        assert run == "noisy"
        first, stop, _ = self.span(run)
        return (self.w.overhead[stop - 1] - self.w.overhead[first - 1]) / (stop - first)

    def recommended(self, column):
        rows = self.w.sql(
            f"SELECT {column} FROM recommendations r JOIN runs ON runs.id = r.run_id "
            "WHERE name = 'noisy' AND made_at < ? ORDER BY r.id DESC",
            self.w.at - 1,
        )
        return rows[0][0]

    def info(self, run):
        ((uid, host, settings),) = self.w.sql(
            "SELECT uid, host, settings FROM runs WHERE name = ?", run
        )
        settings = json.loads(settings)
        return {
            "rank": "0", "uid": uid, "host": host, "optimizer": settings["optimizer"],
            "policy": settings["clip"], "gradwatch": gradwatch.__version__,
            "torch": settings["versions"]["torch"],
        }  # fmt: skip


def near(expected, rel=0.02):
    return pytest.approx(expected, rel=rel, abs=1e-9)


def by_run(values, **approximately):
    return {(run,): near(value, **approximately) for run, value in values.items()}


ONE_SCRAPE = 0.13  # of the ten that a window has
_bounds = [0.0, *metrics.NORM_BUCKETS, np.inf]


class Between:
    """A greatest value of a time that is not known exactly."""

    def __init__(self, low, high):
        self.low, self.high = low * (1 - 1e-9), high * (1 + 1e-9)

    def __eq__(self, value):
        return self.low <= value <= self.high

    __hash__ = None

    def __repr__(self):
        return f"{self.low} to {self.high}"


class Within(Between):
    """A quantile that a histogram can know: in the bucket of the true one, or at its edges."""

    def __init__(self, norms, q):
        at = np.searchsorted(_bounds, np.quantile(norms, q, method="inverted_cdf"))
        super().__init__(_bounds[max(0, at - 2)], _bounds[min(at + 1, len(_bounds) - 1)])


def heat(norms, seconds):
    """Cumulated counts a bucket, drawn out to the window."""
    counts = [np.count_nonzero(norms <= bound) for bound in metrics.NORM_BUCKETS]
    factor = WINDOW / seconds
    edges = [*map(str, metrics.NORM_BUCKETS), "+Inf"]
    rows = zip(edges, [*counts, len(norms)], strict=True)
    return {(edge,): pytest.approx(factor * n, rel=ONE_SCRAPE, abs=0.6) for edge, n in rows}


def expected(truth):
    """(dashboard, panel, query) → labels, and what each series should be, for all there are."""
    t = truth
    total, last = t.total, t.last
    every = {run: t.rate(run) for run in RUNS}
    steps, increase = total("steps"), t.increase
    info = {run: t.info(run) for run in RUNS}
    firing = {}
    if total("nonfinite_steps")["noisy"]:
        firing["GradwatchNonfiniteGradients", "noisy", ""] = near(1)
    # A rule is evaluated within a second of a scrape.
    critical = t.w.values("max_over_time(gradwatch_finding_critical[2m] offset 1s) == 1", "finding")
    for (finding,) in critical:
        firing["GradwatchCriticalFinding", "noisy", finding] = near(1)
    *_, seconds = t.span("noisy")
    none = {}
    run = ("run",)
    alone = ()

    def one(value, **approximately):
        return {(): near(value, **approximately)}

    return {
        ("overview", 1, "A"): (alone, one(t.w.sql("SELECT count(*) FROM runs WHERE status = 'running'")[0][0])),
        ("overview", 2, "A"): (alone, one(sum(every.values()))),
        ("overview", 3, "A"): (alone, one(sum(total("nonfinite_steps").values()))),
        ("overview", 4, "A"): (alone, one(sum(total("skipped_steps").values()))),
        ("overview", 5, "A"): (alone, one(len(t.w.sql("SELECT 1 FROM events WHERE kind = 'records_dropped'")))),
        ("overview", 6, "A"): (alone, one(len(firing)) if firing else none),
        ("overview", 7, "A"): (run, by_run(steps)),
        ("overview", 7, "B"): (run, by_run({r: t.ratio(r) for r in RUNS}, rel=0.05)),
        ("overview", 7, "C"): (run, by_run(last("pre_norm"))),
        ("overview", 7, "D"): (run, {(r,): t.greatest(r) for r in RUNS}),
        ("overview", 7, "E"): (run, by_run(last("threshold"))),
        ("overview", 7, "F"): (run, by_run(last("loss"))),
        ("overview", 7, "G"): (run, by_run({r: t.age(r) for r in RUNS})),
        ("overview", 7, "H"): (run, by_run(dict.fromkeys(RUNS, 1))),
        ("overview", 7, "I"): (("run", "optimizer", "policy"),
                               {(r, i["optimizer"], i["policy"]): 1 for r, i in info.items()}),
        ("overview", 8, "A"): (run, by_run({r: t.ratio(r) for r in RUNS}, rel=0.05)),
        ("overview", 9, "A"): (run, {(r,): t.greatest(r) for r in RUNS}),
        ("overview", 10, "A"): (run, by_run(last("loss"))),
        ("overview", 11, "A"): (run, by_run(every)),
        ("overview", 12, "A"): (("alertname", "run", "finding"), firing),
        ("overview", 13, "A"): (alone, one(sum(total("nonfinite_loss_steps").values()))),
        ("overview", 14, "A"): (alone, one(sum(t.spikes(kind, r) for r in RUNS for kind in ("grad_norm_spike", "loss_spike")))),
        ("overview", 15, "A"): (alone, one(0)),
        ("run", 1, "A"): (alone, one(steps["noisy"])),
        ("run", 2, "A"): (alone, one(increase("noisy", "clipped_steps") / increase("noisy", "finite_gradient_steps"))),
        ("run", 3, "A"): (alone, one(last("threshold")["noisy"])),
        ("run", 4, "A"): (alone, one(t.recommended("threshold"))),
        ("run", 5, "A"): (alone, one(last("loss")["noisy"])),
        ("run", 6, "A"): (alone, one(t.age("noisy"))),
        ("run", 7, "A"): (alone, one(last("pre_norm")["noisy"])),
        ("run", 7, "B"): (alone, {(): t.greatest("noisy")}),
        ("run", 7, "C"): (alone, one(last("post_norm")["noisy"])),
        ("run", 7, "D"): (alone, one(last("threshold")["noisy"])),
        ("run", 7, "E"): (alone, one(t.recommended("threshold"))),
        ("run", 7, "F"): (alone, {(): Within(t.norms("noisy"), 0.5)}),
        ("run", 7, "G"): (alone, {(): Within(t.norms("noisy"), 0.99)}),
        ("run", 8, "A"): (alone, one(t.ratio("noisy"), rel=0.05)),
        ("run", 8, "B"): (alone, one(t.recommended("predicted_clip_ratio"))),
        ("run", 9, "A"): (alone, one(last("loss")["noisy"])),
        ("run", 9, "B"): (alone, {(): t.greatest("noisy", "loss")}),
        ("run", 10, "A"): (alone, one(last("lr")["noisy"])),
        ("run", 11, "A"): (alone, none),  # no scaler; the other run's is asked for below
        ("run", 12, "A"): (alone, one(every["noisy"])),
        ("run", 13, "A"): (alone, one(increase("noisy", "nonfinite_steps"), rel=ONE_SCRAPE)),
        ("run", 13, "B"): (alone, one(0)),
        ("run", 13, "C"): (alone, one(increase("noisy", "skipped_steps"), rel=ONE_SCRAPE)),
        ("run", 13, "D"): (alone, one(0)),
        ("run", 13, "E"): (alone, one(0)),
        ("run", 13, "F"): (alone, one(t.spikes_increase("grad_norm_spike", "noisy"), rel=ONE_SCRAPE)),
        ("run", 13, "G"): (alone, one(t.spikes_increase("loss_spike", "noisy"), rel=ONE_SCRAPE)),
        ("run", 14, "A"): (("le",), heat(t.norms("noisy"), seconds)),
        ("run", 15, "A"): (("le",), heat(t.norms("noisy", "post_norm"), seconds)),
        # `nonfinite_gradient` is critical or a warning by how many there are in 200 steps.
        ("run", 16, "A"): (("finding",), {(finding,): Between(0, 1) if finding == "nonfinite_gradient" else severity == "critical" for finding, severity in t.w.sql("SELECT finding, severity FROM findings f JOIN runs ON runs.id = run_id WHERE name = 'noisy' " "AND found_at < ? AND (f.ended_at IS NULL OR f.ended_at > ?)", t.w.at - 1.5, t.w.at)}),
        ("run", 17, "A"): (tuple(info["noisy"]), {tuple(info["noisy"].values()): 1}),
        ("run", 18, "A"): (alone, one(t.age("noisy"))),
        ("run", 19, "A"): (alone, one(t.stalled_after("noisy"))),
        ("agent", 1, "A"): (alone, one(t.w.sql("SELECT count(DISTINCT metrics_url) FROM runs")[0][0])),
        ("agent", 2, "A"): (alone, none),
        ("agent", 3, "A"): (alone, "backlog"),
        ("agent", 4, "A"): (alone, "cost"),
        ("agent", 5, "A"): (run, "backlog"),
        ("agent", 6, "A"): (("run", "reason"), {(r, why): 0 for r in RUNS for why in metrics.DROP_REASONS}),
        ("agent", 7, "A"): (run, "share"),
        ("agent", 8, "A"): (alone, "scrape"),
        ("agent", 9, "A"): (run, by_run({r: t.age(r) for r in RUNS})),
        ("agent", 10, "A"): (("gradwatch", "torch"),
                             {(info["noisy"]["gradwatch"], info["noisy"]["torch"]): len(RUNS)}),
        ("agent", 11, "A"): (("run",), none),
        ("agent", 12, "A"): (alone, one(0)),
    }  # fmt: skip


def queries(dashboard):
    """(panel, query's letter, expression) of all there are."""
    made = json.loads((DASHBOARDS / f"{dashboard}.json").read_text())
    for panel in made["panels"]:
        for target in panel["targets"]:
            yield panel["id"], target.get("refId") or "A", target["expr"]


def filled_in(expression, run):
    """As Grafana sends it."""
    for name, value in (
        ("$__rate_interval", f"{WINDOW}s"), ("$__range", f"{WINDOW}s"), ("$run", run), ("$rank", ".*"),
    ):  # fmt: skip
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


def test_every_panel_shows_what_sql_says(watched):
    """Each query of each dashboard, within what a scrape can know; no series more, none less."""
    truth = Truth(watched)
    wanted = expected(truth)
    wrong, asked = [], set()
    for dashboard in ("overview", "run", "agent"):
        for panel, letter, expression in queries(dashboard):
            where = dashboard, panel, letter
            asked.add(where)
            labels, value = wanted[where]
            got = watched.values(
                filled_in(expression, "noisy" if dashboard == "run" else ".*"), *labels
            )
            if isinstance(value, str):
                check_own(value, got, truth)
            elif got != value:
                wrong.append((where, got, value))
    assert not wrong
    assert asked == set(wanted)
    ((scale,),) = [
        watched.values(filled_in(e, "scaled")).values() for p, _, e in queries("run") if p == 11
    ]
    assert scale == truth.last("loss_scale")["scaled"]


def check_own(what, got, truth):
    """What gradwatch knows of itself is not in SQL: by the agent's own word, or within reason."""
    if what == "backlog":  # what a run takes in the time of two looks of the worker, and no more
        assert all(0 <= value < 100 for value in got.values()), got
        assert len(got) == (1 if () in got else len(RUNS))
    elif what == "scrape":
        (value,) = got.values()
        assert 0 < value < 1
    elif what == "share":
        assert set(got) == {(run,) for run in RUNS}
        assert got["noisy",] == near(truth.overhead("noisy") * truth.rate("noisy"), rel=ONE_SCRAPE)
    else:
        (value,) = got.values()  # of both runs' steps: the other's cost as much, if not the same
        assert 0.3 < value / truth.overhead("noisy") < 3


def test_the_choice_of_runs_is_what_sql_has(watched):
    """The queries behind the variables, by Prometheus' own API for them."""
    for name, expected_values in (("run", sorted(RUNS)), ("rank", ["0"])):
        (query,) = {
            variable["query"]["query"]
            for dashboard in ("overview", "run", "agent")
            for variable in json.loads((DASHBOARDS / f"{dashboard}.json").read_text())[
                "templating"
            ]["list"]
            if variable["name"] == name
        }
        selector = query.removeprefix("label_values(").removesuffix(f", {name})")
        parameters = {"match[]": filled_in(selector, ".*")}
        assert (
            ask(f"{watched.url}/api/v1/label/{name}/values", **parameters)["data"]
            == expected_values
        )
    assert [name for (name,) in watched.sql("SELECT name FROM runs ORDER BY name")] == sorted(RUNS)


def test_a_killed_job_is_shown_as_gone(watched):
    """Its runs, in the panel that the alert leads to."""
    watched.job.kill()
    watched.job.wait()
    (expression,) = [e for panel, _, e in queries("agent") if panel == 11]
    (count,) = [e for panel, _, e in queries("agent") if panel == 2]

    def gone():
        return watched.values(filled_in(expression, ".*"), "run", at=time.time())

    wait_until(lambda: gone() == {("noisy",): 1, ("scaled",): 1}, gone)
    assert watched.values(filled_in(count, ".*"), at=time.time()) == {(): 2}
