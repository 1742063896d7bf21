"""Scrapers that connect and never ask, or never read: let go of after a while, without a word."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

__all__ = ["limit"]

_PATIENCE_SECONDS = 10.0  # as long as Prometheus itself waits


def limit(server: WSGIServer) -> None:
    """Serve nobody for longer than that; what a connection does wrong is not the job's to print."""
    asked: type[WSGIRequestHandler] = server.RequestHandlerClass  # type: ignore[assignment]

    class Handler(asked):  # type: ignore[misc, valid-type]
        timeout = _PATIENCE_SECONDS

        def handle(self) -> None:
            with contextlib.suppress(OSError):  # reset before it asked, or silent for too long
                super().handle()

        def get_stderr(self) -> io.StringIO:
            return io.StringIO()

    server.RequestHandlerClass = Handler
