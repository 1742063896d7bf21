"""A job that trains for as long as a test looks at it."""

import contextlib
import threading

import torch
from loops import mlp, set_gradients
from stores import lognormal

from gradwatch import Agent, ClipNorm


class LiveJob:
    """Steps of given norms on a thread of its own; what reads it waits for steps, not for time."""

    def __init__(self, run="live", *, clip=None, remote_control=True, middle=5.0, **others):
        self.model = mlp()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.agent = Agent(
            self.optimizer, model=self.model, run=run, store="gradwatch.db",
            clip=clip or ClipNorm(1.0), remote_control=remote_control, **others,
        )  # fmt: skip
        self.step, self._go, self._ended = 0, threading.Event(), threading.Event()
        self._stepping = threading.Lock()
        self._norms = lognormal(200_000, middle=middle)
        self._thread = threading.Thread(target=self._train)
        self._go.set()
        self._thread.start()

    def _train(self):
        while not self._ended.is_set():
            self._go.wait(1.0)
            with self._stepping:
                if self._go.is_set():
                    self._step()
            self._ended.wait(0.005)

    def _step(self):
        set_gradients(self.step, self.model)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        for p in self.model.parameters():
            p.grad.mul_(float(self._norms[self.step]) / float(norm))
        self.agent.log(loss=2.0 / (1 + self.step / 50))
        self.optimizer.step()
        self.step += 1

    def until(self, step):
        """Wait until that many steps are stored."""
        waiting = threading.Event()
        while self.step < step or not self.agent.flush():
            assert self._thread.is_alive()
            waiting.wait(0.01)

    def pause(self):
        """No step until `go_on`; the last one is over."""
        self._go.clear()
        with self._stepping:
            pass

    def go_on(self):
        """Train again."""
        self._go.set()

    def end(self):
        """The run's own end."""
        self._ended.set()
        self._thread.join()
        self.agent.close()


@contextlib.contextmanager
def live(*args, **options):
    """A job for the length of a test."""
    job = LiveJob(*args, **options)
    try:
        job.until(1)
        yield job
    finally:
        job.end()
