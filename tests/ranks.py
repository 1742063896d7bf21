"""Jobs that run on several gloo ranks, and a way to run them."""

import atexit
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loops import mlp
from torch import nn

import gradwatch

# Each rank is forked from a process that has loaded this, and nothing of ours.
multiprocessing.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "sqlalchemy"]
)


def run(job, world, folder, **arguments):
    """What the job returned (JSON-able) on each rank."""
    meeting = f"file://{folder}/meeting-{time.monotonic_ns()}"
    mp.start_processes(
        _start,
        (job, world, meeting, str(folder), dict(os.environ), arguments),
        nprocs=world,
        start_method="forkserver",
    )
    return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def _start(rank, job, world, meeting, folder, environ, arguments):
    os.environ.clear()  # it is that of the first test which has started ranks
    os.environ |= environ
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "GRADWATCH_METRICS_PORT": "0"}
    sys.argv = ["job.py"]
    os.chdir(folder)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    result = job(rank, world, **arguments)
    Path(f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    # A mesh keeps its group, and so gloo's threads, past this; an interpreter that is finalised
    # beneath them may abort (https://github.com/pytorch/pytorch/issues/190489), and a rank once did.
    atexit._run_exitfuncs()
    left = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    assert all("serve_forever" in name for name in left), left  # the exporter's waits in select()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def flat(parameters):
    """All parameters as one list of numbers, gathered where they are spread."""
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
    return torch.cat([p.detach().double().flatten() for p in whole]).tolist()


def batch(step, rank, size=8):
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(size, 8, generator=generator)
    return x, 10 * x.sum(1, keepdim=True)


def loss_of(model, step, rank, poison=1.0):
    x, y = batch(step, rank)
    return nn.functional.mse_loss(model(x), y) * poison


def adamw(parameters, *, fused):
    return torch.optim.AdamW(parameters, lr=0.01, fused=fused)


# -- jobs ----------------------------------------------------------------------------------------


def data_parallel(rank, world):
    """DDP, watched, beside DDP with torch's own clipping; at last one rank's loss is NaN."""
    watched, plain = (nn.parallel.DistributedDataParallel(mlp()) for _ in range(2))
    ours, theirs = adamw(watched.parameters(), fused=True), adamw(plain.parameters(), fused=True)
    agent = gradwatch.Agent(ours, model=watched, clip=gradwatch.ClipNorm(5.0))
    norms, expected = [], []
    for step in range(8):
        for model, optimizer in ((watched, ours), (plain, theirs)):
            optimizer.zero_grad()
            # Gradients of the first micro-batch are kept back, as accumulation does it.
            with model.no_sync():
                (loss_of(model, 50 + step, rank) / 2).backward()
            loss = loss_of(model, step, rank) / 2
            loss.backward()
            if optimizer is theirs:
                norm = nn.utils.clip_grad_norm_(plain.parameters(), 5.0)
                expected.append(float(norm))
            else:
                agent.log(loss=loss)
            optimizer.step()
        norms.append(agent.last.pre_norm)
    result = {"watched": flat(watched.parameters()), "plain": flat(plain.parameters())}
    ours.zero_grad()
    loss = loss_of(watched, 9, rank, float("nan") if rank == world - 1 else 1.0)
    loss.backward()
    agent.log(loss=loss)
    ours.step()
    result |= {"after_nan": flat(watched.parameters()), "skipped": agent.last.skipped}
    url = agent.metrics_url
    assert agent.flush(20)
    agent.close()
    return {**result, "norms": norms, "expected": expected, "url": url, "run": agent.run_id}


def changed_while_running(rank, world, listening):
    """DDP to which another threshold is applied; the threshold and the clip flag of each step."""
    from gradwatch import control
    from gradwatch_monitor import Store

    control.ANSWER_SECONDS = 20.0 if listening == world else 1.0
    model = nn.parallel.DistributedDataParallel(mlp())
    optimizer = adamw(model.parameters(), fused=True)
    agent = gradwatch.Agent(
        optimizer, model=model, clip=gradwatch.ClipNorm(5.0), remote_control=rank < listening
    )
    taken, left = [], torch.tensor([5.0])
    for step in range(3000):
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        optimizer.step()
        taken.append((agent.last.threshold, agent.last.clipped))
        if rank == 0 and step == 20:
            assert agent.flush(20)
            with Store() as store:
                store.apply(1, 0.5, by="ada")
        if rank == 0 and step > 20 and step % 10 == 0:
            with Store() as store:
                (change,) = store.changes(1)
            left -= int(change.applied_at is not None or change.refused is not None)
        dist.broadcast(left, 0)
        if left.item() == 0:
            break
    assert agent.flush(20)
    agent.close()
    return {"taken": taken, "weights": flat(model.parameters())}


def one_rank_watched(rank, world):
    """DDP of which rank 0 alone is wrapped: nobody waits for anybody."""
    model = nn.parallel.DistributedDataParallel(mlp())
    optimizer = adamw(model.parameters(), fused=True)
    if rank == 0:
        gradwatch.wrap(optimizer, model=model, clip=gradwatch.ObserveOnly())
    for step in range(120):
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        optimizer.step()
    if rank == 0:
        gradwatch.Agent.of(optimizer).close()
    return flat(model.parameters())


def _sharded(kind, world, *, fused):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = mlp(sizes=(8, 20, 12, 1))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if fused:  # torch's fused kernel takes no mixture of DTensors and plain tensors
        plan["4"] = RowwiseParallel(input_layouts=Replicate())
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
        for layer in (model[0], model):
            fully_shard(layer, mesh=mesh)
    elif kind == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("r", "s")))
    elif kind == "tensor":
        parallelize_module(model, init_device_mesh("cpu", (world,)), plan)
    else:  # both
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp"])
    return model


def sharded(rank, world, kind, variants):
    """Each variant (policy, fused, fold) of `_sharded_job`."""
    return [_sharded_job(rank, world, kind, *variant) for variant in variants]


def _sharded_job(rank, world, kind, clip, fused, fold):
    """A sharded model, watched; one process's whole model with the same data is the reference."""
    os.environ["GRADWATCH_FOLD"] = fold
    model, whole = _sharded(kind, world, fused=fused), mlp(sizes=(8, 20, 12, 1))
    names = {"ClipNorm": nn.utils.clip_grad_norm_, "ClipValue": nn.utils.clip_grad_value_}
    ours, theirs = adamw(model.parameters(), fused=fused), adamw(whole.parameters(), fused=fused)
    policy = eval(clip, vars(gradwatch))
    agent = gradwatch.Agent(ours, model=model, clip=policy, run=f"{clip} {fused} {fold}")
    # Each rank's own share of the data under FSDP; the same data everywhere under TP.
    shares = {"fsdp": world, "hsdp": world, "tensor": 1, "both": world // 2}[kind]
    mine = {"fsdp": rank, "hsdp": rank, "tensor": 0, "both": rank // 2}[kind]
    norms, expected, clipped = [], [], []
    for step in range(6):
        ours.zero_grad()
        loss_of(model, step, mine).backward()
        theirs.zero_grad()
        (sum(loss_of(whole, step, share) for share in range(shares)) / shares).backward()
        expected.append(float(nn.utils.get_total_norm([p.grad for p in whole.parameters()])))
        name = type(policy).__name__
        if name in names:
            names[name](whole.parameters(), 5.0 if name == "ClipNorm" else 0.5)
        else:
            _one_step_of(policy, whole)
        ours.step()
        theirs.step()
        norms.append(agent.last.pre_norm)
        clipped.append(agent.last.clipped)
    result = {"watched": flat(model.parameters()), "plain": flat(whole.parameters())}
    ours.zero_grad()
    loss_of(model, 9, mine).backward()
    if kind in {"fsdp", "tensor"} and rank == world - 1:
        model[0].weight.grad.to_local()[-1, -1] = float("nan")
    elif kind in {"hsdp", "both"}:
        model[0].weight.grad.to_local().fill_(float("nan"))
    ours.step()
    result |= {"after_nan": flat(model.parameters()), "skipped": agent.last.skipped}
    assert agent.flush(20)
    agent.close()
    return {**result, "norms": norms, "expected": expected, "clipped": clipped}


def _one_step_of(policy, model):
    """A policy carried out on a whole model (that is shown right elsewhere), without a step."""
    from gradwatch.norms import Meter
    from gradwatch.scaling import Carrier

    params = list(model.parameters())
    measured = Meter().measure(params, [p.grad for p in params])
    carrier = Carrier(torch.optim.SGD(params, lr=0.1), fold=True)
    decision = policy.decide(measured, policy.init())
    carrier.carry_out(None, decision, measured, fold=False)


def zero_redundancy(rank, world):
    """ZeroRedundancyOptimizer, watched, beside one that torch clips for."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    watched, plain = (nn.parallel.DistributedDataParallel(mlp()) for _ in range(2))
    ours, theirs = (
        ZeroRedundancyOptimizer(m.parameters(), torch.optim.AdamW, lr=0.01)
        for m in (watched, plain)
    )
    agent = gradwatch.Agent(ours, model=watched, clip=gradwatch.ClipNorm(5.0))
    norms, expected = [], []
    for step in range(6):
        for model, optimizer in ((watched, ours), (plain, theirs)):
            optimizer.zero_grad()
            loss_of(model, step, rank).backward()
            if optimizer is theirs:
                expected.append(float(nn.utils.clip_grad_norm_(plain.parameters(), 5.0)))
            optimizer.step()
        norms.append(agent.last.pre_norm)
    result = {"watched": flat(watched.parameters()), "plain": flat(plain.parameters())}
    ours.zero_grad()
    loss_of(watched, 9, rank, float("nan")).backward()
    ours.step()
    result |= {"after_nan": flat(watched.parameters()), "skipped": agent.last.skipped}
    assert agent.flush(20)
    agent.close()
    return {**result, "norms": norms, "expected": expected}


def without_gradients(rank, world):
    """Steps that no rank has a gradient at, and where there is no sharding, one that rank 0 alone lacks."""
    return [_without_gradients(rank, world, kind) for kind in ("fsdp", "plain")]


def _without_gradients(rank, world, kind):
    model = _sharded(kind, world, fused=False) if kind == "fsdp" else mlp()
    optimizer = adamw(model.parameters(), fused=False)
    agent = gradwatch.Agent(optimizer, model=model, clip=gradwatch.ClipNorm(5.0), run=kind)
    for step in range(6):
        optimizer.zero_grad()
        alone = kind == "plain" and step == 4 and rank == 0
        if step not in (1, 3) and not alone:
            loss_of(model, step, rank).backward()
        optimizer.step()
    assert agent.flush(20)
    agent.close()
    return math.isnan(agent.last.pre_norm)


def killed(rank, world):
    """Every rank dies of SIGKILL while the store cannot be reached; rank 1 had lost its loss."""
    model = mlp()
    optimizer = adamw(model.parameters(), fused=True)
    agent = gradwatch.Agent(optimizer, model=model)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        agent.log(loss=math.nan if rank == 1 and step == 3 else 0.5)
        optimizer.step()
    while rank != 0 and agent._recording.channel.ring.leader is None:
        time.sleep(0.01)
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)
