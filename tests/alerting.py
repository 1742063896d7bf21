"""Prometheus and Alertmanager with the configuration as shipped, and a receiver to be notified."""

import http.server
import json
import socket
import subprocess
import threading
import urllib.parse
import urllib.request
from pathlib import Path

from jobs import wait_until

import gradwatch_dashboards

SHIPPED = Path(gradwatch_dashboards.__file__).parent / "prometheus"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(url, **parameters):
    """The JSON it answers with; None where nobody answers yet."""
    try:
        with urllib.request.urlopen(
            f"{url}?{urllib.parse.urlencode(parameters)}", timeout=5
        ) as got:
            return json.load(got)
    except OSError:
        return None


def asked(prometheus, **query):
    """The result of a query, whenever Prometheus comes to answer it."""
    found = []
    wait_until(lambda: found.append(ask(f"{prometheus}/api/v1/query", **query)) or found[-1])
    return found[-1]["data"]["result"]


def adapted(name, folder, replacements):
    """A shipped file, copied with other ports and times: each of them stands in it."""
    text = (SHIPPED / name).read_text()
    for old, new in replacements.items():
        assert old in text, (name, old)
        text = text.replace(old, new)
    (folder / name).write_text(text)


class Receiver:
    """What Alertmanager's webhook calls; keeps the alerts it was notified of."""

    def __init__(self):
        self.alerts = []
        alerts = self.alerts

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                alerts.extend(json.loads(body)["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def told(self, status="firing"):
        """Alert and run of each."""
        return {
            (alert["labels"]["alertname"], alert["labels"]["run"])
            for alert in list(self.alerts)
            if alert["status"] == status
        }

    def stop(self):
        self._server.shutdown()
        self._server.server_close()


class Stack:
    """Both servers in a folder, looking every second; jobs leave their files in `targets`."""

    def __init__(self, folder, prometheus, alertmanager, receiver_port):
        self.targets = folder / "targets"
        self.targets.mkdir()
        port, self._port = free_port(), free_port()
        adapted("recording_rules.yml", folder, {})
        # Prometheus looks at its targets again every 5 s: a job that ends well may seem to be down
        # for as long.
        adapted("alert_rules.yml", folder, {"for: 2m": "for: 8s"})
        adapted("prometheus.yml", folder, {"interval: 15s": "interval: 1s", ":9093": f":{port}"})
        adapted("alertmanager.yml", folder, {
            ":9097/": f":{receiver_port}/", "group_wait: 10s": "group_wait: 0s",
            "group_interval: 1m": "group_interval: 1s",
        })  # fmt: skip
        self._processes = [
            subprocess.Popen(
                [program, f"--config.file={folder}/{name}.yml", f"--storage.{storage}={folder}/{name}",
                 f"--web.listen-address=127.0.0.1:{its_port}", *more],
                cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for program, name, storage, its_port, more in (
                (alertmanager, "alertmanager", "path", port, ["--cluster.listen-address="]),
                (prometheus, "prometheus", "tsdb.path", self._port, []),
            )
        ]  # fmt: skip
        for its_port in (port, self._port):
            wait_until(lambda url=f"http://127.0.0.1:{its_port}/-/ready": ready(url), seconds=60)

    def query(self, expression):
        """The labels of each series of the result."""
        results = asked(f"http://127.0.0.1:{self._port}", query=expression)
        return [result["metric"] for result in results]

    def stop(self):
        for process in self._processes:
            process.kill()
            process.wait()


def ready(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
