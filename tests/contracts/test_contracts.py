"""What is written twice agrees, and what is promised of the package as a whole holds."""

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from stores import write_run

import gradwatch
import gradwatch_dashboards
import gradwatch_monitor
from gradwatch.config import Settings
from gradwatch_dashboards import cli, grafana_verbs, store_verbs

ROOT = Path(__file__).parents[2]
PACKAGES = (gradwatch, gradwatch_monitor, gradwatch_dashboards)
GROUPS = {"": cli, "store": store_verbs, "grafana": grafana_verbs}
README = (ROOT / "README.md").read_text()


def modules():
    for package in PACKAGES:
        yield package.__name__
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            # Scripts that Streamlit and Alembic run are not imported.
            if not re.search(r"web\.(app|run|runs)$|migrations\.(env|versions)", info.name):
                yield info.name


@pytest.mark.parametrize("name", list(modules()))
def test_all_is_complete_and_sorted(name):
    """`__all__` names every public definition of a module, in order."""
    module = importlib.import_module(name)
    source = ast.parse(Path(module.__file__).read_text())
    defined = {
        node.name
        for node in source.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
    }
    exported = getattr(module, "__all__", None)
    if exported is None:
        assert not defined or name == "gradwatch._version"
        return
    assert exported == sorted(exported, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    for public in exported:
        assert hasattr(module, public) or public == "Settings"
    verbs = set()
    if module in GROUPS.values():
        verbs = {command.callback.__name__ for command in module.app.registered_commands}
    assert defined - verbs <= set(exported)


def test_importing_has_no_effect_and_is_light():
    """No thread, no file, no port, and nothing heavy that torch has not loaded anyway."""
    script = """
import json, os, sys, threading
import torch, numpy
before, files = set(sys.modules), os.listdir(".")
import gradwatch
gradwatch.wrap
new = sorted({name.split(".")[0] for name in set(sys.modules) - before})
print(json.dumps([new, threading.active_count(), os.listdir(".") == files]))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    new, threads, same_files = json.loads(result.stdout)
    heavy = {"streamlit", "pandas", "alembic", "sqlalchemy", "pydantic", "prometheus_client",
             "altair", "typer", "rich", "sklearn"}  # fmt: skip
    assert not heavy & set(new)
    assert threads == 1
    assert same_files


def test_no_verb_waits_for_torch(tmp_path):
    """Loading it takes longer than all else that a command does."""
    write_run(store=f"{tmp_path}/gradwatch.db")
    verbs = ["runs", "show first", "recommend first", "diagnose first", "report first", "doctor"]
    script = f"""
import sys
from gradwatch_dashboards.cli import app
for verb in {verbs!r}:
    app(verb.split(), standalone_mode=False)
    assert "torch" not in sys.modules, verb
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr


def test_readme_names_every_verb_and_no_other():
    """The table of the command line is the command line."""
    verbs = {
        f"{group} {command.callback.__name__}".strip()
        for group, module in GROUPS.items()
        for command in module.app.registered_commands
    }
    table = README.split("## On the command line")[1].split("\n## ")[0]
    named = re.findall(r"`gradwatch ((?:store |grafana )?[a-z]+)", table)
    assert set(named) == verbs


def test_readme_names_every_policy():
    """And their arguments are right."""
    policies = {
        name
        for name in gradwatch.__all__
        if isinstance(getattr(gradwatch, name), type)
        and issubclass(getattr(gradwatch, name), gradwatch.Policy)
        and name != "Policy"
    }
    table = README.split("## Policies")[1].split("\n## ")[0]
    calls = re.findall(r"\| `(\w+\([^`]*\))`", table)
    assert {call.split("(")[0] for call in calls} == policies
    for call in calls:
        eval(call, {name: getattr(gradwatch, name) for name in policies})


def test_generated_pages_are_up_to_date():
    """`make docs` would change nothing."""
    subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], check=True)


def test_every_setting_is_described():
    """Each says what it is, and its unit where it has one."""
    for name, field in Settings.model_fields.items():
        assert field.description, name


def test_readme_example_runs(tmp_path):
    """The ten lines of use, in a job that is complete around them, with nothing else changed."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    example = next(block for block in blocks if "gradwatch.wrap(" in block and "for " in block)
    script = f"""
import torch
from torch.nn.functional import cross_entropy
model = torch.nn.Linear(4, 3)
loader = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(30)]
{example}
gradwatch.Agent.of(optimizer).close()
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    with gradwatch_monitor.Store("gradwatch.db") as store:
        (run,) = store.runs()
        assert store.summary(run.id).steps == 30
        assert store.summary(run.id).last_loss is not None


def test_the_tree_speaks_of_itself_alone():
    """No path of a machine, and every file a text that ends with a newline."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix == ".png" or not path.exists():
            continue
        text = path.read_text()
        assert not text or text.endswith("\n"), name
        assert "/home/" + "user" not in text, name
        assert "/tmp/" + "env" not in text, name
