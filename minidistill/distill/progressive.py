"""Progressive distillation as SDXL-Lightning does it (arXiv 2402.13929, sections 3.1, 3.2 and 3.7): pure functions.

    x_t                = forward(x_0, eps, t)              t of the student's timesteps; pure noise at T     (6), (24)
    x_{t-s}, x_{t-2s}, ..., x_{t-ns}                       n steps of the frozen teacher                     (7-13)
    x^_{t-ns}          = move(x_t, f_student(x_t, t, c), t, t - ns)                                          (14, 15)
    L_mse              = || x^_{t-ns} - x_{t-ns} ||^2                                                        (16)

The equations that are not here are in `diffusion/schedule.py`: (1)-(5), (24) and the move, in float32, and the mean
square in `kd.py`. All timesteps come from the one trailing grid that the student is sampled on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minidistill.diffusion.samplers import Model
from minidistill.diffusion.schedule import move, time_grid, to_eps, to_x0, training_target
from minidistill.distill.kd import mean_square


def jump_table(student: int, teacher: int, timesteps: int | None = None, num_train_timesteps: int = 1000) -> Tensor:
    """The timesteps of each jump: (K, n + 1) int64, a row t, t - s, ..., t - ns for each t the student is trained at.

    n = teacher / student. A row is clamped to -1, the clean latent. With 8 and 32: 999 968 937 905 874, and so on.

    Args:
        student, teacher: their numbers of sampling steps.
        timesteps: K, evenly spaced: 4 trains a student of 1 or 2 steps at 999, 749, 499 and 249 (section 3.7).
            Default: the student's own steps.

    Raises:
        ValueError: the grids are not nested: a step of the coarser one is no step of the finer one.
    """
    count = student if timesteps is None else timesteps
    fine = max(teacher, count)
    grid = time_grid(fine, "trailing", num_train_timesteps)
    for coarse in (student, teacher, count):
        own = time_grid(coarse, "trailing", num_train_timesteps)
        if fine % coarse or not torch.equal(grid[:: fine // coarse], own):
            raise ValueError(f"the timesteps of {coarse} steps are not among those of {fine}")
    if teacher % student or count % student:
        raise ValueError(f"a student of {student} steps needs a multiple of them, not {teacher} and {count}")
    starts = torch.arange(count) * (fine // count)
    places = starts[:, None] + torch.arange(teacher // student + 1) * (fine // teacher)
    return torch.cat([grid, torch.tensor([-1])])[places.clamp(max=fine)]


def mixed_jumps(students: Sequence[int], teacher: int, num_train_timesteps: int = 1000) -> Tensor:
    """The jumps of several students in one table, (K, n + 1): rows of `jump_table`, of each student equally many.

    n is that of the student of fewest steps; shorter rows stay at their end: 999 874 874 for 8 of 8 steps beside 4.
    """
    tables = [jump_table(student, teacher, None, num_train_timesteps) for student in students]
    width, rows = max(table.shape[1] for table in tables), math.lcm(*map(len, tables))
    ends = [table[:, -1:].expand(-1, width - table.shape[1]) for table in tables]
    return torch.cat([torch.cat(pair, 1).repeat(rows // len(pair[0]), 1) for pair in zip(tables, ends, strict=True)])


@torch.no_grad()
def teacher_path(model: Model, x_t: Tensor, times: Tensor, alpha_bar: Tensor, prediction: str) -> Tensor:
    """x_{t-ns} (B, C, h, w) float32 from x_t, by the teacher's n steps (equations 7 to 13).

    model: model(x, t), with its conditioning, and in the first stage with guidance (`samplers.guide`). times: rows of
    `jump_table`, (B, n + 1).
    """
    x = x_t
    for t, t_next in zip(times[:, :-1].unbind(1), times[:, 1:].unbind(1), strict=True):
        at = t.clamp(min=0)
        moved = move(x, model(x, at).float(), at, t_next, alpha_bar, prediction)
        x = torch.where((t == t_next).view(-1, *[1] * (x.ndim - 1)), x.to(moved), moved)  # at their end they stay
    return x


def on_schedule(model: Model, own: Tensor, prediction: str, alpha_bar: Tensor) -> Model:
    """A model that was trained on the schedule `own` (T,), asked on another one, alpha_bar (T,): model(x, t) -> v.

    It is given that timestep of its own at which the noise is most nearly the same. At zero terminal SNR, where eps
    does not determine x0, that is its last one: as in (24) it sees pure noise, and counts with its own alpha_bar.
    """
    clock = (own - alpha_bar[:, None]).abs().argmin(1)  # (T,)

    def predict_v(x: Tensor, t: Tensor) -> Tensor:
        at = clock[t]
        out = model(x, at).float()
        x0, eps = to_x0(out, x, at, own, prediction), to_eps(out, x, at, own, prediction)
        return training_target(x0, eps, t, alpha_bar, "v_prediction")

    return predict_v


@torch.no_grad()
def rollout(model: Model, noise: Tensor, t: Tensor, grid: Tensor, alpha_bar: Tensor, prediction: str) -> Tensor:
    """x_t (B, C, h, w) float32 as the student itself reaches it from pure noise, in place of noised data.

    Backward simulation of DMD2 (arXiv 2405.14867, section 4.5). grid: the student's steps, the last one that is needed
    at its end; t (B,): one of them each.
    """
    x = found = noise.float()
    for now, after in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        at = torch.full_like(t, now)
        x = move(x, model(x, at).float(), at, after, alpha_bar, prediction)
        found = torch.where((t == after).view(-1, *[1] * (x.ndim - 1)), x, found)
    return found


def convert_loss(x0: Tensor, frozen_out: Tensor, x_t: Tensor, t: Tensor, alpha_bar: Tensor, prediction: str) -> Tensor:
    """L_convert (29): x0 (B, C, h, w) of the online network against that of the frozen one, in float32 -> (B,).

    frozen_out: the prediction of the frozen copy (27), of eps or v; x0: that of the network which becomes x0's (28).
    """
    return mean_square(x0, to_x0(frozen_out.detach().float(), x_t, t, alpha_bar, prediction))


@torch.no_grad()
def solve_conv(pairs: Iterable[tuple[Tensor, Tensor]], ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Weight (C', C, 3, 3) and bias (C',) of the padded 3x3 convolution that best maps h to target, by least squares.

    The start of `conv_out` for x0-prediction: from eps weights, gradient descent on (29) needs hundreds of updates to
    get where this is at once. pairs: batches of h (B, C, h, w) and target (B, C', h, w). ridge: added to the diagonal
    of the normal equations, relative to its mean.
    """
    gram = moment = None
    for h, target in pairs:
        rows = F.unfold(h.float(), 3, padding=1).transpose(1, 2).flatten(0, 1)  # (B*h*w, 9C)
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1).cpu().double()
        wanted = target.flatten(2).transpose(1, 2).flatten(0, 1).cpu().double()  # (B*h*w, C')
        gram = rows.T @ rows + (0 if gram is None else gram)
        moment = rows.T @ wanted + (0 if moment is None else moment)
        shape = target.shape[1], h.shape[1], 3, 3
    if gram is None or moment is None:
        raise ValueError("least squares need one pair of features and targets at least")
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solved = torch.linalg.solve(gram, moment).T.float()  # (C', 9C + 1)
    return solved[:, :-1].reshape(shape), solved[:, -1].clone()
