"""The dashboards as committed: of Grafana's own schema, whole, and in line with metrics and alerts."""

import itertools
import json
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
from alerting import SHIPPED
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

import gradwatch_dashboards
from gradwatch import metrics
from gradwatch_dashboards.grafana import build, push

GRAFANA = Path(gradwatch_dashboards.__file__).parent / "grafana"
FILES = sorted((GRAFANA / "dashboards").glob("*.json"))
MADE = {path.stem: json.loads(path.read_text()) for path in FILES}
PANELS = [(name, panel) for name, made in MADE.items() for panel in made["panels"]]
RULES = (SHIPPED / "alert_rules.yml").read_text()
each_dashboard = pytest.mark.parametrize("made", MADE.values(), ids=MADE)
each_panel = pytest.mark.parametrize(
    "panel", [panel for _, panel in PANELS], ids=[f"{name}-{p['id']}" for name, p in PANELS]
)


def test_they_are_what_is_written():
    """`make docs` would change nothing."""
    command = [sys.executable, "-m", "gradwatch_dashboards.grafana.build", "--check"]
    subprocess.run(command, check=True)


@each_dashboard
def test_they_are_of_grafanas_schema(made):
    """Grafana's own types read them, and lose or add nothing but the default of a link."""
    register_default_plugins()
    again = json.loads(json.dumps(Dashboard.from_json(made), cls=JSONEncoder))
    for link in again["links"]:
        del link["placement"]
    assert again == made


def test_their_addresses_stay():
    """Bookmarks, links and alerts lead to them."""
    assert {name: made["uid"] for name, made in MADE.items()} == {
        "overview": "gradwatch-overview", "run": "gradwatch-run", "agent": "gradwatch-agent",
    }  # fmt: skip


def test_every_metric_is_shown():
    """And the recorded ratio; a name that there is not would stop `build`."""
    shown = set(re.findall(r"\b(?:run:)?gradwatch_\w+(?::\w+)?", json.dumps(MADE)))
    shown = {name.removesuffix("_bucket") for name in shown}
    every = {*metrics.BY_NAME, build.RECORDED}
    assert shown == every


def test_the_alert_and_the_panel_that_it_leads_to_ask_the_same():
    """Of which targets do not answer."""
    rules = (Path(build.__file__).parents[1] / "prometheus" / "alert_rules.yml").read_text()
    assert build.SILENT in " ".join(rules.split())


@each_panel
def test_a_panel_says_what_it_is_and_when_there_is_nothing(panel):
    """Title, data source, a word in place of data; a unit, except for tables of labels."""
    assert panel["title"]
    assert panel["datasource"]["uid"] == "${datasource}"
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["noValue"]
    assert panel["type"] in {"table", "heatmap"} or defaults["unit"] in {
        "short", "percentunit", "s", "sci",
    }  # fmt: skip
    letters = [target["refId"] for target in panel["targets"] if "refId" in target]
    assert len(set(letters)) == len(panel["targets"]) or len(panel["targets"]) == 1


@each_dashboard
def test_panels_lie_beside_each_other(made):
    """Within 24 columns, none on another, each with a number of its own."""
    places = [panel["gridPos"] for panel in made["panels"]]
    assert all(p["x"] >= 0 and p["x"] + p["w"] <= 24 for p in places)
    for a, b in itertools.combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above
    numbers = [panel["id"] for panel in made["panels"]]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("name", ["overview", "run"])
def test_the_band_is_drawn(name):
    """From 10 to 30 %, behind the clip ratio."""
    (panel,) = [p for p in MADE[name]["panels"] if p["title"].startswith("Clip ratio")]
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert [step["value"] for step in steps] == [None, 0.10, 0.30]
    assert panel["fieldConfig"]["defaults"]["custom"]["thresholdsStyle"]["mode"] == "area"


@each_dashboard
def test_it_leads_to_the_others_and_asks_for_run_and_rank(made):
    """With the run along; the choices come from Prometheus."""
    urls = " ".join(link["url"] for link in made["links"])
    others = {"gradwatch-overview", "gradwatch-run", "gradwatch-agent"} - {made["uid"]}
    assert all(f"/d/{uid}?${{run:queryparam}}" in urls for uid in others)
    variables = {variable["name"]: variable for variable in made["templating"]["list"]}
    assert set(variables) == {"datasource", "run", "rank", "ui"}
    assert variables["datasource"]["current"]["value"] == push.DATA_SOURCE


def test_every_alert_leads_to_the_panel_that_shows_it():
    """From the notification, and from the table of alerts; run and rank go along."""
    alerts = dict(re.findall(r"- alert: (\w+)\n(?:.*\n)*? +dashboard_url: \"(.*)\"", RULES))
    assert set(alerts) == set(re.findall(r"- alert: (\w+)", RULES)) == set(build.PANELS_OF_ALERTS)
    panels = {made["uid"]: {panel["id"] for panel in made["panels"]} for made in MADE.values()}
    for alert, url in alerts.items():
        parts = urllib.parse.urlsplit(url)
        asked = urllib.parse.parse_qs(parts.query)
        uid, panel = build.PANELS_OF_ALERTS[alert]
        assert parts.path == f"/d/{uid}"
        assert asked["viewPanel"] == [str(panel)]
        assert panel in panels[uid]
        assert asked["var-run"] == ["{{ $labels.run | urlquery }}"]
        rank = None if alert == "GradwatchCriticalFinding" else ["{{ $labels.rank }}"]
        assert asked.get("var-rank") == rank  # a finding is of the run as a whole


def test_the_streamlit_page_is_a_click_away():
    """From each run of the overview, and from the run."""
    to_page = [
        text for text in re.findall(r'"url": "([^"]*)"', json.dumps(MADE)) if "ui:raw" in text
    ]
    assert "${ui:raw}/run?run=uid:${__data.fields.uid}" in to_page
    assert "${ui:raw}/run?run=name:${run:percentencode}" in to_page


def test_provisioning_makes_the_same_data_source():
    """And the folder that `push` makes."""
    source = (GRAFANA / "provisioning" / "datasources" / "gradwatch.yml").read_text()
    assert f"uid: {push.DATA_SOURCE}\n" in source
    folder = (GRAFANA / "provisioning" / "dashboards" / "gradwatch.yml").read_text()
    assert f"folderUid: {push.FOLDER}\n" in folder
