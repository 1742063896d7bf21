"""docker-compose.yml: what docker-compose makes of it keeps what is promised."""

import re
import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def config(server_program):
    """Runs `docker-compose config` on the file; the lines it prints."""
    program = server_program("docker-compose", "docker-compose")

    def run(*options):
        result = subprocess.run(
            [program, "config", *options], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        return result.stdout.splitlines()

    return run


ROOT = Path(__file__).parents[2]
SERVICES = {"postgres", "prometheus", "alertmanager", "grafana", "monitor", "dashboard", "job"}


def test_docker_compose_accepts_it(config):
    """All services, each with a health check and a pinned image."""
    assert set(config("--services")) == SERVICES
    text = "\n".join(config())
    assert text.count("healthcheck:") == len(SERVICES)
    images = re.findall(r"image: (\S+)", text)
    assert len(images) == len(SERVICES)
    for image in images:
        assert re.fullmatch(r"[a-z/]+:v?\d+(\.\d+)+\S*", image), image


def test_it_is_published_on_loopback_alone(config):
    """Every port of the host is 127.0.0.1's."""
    published = re.findall(r"- (\S+):\d+/tcp", "\n".join(config()))
    assert {address.rsplit(":", 1)[0] for address in published} == {"127.0.0.1"}
    assert len(published) == 6


def test_no_secret_stands_in_it(config):
    """Passwords are files, named in environment variables that end so."""
    text = "\n".join(config())
    for name, value in re.findall(r"(\S*(?:PASSWORD|TOKEN)\S*): (\S+)", text):
        assert name.endswith("_FILE"), name
        assert value.startswith("/run/secrets/")
    assert "gradwatch@postgres/" in text


def test_every_file_that_it_mounts_is_in_the_tree(config):
    """Save what `make compose-files` makes."""
    made = subprocess.run(
        ["make", "-n", "compose-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for path in re.findall(rf"- {ROOT}/(\S+?):", "\n".join(config())):
        assert (ROOT / path).exists() or path in made, path
