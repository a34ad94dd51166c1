"""Memory that a distillation needs, counted on fake tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from minidistill.distill import kd
from minidistill.distill.block_removal import Removal, weight_shapes
from minidistill.distill.ladder import copy_unet
from minidistill.distill.lightning import Phase, Stage, legs, only_lora
from minidistill.metrics.cost import format_bytes, peak_bytes
from minidistill.models import lora
from minidistill.models.discriminator import Discriminator
from minidistill.models.unet import UNet, UNetConfig, random_inputs
from minidistill.pipeline import VAE
from minidistill.training.device import to_precision
from minidistill.training.parallel import Held

ALONE = Held()


def step_peak(
    removal: Removal,
    pairs: Sequence[tuple[str, str]],
    inputs: tuple[int, int, int, int],
    *,
    half: bool,
    checkpointing: bool,
    accumulate: bool = False,
    share: float = 1.0,
) -> int:
    """Peak memory of one optimizer step in bytes: activations, gradients and the temporaries of both networks.

    inputs: batch size, height and width of the latents, text tokens. half: autocast, and a teacher in that precision.
    accumulate: over several micro-batches. share: of the gradients that this process holds (`parallel.held`).
    """

    def build() -> tuple[list[nn.Module], Callable[[], None]]:
        teacher, student = frozen_unet(removal.teacher, half), UNet(removal.student)
        student.gradient_checkpointing = checkpointing
        if share < 1:
            let_go_of_gradients(student.parameters())
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

    gradients = 4 * sum(map(math.prod, weight_shapes(removal.student).values()))
    return peak_bytes(build) + round(share * gradients) * (share < 1)


def let_go_of_gradients(weights: Iterable[nn.Parameter]) -> None:
    """Drop the gradient of each weight as soon as it is there, since it is sent to the processes that hold parts."""
    for weight in weights:
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda own: setattr(own, "grad", None))


def frozen_unet(config: UNetConfig, half: bool) -> UNet:
    """A U-Net that does not train, in the precision of the run."""
    unet = UNet(config).requires_grad_(False)
    to_precision(unet, "fp16" if half else "fp32")
    return unet


def image_peak(vae: VAE, side: int) -> int:
    """Peak memory of decoding one image, whose latents are (side, side), in bytes."""

    def build() -> tuple[list[nn.Module], Callable[[], object]]:
        own = type(vae)(vae.config).requires_grad_(False)
        latents = torch.empty(1, vae.config.latent_channels, side, side)
        return [own], lambda: own.from_latents(latents)

    return peak_bytes(build)


def memory_rows(
    removal: Removal,
    others: Sequence[nn.Module],
    step: int,
    image: int,
    averaged: bool,
    half: bool = False,
    held: Held = ALONE,
) -> list[tuple[str, str]]:
    """Table of the memory needed on the device, of the first process if there are several.

    others: the frozen networks besides the teacher; step, image: `step_peak`, `image_peak`; averaged: with an EMA.
    half: as in `step_peak`. held: `parallel.held`; with `fsdp`, the one layer that computes is not counted.
    """
    teacher, student = (4 * sum(map(math.prod, weight_shapes(c).values())) for c in (removal.teacher, removal.student))
    parts = {
        "teacher's weights": round(teacher * held.frozen) // (1 + half),
        "student's weights": round(student * held.trained),
        "AdamW's two averages": round(2 * student * held.states),
        "averaged weights": round(student * held.states) * averaged,
        "VAE and text encoders": sum(w.numel() * w.element_size() for network in others for w in network.parameters()),
        # Images are sampled with the averaged weights, or all those that are shared out, beside the student's.
        "activations, gradients": max(step, image + student * (averaged or held.states < 1)),
    }
    rows = [(name, format_bytes(size)) for name, size in parts.items() if size]
    return [("on the device", "memory"), *rows, ("in all, about", format_bytes(sum(parts.values())))]


class Cast(NamedTuple):
    """The networks of a phase of `distill/lightning.py`, as `distill/players.py` has them."""

    base: UNet  # the first teacher
    student: UNet
    others: list[UNet]  # earlier students, as the teacher of the phase, or for the conversion to x0
    judge: Discriminator | None
    fake: UNet | None

    def weights(self) -> list[nn.Parameter]:
        """All weights, shared ones once."""
        networks = [network for network in (*self[:2], *self.others, *self[3:]) if network is not None]
        return list({id(weight): weight for network in networks for weight in network.parameters()}.values())


def make_cast(
    teacher: UNetConfig, student: UNetConfig, phase: Phase, side: int, further: int, rank: int, shared: bool, half: bool
) -> Cast:
    """The networks of a phase; `further` of them are earlier students. side: of the latents. shared, half: as below."""
    base = frozen_unet(teacher, half)

    def new(with_lora: bool) -> UNet:
        unet = copy_unet(base, shared=True) if shared else UNet(student)
        if with_lora:
            lora.add_lora(unet, lora.ALL, rank)
        return unet

    others = [new(shared).requires_grad_(False) if shared else frozen_unet(student, half) for _ in range(further)]
    judge = None
    if phase.adversarial:
        trains = phase.backbone_rate > 0
        source = UNet(teacher) if trains else base  # not a deep copy, which would lose its fake mode
        judge = Discriminator(source, side, phase.conditional, phase.taps, train_backbone=False)
        judge.backbone.requires_grad_(trains)
    return Cast(base, new(phase.lora), others, judge, UNet(teacher) if phase.matching else None)


def play(cast: Cast, phase: Phase, inputs: tuple[int, int, int, int], guided: bool, half: bool) -> None:
    """One micro-batch, as in `players.endpoints`, `contest` and `match`: every pass, and what is kept between them."""
    base, student, others, judge, fake = cast
    x, t, context, added = random_inputs(base.config, *inputs)

    def frozen(unet: UNet, guided: bool) -> None:
        with torch.no_grad():
            unet(*(random_inputs(base.config, 2 * inputs[0], *inputs[1:]) if guided else (x, t, context, added)))

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.float16, enabled=half)  # not bfloat16: attention of CPUs

    with autocast():
        if (phase.mse or phase.adversarial) and not phase.from_data:
            frozen((others or [base])[0], guided)
        out = student(x, t, context, added).float()
    target = kd.mean_square(out, x).mean()
    if fake:
        with autocast():
            frozen(base, True)
            found = fake(x, t, context, added).float()
        kd.mean_square(found, x).mean().backward()
    if judge:
        x_fake = out.detach().requires_grad_()
        with autocast():
            latents = [x_fake, *[x] * (1 + phase.conditional + (phase.r1 > 0))]
            parts = judge.features_of(latents, [t] * len(latents), context, added)
            condition = parts.pop() if phase.conditional else None
            logits = [judge.compare(part, condition) for part in parts]
        learned = [weight for weight in judge.parameters() if weight.requires_grad]
        sum(logits).mean().backward(inputs=[*learned, x_fake])
        target = target + (out * x_fake.grad).sum()
        del logits, condition, parts
    target.backward()


@lru_cache
def phase_memory(
    teacher: UNetConfig,
    student: UNetConfig,
    phase: Phase,
    inputs: tuple[int, int, int, int],
    *,
    first: bool,
    guided: bool,
    rank: int,
    shared: bool,
    half: bool,
    checkpointing: bool,
    accumulate: bool = False,
    share: float = 1.0,
) -> tuple[int, int, int]:
    """Bytes that a phase needs: (weights, Adam's two averages, activations and gradients at the peak of a step).

    Arguments as in `step_peak`, and further:
        first: it is of the first stage, whose teacher is the first one. guided: with guidance.
        rank: of a LoRA. shared: nothing but one LoRA is trained, so that student and teachers are one U-Net.
    """
    sizes: list[int] = []

    def build() -> tuple[list[nn.Module], Callable[[], None]]:
        further = (not first) + bool(phase.convert)
        cast = make_cast(teacher, student, phase, min(inputs[1:3]), further, rank, shared, half)
        trained = [weight for weight in cast.weights() if weight.requires_grad]
        sizes.extend((sum(w.nbytes for w in cast.weights()), sum(2 * w.nbytes for w in trained)))
        for network in (cast.student, cast.judge and cast.judge.backbone, cast.fake):
            if network is not None:
                network.gradient_checkpointing = checkpointing
        if share < 1:
            let_go_of_gradients(trained)

        def run() -> None:
            if accumulate and share == 1:  # the second micro-batch finds the gradients of the first
                for weight in trained:
                    weight.grad = torch.zeros_like(weight)
            play(cast, phase, inputs, guided, half)

        return [cast.base, nn.ParameterList(cast.weights())], run

    peak = peak_bytes(build)
    return sizes[0], sizes[1], peak + round(share * sizes[1] / 2) * (share < 1)


def stage_memory_rows(
    stages: Sequence[Stage],
    teacher: UNetConfig,
    student: UNetConfig,
    others: Sequence[nn.Module],
    inputs: tuple[int, int, int, int],
    image: int,
    *,
    guidance: float,
    rank: int,
    half: bool,
    checkpointing: bool,
    accumulate: bool,
    held: Held = ALONE,
    started: bool = False,
) -> list[tuple[str, ...]]:
    """Table of the memory that each phase needs on the device. Arguments as in `memory_rows` and `phase_memory`.

    started: the ladder starts from a student, which then teaches its first stage.
    """
    beside = sum(w.nbytes for network in others for w in network.parameters())
    rows = [("stage", "objective", "weights", "Adam's averages", "activations, gradients", "in all, about")]
    for leg in legs(stages):
        phase, first = leg.phase, leg.index == 0 and not started
        weights, averages, peak = phase_memory(
            teacher, student, kind_of(phase), inputs, first=first, guided=first and guidance > 1, rank=rank,
            shared=only_lora(stages), half=half, checkpointing=checkpointing, accumulate=accumulate, share=held.states,
        )  # fmt: skip
        learned = averages // 2
        weights = round(learned * held.trained + (weights - learned) * held.frozen)
        parts = weights + beside, round(averages * held.states), max(peak, image)
        rows.append((leg.stage.name, phase.label, *map(format_bytes, (*parts, sum(parts)))))
    return rows


def kind_of(phase: Phase) -> Phase:
    """The phase without what memory does not depend on: phases of one kind are counted once."""
    losses = [float(weight > 0) for weight in (phase.mse, phase.adversarial, phase.matching, phase.convert)]
    judge = {"conditional": phase.conditional, "taps": phase.taps, "r1": phase.r1}
    trains_backbone = float(phase.backbone_rate > 0)
    return Phase(1, 1.0, phase.lora, *losses, from_data=phase.from_data, backbone_rate=trains_backbone, **judge)
