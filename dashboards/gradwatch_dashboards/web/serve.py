"""Starting the Streamlit server: on loopback, no browser, no e-mail prompt, no statistics."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

from gradwatch.addresses import why_not_bound
from gradwatch.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["command", "run"]

_APP = Path(__file__).parent / "app.py"
_START_SECONDS = 60.0
_OPTIONS = {
    "server.headless": "true",
    "browser.gatherUsageStats": "false",
    "server.fileWatcherType": "none",
    "client.toolbarMode": "minimal",
    "client.showErrorDetails": "type",
}


def command(address: str, port: int) -> list[str]:
    """The command line of the server."""
    options = {**_OPTIONS, "server.address": address, "server.port": str(port)}
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "streamlit", "run", str(_APP), *flags]


def run(
    store: str,
    *,
    address: str = "127.0.0.1",
    port: int = 8501,
    run: str | None = None,
    announce: Callable[[str], None],
) -> int:
    """Serve until Ctrl-C; `announce` is called with the page's URL once it answers.

    Raises `ConfigurationError` where the port is taken.
    """
    if (problem := why_not_bound(address, port)) is not None:
        msg = f"the dashboard cannot bind {address}:{port} ({problem}): try --port"
        raise ConfigurationError(msg)
    host = f"[{address}]" if ":" in address else address
    page = f"http://{host}:{port}/"
    if run is not None:
        page += f"run?run={urllib.parse.quote(run)}"
    server: subprocess.Popen[bytes] | None = None
    asked = False

    def go(*_: object) -> None:
        nonlocal asked
        asked = True
        if server is not None:  # else it may be there, and we not know of it yet
            raise KeyboardInterrupt

    # Asked to go by a signal, take the server along: it is a process of its own.
    before = {kind: signal.signal(kind, go) for kind in (signal.SIGTERM, signal.SIGHUP)}
    try:
        # The store's URL may hold a password: the environment is not seen by other users.
        server = subprocess.Popen(  # noqa: S603 - our own command
            command(address, port),
            env={**os.environ, "GRADWATCH_STORE": store},
            stdout=subprocess.DEVNULL,
        )
        if asked:
            return 0
        if _answers(server, address, port):
            announce(page)
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        if server is not None:
            _stop(server)
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _answers(server: subprocess.Popen[bytes], address: str, port: int) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with socket.create_connection((address, port), timeout=1.0):
                return True
        except OSError:
            time.sleep(0.1)
    return False


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            server.kill()
