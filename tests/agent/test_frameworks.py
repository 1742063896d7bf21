"""Lightning and accelerate: one line there too, against the clipping that they have themselves."""

import copy
import re
import sqlite3
import warnings
from pathlib import Path

import pytest
import torch
from loops import mlp, watched
from torch.utils.data import DataLoader, TensorDataset

import gradwatch
from gradwatch import ClipNorm
from gradwatch.errors import ConfigurationError
from gradwatch_monitor import Store

LIMITS = {"rtol": 1e-5, "atol": 1e-6}


def batches(size=16):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 8, generator=generator)
    return DataLoader(TensorDataset(x, 3 * x.sum(1, keepdim=True)), batch_size=size)


def adamw(model, *, fused=True):
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)


@pytest.fixture(autouse=True)
def _quiet():
    """What frameworks deprecate is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -- Lightning -----------------------------------------------------------------------------------


class Automatic:
    """A LightningModule's methods, where Lightning makes the steps; `wrap` is None or called once."""

    def prepared(self, wrap, *, fused):
        self.net, self.norms, self.wrap, self.fused = mlp(), [], wrap, fused
        self.automatic_optimization = type(self).training_step is Automatic.training_step
        return self

    def loss(self, batch):
        x, y = batch
        return torch.nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch, _):
        return self.loss(batch)

    def on_before_optimizer_step(self, _):
        grads = [p.grad for p in self.parameters()]
        self.norms.append(float(torch.nn.utils.get_total_norm(grads)))

    def configure_optimizers(self):
        optimizer = adamw(self, fused=self.fused)
        if self.wrap and self.automatic_optimization:
            self.wrap(optimizer, self)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Manual(Automatic):
    """The same, where the module makes the steps, with the front that Lightning gives it."""

    def on_fit_start(self):
        if self.wrap:
            self.wrap(self.optimizers(), self)

    def training_step(self, batch, _):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        if not self.wrap:
            self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()


def fitted(steps, wrap=None, *, fused=True, **options):
    """The module, trained."""
    import lightning

    module = type("Module", (steps, lightning.LightningModule), {})().prepared(wrap, fused=fused)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, batches())
    return module


@pytest.mark.parametrize(
    ("steps", "options", "count"),
    [
        (Automatic, {}, 48),
        (Automatic, {"accumulate_grad_batches": 2}, 24),
        (Automatic, {"precision": "bf16-mixed"}, 48),
        (Manual, {}, 48),
    ],
)
def test_lightning(steps, options, count):
    """Wrapped where the optimizer is made, or by the front of it that a manual loop is given."""
    seen = {}

    def wrap(optimizer, module):
        seen["agent"], seen["sink"] = watched(optimizer, model=module, clip=ClipNorm(1.0))
        assert gradwatch.Agent.of(optimizer) is seen["agent"]

    ours = fitted(steps, wrap, **options)
    # Under mixed precision Lightning itself refuses to clip for a fused optimizer.
    clips = {} if steps is Manual else {"gradient_clip_val": 1.0}
    theirs = fitted(steps, fused="precision" not in options, **options, **clips)
    seen["agent"].close()
    torch.testing.assert_close(ours.net.state_dict(), theirs.net.state_dict(), **LIMITS)
    records = seen["sink"].steps
    assert len(records) == count
    assert any(record.clipped for record in records)
    assert [record.pre_norm for record in records] == pytest.approx(ours.norms, rel=1e-5)


def test_the_recipe_of_the_docs_goes_on_as_the_same_run(tmp_path):
    """Trained, and trained again from its checkpoint: one run, each micro-batch's true loss."""
    import lightning

    page = (Path(gradwatch.__file__).parents[2] / "docs" / "frameworks.md").read_text()
    (recipe,) = re.findall(r"```python\n(import lightning\n.*?)```", page, re.DOTALL)
    names = {}
    exec(recipe, names)
    losses = []

    class Noted(names["Module"]):
        def training_step(self, *arguments):
            losses.append(super().training_step(*arguments))
            return losses[-1]

    for epochs, checkpoint in ((1, None), (2, tmp_path / "last.ckpt")):
        module = Noted()
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=4,
        )  # fmt: skip
        trainer.fit(module, batches(), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        gradwatch.Agent.of(module.optimizers()).close()
    with Store() as store:
        (run,) = store.runs()
        recorded = store.steps(run.id)
    assert run.name == "my-run"
    with sqlite3.connect("gradwatch.db") as connection:
        taken = connection.execute("SELECT step, attempt FROM steps ORDER BY step").fetchall()
    assert taken == [(step, 1 + step // 4) for step in range(8)]
    assert recorded.loss.tolist() == pytest.approx([float(one) for one in losses[3::4]])


# -- accelerate ----------------------------------------------------------------------------------


def accelerated(wrap, accumulate):
    """The model, and its optimizer as `prepare` returns it."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    plain = mlp()
    inner = adamw(plain)
    if wrap == "before prepare":
        watched(inner, model=plain, clip=ClipNorm(1.0))
    model, optimizer, loader = accelerator.prepare(plain, inner, batches())
    if wrap == "after prepare":
        gradwatch.wrap(optimizer, model=model, clip=ClipNorm(1.0), metrics_port=None)
    for _ in range(2):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(torch.nn.functional.mse_loss(model(x), y))
                if not wrap and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("wrap", ["before prepare", "after prepare"])
def test_accelerate(wrap, accumulate):
    """The optimizer itself, or what `prepare` puts before it: the same agent, one record a step."""
    ours, optimizer = accelerated(wrap, accumulate)
    theirs, _ = accelerated(None, accumulate)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **LIMITS)
    agent = gradwatch.Agent.of(optimizer)
    assert agent is gradwatch.Agent.of(optimizer.optimizer)
    assert agent.last.step == 32 // accumulate - 1
    assert agent.last.clipped
    with pytest.raises(gradwatch.AlreadyWrappedError):
        gradwatch.wrap(optimizer)
    unwrapped = copy.deepcopy(optimizer.optimizer)
    with pytest.raises(gradwatch.NotWrappedError, match="AdamW"):
        gradwatch.Agent.of(unwrapped)
    agent.close()


def test_an_optimizer_by_its_class_alone():
    """A front whose optimizer cannot be found is refused, by name."""

    class Front(torch.optim.Optimizer):
        def __init__(self, inside):
            self.inside = inside

        param_groups = property(lambda self: self.inside.param_groups)

    with pytest.raises(ConfigurationError, match=r"Front .* wrap the optimizer that it calls"):
        gradwatch.wrap(Front(adamw(mlp())))
