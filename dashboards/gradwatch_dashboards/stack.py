"""The whole stack on this machine without Docker: `make stack`, until Ctrl-C.

Prometheus and Alertmanager from the system's packages, the monitor, the dashboard and a sample job,
each a process on loopback with its log and state in one folder. What Alertmanager notifies of is
printed here. Ports: PROMETHEUS_PORT, ALERTMANAGER_PORT, MONITOR_PORT, DASHBOARD_PORT.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from gradwatch.addresses import why_not_bound

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["main"]

_SHIPPED = Path(__file__).parent / "prometheus"
_FILES = ("prometheus.yml", "recording_rules.yml", "alert_rules.yml", "alertmanager.yml")
_START_SECONDS = 120.0
_STOP_SECONDS = 10.0
_GRADWATCH = (sys.executable, "-c", "from gradwatch_dashboards.cli import main; main()")


class _Part(NamedTuple):
    """One process: its command, where it shows itself, where it says that it is well."""

    name: str
    command: list[str]
    url: str
    health: str
    stop: signal.Signals = signal.SIGTERM


class _Receiver(BaseHTTPRequestHandler):
    """Alertmanager's webhook: a line on the terminal for each alert."""

    def do_POST(self) -> None:
        """Print the alerts of one notification."""
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        for alert in told["alerts"]:
            _say(f"{alert['status'].upper():9} {alert['annotations']['summary']}")
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a program's output


def _port(name: str, default: int) -> int:
    """The port that was asked for, which has to be free: another's server would be taken for ours."""
    told = os.environ.get(f"{name}_PORT", str(default))
    if not told.isascii() or not told.isdigit() or not 0 < int(told) < 65536:
        sys.exit(f"{name}_PORT={told}: a port is a number from 1 to 65535")
    if (problem := why_not_bound("127.0.0.1", int(told))) is not None:
        sys.exit(f"port {told} cannot be had ({problem}): set {name}_PORT to another")
    return int(told)


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        sys.exit(f"{name} is not installed: apt-get install prometheus prometheus-alertmanager")
    return path


def _configure(folder: Path, alertmanager: int, receiver: int) -> None:
    """The shipped files, with these ports."""
    (folder / "targets").mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        text = (_SHIPPED / name).read_text()
        text = text.replace("127.0.0.1:9093", f"127.0.0.1:{alertmanager}")
        (folder / name).write_text(text.replace("127.0.0.1:9097", f"127.0.0.1:{receiver}"))


def _parts(folder: Path, alertmanager: int) -> Iterator[_Part]:
    prometheus = _port("PROMETHEUS", 9090)
    monitor, dashboard = _port("MONITOR", 9496), _port("DASHBOARD", 8501)

    def server(name: str, program: str, port: int, *options: str) -> _Part:
        url = f"http://127.0.0.1:{port}/"
        config = f"--config.file={folder}/{name}.yml"
        command = [_program(program), config, f"--web.listen-address=127.0.0.1:{port}", *options]
        return _Part(name, command, url, f"{url}-/ready")

    yield server("prometheus", "prometheus", prometheus,
                 f"--storage.tsdb.path={folder}/prometheus")  # fmt: skip
    yield server("alertmanager", "prometheus-alertmanager", alertmanager,
                 f"--storage.path={folder}/alertmanager", "--cluster.listen-address=")  # fmt: skip
    for name, verb, port, health in (
        ("monitor", "monitor", monitor, "healthz"),
        ("dashboard", "ui", dashboard, "_stcore/health"),
    ):
        url = f"http://127.0.0.1:{port}/"
        yield _Part(name, [*_GRADWATCH, verb, "--port", str(port)], url, url + health)
    # By SIGINT: the run ends, and Prometheus does not miss it.
    yield _Part("sample job", [*_GRADWATCH, "demo", "--no-ui", "--epochs", "3000"],
                "the run `demo` on the dashboard",
                f"http://127.0.0.1:{prometheus}/api/v1/query?query=gradwatch_steps_total%7Brun%3D~%22demo.*%22%7D",
                signal.SIGINT)  # fmt: skip


def _well(part: _Part) -> bool:
    try:
        with urllib.request.urlopen(part.health, timeout=5) as answer:  # noqa: S310 - our own
            return b'"result":[]' not in answer.read()
    except OSError:
        return False


def _log(folder: Path, part: _Part) -> Path:
    return folder / f"{part.name.replace(' ', '-')}.log"


def _wait(folder: Path, part: _Part, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _well(part):
        if process.poll() is not None or time.monotonic() > deadline:
            log = _log(folder, part)
            lines = log.read_text(errors="replace").splitlines()[-5:]
            sys.exit("\n".join([f"{part.name} does not start; the end of {log}:", *lines]))
        time.sleep(0.2)


def _end(running: list[tuple[_Part, subprocess.Popen[bytes]]]) -> None:
    """Ask all to go; what does not, with what it has started, is killed."""
    for part, process in running:
        if process.poll() is None:
            process.send_signal(part.stop)
    deadline = time.monotonic() + _STOP_SECONDS
    for _, process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Start everything, say where it is, and end everything with Ctrl-C."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "stack").absolute()
    alertmanager = _port("ALERTMANAGER", 9093)
    receiver = ThreadingHTTPServer(("127.0.0.1", 0), _Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    _configure(folder, alertmanager, receiver.server_port)
    parts = list(_parts(folder, alertmanager))
    environ = {
        **os.environ,
        "GRADWATCH_STORE": f"sqlite:///{folder}/gradwatch.db",
        "GRADWATCH_SD_DIR": str(folder / "targets"),
    }
    # SIGINT too: a shell may have it ignored, which the sample job would inherit.
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, _interrupt)
    running: list[tuple[_Part, subprocess.Popen[bytes]]] = []
    try:
        for part in parts:
            with _log(folder, part).open("wb") as log:
                process = subprocess.Popen(  # noqa: S603 - our own commands
                    part.command,
                    cwd=folder,
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is ours to pass on
                )
            running.append((part, process))
        for part, process in running:
            _wait(folder, part, process)
            _say(f"{part.name:13} {part.url}")
        _say(f"State and logs: {folder}   (Ctrl-C ends all)")
        for _, process in reversed(running):  # the job may end before the others
            process.wait()
    except KeyboardInterrupt:
        _say("Ending.")
    finally:
        for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(kind, signal.SIG_IGN)
        _end(running)
        receiver.shutdown()


if __name__ == "__main__":
    main()
