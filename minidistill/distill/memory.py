"""Memory that a distillation needs, counted on fake tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from minidistill.distill import kd
from minidistill.distill.block_removal import Removal, weight_shapes
from minidistill.metrics.cost import format_bytes, peak_bytes
from minidistill.models.unet import UNet, random_inputs
from minidistill.pipeline import VAE


def step_peak(
    removal: Removal,
    pairs: Sequence[tuple[str, str]],
    inputs: tuple[int, int, int, int],
    *,
    half: bool,
    checkpointing: bool,
    accumulate: bool = False,
) -> int:
    """Peak memory of one optimizer step in bytes: activations, gradients and the temporaries of both networks.

    inputs: batch size, height and width of the latents, text tokens. accumulate: over several micro-batches.
    """

    def build() -> tuple[list[nn.Module], Callable[[], None]]:
        teacher, student = UNet(removal.teacher).requires_grad_(False), UNet(removal.student)
        student.gradient_checkpointing = checkpointing
        x, t, context, added_cond = random_inputs(removal.teacher, *inputs)

        def run() -> None:
            for _ in range(1 + accumulate):  # the second micro-batch already finds gradients
                with torch.autocast("cpu", torch.float16, enabled=half):  # not bfloat16: attention of CPUs
                    with torch.no_grad():
                        teacher_out, teacher_features = teacher(x, t, context, added_cond, return_features=True)
                    student_out, student_features = student(x, t, context, added_cond, return_features=True)
                loss = kd.task_loss(student_out, x) + kd.output_loss(student_out, teacher_out)
                (loss + kd.feature_loss(student_features, teacher_features, pairs)).mean().backward()

        return [teacher, student], run

    return peak_bytes(build)


def image_peak(vae: VAE, side: int) -> int:
    """Peak memory of decoding one image, whose latents are (side, side), in bytes."""

    def build() -> tuple[list[nn.Module], Callable[[], object]]:
        own = type(vae)(vae.config).requires_grad_(False)
        latents = torch.empty(1, vae.config.latent_channels, side, side)
        return [own], lambda: own.from_latents(latents)

    return peak_bytes(build)


def memory_rows(
    removal: Removal, others: Sequence[nn.Module], step: int, image: int, averaged: bool
) -> list[tuple[str, str]]:
    """Table of the memory needed on the device.

    others: the frozen networks besides the teacher; step, image: `step_peak`, `image_peak`; averaged: with an EMA.
    """
    teacher, student = (4 * sum(map(math.prod, weight_shapes(c).values())) for c in (removal.teacher, removal.student))
    parts = {
        "teacher's weights": teacher,
        "student's weights": student,
        "AdamW's two averages": 2 * student,
        "averaged weights": student * averaged,
        "VAE and text encoders": sum(w.numel() * w.element_size() for network in others for w in network.parameters()),
        # Images are sampled with the averaged weights, in addition to the student's weights.
        "activations, gradients": max(step, image + student * averaged),
    }
    rows = [(name, format_bytes(size)) for name, size in parts.items() if size]
    return [("on the device", "memory"), *rows, ("in all, about", format_bytes(sum(parts.values())))]
