"""A distribution in two dimensions whose noise prediction is known exactly, and a small network that learns it.

`mixture_eps` of `solutions.py` is the exact prediction. Points are (B, 2) in place of latents (B, C, h, w).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from minidistill.diffusion.samplers import Model
from minidistill.diffusion.schedule import ScheduleConfig, add_noise, make_alpha_bar, move
from minidistill.distill.kd import mean_square
from minidistill.distill.progressive import teacher_path
from minidistill.training.optim import adamw, lr_at, set_lr

ALPHA_BAR = make_alpha_bar(ScheduleConfig())  # that of Stable Diffusion and of the miniature
angles = 2 * math.pi * torch.arange(8) / 8
MODES = 1.4 * torch.stack([angles.cos(), angles.sin()], dim=1)  # (8, 2), variance 1 in each coordinate
SIGMA = 0.1  # standard deviation around a mode
BATCH = 512


def draw(count: int, generator: torch.Generator, modes: Tensor = MODES, sigma: float = SIGMA) -> Tensor:
    """Points (count, 2) of the distribution: a mode, each as likely, and normal noise around it."""
    chosen = modes[torch.randint(len(modes), (count,), generator=generator)]
    return chosen + sigma * torch.randn(count, 2, generator=generator)


def on_mode(points: Tensor) -> Tensor:
    """Which points (B, 2) are within three standard deviations of a mode: (B,) bool."""
    return torch.cdist(points, MODES).min(1).values < 3 * SIGMA


class Network(nn.Module):
    """eps from points (B, 2) and timesteps (B,). Its width is its capacity."""

    def __init__(self, width: int, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        sizes = [2 + 8, width, width, width, 2]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phases = math.pi * t[:, None] / 1000 * torch.tensor([0.5, 1, 2, 4])  # (B, 4)
        h = torch.cat([x, phases.sin(), phases.cos()], dim=1)  # (B, 10)
        for layer in self.layers[:-1]:
            h = layer(h).relu()
        return self.layers[-1](h)


def distil(student: nn.Module, model: Model, times: Tensor, steps: int, learning_rate: float = 1e-2) -> float:
    """Train a student by MSE on the jumps `times` of `jump_table`; -> the mean loss of the last tenth of the steps."""
    generator, optimizer = torch.Generator().manual_seed(0), adamw(student.parameters(), learning_rate, weight_decay=0)
    losses = []
    for step in range(steps):
        rows = times[torch.randint(len(times), (BATCH,), generator=generator)]  # (B, n + 1)
        t, t_next = rows[:, 0], rows[:, -1]
        x0, eps = draw(BATCH, generator), torch.randn(BATCH, 2, generator=generator)
        x_t = add_noise(x0, eps, t, ALPHA_BAR, pure_noise_at_end=True)  # (6), (24)
        target = teacher_path(model, x_t, rows, ALPHA_BAR, "epsilon")  # (7) to (13)
        x_next = move(x_t, student(x_t, t), t, t_next, ALPHA_BAR)  # (14), (15)
        loss = mean_square(x_next, target).mean()  # (16)
        loss.backward()
        set_lr(optimizer, lr_at(step, learning_rate, 50, steps, "cosine"))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-(steps // 10 or 1) :]) / (steps // 10 or 1)


def fit(network: nn.Module, points: Callable[[int, torch.Generator], Tensor], steps: int, rate: float = 5e-3) -> None:
    """Train a network to predict the noise of points(count, generator), (count, 2), at all timesteps."""
    generator, optimizer = torch.Generator().manual_seed(0), adamw(network.parameters(), rate, weight_decay=0)
    for step in range(steps):
        x0, eps = points(BATCH, generator), torch.randn(BATCH, 2, generator=generator)
        t = torch.randint(len(ALPHA_BAR), (BATCH,), generator=generator)
        mean_square(network(add_noise(x0, eps, t, ALPHA_BAR), t), eps).mean().backward()
        set_lr(optimizer, lr_at(step, rate, 50, steps, "cosine"))
        optimizer.step()
        optimizer.zero_grad()
