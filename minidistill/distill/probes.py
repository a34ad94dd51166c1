"""Fixed noisy latents on which the outputs of teacher and student are compared.

Timesteps are spread evenly, not drawn: the difference falls by two orders of magnitude from t = 0 to T (noise that is
hardly there is hard to see), so with t drawn for each of a few dozen samples it would say more about the draw than
about the student.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from minidistill.diffusion.schedule import add_noise, make_alpha_bar
from minidistill.distill.kd import output_loss
from minidistill.models.unet import UNet
from minidistill.training.batches import Batches


class Probe(NamedTuple):
    """A fixed batch to compare outputs on."""

    x_t: Tensor
    t: Tensor
    context: Tensor
    added_cond: dict[str, Tensor] | None
    teacher_out: Tensor


@torch.no_grad()
def make_probes(batches: Batches, numbers: range) -> list[Probe]:
    """The batches of these numbers, at timesteps spread evenly over all of them, and what the teacher says to them."""
    pipe, total = batches.pipe, len(numbers) * batches.batch_size
    T, alpha_bar = pipe.schedule.num_train_timesteps, make_alpha_bar(pipe.schedule).to(pipe.device)
    probes = []
    every_t = ((torch.arange(total, device=pipe.device) + 0.5) * T / total).long()
    for k, t in zip(numbers, every_t.split(batches.batch_size), strict=True):
        batch = batches[k]
        x_t = add_noise(batch.x0, batch.eps, t, alpha_bar)
        out = pipe.unet(x_t, t, batch.context, batch.added_cond)
        probes.append(Probe(x_t, t, batch.context, batch.added_cond, out))
    return probes


@torch.no_grad()
def distance_to_teacher(student: UNet, probes: Iterable[Probe]) -> float:
    """Mean squared difference to the teacher's output."""
    losses = [output_loss(student(p.x_t, p.t, p.context, p.added_cond), p.teacher_out) for p in probes]
    return torch.cat(losses).double().mean().item()
