"""The HTTP server behind the exporter and the monitor: every request is answered, in bounded time.

Python's own server lets a client that sends a byte now and then hold a thread for ever, prints the
traceback of what it cannot read, answers a malformed request without a status line, and closes a
connection in a way that may take the answer with it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import socket
import threading
import time
from http import HTTPStatus
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.handlers import SimpleHandler
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

__all__ = ["Server"]

_PATIENCE_SECONDS = 10.0  # as long as Prometheus itself waits
_CONNECTIONS = 64  # at a time; a thread is held for each
_LONGEST = 1 << 16  # bytes of a request line
_LINGER_SECONDS = 2.0
_LINGER_BYTES = 1 << 20
_TOO_MANY = b"HTTP/1.0 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class _Incoming(io.RawIOBase):
    """What a client sends, until a deadline for all of it."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        super().__init__()
        self.begun = False  # whether any byte has come
        self._connection = connection
        self._deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0.0:
            raise TimeoutError
        self._connection.settimeout(left)
        count = self._connection.recv_into(buffer)
        self.begun = self.begun or count > 0
        return count


class _Answer(SimpleHandler):
    """The answer of the application; where that raises, the client is told 500, and nobody else."""

    server_software = "gradwatch"


class _Handler(WSGIRequestHandler):
    """One request; the client's faults are answered with a status, and never printed."""

    server_version = "gradwatch"
    sys_version = ""
    # Else the answer to what cannot be parsed has no status line.
    default_request_version = "HTTP/1.0"
    # As `send_error` finds them where the request line never came.
    command = ""
    requestline = ""
    request_version = "HTTP/1.0"
    raw_requestline = b""
    incoming: _Incoming
    parsed = False

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.incoming = _Incoming(self.connection, _PATIENCE_SECONDS)
        self.rfile = io.BufferedReader(self.incoming, 1 << 16)

    def handle(self) -> None:
        """Read the request and answer it; nobody is served for longer than the deadline."""
        try:
            self._serve()
        except TimeoutError:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        except OSError:
            pass  # the client has gone
        except Exception:  # noqa: BLE001 - a request that Python's parser does not survive
            self._refuse(HTTPStatus.BAD_REQUEST)

    def _serve(self) -> None:
        self.raw_requestline = self.rfile.readline(_LONGEST + 1)
        if len(self.raw_requestline) > _LONGEST:
            self._refuse(HTTPStatus.REQUEST_URI_TOO_LONG)
        elif self.parse_request():
            asked: Any = self.rfile
            told: Any = self.wfile
            answer = _Answer(asked, told, io.StringIO(), self.get_environ())
            answer.run(self.server.get_app())  # type: ignore[attr-defined]

    def parse_request(self) -> bool:
        """Take a lone CRLF before the request line as RFC 9112 (2.2) says, and HTTP/0.9's form."""
        if self.raw_requestline in {b"\r\n", b"\n"}:
            self.raw_requestline = self.rfile.readline(_LONGEST + 1)
        words = self.raw_requestline.split()
        if not words:
            self._refuse(HTTPStatus.BAD_REQUEST)
            return False
        if len(words) == 2:  # HTTP/0.9: no header follows, nor the empty line after them
            self.rfile = io.BufferedReader(io.BytesIO())
        self.parsed = super().parse_request()
        self.connection.settimeout(_PATIENCE_SECONDS)  # from here on for each write
        return self.parsed

    def finish(self) -> None:
        """Close so that the answer arrives: unread input would make the system reset the connection."""
        with contextlib.suppress(OSError):
            super().finish()
            self.connection.shutdown(socket.SHUT_WR)
            rest = _Incoming(self.connection, _LINGER_SECONDS)
            taken, buffer = 0, bytearray(1 << 16)
            while taken < _LINGER_BYTES and (count := rest.readinto(buffer)):
                taken += count

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _refuse(self, status: HTTPStatus) -> None:
        if self.parsed or not self.incoming.begun:  # it is being answered, or nothing was asked
            return
        with contextlib.suppress(OSError):
            self.connection.settimeout(_PATIENCE_SECONDS)
            self.send_error(status)


class Server(ThreadingMixIn, WSGIServer):
    """Serves a WSGI application at an address and port, IPv4 or IPv6. Raises `OSError`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], application: WSGIApplication) -> None:
        host, port = address
        try:
            found = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except ValueError as error:  # text that is no host's name: a.b..c, or one with a NUL
            raise OSError(errno.EADDRNOTAVAIL, "that is no host's name or address") from error
        self.address_family = found[0][0]
        self._free = threading.BoundedSemaphore(_CONNECTIONS)
        super().__init__((str(found[0][4][0]), port), _Handler)
        self.set_app(application)

    def server_bind(self) -> None:
        """Bind the port without asking DNS for this machine's name, which may take long."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer on a thread of its own; where too many are being answered, say so at once."""
        if not self._free.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.setblocking(False)
                request.send(_TOO_MANY)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The same on that thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing is printed into the job's own output."""
