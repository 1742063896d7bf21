"""What a scrape shows: every metric of the table, the true counts, nothing non-finite."""

import math
import socket
import urllib.request

import numpy as np
import pytest
import torch
from loops import mlp, set_gradients
from prometheus_client.parser import text_string_to_metric_families

import gradwatch
from gradwatch import Agent, metrics
from gradwatch.testing import MemorySink


def scrape(url):
    """Samples by name and labels, as a Prometheus client reads them."""
    with urllib.request.urlopen(url, timeout=5) as response:
        text = response.read().decode()
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.items()))
            assert key not in samples
            samples[key] = sample.value
    return samples


def value(samples, name, **labels):
    labels = {"run": "scraped", "rank": "0"} | labels
    return samples[(name, *sorted(labels.items()))]


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def start(steps=0, **arguments):
    model = mlp()
    optimizer = adamw(model)
    arguments = {"store": MemorySink(), "run": "scraped"} | arguments
    agent = Agent(optimizer, model=model, **arguments)
    for step in range(steps):
        set_gradients(step, model)
        optimizer.step()
    agent.flush()
    return agent, model, optimizer


def test_counters_and_histograms_equal_the_records():
    """Counts, sums and buckets against numpy over the stored records."""
    sink = MemorySink()
    agent, model, optimizer = start(200, store=sink)
    set_gradients(200, model)
    model[0].bias.grad[0] = math.nan
    agent.log(loss=0.25)
    optimizer.step()
    assert agent.flush()
    samples = scrape(agent.metrics_url)
    records = sink.steps
    counts = {
        "gradwatch_steps_total": len(records),
        "gradwatch_clipped_steps_total": sum(r.clipped for r in records),
        "gradwatch_nonfinite_steps_total": 1,
        "gradwatch_skipped_steps_total": 1,
        "gradwatch_amp_overflow_steps_total": 0,
    }
    for name, count in counts.items():
        assert value(samples, name) == count
    for name, field in (("pre", "pre_norm"), ("post", "post_norm")):
        norms = np.array([getattr(r, field) for r in records])
        norms = norms[np.isfinite(norms)]
        family = f"gradwatch_grad_norm_{name}_clip"
        assert value(samples, f"{family}_count") == 200
        assert value(samples, f"{family}_sum") == pytest.approx(norms.sum())
        for bound in metrics.NORM_BUCKETS:
            assert value(samples, f"{family}_bucket", le=str(bound)) == (norms <= bound).sum()
        assert value(samples, f"gradwatch_last_grad_norm_{name}_clip") == norms[-1]
    assert value(samples, "gradwatch_clip_threshold") == 1.0
    assert value(samples, "gradwatch_learning_rate") == 0.01
    assert value(samples, "gradwatch_loss") == 0.25
    assert value(samples, "gradwatch_last_step_timestamp_seconds") == records[-1].time
    assert value(samples, "gradwatch_overhead_seconds_total") > 0


def test_every_metric_of_the_table_is_exported_and_no_other():
    """Names and labels are those of `metrics.py`; no `_created` series."""
    agent, *_ = start(3)
    samples = scrape(agent.metrics_url)
    suffixes = {"histogram": ("_bucket", "_count", "_sum")}
    expected = {
        m.name + suffix
        for m in (*metrics.AGENT, metrics.EXPORTER, metrics.RUNS_NOT_EXPORTED)
        for suffix in suffixes.get(m.type, ("",))
    } - {
        "gradwatch_loss", "gradwatch_max_loss", "gradwatch_last_finite_loss_timestamp_seconds",
        "gradwatch_loss_scale",
    }  # nobody logged a loss, there is no scaler  # fmt: skip
    assert {key[0] for key in samples} == expected
    of_the_process = {metrics.EXPORTER.name, metrics.RUNS_NOT_EXPORTED.name}
    table = {m.name: m for m in (*metrics.AGENT, metrics.EXPORTER, metrics.RUNS_NOT_EXPORTED)}
    for key in samples:
        labels = {name for name, _ in key[1:]} - {"le"}
        name = next(n for n in (key[0], key[0].rsplit("_", 1)[0]) if n in table)
        own = set() if name in of_the_process else {"run", "rank"}
        assert labels == own | set(table[name].labels)


def test_from_the_first_scrape_counters_are_0_and_gauges_absent():
    """A NaN first step: counters exist with every reason, no gauge tells a value nobody had."""
    agent, model, optimizer = start()
    set_gradients(0, model)
    model[0].bias.grad[0] = math.nan
    optimizer.step()
    assert agent.flush()
    samples = scrape(agent.metrics_url)
    for reason in metrics.DROP_REASONS:
        assert value(samples, "gradwatch_dropped_records_total", reason=reason) == 0
    names = {key[0] for key in samples}
    assert "gradwatch_last_grad_norm_pre_clip" not in names
    assert "gradwatch_loss" not in names
    assert all(math.isfinite(v) for v in samples.values())


def test_run_info_tells_who_the_run_is():
    """uid, host, optimizer, policy and versions, as labels of one series."""
    agent, *_ = start(1)
    (info,) = [dict(k[1:]) for k in scrape(agent.metrics_url) if k[0] == "gradwatch_run_info"]
    assert info["uid"] == agent.run_id
    assert info["optimizer"] == "AdamW"
    assert info["policy"] == "ClipNorm(1.0)"
    assert info["gradwatch"] == gradwatch.__version__


def test_one_exporter_a_process():
    """Two agents, also of one name, share a port and are told apart; a third port is refused."""
    first, *_ = start(2)
    second, *_ = start(3)
    assert first.metrics_url == second.metrics_url
    samples = scrape(first.metrics_url)
    assert value(samples, "gradwatch_steps_total") == 2
    assert value(samples, "gradwatch_steps_total", run="scraped-2") == 3


def test_an_agent_that_resumes_counts_on():
    """The same run going on in this process keeps its counters: they never go back."""
    agent, model, optimizer = start(5)
    agent.load_state_dict(agent.state_dict())
    set_gradients(0, model)
    optimizer.step()
    assert agent.flush()
    assert value(scrape(agent.metrics_url), "gradwatch_steps_total") == 6


def test_a_run_that_ended_is_still_scraped_for_a_while():
    """Its last values do not vanish between two scrapes."""
    agent, *_ = start(4)
    url = agent.metrics_url
    other, *_ = start(1, run="other")
    assert value(scrape(url), "gradwatch_run_active", uid=agent.run_id) == 1
    agent.close()
    assert value(scrape(url), "gradwatch_steps_total") == 4
    assert value(scrape(url), "gradwatch_run_active", uid=agent.run_id) == 0
    assert value(scrape(url), "gradwatch_run_active", run="other", uid=other.run_id) == 1
    replaced, *_ = start(2)
    samples = scrape(url)
    assert value(samples, "gradwatch_steps_total") == 2
    assert value(samples, "gradwatch_run_active", uid=replaced.run_id) == 1
    # Else the last that Prometheus knows of the first one would be that it goes on.
    assert value(samples, "gradwatch_run_active", uid=agent.run_id) == 0
    assert other.metrics_url == replaced.metrics_url == url


def test_a_run_that_failed_is_neither_active_nor_ended_well():
    """Should its process die of that, the last that Prometheus saw is a run that went on."""
    agent, *_ = start(4)
    with pytest.raises(ZeroDivisionError), agent:
        1 / 0  # noqa: B018
    samples = scrape(agent.metrics_url or agent._recording.pipeline._exporter.url)
    assert value(samples, "gradwatch_steps_total") == 4
    assert not [key for key in samples if key[0] == "gradwatch_run_active"]


def test_a_port_in_use_gives_the_next_free_one(caplog):
    """Asked for by name, the port that is really used is told; the job goes on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        agent, *_ = start(1, metrics_port=port)
        assert agent.metrics_url != f"http://127.0.0.1:{port}/metrics"
        assert value(scrape(agent.metrics_url), "gradwatch_steps_total") == 1
        assert any(f"not on port {port}: that port is in use" in m for m in caplog.messages)


def test_an_address_that_cannot_be_bound_is_one_warning(monkeypatch, caplog):
    """No exporter, and training goes on."""
    monkeypatch.setenv("GRADWATCH_METRICS_ADDR", "192.0.2.1")
    agent, *_ = start(2)
    assert agent.metrics_url is None
    (message,) = caplog.messages
    assert "192.0.2.1" in message
    assert "GRADWATCH_METRICS_ADDR" in message


@pytest.mark.parametrize("port", [None, "off", "none"])
def test_no_exporter(port):
    """`None` and "off" mean none."""
    agent, *_ = start(1, metrics_port=port)
    assert agent.metrics_url is None


def test_it_binds_loopback_unless_told_otherwise():
    """Nothing of the job is shown to the network by default."""
    agent, *_ = start(1)
    exporter = agent._recording.pipeline._exporter
    assert exporter._server.server_address[0] == "127.0.0.1"


def test_the_advertised_address_is_what_prometheus_is_told(monkeypatch):
    """For a job reached from elsewhere."""
    monkeypatch.setenv("GRADWATCH_ADVERTISED_ADDR", "node7.cluster")
    sink = MemorySink()
    agent, *_ = start(1, store=sink)
    assert agent.metrics_url.startswith("http://node7.cluster:")
    assert sink.runs[0].metrics_url == agent.metrics_url
