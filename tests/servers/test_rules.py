"""The shipped configuration and rules, by the programs that read them."""

import subprocess

import pytest
from alerting import SHIPPED


@pytest.mark.parametrize(
    "command",
    [
        "promtool check config prometheus.yml",
        "promtool check rules recording_rules.yml alert_rules.yml",
        "promtool test rules recording_rules_test.yml alert_rules_test.yml",
        "amtool check-config alertmanager.yml",
    ],
)
def test_prometheus_and_alertmanager_accept_what_is_shipped(server_program, command):
    """The ratio is right, and none for an idle run; each alert fires where it should alone."""
    program, *arguments = command.split()
    package = "prometheus" if program == "promtool" else "prometheus-alertmanager"
    path = server_program(program, package)
    result = subprocess.run(
        [path, *arguments], cwd=SHIPPED, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
