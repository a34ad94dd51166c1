"""Solutions of all exercises of the notebooks, for after you have tried. tests/test_notebooks.py checks them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minidistill.diffusion.schedule import move, time_grid
from minidistill.distill import kd

# 00 Latents, noise and a U-Net


def x0_from_eps(x_t: Tensor, eps: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The equation of x_t solved for x0; each sample has its own alpha_bar, which must be broadcast over (C, h, w)."""
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return (x_t - (1 - a).sqrt() * eps) / a.sqrt()


def feature_shape(name: str, channels: tuple[int, ...], side: int) -> tuple[int, int, int]:
    """Down stages end with a downsampler and up stages with an upsampler, except the last of each path."""
    path, stage = name.split(".")
    last = len(channels) - 1
    level = int(stage) if path == "down" else last - int(stage)
    after = min(level + 1, last) if path == "down" else max(level - 1, 0)
    return channels[level], side >> after, side >> after


def guided(unet, x: Tensor, t: Tensor, context: Tensor, uncond: Tensor, guidance: float) -> Tensor:
    """Both predictions come from one call with a batch of twice the size; u + g (c - u) is c for g = 1."""
    u, c = unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([uncond, context])).chunk(2)
    return u + guidance * (c - u)


def ddim_step(x_t: Tensor, eps: Tensor, a: Tensor, a_next: Tensor) -> Tensor:
    """Estimate x0, then add noise again, to the next level: the same direction eps, not fresh noise."""
    x0 = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
    return a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps


# 01 Block removal


def outer_levels() -> tuple[str, ...]:
    """The up path is numbered from the bottom: of four levels, up.3 belongs to level 0 and up.2 to level 1."""
    return ("down.0.1", "down.1.1", "up.3.1", "up.2.1", "mid")


def conv_costs(kernel: int, c_in: int, c_out: int, h: int, w: int) -> tuple[int, int]:
    """Each weight is used once for every output pixel; the bias is a parameter, but its addition is no MAC."""
    weights = kernel**2 * c_in * c_out
    return weights + c_out, weights * h * w


def teacher_name(name: str, removal) -> str:
    """Only two numbers change: that of an up stage, if levels are removed below it, and that of a layer."""
    part, *rest = name.split(".")
    if part in ("down_blocks", "up_blocks"):
        stage = int(rest[0])
        layers = (removal.kept_down if part == "down_blocks" else removal.kept_up)[stage]
        if part == "up_blocks":
            rest[0] = str(stage + removal.stages_removed)
        if rest[1] in ("resnets", "attentions"):
            rest[2] = str(layers[int(rest[2])])
    return ".".join([part, *rest])


def greedy(scores: list, saving: int) -> list:
    """Each round takes the best ratio among those that share no weight with what has been taken before."""
    taken = []
    while sum(s.parameters for s in taken) < saving:
        free = [s for s in scores if not any(s.weights & old.weights for old in taken)]
        taken.append(min(free, key=lambda s: s.sensitivity / s.parameters))
    return taken


# 02 Knowledge distillation


def my_output_loss(student_out: Tensor, teacher_out: Tensor) -> Tensor:
    """Squared in float32, since float16 ends at 65504; detached, so that only the student learns."""
    return (student_out.float() - teacher_out.detach().float()).square().flatten(1).mean(1)


def normalised_term(f_student: Tensor, f_teacher: Tensor) -> Tensor:
    """Error and size are averaged over everything but the batch, so that each sample has its own ratio."""
    size = f_teacher.float().square().flatten(1).mean(1)
    error = (f_student.float() - f_teacher.float()).square().flatten(1).mean(1)
    return error / size


def reached(feature: str) -> set[str]:
    """A down feature depends on all stages before it; an up feature on the whole down path and the up stages to it."""
    side, stage = feature.split(".")[:2]
    down, up = (3, int(stage) + 1) if side == "up" else (int(stage) + 1, 0)
    parts = {"conv_in", "time_embedding"} | {f"down_blocks.{i}" for i in range(down)}
    return parts | {f"up_blocks.{i}" for i in range(up)}


def eps_loss_of_v(v_student: Tensor, v_teacher: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    """In the difference of two predictions at the same x_t, sqrt(1 - abar) x_t cancels; sqrt(abar) is squared."""
    return alpha_bar[t] * kd.mean_square(v_student, v_teacher)


# 03 Progressive distillation


def mixture_eps(x_t: Tensor, t: Tensor, alpha_bar: Tensor, modes: Tensor, sigma: float) -> Tensor:
    """Given a mode, E[eps] is linear in x_t; the modes are weighted by how likely each is, given x_t."""
    a = alpha_bar[t].reshape(-1, 1, 1)
    variance = a * sigma**2 + 1 - a  # of x_t around a mode, (B, 1, 1)
    away = x_t[:, None] - a.sqrt() * modes  # (B, K, 2)
    weights = (-away.square().sum(2, keepdim=True) / (2 * variance)).softmax(1)  # (B, K, 1)
    return (weights * away * (1 - a).sqrt() / variance).sum(1)


def my_jump_table(student: int, teacher: int) -> Tensor:
    """The teacher's grid, ended by -1, cut into the student's jumps; neighbours share a timestep."""
    grid = torch.cat([time_grid(teacher, "trailing"), torch.tensor([-1])])
    return grid.unfold(0, teacher // student + 1, teacher // student)


def jump_loss(model, x_t: Tensor, target: Tensor, times: Tensor, alpha_bar: Tensor) -> Tensor:
    """Only the ends of a row matter to the student: it makes one move from the first to the last timestep."""
    t, t_next = times[:, 0], times[:, -1]
    return kd.mean_square(move(x_t, model(x_t, t), t, t_next, alpha_bar), target)


def sharpness(pixels: Tensor) -> Tensor:
    """Four neighbours less four times the pixel, of the mean over colours."""
    grey = pixels.mean(1)
    centre = grey[:, 1:-1, 1:-1]
    neighbours = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return (neighbours - 4 * centre).abs().flatten(1).mean(1)


# 04 The discriminator


def player_losses(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """-log p is softplus(-l), and -log(1 - p) is softplus(l), since 1 - sigmoid(l) = sigmoid(-l)."""
    return F.softplus(-real) + F.softplus(fake), F.softplus(-fake)


def best_logit(real: Tensor, fake: Tensor) -> Tensor:
    """The derivative -P sigmoid(-l) + Q sigmoid(l) is zero where e^l = P / Q."""
    return real.log() - fake.log()


def ranking(real: Tensor, fake: Tensor) -> float:
    """The sign of the difference is 1, 0 or -1: its mean, from -1 .. 1 to 0 .. 1."""
    return (0.5 + 0.5 * (real - fake).sign().mean()).item()


def pull(judge, fake: Tensor) -> Tensor:
    """The gradient of a sum is each sample's own; autograd.grad leaves nothing in the weights."""
    latents = fake.detach().requires_grad_()
    return torch.autograd.grad(F.softplus(-judge(latents)).sum(), latents)[0]


# 05 One step


def amplification(a: Tensor, a_next: Tensor) -> Tensor:
    """eps enters x_t' twice: by way of x0, and as the noise that is added again, with the other sign."""
    return ((1 - a_next).sqrt() - a_next.sqrt() * ((1 - a) / a).sqrt()).abs()


def mean_error(a: float, n: int) -> float:
    """The mean of n independent numbers has 1 / sqrt(n) of their standard deviation."""
    return math.sqrt((1 - a) / a / n)


def score_difference(eps_real: Tensor, eps_fake: Tensor, a: Tensor) -> Tensor:
    """Each log density has the gradient -eps / sqrt(1 - abar): towards less noise."""
    return (eps_fake - eps_real) / (1 - a).sqrt()


def solve_linear(h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The row of the solution that belongs to the ones is the bias."""
    solution = torch.linalg.lstsq(torch.cat([h, torch.ones_like(h[:, :1])], dim=1), target).solution  # (D + 1, C)
    return solution[:-1].T, solution[-1]
