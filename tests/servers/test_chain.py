"""From a NaN in a gradient to a person: real jobs, Prometheus, Alertmanager, and who is notified."""

import os
import signal
import subprocess
import sys

import pytest
from alerting import Receiver, Stack
from jobs import wait_until

# Trains until a line comes, with a NaN in the gradient of its steps number `at` (-1: of the step
# after a line "nan"). Called "sick" it trains under a loss scale of 0, at which every step overflows, and
# logs losses of NaN.
JOB = """
import os, sys, threading, time, torch, gradwatch
name, at = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
scaler = torch.amp.GradScaler("cpu", init_scale=0.0, enabled=name == "sick")
agent = gradwatch.Agent(optimizer, model=model, run=name, store=os.environ["GRADWATCH_RUN_ID"] + ".db",
                        clip=gradwatch.ClipNorm(1e6), scaler=scaler)
orders = []
threading.Thread(target=lambda: orders.extend(iter(sys.stdin.readline, "")), daemon=True).start()
step = 0
while "end\\n" not in orders:
    optimizer.zero_grad()
    loss = model(torch.randn(8, 8)).pow(2).mean()
    scaler.scale(loss).backward()
    agent.log(loss=loss * float("nan") if name == "sick" else loss)
    if step == at or "nan\\n" in orders:
        orders.clear()
        model.weight.grad[0, 3] = float("nan")
    scaler.step(optimizer)
    scaler.update()
    step += 1
    time.sleep(0.01)
"""


@pytest.fixture
def chain(server_program, tmp_path):
    """The servers, and who is notified."""
    programs = [
        server_program("prometheus", "prometheus"),
        server_program("prometheus-alertmanager", "prometheus-alertmanager"),
    ]
    receiver = Receiver()
    stack = Stack(tmp_path, *programs, receiver.port)
    yield stack, receiver
    stack.stop()
    receiver.stop()


@pytest.fixture
def job(monkeypatch, chain):
    """Starts a job that Prometheus can find."""
    monkeypatch.setenv("GRADWATCH_SD_DIR", "targets")
    started = []

    def start(name, nan_at=-1, uid=None):
        arguments = [sys.executable, "-c", JOB, name, str(nan_at)]
        environ = {
            **os.environ,
            "GRADWATCH_RUN_ID": uid or name,  # started again, it is the same run
            "GRADWATCH_METRICS_PORT": "0",  # who took a dead job's port would hide it
        }
        started.append(subprocess.Popen(arguments, stdin=subprocess.PIPE, text=True, env=environ))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def order(process, line):
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def test_sick_and_dead_jobs_reach_a_person_and_a_good_end_does_not(chain, job):
    """Each is notified with its run and rank, whenever the NaN came; nothing else is.

    Also of losses of NaN where no gradient is, of a scaler that skips every step, and of a killed run
    whose name another has meanwhile.
    """
    stack, receiver = chain
    jobs = {"nan-midway": job("nan-midway"), "sick": job("sick"), "killed": job("killed", 0)}

    def seen():
        return {labels["run"] for labels in stack.query("gradwatch_run_active == 1")}

    wait_until(lambda: seen() == set(jobs), seen, seconds=60)
    # The NaN of `killed` is older than Prometheus' first look at it.
    expected = {
        ("GradwatchNonfiniteGradients", "killed"),
        ("GradwatchNonfiniteLoss", "sick"),
        ("GradwatchStepsNotApplied", "sick"),
    }
    wait_until(lambda: receiver.told() == expected, receiver.told)
    order(jobs["nan-midway"], "nan")
    expected |= {("GradwatchNonfiniteGradients", "nan-midway")}
    wait_until(lambda: receiver.told() == expected, receiver.told)

    assert not stack.query('gradwatch_nonfinite_steps_total{run="sick"} > 0')
    assert not stack.query('gradwatch_loss{run="sick"}')
    for name in ("nan-midway", "sick"):
        order(jobs[name], "end")
        assert jobs[name].wait(timeout=30) == 0
    # Whoever is not looked for is not missed.
    wait_until(lambda: len(stack.query("up")) == 1, lambda: stack.query("up"))
    jobs["killed"].send_signal(signal.SIGKILL)
    job("killed", uid="another")
    expected |= {("GradwatchAgentGone", "killed")}
    wait_until(lambda: receiver.told() == expected, receiver.told, seconds=40)
    later = 'gradwatch_run_active{run="killed", uid="another"} == 1'
    wait_until(lambda: stack.query(later), seconds=60)
    (gone,) = stack.query('ALERTS{alertname="GradwatchAgentGone"}')
    assert (gone["uid"], gone["alertstate"]) == ("killed", "firing")

    for alert in receiver.alerts:
        labels, told = alert["labels"], alert["annotations"]
        assert labels["rank"] == "0"
        assert labels["severity"] in {"warning", "critical"}
        assert f"{labels['run']} (rank 0)" in told["summary"]
        assert f"un {labels['run']}, rank 0" in told["description"]
        assert told["runbook_url"].startswith("docs/runbook.md#")

    # The run goes on: nobody need look after it any more.
    job("killed")
    over = {("GradwatchAgentGone", "killed")}
    wait_until(lambda: over <= receiver.told("resolved"), receiver.alerts.copy, seconds=60)
