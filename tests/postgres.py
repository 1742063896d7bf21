"""A PostgreSQL of the tests' own, which they may stop and kill; nothing of the system's is used."""

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg

PASSWORD = "s3cret pass@word"  # on every URL, so that whatever leaks it shows
QUOTED = "s3cret%20pass%40word"


def find_program(program):
    """A program of PostgreSQL's: Debian keeps the server's off the PATH."""
    places = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), *places]))


class PostgresServer:
    """One server, one folder, one port of the loopback interface."""

    def __init__(self, program):
        self.bin = Path(program).resolve().parent
        self.folder = Path(tempfile.mkdtemp(prefix="gradwatch-postgres-"))
        self.account = {}
        if os.geteuid() == 0:  # as whom PostgreSQL refuses to run
            import pwd

            names = {entry.pw_name for entry in pwd.getpwall()}
            user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self.account = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process = None
        self._names = itertools.count(1)
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        self._call(
            "initdb", "--pgdata", self.folder / "data", "--username", "gradwatch",
            "--auth", "scram-sha-256", "--pwfile", secret, "--encoding", "UTF8",
            "--no-locale", "--no-sync",
        )  # fmt: skip

    def _call(self, program, *arguments):
        done = subprocess.run(
            [self.bin / program, *arguments], capture_output=True, text=True, cwd=self.folder,
            check=False, **self.account,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, **settings):
        """Start it, and wait until it answers; after a kill the old one's memory has to go first."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.folder,
            "fsync": "off",
            **settings,
        }
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        deadline = time.monotonic() + 60
        while True:
            if self.process is None or self.process.poll() is not None:
                with (self.folder / "log").open("ab") as log:
                    self.process = subprocess.Popen(
                        [self.bin / "postgres", "-D", self.folder / "data", *flags],
                        stdout=log, stderr=log, cwd=self.folder, **self.account,
                    )  # fmt: skip
            with contextlib.suppress(psycopg.OperationalError):
                self.connect().close()
                return
            assert time.monotonic() < deadline, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.05)

    def stop(self, how=signal.SIGINT):
        """Stop it: every connection is closed, everything is on disk."""
        self.process.send_signal(how)
        self.process.wait(60)

    def kill(self):
        """`kill -9` of all its processes at one moment; what was not written yet is lost."""
        self._signal(signal.SIGKILL)
        self.process.wait(60)

    @contextlib.contextmanager
    def hanging(self):
        """It answers nobody and closes no connection, for the length of the context."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def _signal(self, kind):
        """Send a signal to all its processes."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for one in [pid, *map(int, children)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, kind)

    def connect(self, database="postgres"):
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="gradwatch", password=PASSWORD,
            dbname=database, autocommit=True,
        )  # fmt: skip

    def url(self, database):
        return f"postgresql+psycopg://gradwatch:{QUOTED}@127.0.0.1:{self.port}/{database}"

    def new_database(self, options=""):
        """The URL of an empty database, created with these options."""
        name = f"store{next(self._names)}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name} {options}")
        return self.url(name)

    def query(self, url, sql, *arguments):
        """Rows by psycopg itself."""
        with self.connect(url.rpartition("/")[2]) as connection:
            cursor = connection.execute(sql, arguments or None)
            return cursor.fetchall() if cursor.description else cursor.rowcount

    def remove(self):
        if self.process is not None and self.process.poll() is None:
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder)
