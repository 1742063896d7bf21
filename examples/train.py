"""A job to copy from: mixed precision, checkpoints that resume the run, tags.

python examples/train.py            # then: gradwatch show train, gradwatch ui
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.amp import GradScaler

import gradwatch

CHECKPOINT = Path("checkpoint.pt")
STEPS = 300

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data / 16.0, dtype=torch.float32)
labels = torch.tensor(digits.target)

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * STEPS)
scaler = GradScaler("cpu", init_scale=2.0**10)

agent = gradwatch.Agent(
    optimizer,
    model=model,
    clip=gradwatch.ClipNorm(1.0),
    scaler=scaler,
    tags={"lr": 1e-3, "data": "digits"},
)

if CHECKPOINT.exists():
    saved = torch.load(CHECKPOINT, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    scaler.load_state_dict(saved["scaler"])
    agent.load_state_dict(saved["gradwatch"])  # goes on as the same run

for step in range(STEPS):
    batch = torch.randint(len(labels), (64,))
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    scaler.scale(loss).backward()
    agent.log(loss=loss)
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()

torch.save(
    {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict(),
        "gradwatch": agent.state_dict(),
    },
    CHECKPOINT,
)
agent.close()
print(f"run {agent.run_id}: {agent.last}")
