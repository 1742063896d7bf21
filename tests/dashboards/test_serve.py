"""The dashboard's server goes with whoever started it."""

import os
import signal
import subprocess

from alerting import free_port

from gradwatch_dashboards.web import serve


def test_a_signal_that_comes_while_the_server_starts(monkeypatch):
    """It is there, and the name for it is not yet."""
    started, popen = [], subprocess.Popen

    def start(*arguments, **options):
        started.append(popen(*arguments, **options))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(serve.subprocess, "Popen", start)
    before = signal.getsignal(signal.SIGTERM)
    assert serve.run("gradwatch.db", port=free_port(), announce=lambda _: None) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    (server,) = started
    try:
        assert server.poll() is not None
    finally:
        server.kill()
        server.wait()
