"""Writes the generated pages, or with --check says which of them are out of date."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

from gradwatch.config import DEFAULT_STORE, Settings
from gradwatch.metrics import (
    AGENT,
    EXPORTER,
    LABELS,
    MONITOR,
    NORM_BUCKETS,
    RUNS_NOT_EXPORTED,
    Metric,
)

HERE = Path(__file__).parent
RULES = HERE.parent / "dashboards" / "gradwatch_dashboards" / "prometheus"
NOTE = "<!-- Written by docs/generate.py: change the source it names, then run `make docs`. -->\n"


def metrics() -> str:
    """The metrics page, from the table in metrics.py."""
    lines = [
        NOTE,
        "# Metrics\n",
        (
            f"Those of the job carry the labels {' and '.join(f'`{label}`' for label in LABELS)}: the "
            f"run's name and its rank (but `{EXPORTER.name}` and `{RUNS_NOT_EXPORTED.name}`, which "
            "the process has once). Counters exist from the run's first scrape, at 0; a gauge "
            "appears with its first finite value; nothing non-finite is ever exposed. The source is "
            "`agent/gradwatch/metrics.py`.\n"
        ),
        "## From the training job\n",
        *_table((*AGENT, EXPORTER, RUNS_NOT_EXPORTED)),
        "",
        (
            f"The histograms have {len(NORM_BUCKETS)} buckets, four a decade, with upper bounds from "
            f"{NORM_BUCKETS[0]:g} to {NORM_BUCKETS[-1]:g}.\n"
        ),
        "## Recorded by Prometheus\n",
        *_recorded(),
        "## From the monitor\n",
        (
            "`gradwatch monitor` exports them at `/metrics`, for each live run. They are about the run "
            "as a whole, and carry the labels `run` and `uid`.\n"
        ),
        *_table(MONITOR),
    ]
    return "\n".join(lines) + "\n"


def _table(table: tuple[Metric, ...]) -> list[str]:
    rows = ["| metric | type | further labels | meaning |", "|---|---|---|---|"]
    for metric in table:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.name}` | {metric.type} | {labels} | {metric.meaning} |")
    return rows


def _recorded() -> list[str]:
    """Each recording rule, as it stands in the file, in place of a meaning."""
    text = (RULES / "recording_rules.yml").read_text()
    found = re.findall(r"- record: (\S+)\n\s+expr: \|\n((?: {10}.*\n)+)", text)
    return [f"`{name}`:\n\n```\n{textwrap.dedent(expr)}```\n" for name, expr in found]


def settings() -> str:
    """The settings page, from the fields of Settings."""
    lines = [
        NOTE,
        "# Settings\n",
        (
            "By argument of `wrap` where it has one, else by `gradwatch.Settings`, else by environment "
            "variable, else the default. The source is `agent/gradwatch/config.py`.\n"
        ),
        "| variable | default | meaning |",
        "|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        default = DEFAULT_STORE if name == "store" else field.default
        shown = "" if default is None else f"`{default}`"
        lines.append(f"| `GRADWATCH_{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(lines) + "\n"


PAGES = {"metrics.md": metrics, "settings.md": settings}


def main() -> int:
    """Write or check every page; the exit status."""
    check = "--check" in sys.argv[1:]
    stale = []
    for name, make in PAGES.items():
        path = HERE / name
        text = make()
        if check and (not path.exists() or path.read_text() != text):
            stale.append(f"docs/{name}")
        elif not check:
            path.write_text(text)
    if stale:
        print(f"out of date, run `make docs`: {', '.join(stale)}", file=sys.stderr)
    return len(stale)


if __name__ == "__main__":
    sys.exit(main())
