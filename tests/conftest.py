"""Every test runs in a folder of its own, with a process pipeline of its own."""

import os
import shutil
import sys

# Before torch is loaded, for the jobs of the tests as well: there is a test for each core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

from gradwatch import process

# A busy machine is not a failing test.
hypothesis.settings.register_profile("plain", deadline=None)
hypothesis.settings.load_profile("plain")

MADE_BY_LAUNCHERS = ("GRADWATCH_", "SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_RANK")


def pytest_addoption(parser):
    """How long `tests/fuzz` looks, in all, and where it begins."""
    parser.addoption("--fuzz-seconds", type=float, default=50.0, help="seconds to fuzz for, in all")
    parser.addoption("--fuzz-seed", type=int, default=0, help="the first seed")


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    """No setting, file, port or thread of one test reaches another."""
    for name in list(os.environ):
        if name.startswith(MADE_BY_LAUNCHERS):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADWATCH_METRICS_PORT", "0")
    monkeypatch.setenv("GRADWATCH_DRAIN_INTERVAL", "0.05")
    # Streamlit's AppTest leaves its page there, which every spawned process would import.
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    yield
    if process._process.pipeline is not None:
        process._process.pipeline.shutdown("finished", 10.0)
        process._process.pipeline = None


def found(path, program, package):
    """The path; skips where there is none, naming the package, or fails where it must not."""
    if path is None:
        message = f"{program} is not installed: apt-get install {package}"
        if os.environ.get("REQUIRE_TEST_SERVERS") == "required":
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command line as the console script does: status, output, errors."""
    from gradwatch_dashboards import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["gradwatch", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def server_program():
    """The path of a server's program."""
    return lambda program, package: found(shutil.which(program), program, package)


@pytest.fixture(scope="session")
def _postgres_server():
    """A real PostgreSQL, started once."""
    import postgres

    server = postgres.PostgresServer(
        found(postgres.find_program("initdb"), "PostgreSQL's initdb", "postgresql")
    )
    yield server
    server.remove()


@pytest.fixture
def postgres_server(_postgres_server, monkeypatch, tmp_path):
    """The same, running: the test before may have stopped it. Rings go with the test's folder."""
    monkeypatch.setenv("GRADWATCH_RING_DIR", str(tmp_path / "rings"))
    if _postgres_server.process is None or _postgres_server.process.poll() is not None:
        _postgres_server.start()
    return _postgres_server
