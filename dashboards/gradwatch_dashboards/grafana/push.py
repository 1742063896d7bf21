"""Into a Grafana server over its HTTP API: data source, folder, dashboards.

Each is looked at first and written only where it is missing or differs, so a second push changes
nothing. What a person has set on the data source (authentication, another address) stays.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from gradwatch.errors import ConfigurationError, GrafanaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from grafana_client.api import GrafanaApi

__all__ = ["DATA_SOURCE", "OLDEST", "Pushed", "checked", "connect", "push"]

DATA_SOURCE = "gradwatch-prometheus"  # its uid
FOLDER = "gradwatch"  # its uid
OLDEST = 10  # the first major version with all that the dashboards use
_HERE = Path(__file__).parent / "dashboards"

_EXAMPLES = {
    "--url": "http://127.0.0.1:3000",
    "--prometheus-url": "http://127.0.0.1:9090",
    "--ui-url": "http://127.0.0.1:8501",
}
_ANOTHER = "{} does not answer as Grafana does: is it another server, or under another path?"

State = Literal["created", "changed", "as it was"]


class Pushed(NamedTuple):
    """What became of one thing: "data source", "folder" or "dashboard"."""

    kind: str
    name: str
    state: State


@contextlib.contextmanager
def connect(url: str, token: str, *, timeout: float = 10.0) -> Iterator[GrafanaApi]:
    """A server's API, once the server has said that it is one and new enough.

    Args:
        url: where Grafana is, as in `http://127.0.0.1:3000` or `https://example.org/grafana`.
        token: of a service account; shown nowhere.
        timeout: seconds that one answer may take.

    Raises:
        ConfigurationError: `url` or `token` cannot be one.
        GrafanaError: nobody answers there, no Grafana does, or one older than version 10.
    """
    from grafana_client.api import GrafanaApi  # noqa: PLC0415 - heavy, and an extra

    parsed = checked("--url", url)
    if not re.fullmatch(r"[!-~]+", token):
        msg = "the Grafana token is empty, or holds what no token does (a space, a line break?)"
        raise ConfigurationError(msg)
    path = parsed.path.rstrip("/") + "/"
    base = urllib.parse.urlunsplit((parsed.scheme, parsed.netloc, path, "", ""))
    api: GrafanaApi = GrafanaApi.from_url(base, token, timeout=timeout)
    with contextlib.closing(api.client.s):
        told = _asking(base, "is no Grafana", api.client.GET, "/frontend/settings")
        version = _version(told)
        major = re.match(r"\d+", version)
        if major is None:
            raise GrafanaError(_ANOTHER.format(base))
        if int(major[0]) < OLDEST:
            msg = f"{base} is Grafana {version}; the dashboards need version {OLDEST} or later"
            raise GrafanaError(msg)
        yield api


def checked(option: str, url: str) -> urllib.parse.SplitResult:
    """The address of that option in its parts. Raises `ConfigurationError` where it cannot be one."""
    try:
        parsed = urllib.parse.urlsplit(url)
        good = parsed.scheme in {"http", "https"} and parsed.hostname and parsed.port != 0
    except ValueError:  # brackets that do not close, a port that is none
        good = False
    if not good or "@" in parsed.netloc:
        shown = url if "@" not in url else f"…@{url.rpartition('@')[2]}"
        right = _EXAMPLES[option]
        msg = f"{option} {shown}: right would be {right}, without user and password"
        raise ConfigurationError(msg)
    return parsed


def _version(settings: Any) -> str:
    """Of what a server says of itself; empty where it is no Grafana's."""
    told = settings.get("buildInfo") if isinstance(settings, dict) else None
    return str(told.get("version", "")) if isinstance(told, dict) else ""


def push(
    api: GrafanaApi,
    *,
    prometheus: str | None = None,
    ui: str | None = None,
    dry_run: bool = False,
) -> Iterator[Pushed]:
    """Bring data source, folder and dashboards to the server, and tell of each.

    Args:
        api: from `connect`.
        prometheus: where Grafana reaches Prometheus; default: as it is there, or
            `http://127.0.0.1:9090` for a new data source.
        ui: where people reach `gradwatch ui`, for the links to it; default: as it is there, or
            this machine's for a new dashboard.
        dry_run: look, and write nothing.

    Raises `GrafanaError` where the server refuses one; what was told before stands.
    """
    server = _Server(api, dry_run=dry_run)
    yield Pushed("data source", DATA_SOURCE, server.data_source(prometheus))
    yield Pushed("folder", FOLDER, server.folder())
    for path in sorted(_HERE.glob("*.json")):
        dashboard = json.loads(path.read_text())
        yield Pushed("dashboard", dashboard["title"], server.dashboard(dashboard, ui))


class _Server:
    """Looks, compares, writes."""

    def __init__(self, api: GrafanaApi, *, dry_run: bool) -> None:
        self._api, self._dry_run = api, dry_run

    def data_source(self, prometheus: str | None) -> State:
        """The Prometheus that the dashboards ask first."""
        api = self._api.datasource
        there = self._look(f"data source {DATA_SOURCE}", api.get_datasource_by_uid, DATA_SOURCE)
        if there is None:
            made = {
                "uid": DATA_SOURCE,
                "name": "gradwatch",
                "type": "prometheus",
                "access": "proxy",
                "url": prometheus or "http://127.0.0.1:9090",
                "jsonData": {"httpMethod": "POST", "timeInterval": "15s"},
            }
            self._write("make the data source", api.create_datasource, made)
            return "created"
        if prometheus is None or there.get("url") == prometheus:
            return "as it was"
        self._write(
            "change the data source",
            api.update_datasource_by_uid,
            DATA_SOURCE,
            {**there, "url": prometheus},
        )
        return "changed"

    def folder(self) -> State:
        """The folder, under whatever title somebody may have given it."""
        api = self._api.folder
        if self._look("folder", api.get_folder, FOLDER) is not None:
            return "as it was"
        self._write("make the folder", api.create_folder, "gradwatch", FOLDER)
        return "created"

    def dashboard(self, dashboard: dict[str, Any], ui: str | None) -> State:
        """One dashboard, in the folder."""
        api = self._api.dashboard
        there = self._look("dashboard", api.get_dashboard, dashboard["uid"])
        was = None if there is None else _ui(there["dashboard"])
        told = was["query"] if ui is None and was else ui
        if told is not None:
            dashboard = copy.deepcopy(dashboard)
            _ui(dashboard)["query"] = told.rstrip("/")
        if there is not None:
            own = {k: v for k, v in there["dashboard"].items() if k not in {"id", "version"}}
            if own == dashboard and there["meta"].get("folderUid") == FOLDER:
                return "as it was"
        what = {"dashboard": {**dashboard, "id": None}, "folderUid": FOLDER, "overwrite": True,
                "message": "gradwatch grafana push"}  # fmt: skip
        self._write(f"write the dashboard {dashboard['title']!r}", api.update_dashboard, what)
        return "created" if there is None else "changed"

    def _look(self, what: str, get: Callable[..., Any], uid: str) -> Any:
        """What is there, None where nothing is."""
        return _asking(str(self._api.url), f"does not tell of the {what}", get, uid, absent=True)

    def _write(self, what: str, call: Callable[..., Any], *arguments: Any) -> None:
        if not self._dry_run:
            _asking(str(self._api.url), f"refuses to {what}", call, *arguments)


def _ui(dashboard: dict[str, Any]) -> Any:
    """Its variable that holds where `gradwatch ui` is; None where it has none."""
    variables = dashboard.get("templating", {}).get("list", ())
    return next((v for v in variables if v.get("name") == "ui" and "query" in v), None)


def _asking(
    url: str, problem: str, call: Callable[..., Any], *arguments: Any, absent: bool = False
) -> Any:
    """The answer; None for a 404 where what is asked for may be `absent`."""
    from grafana_client.client import GrafanaException  # noqa: PLC0415
    from niquests.exceptions import RequestException  # noqa: PLC0415

    try:
        return call(*arguments)
    except GrafanaException as error:
        if absent and error.status_code == 404:
            return None
        if not error.status_code:  # it did not answer in time
            msg = f"{url} does not answer: {_reason(error)}"
        elif error.status_code == 401:
            msg = f"{url} does not take this token: it is wrong, was revoked or has expired"
        elif error.status_code == 403:
            msg = (
                f"{url} {problem}: the token's service account may not. It needs the role Admin for "
                f"the data source, Editor for folder and dashboards ({_reason(error)})"
            )
        else:
            msg = f"{url} {problem}: {_reason(error)}"
        raise GrafanaError(msg) from None
    except RequestException as error:
        msg = f"{url} does not answer: {_reason(error)}"
        raise GrafanaError(msg) from None
    except ValueError:  # no JSON
        raise GrafanaError(_ANOTHER.format(url)) from None


def _reason(error: Exception) -> str:
    """An error in one line, without what would hold a token."""
    response = getattr(error, "response", None)
    if isinstance(response, dict) and response.get("message"):
        text = str(response["message"])
    else:
        cause: BaseException = error
        while cause.__cause__ is not None or cause.__context__ is not None:
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        text = str(cause)
    first = (text.strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"Bearer\s+\S+", "Bearer …", first)[:300]
