"""Metrics, alerts and settings: what is in the code is in the rules' terms and in the docs."""

import ast
import re
from pathlib import Path

import pytest
from alerting import SHIPPED

from gradwatch import metrics
from gradwatch.config import Settings

DOCS = Path(__file__).parents[2] / "docs"
ALERTS = (SHIPPED / "alert_rules.yml").read_text()
RULES = {path.name: path.read_text() for path in SHIPPED.glob("*_rules.yml")}
RUNBOOK = (DOCS / "runbook.md").read_text()
NAMES = re.findall(r"- alert: (\w+)", ALERTS)


def documented(page, heading=""):
    """The names in the first column of a page's tables."""
    text = (DOCS / page).read_text().split(heading or None, 1)[-1]
    return re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)


def test_every_metric_is_documented():
    """And no other, each once."""
    assert sorted(documented("metrics.md")) == sorted(metrics.BY_NAME)


def test_every_setting_is_documented():
    """And no other, each once."""
    variables = [f"GRADWATCH_{name.upper()}" for name in Settings.model_fields]
    assert sorted(documented("settings.md")) == sorted(variables)


def test_every_recorded_series_is_documented():
    """With its expression."""
    page = (DOCS / "metrics.md").read_text()
    recorded = re.findall(r"- record: (\S+)", RULES["recording_rules.yml"])
    assert recorded
    for name in recorded:
        assert f"`{name}`:" in page


@pytest.mark.parametrize("file", RULES)
def test_rules_ask_for_metrics_that_there_are(file):
    """A name that nobody exports would be silent for ever."""
    recorded = re.findall(r"- record: (\S+)", RULES["recording_rules.yml"])
    asked = {
        name.removesuffix("_bucket")
        for name in re.findall(r"\b(?:run:)?gradwatch_\w+(?::\w+)?", RULES[file])
    }
    assert asked
    assert asked <= set(metrics.BY_NAME) | set(recorded)


@pytest.mark.parametrize("name", NAMES)
def test_every_alert_has_what_a_person_needs(name):
    """Severity, sentences that name run and rank, and a runbook with its three parts."""
    rule = ALERTS.split(f"- alert: {name}\n")[1].split("- alert:")[0]
    assert re.search(r"severity: (warning|critical)\n", rule)
    for annotation in ("summary", "description"):
        text = re.search(rf"{annotation}: (.*?)(?=\n {{10}}\w|\Z)", rule, flags=re.DOTALL)[1]
        assert "{{ $labels.run }}" in text
        of_the_run = name == "GradwatchCriticalFinding"  # which has an entry for each finding
        assert ("{{ $labels.finding }}" if of_the_run else "rank {{ $labels.rank }}") in text
    entry = (
        '"docs/runbook.md#{{ $labels.finding }}"'
        if of_the_run
        else (f"docs/runbook.md#{name.lower()}")
    )
    assert f"runbook_url: {entry}\n" in rule
    section = RUNBOOK.split(f"\n## {name}\n")[1].split("\n## ")[0]
    for part in ("**What it means.** ", "**How to check.** ", "**What to do.** "):
        assert section.count(part) == 1


def test_the_runbook_has_no_alert_that_there_is_not():
    """Nor is one missing."""
    assert re.findall(r"^## (.*)$", RUNBOOK, flags=re.MULTILINE) == NAMES


def findings_in_the_code():
    """First arguments and `finding=` of what makes them."""
    root = DOCS.parent
    for path in (
        *root.glob("agent/gradwatch/*.py"),
        *root.glob("monitor/gradwatch_monitor/**/*.py"),
    ):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in {"Sign", "Finding"}:
                given = [k.value for k in call.keywords if k.arg == "finding"] or call.args[:1]
                yield from (v.value for v in given if isinstance(v, ast.Constant))
            elif isinstance(call, ast.Call) and getattr(call.func, "id", "") == "_clipped":
                yield call.args[1].value


def test_every_finding_has_its_entry_in_the_runbook_and_in_the_list():
    """An alert on it links there by its name; no entry is of a finding that there is not."""
    found = set(findings_in_the_code())
    assert len(found) > 20
    entries = re.findall(r"^### (.*)$", RUNBOOK, flags=re.MULTILINE)
    assert sorted(entries) == sorted(found)
    assert set(documented("findings.md")) == found


def test_every_alert_is_tested():
    """With a case in which it fires, and one in which it does not."""
    cases = (SHIPPED / "alert_rules_test.yml").read_text().split("- eval_time: ")[1:]
    for name in NAMES:
        of_it = [case for case in cases if re.search(rf"alertname: {name}$", case, re.MULTILINE)]
        assert any("exp_labels" in case or "exp_alerts: *" in case for case in of_it), name
        assert any("exp_alerts" not in case for case in of_it), name


def anchors(page):
    """What its headings can be linked to by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere():
    """Every relative link of the docs and the README, to the heading that it names."""
    root = DOCS.parent
    for page in (*DOCS.glob("*.md"), *root.glob("*.md"), root / "benchmarks" / "README.md"):
        for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
            target = page.parent / path if path else page
            assert target.exists(), (page.name, path)
            assert not anchor or anchor in anchors(target), (page.name, path, anchor)
