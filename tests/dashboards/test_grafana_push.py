"""`gradwatch grafana push`, against a server that checks requests as Grafana's API documents them."""

import copy
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from grafana_server import TOKEN, Grafana, serving

import gradwatch_dashboards

DASHBOARDS = {
    made["uid"]: made
    for path in (Path(gradwatch_dashboards.__file__).parent / "grafana" / "dashboards").glob("*.json")
    if (made := json.loads(path.read_text()))
}  # fmt: skip
SOURCE = "gradwatch-prometheus"


# https://grafana.com/docs/grafana/latest/developers/http_api/ of data sources, folders, dashboards
@pytest.fixture
def token(monkeypatch):
    """In the environment."""
    monkeypatch.setenv("GRAFANA_TOKEN", TOKEN)


def written(grafana):
    """Requests that change something."""
    return [(method, path) for method, path, _ in grafana.requests if method != "GET"]


@pytest.mark.usefixtures("token")
def test_everything_is_there_afterwards_and_a_second_push_changes_nothing(run):
    """Data source, folder and dashboards, as committed."""
    grafana = Grafana()
    with serving(grafana) as url:
        status, text, told = run("grafana", "push", "--url", url)
        assert (status, told) == (0, "")
        assert text.count("created") == 2 + len(DASHBOARDS)
        assert grafana.sources[SOURCE]["type"] == "prometheus"
        assert grafana.sources[SOURCE]["url"] == "http://127.0.0.1:9090"
        kept = {
            uid: (copy.copy(made), folder) for uid, (made, folder) in grafana.dashboards.items()
        }
        assert {folder for _, folder in kept.values()} == {"gradwatch"} == set(grafana.folders)
        for made, _ in kept.values():
            made.pop("id")
            made.pop("version")
        assert {uid: made for uid, (made, _) in kept.items()} == DASHBOARDS

        grafana.requests.clear()
        status, text, _ = run("grafana", "push", "--url", url + "/")
        assert status == 0
        assert text.count("as it was") == 2 + len(DASHBOARDS)
        assert written(grafana) == []


@pytest.mark.usefixtures("token")
def test_what_differs_is_changed_and_what_somebody_set_stays(run):
    """A dashboard that was edited or moved; the data source's address, with its user's other settings."""
    grafana = Grafana()
    with serving(grafana, prefix="/grafana") as url:
        run("grafana", "push", "--url", url)
        grafana.sources[SOURCE]["basicAuthUser"] = "reader"
        grafana.dashboards["gradwatch-run"][0]["title"] = "edited"
        grafana.folders["mine"] = {"uid": "mine", "title": "mine"}
        moved, _ = grafana.dashboards["gradwatch-agent"]
        grafana.dashboards["gradwatch-agent"] = moved, "mine"
        grafana.requests.clear()
        status, text, _ = run("grafana", "push", "--url", url, "--json",
                              "--prometheus-url", "http://prometheus:9090")  # fmt: skip
        assert status == 0
        states = {one["name"]: one["state"] for one in json.loads(text)["pushed"]}
        assert [name for name, state in states.items() if state == "changed"] == [
            SOURCE, DASHBOARDS["gradwatch-agent"]["title"], DASHBOARDS["gradwatch-run"]["title"],
        ]  # fmt: skip
        assert len(written(grafana)) == 3
        assert grafana.sources[SOURCE]["url"] == "http://prometheus:9090"
        assert grafana.sources[SOURCE]["basicAuthUser"] == "reader"
        assert grafana.dashboards["gradwatch-run"][0]["title"] == "gradwatch: run"
        assert grafana.dashboards["gradwatch-agent"][1] == "gradwatch"
        # Said again without the address, it stays.
        assert "changed" not in run("grafana", "push", "--url", url)[1]

        run("grafana", "push", "--url", url, "--ui-url", "https://gradwatch.example.org/")
        (variable,) = [v for v in grafana.dashboards["gradwatch-run"][0]["templating"]["list"]
                       if v["name"] == "ui"]  # fmt: skip
        assert variable["query"] == "https://gradwatch.example.org"
        assert "changed" not in run("grafana", "push", "--url", url)[1]


@pytest.mark.usefixtures("token")
def test_a_dry_run_looks_and_writes_nothing(run):
    """It says what would be."""
    grafana = Grafana()
    with serving(grafana) as url:
        status, text, _ = run("grafana", "push", "--url", url, "--dry-run")
    assert status == 0
    assert text.count("would be created") == 2 + len(DASHBOARDS)
    assert written(grafana) == []
    assert grafana.requests


def test_the_token_may_be_in_a_file(run, tmp_path):
    """With the line break that editors leave."""
    (tmp_path / "token").write_text(TOKEN + "\n")
    grafana = Grafana()
    with serving(grafana) as url:
        assert run("grafana", "push", "--url", url, "--token-file", "token")[0] == 0


def test_a_token_file_that_is_no_text(run, tmp_path):
    """One line."""
    (tmp_path / "token").write_bytes(b"\xff\xfe\x00")
    status, _, told = run("grafana", "push", "--url", "http://127.0.0.1:9", "--token-file", "token")
    assert status == 2
    assert "no text that can be read" in told


def test_no_token_is_said_with_what_to_do(run):
    """Before anything is asked."""
    grafana = Grafana()
    with serving(grafana) as url:
        status, text, told = run("grafana", "push", "--url", url)
    assert (status, text) == (2, "")
    assert "GRAFANA_TOKEN is not set" in told
    assert "Service accounts" in told
    assert grafana.requests == []


@pytest.mark.parametrize("token", ["two words", "tökén", "glsa_7\nglsa_8"])
def test_what_can_be_no_token_is_refused_and_not_shown(run, monkeypatch, token):
    """An HTTP library would show it in its own error."""
    monkeypatch.setenv("GRAFANA_TOKEN", token)
    status, text, told = run("grafana", "push", "--url", "http://127.0.0.1:9")
    assert (status, text) == (2, "")
    assert "token" in told
    for part in token.split():
        assert part not in told.replace("token", "")


def test_a_wrong_token(run, monkeypatch):
    """One line, without it."""
    monkeypatch.setenv("GRAFANA_TOKEN", "glsa_wrong_and_secret")
    with serving(Grafana()) as url:
        status, text, told = run("grafana", "push", "--url", url)
    assert (status, text) == (1, "")
    assert "does not take this token" in told
    assert "glsa" not in told
    assert told.count("\n") == 1


@pytest.mark.usefixtures("token")
def test_a_token_that_may_not(run):
    """Which role it needs; what came before stands."""
    grafana = Grafana()
    grafana.may_write_sources = False
    with serving(grafana) as url:
        status, _, told = run("grafana", "push", "--url", url)
    assert status == 1
    assert "role Admin" in told
    assert "additional permissions" in told


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize(("version", "good"), [("8.5.27", False), ("9.5.1", False), ("10.0.0", True),
                                               ("13.0.1-pre", True)])  # fmt: skip
def test_old_servers_are_refused(run, version, good):
    """Nothing is written there."""
    grafana = Grafana(version)
    with serving(grafana) as url:
        status, _, told = run("grafana", "push", "--url", url)
    assert status == (0 if good else 1)
    if not good:
        assert f"is Grafana {version}; the dashboards need version 10 or later" in told
        assert written(grafana) == []


class AnotherServer(Grafana):
    """Answers everything with a page."""

    def answer(self, *_):
        return "<html>welcome</html>"


@pytest.mark.usefixtures("token")
def test_another_server_is_told_as_such(run):
    """No traceback."""
    with serving(AnotherServer()) as url:
        status, _, told = run("grafana", "push", "--url", url)
    assert status == 1
    assert "does not answer as Grafana does" in told


@pytest.mark.usefixtures("token")
def test_nobody_there(run):
    """A port at which nobody listens, a name that there is not, one who never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
    status, text, told = run("grafana", "push", "--url", f"http://127.0.0.1:{port}")
    assert (status, text) == (1, "")
    assert f"http://127.0.0.1:{port}/ does not answer: " in told
    assert "refused" in told
    status, _, told = run("grafana", "push", "--url", "http://grafana.invalid:3000")
    assert status == 1
    assert "does not answer" in told
    assert TOKEN not in told


@pytest.mark.usefixtures("token")
def test_a_server_that_never_answers(run, monkeypatch):
    """After a while that is not said to be an answer either."""
    from gradwatch_dashboards.grafana import push as pushing

    hurried = pushing.connect
    monkeypatch.setattr(pushing, "connect", lambda url, token: hurried(url, token, timeout=0.3))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        status, _, told = run(
            "grafana", "push", "--url", f"http://127.0.0.1:{silent.getsockname()[1]}"
        )
    assert status == 1
    assert "does not answer" in told


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize(
    "url",
    [
        "grafana",
        "ftp://grafana",
        "http://",
        "http://admin:hush@grafana:3000",
        "http://[::1",
        "http://grafana:port",
        "http://grafana:99999",
    ],
)
def test_what_is_no_address(run, url):
    """What would be right, and no password."""
    status, _, told = run("grafana", "push", "--url", url)
    assert status == 2
    assert "http://127.0.0.1:3000" in told
    assert "hush" not in told


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize("option", ["--prometheus-url", "--ui-url"])
@pytest.mark.parametrize("url", ["garbage", "javascript:alert(1)"])
def test_what_is_no_address_is_not_brought_to_the_server(run, option, url):
    """Neither into the data source nor behind a link."""
    grafana = Grafana()
    with serving(grafana) as server:
        status, text, errors = run("grafana", "push", "--url", server, option, url)
    assert (status, text) == (2, "")
    assert f"{option} {url}: right would be http://127.0.0.1:" in errors
    assert grafana.requests == []


def test_without_its_extra_it_says_which():
    """In an environment without grafana-client."""
    script = (
        "import importlib.util as u, sys; real = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'grafana_client' else real(n, *a)\n"
        "sys.argv = ['gradwatch', 'grafana', 'push', '--url', 'http://127.0.0.1:3000']\n"
        "from gradwatch_dashboards.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "pip install 'gradwatch[grafana]'" in done.stderr
