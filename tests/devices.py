"""The CPU as a device that steps are deferred to, and what stands for another one."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
}


class Queue:
    """A device's queue: what was sent arrives when the test says so, or when it is waited for."""

    def __init__(self):
        self.sent = self.arrived = self.waits = 0
        self.at_once = True

    def arrival(self, _device):
        queue = self

        class Arrival:
            def record(self, _stream):
                queue.sent += 1
                self.number = queue.sent
                if queue.at_once:
                    queue.arrived = queue.sent

            def query(self):
                return queue.arrived >= self.number

            def synchronize(self):
                if not self.query():
                    queue.waits += 1
                    queue.arrived = self.number

        return Arrival()


class Reads(TorchDispatchMode):
    """Counts the reads of a tensor's value, each of which waits for a CUDA device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Elsewhere(torch.Tensor):
    """A number on another device: it can be copied from there, and nothing else."""

    @staticmethod
    def __new__(cls, value):
        return cls._make_wrapper_subclass(cls, (), dtype=torch.float32, device="meta")

    def __init__(self, value):
        self.held = torch.tensor(value)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        match func.overloadpacket.__name__:
            case "detach" | "view" | "_reshape_alias":
                return cls(args[0].held.item())
            case "_to_copy" if torch.device(kwargs["device"]).type == "cpu":
                return args[0].held.clone()
            case "copy_" if not isinstance(args[0], cls):
                return args[0].copy_(args[1].held)
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device")
