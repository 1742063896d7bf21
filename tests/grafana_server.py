"""A Grafana that takes requests as its HTTP API documents them, and refuses all others."""

import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "glsa_3kFq9TokenThatNobodyMaySee_1a2b"
DATA_SOURCE_FIELDS = {
    "uid": str, "name": str, "type": str, "access": str, "url": str, "jsonData": dict, "id": int,
    "orgId": int, "version": int, "readOnly": bool, "basicAuth": bool, "basicAuthUser": str,
    "isDefault": bool, "user": str, "database": str, "withCredentials": bool, "typeLogoUrl": str,
    "secureJsonFields": dict, "secureJsonData": dict,
}  # fmt: skip


class RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class Grafana:
    """What the server holds, and what it does when asked; every request is kept."""

    def __init__(self, version="11.2.0"):
        self.version = version
        self.sources, self.folders, self.dashboards = {}, {}, {}
        self.requests = []
        self.may_write_sources = True

    @staticmethod
    def admit(authorization):
        if authorization != f"Bearer {TOKEN}":
            raise RefusedError(401, "Invalid API key")

    def answer(self, method, path, body):
        known = {
            ("GET", r"/api/frontend/settings"): lambda: {"buildInfo": {"version": self.version}},
            ("GET", r"/api/datasources/uid/([\w-]+)"): self.source,
            ("POST", r"/api/datasources"): lambda: self.make_source(body),
            ("PUT", r"/api/datasources/uid/([\w-]+)"): lambda uid: self.change_source(uid, body),
            ("GET", r"/api/folders/([\w-]+)"): self.folder,
            ("POST", r"/api/folders"): lambda: self.make_folder(body),
            ("GET", r"/api/dashboards/uid/([\w-]+)"): self.dashboard,
            ("POST", r"/api/dashboards/db"): lambda: self.write_dashboard(body),
        }
        for (verb, pattern), act in known.items():
            if verb == method and (found := re.fullmatch(pattern, path)):
                return act(*found.groups())
        raise RefusedError(404, "Not found")

    def source(self, uid):
        if uid not in self.sources:
            raise RefusedError(404, "Data source not found")
        return self.sources[uid]

    def make_source(self, body):
        self._is_source(body)
        if not self.may_write_sources:
            raise RefusedError(403, "You'll need additional permissions to perform this action")
        if any(body["name"] == source["name"] for source in self.sources.values()):
            raise RefusedError(409, "data source with the same name already exists")
        made = {**body, "id": len(self.sources) + 1, "orgId": 1, "version": 1, "readOnly": False}
        self.sources[body["uid"]] = made
        return {"datasource": made, "id": made["id"], "message": "Datasource added"}

    def change_source(self, uid, body):
        self._is_source(body)
        there = self.source(uid)
        if there["readOnly"]:
            raise RefusedError(403, "Cannot update read-only data source")
        self.sources[uid] = {**there, **body, "version": there["version"] + 1}
        return {"datasource": self.sources[uid], "message": "Datasource updated"}

    @staticmethod
    def _is_source(body):
        assert {"name", "type", "access", "url"} <= set(body)
        assert body["access"] in {"proxy", "direct"}
        for field, value in body.items():
            assert isinstance(value, DATA_SOURCE_FIELDS[field]), field

    def folder(self, uid):
        if uid not in self.folders:
            raise RefusedError(404, "folder not found")
        return self.folders[uid]

    def make_folder(self, body):
        assert set(body) <= {"uid", "title", "parentUid", "description"}
        assert isinstance(body["title"], str)
        if body["uid"] in self.folders:
            raise RefusedError(409, "a folder with the same uid already exists")
        self.folders[body["uid"]] = {**body, "id": 7, "version": 1}
        return self.folders[body["uid"]]

    def dashboard(self, uid):
        if uid not in self.dashboards:
            raise RefusedError(404, "Dashboard not found")
        dashboard, folder = self.dashboards[uid]
        return {"dashboard": dashboard, "meta": {"folderUid": folder, "provisioned": False}}

    def write_dashboard(self, body):
        assert set(body) <= {
            "dashboard",
            "folderId",
            "folderUid",
            "message",
            "overwrite",
            "refresh",
        }
        given = body["dashboard"]
        assert given["title"]
        assert given["id"] is None
        assert len(given["uid"]) <= 40
        if body["folderUid"] not in self.folders:
            raise RefusedError(400, "folder not found")
        there = self.dashboards.get(given["uid"])
        if there is not None and not body.get("overwrite"):
            raise RefusedError(412, "The dashboard has been changed by someone else")
        version = there[0]["version"] + 1 if there else 1
        number = there[0]["id"] if there else 100 + len(self.dashboards)
        kept = {**given, "id": number, "version": version}
        self.dashboards[given["uid"]] = kept, body["folderUid"]
        return {"id": number, "uid": given["uid"], "status": "success", "version": version,
                "url": f"/d/{given['uid']}/x", "slug": "x"}  # fmt: skip


@contextlib.contextmanager
def serving(grafana, prefix=""):
    """Its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self):
            length = int(self.headers.get("Content-Length") or 0)
            text = self.rfile.read(length)
            body = json.loads(text) if length else None
            status, value = 200, None
            try:
                assert not length or self.headers["Content-Type"].startswith("application/json")
                assert self.path.startswith(f"{prefix}/"), self.path
                grafana.requests.append((self.command, self.path.removeprefix(prefix), body))
                grafana.admit(self.headers["Authorization"])
                value = grafana.answer(self.command, self.path.removeprefix(prefix), body)
            except RefusedError as error:
                status, value = error.status, {"message": str(error)}
            except (AssertionError, KeyError, TypeError) as error:
                status, value = 400, {"message": f"not as documented: {error!r}"}
            if isinstance(value, str):
                self._send(status, value.encode(), "text/html")
            else:
                self._send(status, json.dumps(value).encode(), "application/json; charset=UTF-8")

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _do  # noqa: N815

        def _send(self, status, body, kind):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{prefix}"
    finally:
        server.shutdown()
        server.server_close()
