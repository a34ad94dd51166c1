"""One optimizer step, in pieces: learning rate, AdamW, gradient norm, the finite check."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from minidistill.errors import InputError, NonFiniteLoss
from minidistill.training import parallel

SCHEDULES = ("constant", "cosine")
MUON_RATE = 3.0  # the learning rate of Muon over AdamW's


def lr_at(step: int, base: float, warmup: int, total: int, schedule: str = "constant") -> float:
    """Learning rate of optimizer step `step`, counted from 0, of `total` steps.

    A pure function of the optimizer step: micro-batches, processes and resumes do not enter. Linear warm-up
    over `warmup` steps, the first at base / warmup (at 0 it would be wasted), the last at base; then base for
    "constant", or half a cosine that reaches 0 at `total`.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    if step < warmup:
        return base * (step + 1) / warmup
    if schedule == "constant":
        return base
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return base * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def adamw(
    parameters: Iterable[nn.Parameter],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient, in one fused kernel.

    Norms and biases are decayed too, as in BK-SDM and the diffusers scripts. ValueError if none requires one.
    InputError: a learning rate that trains nothing, or uphill.
    """
    if lr <= 0:
        raise InputError(f"--learning-rate must be above 0, not {lr:g}")
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise ValueError("no parameter requires a gradient: nothing would be trained")
    return torch.optim.AdamW(trained, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (arXiv 2502.16982, sec. 2), for weights of two or more dimensions.

    The update of a weight, as a matrix (outputs, the rest), gets singular values of about 1, by five Newton-Schulz
    iterations on the Gram matrix, and the size that AdamW's have: a root mean square of 0.2 lr. So small directions of
    the gradient train as fast as large ones.
    """

    NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; without a gradient, a weight stays as it is. Weights of one shape are computed together."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for weight in (p for p in group["params"] if p.grad is not None):
                alike[weight.shape].append(weight)
                if not self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
            for shape, weights in alike.items():
                averages = [self.state[weight]["momentum"] for weight in weights]
                for weight, average in zip(weights, averages, strict=True):
                    average.mul_(group["momentum"]).add_(weight.grad)
                nesterov = torch.stack([weight.grad for weight in weights])
                nesterov = nesterov.add_(torch.stack(averages), alpha=group["momentum"]).flatten(2)
                lr = 0.2 * group["lr"] * max(nesterov.shape[1:]) ** 0.5
                for weight, update in zip(weights, self.orthogonal(nesterov), strict=True):
                    weight.add_(update.view(shape), alpha=-lr)

    @classmethod
    def orthogonal(cls, matrix: Tensor) -> Tensor:
        """The nearest matrices (..., m, n) with singular values of 1, roughly: they are between 0.7 and 1.2."""
        x = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-20)
        a, b, c = cls.NEWTON_SCHULZ
        gram, eye = x @ x.mT, torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
        product = eye
        for _ in range(5):  # x <- (a + b x x^T + c (x x^T)^2) x, of which the factors commute with x x^T
            factor = a * eye + b * gram + c * gram @ gram
            product, gram = factor @ product, factor @ gram @ factor
        x = product @ x
        return (x.mT if matrix.shape[-2] > matrix.shape[-1] else x).contiguous()


def muon_and_adamw(network: nn.Module, hidden: Sequence[nn.Parameter], lr: float) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the weights `hidden`, at MUON_RATE times the rate, and AdamW for the others of a network.

    Without weight decay, and with a small eps: gradients of inner levels may be as small as the usual one.
    """
    taken = {id(p) for p in hidden}
    others = [p for p in network.parameters() if id(p) not in taken]
    return Muon(hidden, MUON_RATE * lr), adamw(others, lr, betas=(0.9, 0.99), eps=1e-12, weight_decay=0)


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most `max_norm` (None: leave them).

    Returns the norm before clipping, a 0-d tensor so that a GPU need not wait. With fp16, unscale first.
    """
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
    return parallel.full(norm.detach())


def optimizer_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    lr: float,
    max_grad_norm: float | None,
    step: int = 0,
    t: Tensor | None = None,
) -> Tensor:
    """After backward: average over processes, unscale, clip, step with `lr`, clear the gradients.

    Returns the norm before clipping (0-d). NonFiniteLoss, before any weight is changed, if a gradient is not finite:
    `step` and its timesteps `t` (B,) are for the message. With fp16, whose gradients overflow now and then, `scaler`
    skips such a step instead.
    """
    set_lr(optimizer, lr)
    parallel.average_gradients(weight for group in optimizer.param_groups for weight in group["params"])
    scaler.unscale_(optimizer)
    norm = clip_grad_norm(module.parameters(), max_grad_norm)
    if not scaler.is_enabled():
        check_finite(norm, step, t, "gradient norm")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_finite(loss: Tensor, step: int, t: Tensor | None, what: str = "loss") -> None:
    """Raise NonFiniteLoss naming the step and the timesteps unless every value of `loss` is finite.

    `loss` is a scalar, or (B,) beside `t` (B,), and then only the timesteps of the bad samples are named. `what` it is
    called in the message.
    """
    finite = torch.isfinite(loss.detach())
    if bool(finite.all()):
        return
    where, value = f"step {step}", loss.detach()[~finite].flatten()[0].item()
    if t is not None:
        steps = sorted(set((t[~finite] if finite.shape == t.shape else t).flatten().tolist()))
        where += f" (timesteps {', '.join(map(str, steps[:8]))}{', ...' if len(steps) > 8 else ''})"
    raise NonFiniteLoss(
        f"the {what} is {value} at {where}: start again with a lower --learning-rate; where that was in fp16, "
        "--precision bf16 or fp32 may do too"
    )
