"""A real job and monitor that a real Prometheus has scraped for a while, and what SQL says of them."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time

from alerting import SHIPPED, asked, free_port, ready
from jobs import wait_until

SECONDS = 15  # of training that are scraped, one scrape a second
# Two runs in one process: one with a NaN in every 97th gradient, one under a loss scaler with an
# overflow in every 53rd. `overhead` is what the agent itself says at each step of the first.
JOB = """
import json, sys, threading, time, torch, gradwatch
torch.manual_seed(0)
torch.set_num_threads(1)

class Run:
    def __init__(self, name, clip, scaler=None):
        self.model = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.agent = gradwatch.Agent(self.optimizer, model=self.model, clip=clip, run=name,
                                     store="gradwatch.db", scaler=scaler)
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)

    def step(self, spoil):
        x = torch.randn(8, 8)
        self.optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(self.model(x), 2 * x.sum(1, keepdim=True))
        self.scaler.scale(loss).backward()
        if spoil is not None:
            self.model[0].weight.grad[0, 0] = spoil
        self.agent.log(loss=loss)
        self.scaler.step(self.optimizer)
        self.scaler.update()

runs = [Run("noisy", gradwatch.ClipNorm(2.0)),
        Run("scaled", gradwatch.TargetRatio(cap=9.0), torch.amp.GradScaler("cpu", init_scale=256.0))]
overhead, step, ending = [], 0, threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), ending.set()), daemon=True).start()
while not ending.is_set():
    runs[0].step(float("nan") if step % 197 == 50 else None)
    runs[1].step(float("inf") if step % 53 == 30 else None)
    overhead.append(runs[0].agent._recording.channel.overhead)
    step += 1
    time.sleep(0.004)
assert all(run.agent.flush() for run in runs)
print(json.dumps({"steps": step, "overhead": overhead}), flush=True)
sys.stdin.readline()
"""
CLI = "from gradwatch_dashboards.cli import main; main()"


class Watched:
    """The job, the monitor and Prometheus in a folder; the job has taken its last step."""

    def __init__(self, prometheus, folder):
        self.folder, self._processes = folder, []
        self._configure(prometheus)
        environ = {
            **os.environ, "GRADWATCH_SD_DIR": "targets", "GRADWATCH_METRICS_PORT": "0",
            "GRADWATCH_DRAIN_INTERVAL": "0.05", "GRADWATCH_STORE": "gradwatch.db",
        }  # fmt: skip
        self.job = self._start(
            [sys.executable, "-c", JOB], env=environ,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        # The monitor recommends once a minute: not before there is something to recommend from.
        wait_until(lambda: self.steps("noisy") > 300, seconds=60)
        self._start(
            [sys.executable, "-c", CLI, "monitor", "--port", "0", "--interval", "0.5"],
            env=environ, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(self._is_recommended, seconds=60)
        time.sleep(SECONDS)
        self.job.stdin.write("end\n")
        self.job.stdin.flush()
        told = json.loads(self.job.stdout.readline())
        self.taken, self.overhead = told["steps"], told["overhead"]
        self.ended_at = time.time()
        self.at = self.ended_at - 1.0  # a moment at which all was being scraped

    def _is_recommended(self):
        return self.query('gradwatch_recommended_threshold{run="noisy"}', at=time.time())

    def _configure(self, prometheus):
        (self.folder / "targets").mkdir()
        for name in ("recording_rules.yml", "alert_rules.yml"):
            shutil.copy(SHIPPED / name, self.folder)
        text = (SHIPPED / "prometheus.yml").read_text()
        assert text.count("interval: 15s") == 3  # a comment among them
        text = text.replace("interval: 15s", "interval: 1s")
        (self.folder / "prometheus.yml").write_text(text)
        self.url = f"http://127.0.0.1:{free_port()}"
        self._start(
            [prometheus, f"--config.file={self.folder}/prometheus.yml",
             f"--storage.tsdb.path={self.folder}/data",
             f"--web.listen-address={self.url.removeprefix('http://')}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(lambda: ready(f"{self.url}/-/ready"), seconds=60)

    def _start(self, command, **options):
        self._processes.append(subprocess.Popen(command, cwd=self.folder, **options))
        return self._processes[-1]

    def stop(self):
        for process in self._processes:
            process.kill()
            process.communicate()

    # -- Prometheus ----------------------------------------------------------------------------

    def query(self, expression, at=None):
        """The result as of that moment, by default the one in the middle of it all."""
        moment = self.at if at is None else at
        return asked(self.url, query=expression, time=moment)

    def values(self, expression, *labels, at=None):
        """Labels → value; of a single series without labels, () → value."""
        series = self.query(expression, at)
        found = {
            tuple(one["metric"].get(label, "") for label in labels): float(one["value"][1])
            for one in series
        }
        assert len(found) == len(series), expression
        return found

    def scrapes(self, run, seconds=10):
        """(time, steps seen by then) of the scrapes in the last seconds."""
        (series,) = self.query(f'gradwatch_steps_total{{run="{run}"}}[{seconds}s]')
        return [(when, int(value)) for when, value in series["values"]]

    # -- SQL -----------------------------------------------------------------------------------

    def sql(self, query, *arguments):
        with sqlite3.connect(f"file:{self.folder}/gradwatch.db?mode=ro", uri=True) as connection:
            return connection.execute(query, arguments).fetchall()

    def steps(self, run):
        """How many are stored; 0 before there is a store."""
        try:
            return self.count(run)
        except sqlite3.Error:
            return 0

    def count(self, run, where="1", first=0, stop=2**62):
        """Steps of that kind from `first` on, before `stop`."""
        ((count,),) = self.sql(
            "SELECT count(*) FROM steps JOIN runs ON runs.id = run_id WHERE name = ? "
            f"AND step >= ? AND step < ? AND ({where})",
            run, first, stop,
        )  # fmt: skip
        return count

    def column(self, run, column, first=0, stop=2**62, where="1"):
        """Its finite values of those steps, in order."""
        rows = self.sql(
            f"SELECT {column} FROM steps JOIN runs ON runs.id = run_id WHERE name = ? "
            f"AND step >= ? AND step < ? AND {column} IS NOT NULL AND {where} ORDER BY step",
            run, first, stop,
        )  # fmt: skip
        return [value for (value,) in rows]
