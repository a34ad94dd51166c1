"""The networks of one phase of SDXL-Lightning: the student, the teacher, the discriminator, and how each is used.

Everything is built from the first teacher, from the students of earlier stages, which are read from the run folder, and
from the state of the phase. So a run can be resumed in any phase.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidistill.diffusion.noise import generator_for
from minidistill.diffusion.samplers import Model, guide
from minidistill.diffusion.schedule import add_noise, move, to_eps, to_x0, training_target
from minidistill.distill import adversarial
from minidistill.distill.kd import mean_square
from minidistill.distill.ladder import Ladder, copy_unet, first_student, load_student
from minidistill.distill.lightning import Leg, only_lora
from minidistill.distill.progressive import jump_table, mixed_jumps, on_schedule, rollout, solve_conv, teacher_path
from minidistill.models import lora
from minidistill.models.discriminator import Discriminator, Features
from minidistill.models.unet import UNet
from minidistill.training import optim, parallel
from minidistill.training.batches import Batch
from minidistill.training.state import Part

SOLVED = 768  # samples of the least squares that start conv_out for x0-prediction
CHANCES = 8  # random heads beside the discriminator's ranking
NUDGE = 0.01  # standard deviation of the noise of the approximated R1


class Player(NamedTuple):
    """A network that is trained."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    rate: float  # peak learning rate


class Teacher(NamedTuple):
    """A frozen network, and how it is sampled."""

    unet: UNet
    prediction: str
    guidance: float = 1.0
    own: Tensor | None = None  # its schedule, if that is another one than the ladder's


class Players(NamedTuple):
    """The networks of a phase."""

    leg: Leg
    student: UNet
    prediction: str  # the student's
    times: Tensor  # `jump_table`
    teacher: Teacher | None  # None where the phase needs no endpoints of one
    frozen: Teacher | None  # the student before its conversion to x0, eq. (27)
    discriminator: Discriminator | None
    fake: UNet | None  # of distribution matching: trained on the student's samples
    trained: dict[str, Player]
    parts: dict[str, Part]  # of a checkpoint


class Jump(NamedTuple):
    """One jump of the student, and the teacher's steps over the same time. Latents (B, C, h, w), timesteps (B,)."""

    x_t: Tensor
    t: Tensor
    t_next: Tensor  # -1: clean
    x_real: Tensor | None  # the teacher's x_{t-ns}, or that of the data
    x_fake: Tensor  # the student's
    out: Tensor  # the student's prediction, float32
    frozen_out: Tensor | None  # that of the student before its conversion


def assemble(ladder: Ladder, leg: Leg, unet: UNet | None, fresh: bool = True) -> Players:
    """The networks at the start of a phase.

    Args:
        unet: the student as the phase before has left it; None at the start, and of a resumed run.
        fresh: False if a checkpoint will replace all that is trained.
    """
    config, phase = ladder.config, leg.phase
    student = prepare_student(ladder, leg, unet or first_student(ladder))
    T, taught_by = len(ladder.alpha_bar), phase.teacher or leg.stage.teacher
    times = jump_table(leg.stage.student, taught_by, phase.timesteps, T)
    if leg.stage.mixed:
        times = mixed_jumps(leg.stage.mixed, taught_by, T)
    frozen = taught_student(ladder, leg.index - 1) if phase.convert else None
    networks: dict[str, tuple[nn.Module, float]] = {"student": (student, 1.0)}
    discriminator = fake = None
    if phase.adversarial:
        torch.manual_seed(generator_for(config.seed, "discriminator", leg.number).initial_seed())
        side = min(ladder.batches.size) // ladder.pipe.vae.config.downscale
        trains = phase.backbone_rate > 0
        base = parallel.whole(ladder.exact if trains else ladder.pipe.unet)
        discriminator = Discriminator(base, side, phase.conditional, phase.taps, trains)
        discriminator = discriminator.to(ladder.pipe.device)
        discriminator.backbone.gradient_checkpointing = config.gradient_checkpointing
        networks["heads"] = discriminator.heads, phase.head_rate
        if trains:
            networks["backbone"] = discriminator.backbone, phase.backbone_rate
    if phase.matching:
        fake = copy_unet(parallel.whole(ladder.exact)).to(ladder.pipe.device).requires_grad_(True)
        fake.gradient_checkpointing = config.gradient_checkpointing
        networks["fake"] = fake, phase.fake_rate
    teacher = find_teacher(ladder, leg) if (phase.mse or phase.adversarial) and not phase.from_data else None
    players = Players(
        leg, student, ladder.prediction(leg.stage), times.to(ladder.pipe.device), teacher, frozen,
        discriminator, fake, {}, {},
    )  # fmt: skip
    if fresh and phase.convert:
        solve_output(ladder, players, frozen)
    elif fresh and leg.number == 0 and not ladder.start and players.prediction != ladder.pipe.schedule.prediction_type:
        solve_output(ladder, players, first_teacher(ladder))
    add_optimizers(ladder, players, networks)
    return players


def add_optimizers(ladder: Ladder, players: Players, networks: dict[str, tuple[nn.Module, float]]) -> None:
    """Fill `trained` and `parts`, once processes have shared out the networks. networks: (network, rate) by name."""
    mode, phase = ladder.config.parallel, players.leg.phase
    for other in (players.teacher, players.frozen):
        if other is not None:
            parallel.shard(other.unet, mode)
    if players.discriminator is not None:
        parallel.shard(players.discriminator.backbone, mode, "encode")
    for name, (network, rate) in networks.items():
        parallel.shard(network, mode)
        betas = (0.9, 0.999) if name == "fake" else phase.betas
        optimizer = optim.adamw(network.parameters(), rate * phase.learning_rate, betas, weight_decay=0.0)
        players.trained[name] = Player(network, optimizer, rate * phase.learning_rate)
        players.parts.update({name: network, f"{name} optimizer": optimizer})
    if only_lora(ladder.stages):  # the rest of the student is the teacher's
        weights = players.student.named_parameters()
        players.parts["student"] = {name: weight for name, weight in weights if weight.requires_grad}


def prepare_student(ladder: Ladder, leg: Leg, unet: UNet) -> UNet:
    """The student with what the phase trains: a LoRA, a new one or the one that it has, or all weights."""
    config = ladder.config
    if not leg.phase.lora:
        lora.merge_lora(unet)
        unet.requires_grad_(True)
    elif not (layers := lora.lora_layers(unet)):
        generator = generator_for(config.seed, "lora", leg.number)
        lora.add_lora(unet, lora.ALL, config.lora_rank, config.lora_alpha, generator=generator)
    else:
        for layer in layers.values():
            layer.lora_down.requires_grad_(True)
            layer.lora_up.requires_grad_(True)
    unet.gradient_checkpointing = config.gradient_checkpointing
    return unet


def find_teacher(ladder: Ladder, leg: Leg) -> Teacher:
    """The teacher of a phase: an earlier student, or the first teacher with guidance."""
    wanted = leg.phase.teacher or leg.stage.teacher
    for index in reversed(range(-1, leg.index)):
        if (stage := ladder.stage(index)) and stage.student == wanted:
            return taught_student(ladder, index)
    return first_teacher(ladder)


def taught_student(ladder: Ladder, index: int) -> Teacher:
    """The student of a stage, -1: the one that the ladder starts from, as a teacher."""
    return Teacher(load_student(ladder, index), ladder.prediction(ladder.stage(index)))


def first_teacher(ladder: Ladder) -> Teacher:
    """The teacher that all begins with, with guidance."""
    own = ladder.own_alpha_bar if ladder.config.zero_snr else None
    return Teacher(ladder.pipe.unet, ladder.pipe.schedule.prediction_type, ladder.config.guidance, own)


def endpoints(ladder: Ladder, players: Players, batch: Batch, trains: bool) -> Jump:
    """Both ways from x_t to x_{t-ns}: (6) to (15). trains: with gradients to the student."""
    phase, alpha_bar = players.leg.phase, ladder.alpha_bar
    times = players.times[batch.t * len(players.times) // len(alpha_bar)]  # (B, n + 1), each row as likely
    t, t_next = times[:, 0], times[:, -1]
    x_real = add_noise(batch.x0, batch.eps, t_next, alpha_bar) if phase.from_data else None
    frozen_out = None
    if phase.rollout:
        model, grid = model_of(ladder, players.student, batch), players.times[:, 0]
        last = min(parallel.gather(int(t.min())))  # processes that share out the student call it equally often
        with ladder.autocast:  # its own: weights that it casts without gradients must not serve the pass with them
            x_t = rollout(model, batch.eps, t, grid[grid >= last], alpha_bar, players.prediction)
    else:
        x_t = add_noise(batch.x0, batch.eps, t, alpha_bar, ladder.config.pure_noise)  # (6), (24)
    with ladder.autocast:
        if players.teacher is not None:
            model, prediction = ask(ladder, players.teacher, batch)
            x_real = teacher_path(model, x_t, times, alpha_bar, prediction)  # (7) to (13)
        if players.frozen is not None:
            with torch.no_grad():
                frozen_out = ask(ladder, players.frozen, batch)[0](x_t, t).float()  # (27)
        with torch.set_grad_enabled(trains):
            out = players.student(x_t, t, batch.context, batch.added_cond).float()  # (14)
    x_fake = move(x_t, out, t, t_next, alpha_bar, players.prediction)  # (15)
    return Jump(x_t, t, t_next, x_real, x_fake, out, frozen_out)


def model_of(ladder: Ladder, unet: UNet, batch: Batch, guidance: float = 1.0) -> Model:
    """model(x, t) of a U-Net with the text of a batch in it, and with guidance above 1."""
    context, added = batch.context, batch.added_cond
    if guidance <= 1:
        return guide(unet, context, None, 1.0, added_cond=added)
    uncond = ladder.absent.map(lambda part: part.to(context).expand(len(context), *part.shape[1:]))
    other = None if added is None else {**added, "text_embeds": uncond.pooled}
    return guide(unet, context, uncond.context, guidance, added_cond=added, uncond_added_cond=other)


def ask(ladder: Ladder, teacher: Teacher, batch: Batch) -> tuple[Model, str]:
    """model(x, t) of a teacher with the text of a batch in it, and what it predicts."""
    model = model_of(ladder, teacher.unet, batch, teacher.guidance)
    if teacher.own is None:
        return model, teacher.prediction
    return on_schedule(model, teacher.own, teacher.prediction, ladder.alpha_bar), "v_prediction"


def features(
    ladder: Ladder, players: Players, batch: Batch, jump: Jump, k: int, *latents: Tensor
) -> tuple[list[Features], Features | None, Tensor]:
    """D's features of endpoints (B, C, h, w) of micro-batch k, those of x_t, and the timesteps (B,) that it read.

    All latents pass the backbone together, as one batch.
    """
    phase, judge, text = players.leg.phase, players.discriminator, (batch.context, batch.added_cond)
    uniform, eps = fresh(ladder, k, "t*", jump.x_t)
    level = adversarial.draw_levels(uniform, phase.noise_levels, phase.noise_weights) if phase.noise_levels else None
    ends = [adversarial.to_noise_level(x, jump.t_next, eps, level, ladder.alpha_bar) for x in latents]
    xs, ts = zip(*([(jump.x_t, jump.t)] * phase.conditional + ends), strict=True)
    with ladder.autocast:
        parts = judge.features_of(xs, ts, *text)
    condition = parts.pop(0) if phase.conditional else None
    return parts, condition, ts[-1]


def contest(
    ladder: Ladder, players: Players, batch: Batch, jump: Jump, k: int, trains: bool
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Both players' losses on micro-batch k, from one forward pass of the student, and one and a backward pass of D.

    Adds the gradient of L_D to D's parameters, and computes that of L_G in x_fake, but not further. Both are of the
    weights before the step. Returns L_G (B,), its gradient (B, C, h, w), and measures to log.
    """
    phase, judge = players.leg.phase, players.discriminator
    x_fake = jump.x_fake.detach().requires_grad_(trains)
    nudged = [jump.x_real + NUDGE * fresh(ladder, k, "r1", x_fake)[1]] if phase.r1 else []
    parts, condition, at = features(ladder, players, batch, jump, k, jump.x_real, x_fake, *nudged)
    real, fake, *nudged = (judge.compare(part, condition) for part in parts)  # (18), (19)
    loss_g = adversarial.generator_loss(real, fake, phase.relativistic)
    loss_d = adversarial.discriminator_loss(real, fake, phase.relativistic)
    if phase.r1:
        loss_d = loss_d + phase.r1 * adversarial.approximate_r1(real, *nudged)
    share = 1 / (len(x_fake) * ladder.config.accumulate)
    (share * loss_d.sum()).backward()
    pull = torch.zeros_like(x_fake)
    if trains:
        ratio = adversarial.turn(real, fake, phase.relativistic) / share
        pull = ratio.view(-1, *[1] * (x_fake.ndim - 1)) * x_fake.grad
    measures = {
        "d": loss_d.mean(), "real": real.mean(), "fake": fake.mean(), "pull": pull.flatten(1).norm(dim=1).mean(),
        "rank": adversarial.ranking_accuracy(real, fake),
    }  # fmt: skip
    for level in phase.noise_levels:
        if bool((at == level).any()):
            measures[f"d t*={level + 1}"] = loss_d[at == level].mean()
    return loss_g.detach(), pull, measures


def match(ladder: Ladder, players: Players, batch: Batch, jump: Jump, k: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Distribution matching of the x0 that the student predicts, wherever its jumps end: loss (B,), measures to log.

    Adds the gradient of the fake network's loss, the usual one on the student's x0, to its parameters.
    """
    alpha_bar, prediction = ladder.own_alpha_bar, ladder.pipe.schedule.prediction_type
    x0 = to_x0(jump.out, jump.x_t, jump.t, ladder.alpha_bar, players.prediction)
    uniform, eps = fresh(ladder, k, "matching", x0)
    t = (len(alpha_bar) * (0.02 + 0.96 * uniform)).long()
    x_t = add_noise(x0.detach(), eps, t, alpha_bar)
    with ladder.autocast:
        with torch.no_grad():
            real = model_of(ladder, ladder.pipe.unet, batch, ladder.config.guidance)(x_t, t).float()
        fake = players.fake(x_t, t, batch.context, batch.added_cond).float()
    loss_fake = mean_square(fake, training_target(x0.detach(), eps, t, alpha_bar, prediction)).mean()
    (loss_fake / ladder.config.accumulate).backward()
    found = (to_x0(out.detach(), x_t, t, alpha_bar, prediction) for out in (real, fake))
    return adversarial.matching_loss(x0, *found), {"fake net": loss_fake}


@torch.no_grad()
def ranking(ladder: Ladder, players: Players, pairs: int) -> tuple[float, list[float], int]:
    """D's ranking accuracy on pairs that no step takes, those of CHANCES random heads, and how many pairs they are."""
    judge = players.discriminator
    heads = [judge.heads, *map(judge.random_heads, range(CHANCES))]
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in heads]
    for k in range(-math.ceil(pairs / ladder.batches.batch_size), 0):
        batch = ladder.batches[k]
        jump = endpoints(ladder, players, batch, trains=False)
        (real, fake), condition, _ = features(ladder, players, batch, jump, k, jump.x_real, jump.x_fake)
        for own, logits in zip(heads, found, strict=True):
            logits.append((judge.compare(real, condition, own), judge.compare(fake, condition, own)))
    both = [[torch.cat(side) for side in zip(*logits, strict=True)] for logits in found]
    accuracy, *by_chance = (adversarial.ranking_accuracy(*logits).item() for logits in both)
    return accuracy, by_chance, len(both[0][0])


@torch.no_grad()
def solve_output(ladder: Ladder, players: Players, source: Teacher) -> None:
    """Give the student the conv_out that best says in its own terms, from its last features, what `source` predicts."""
    ladder = replace(ladder, batches=ladder.batches.whole)  # every process finds the same
    unet, alpha_bar = players.student, ladder.alpha_bar

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for k in range(-math.ceil(SOLVED / ladder.batches.batch_size), 0):
            batch = ladder.batches[k]
            x_t, t, *_ = endpoints(ladder, players, batch, trains=False)
            _, features = unet(x_t, t, batch.context, batch.added_cond, return_features=True)
            model, prediction = ask(ladder, source, batch)
            with ladder.autocast:
                out = model(x_t, t).float()
            x0, eps = to_x0(out, x_t, t, alpha_bar, prediction), to_eps(out, x_t, t, alpha_bar, prediction)
            target = training_target(x0, eps, t, alpha_bar, players.prediction)
            yield F.silu(unet.conv_norm_out(features[f"up.{len(unet.up_blocks) - 1}"])), target

    weight, bias = solve_conv(pairs())
    unet.conv_out.weight.copy_(weight)
    unet.conv_out.bias.copy_(bias)


def fresh(ladder: Ladder, k: int, what: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """Uniform numbers (B,) and standard-normal noise (B, C, h, w) of the samples of micro-batch k, for one purpose."""
    generators = [generator_for(ladder.config.seed, what, n) for n in ladder.batches.numbers(k)]
    uniform = torch.stack([torch.rand((), generator=g) for g in generators])
    noise = torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators])
    return uniform.to(like.device), noise.to(like.device)
