"""Probes: fixed noisy latents on which the predictions of teacher and student are compared.

Their timesteps are spaced evenly, not random: the error falls by two orders of magnitude from t = 0 to T, so the mean
over a few dozen random timesteps would depend more on those than on the student.
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
    """A fixed batch of noisy latents with their conditioning, and the teacher's prediction."""

    x_t: Tensor  # (B, C, h, w)
    t: Tensor  # (B,)
    context: Tensor  # (B, L, D)
    added_cond: dict[str, Tensor] | None
    teacher_out: Tensor  # (B, C, h, w)


@torch.no_grad()
def make_probes(batches: Batches, numbers: range) -> list[Probe]:
    """The batches of these numbers at evenly spaced timesteps, with the predictions of their pipeline's U-Net."""
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
    """MSE to teacher: mean squared difference between the predictions of student and teacher over all probes."""
    losses = [output_loss(student(p.x_t, p.t, p.context, p.added_cond), p.teacher_out) for p in probes]
    return torch.cat(losses).double().mean().item()
