"""A real Prometheus scrapes a real training process; what it has equals what SQL says."""

import json
import shutil
import sqlite3
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

import gradwatch_dashboards

RULES = Path(gradwatch_dashboards.__file__).parent / "prometheus"

JOB = """
import sys, time, torch, gradwatch
torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
agent = gradwatch.Agent(optimizer, model=model, clip=gradwatch.ClipNorm(2.0), run="scraped",
                        store="gradwatch.db", metrics_port=0)
print(agent.metrics_url, flush=True)
until = time.time() + 14
step = 0
while time.time() < until:
    x = torch.randn(8, 8)
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), 2 * x.sum(1, keepdim=True))
    loss.backward()
    if step % 97 == 50:
        model[0].weight.grad[0, 0] = float("nan")
    agent.log(loss=loss)
    optimizer.step()
    step += 1
    time.sleep(0.003)
assert agent.flush()
print(step, flush=True)
sys.stdin.readline()
"""


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Prometheus:
    """A server of the test's own."""

    def __init__(self, program, folder, target):
        self.port = free_port()
        shutil.copy(RULES / "recording_rules.yml", folder)
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["recording_rules.yml"],
            "scrape_configs": [
                {"job_name": "gradwatch", "static_configs": [{"targets": [target]}]}
            ],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        self.process = subprocess.Popen(
            [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/d",
             f"--web.listen-address=127.0.0.1:{self.port}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.wait_until(lambda: self.get("/api/v1/status/buildinfo"))

    def get(self, path, **parameters):
        url = f"http://127.0.0.1:{self.port}{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=5) as response:
            return json.load(response)["data"]

    def query(self, expression):
        return self.get("/api/v1/query", query=expression)["result"]

    @staticmethod
    def wait_until(condition, seconds=60):
        deadline = time.monotonic() + seconds
        while True:
            try:
                if result := condition():
                    return result
            except OSError:
                pass
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def stop(self):
        self.process.terminate()
        self.process.wait()


@pytest.fixture
def scraped(server_program, tmp_path):
    """A training process and the Prometheus that scrapes it."""
    program = server_program("prometheus", "prometheus")
    job = subprocess.Popen(
        [sys.executable, "-c", JOB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    target = urllib.parse.urlsplit(job.stdout.readline().strip()).netloc
    server = Prometheus(program, tmp_path, target)
    yield server, job
    server.stop()
    job.communicate("\n", timeout=30)
    assert job.returncode == 0


def counts(where=""):
    with sqlite3.connect("file:gradwatch.db?mode=ro", uri=True) as connection:
        return connection.execute(
            "SELECT count(*), sum(clipped), sum(nonfinite), sum(skipped) FROM steps "
            f"WHERE run_id = 1 {where}"
        ).fetchone()


NAMES = ("steps", "clipped_steps", "nonfinite_steps", "skipped_steps")


def test_counters_of_every_scrape_equal_sql(scraped):
    """Each scrape's counters, taken mid-run, are exactly the counts by SQL over the same steps."""
    server, job = scraped
    steps = int(job.stdout.readline())
    assert counts()[0] == steps
    last = 'gradwatch_steps_total{run="scraped",rank="0"}'
    server.wait_until(lambda: [float(r["value"][1]) for r in server.query(last)] == [steps])
    series = {}
    for name in NAMES:
        (result,) = server.query(f'gradwatch_{name}_total{{run="scraped"}}[5m]')
        series[name] = {time: float(value) for time, value in result["values"]}
    scrapes = sorted(set.intersection(*(set(s) for s in series.values())))
    seen = {tuple(int(series[name][t]) for name in NAMES) for t in scrapes}
    assert len(seen) >= 6  # of which most in the middle of the run
    for scrape in seen:
        assert tuple(n or 0 for n in counts(f"AND step < {scrape[0]}")) == scrape

    # The recorded ratio is of rates over what was scraped in the window.
    first, final = series["steps"][scrapes[0]], series["steps"][scrapes[-1]]
    clipped = counts(f"AND step >= {first} AND step < {final}")[1]
    true_ratio = clipped / (final - first)
    assert 0.05 < true_ratio < 0.95
    ratio = 'run:gradwatch_clip_ratio:rate5m{run="scraped"}'
    server.wait_until(lambda: len(server.query(f"{ratio}[1m]")[0]["values"]) > 3)
    (recorded,) = server.query(ratio)
    assert float(recorded["value"][1]) == pytest.approx(true_ratio, rel=0.02)


def test_everything_scraped_is_finite(scraped):
    """No sample of any gradwatch series is NaN or inf, though every 97th gradient is."""
    server, job = scraped
    job.stdout.readline()
    time.sleep(2)
    results = server.query('{__name__=~"gradwatch_.*"}')
    assert len({r["metric"]["__name__"] for r in results}) > 15
    assert all(r["value"][1] not in {"NaN", "+Inf", "-Inf"} for r in results)
