"""The adversarial objective of SDXL-Lightning (arXiv 2402.13929, sections 3.2 to 3.4 and 3.7), and its options.

    p  = D(x_t, x_{t-ns},  t, t - ns, c)    the teacher's endpoint: real                  (18)
    p^ = D(x_t, x^_{t-ns}, t, t - ns, c)    the student's: fake                           (19)
    L_D = -log p - log(1 - p^)              L_G = -log p^                                 (20), (21)

With logits l, p = sigmoid(l): -log p = softplus(-l) and -log(1 - p) = softplus(l). Everything is float32. The network
is `models/discriminator.py`, conditional (22) or unconditional D' (23), which reads no x_t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minidistill.diffusion.schedule import add_noise


def discriminator_loss(real: Tensor, fake: Tensor, relativistic: bool = False) -> Tensor:
    """L_D (20) from logits (B,), (B,) -> (B,); 2 ln 2 where D knows nothing.

    relativistic: softplus(fake - real), which compares the two of a pair (arXiv 1807.00734); then ln 2.
    """
    if relativistic:
        return F.softplus(fake - real)
    return F.softplus(-real) + F.softplus(fake)


def generator_loss(real: Tensor, fake: Tensor, relativistic: bool = False) -> Tensor:
    """L_G (21) from logits (B,), (B,) -> (B,); ln 2 where D knows nothing. real is read if relativistic only."""
    return F.softplus(real.detach() - fake) if relativistic else F.softplus(-fake)


def turn(real: Tensor, fake: Tensor, relativistic: bool = False) -> Tensor:
    """The gradient of L_G in the student's sample over that of L_D in it, from logits (B,) and (B,) -> (B,).

    Both losses reach the sample through its logit l alone, so one backward pass is enough: d L_D / dl = sigmoid(l) and
    d L_G / dl = -sigmoid(-l), which is -exp(-l) times as much. relativistic: l is fake - real.
    """
    l = (fake - real if relativistic else fake).detach()
    return -torch.exp(-l.clamp(min=-50))  # below, sigmoid(l) loses its digits in float32


def ranking_accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """Share () of pairs, logits (B,) and (B,), of which the real one has the larger logit; ties count one half."""
    return ((real > fake).double() + 0.5 * (real == fake).double()).mean()


def verdict(accuracy: float, pairs: int, by_chance: Sequence[float] = ()) -> str | None:
    """What is wrong with a discriminator that ranks so many held-out pairs with this accuracy; None: nothing.

    Its loss does not tell: with beta1 = 0, Adam makes full-size steps of any gradient, also of noise.
    by_chance: the accuracies of discriminators with random heads. They scatter more than guesses, since the student's
    samples differ from the teacher's in the same way in all pairs, which any head may like or dislike.
    """
    scatter = sum((chance - 0.5) ** 2 for chance in by_chance) / max(1, len(by_chance))
    error = math.sqrt(max(0.25 / pairs, scatter))  # standard error of a guess, or the scatter
    if accuracy < 0.5 - 2 * error:
        return "has collapsed: it ranks the student's samples above the teacher's, and leads the student away"
    if accuracy < 0.5 + 2 * error:
        return "is blind: its ranking is within what random heads reach, so the student learns nothing from it"
    if accuracy > 0.99:
        return "wins outright: the student may learn no more from it; lower its learning rate, or train longer"
    return None


def to_noise_level(
    x: Tensor, t_next: Tensor, eps: Tensor, level: Tensor | None, alpha_bar: Tensor
) -> tuple[Tensor, Tensor]:
    """What D reads: clean samples noised to t* (25), (26), others as they are -> (x (B, C, h, w), its timesteps (B,)).

    level: t* (B,) for the samples with t_next = -1; None: D reads clean samples, as of t = 0.
    """
    if level is None:
        return x, t_next.clamp(min=0)
    clean = t_next < 0
    at = torch.where(clean, level, t_next)
    noised = add_noise(x, eps, at.clamp(min=0), alpha_bar)
    return torch.where(clean.view(-1, *[1] * (x.ndim - 1)), noised, x.to(noised)), at


def draw_levels(uniform: Tensor, levels: Sequence[int], weights: Sequence[float] | None = None) -> Tensor:
    """t* (B,) int64 from uniform numbers (B,) in [0, 1). weights: relative, such as 5, 1, 1, 1; default: equal."""
    shares = torch.tensor(weights or [1.0] * len(levels), dtype=torch.float64).cumsum(0)
    place = torch.searchsorted(shares / shares[-1], uniform.double().cpu(), right=True)
    return torch.tensor(levels)[place].to(uniform.device)


def approximate_r1(real: Tensor, nudged: Tensor) -> Tensor:
    """Approximated R1, (D(x) - D(x + sigma n))^2, from logits (B,), (B,) -> (B,) (arXiv 2501.08316, section 3.4)."""
    return (real - nudged).square()


def matching_loss(x0: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """Distribution matching: (B, C, h, w) three times -> (B,) (arXiv 2311.18828, equations 7 and 8; 2405.14867).

    Its gradient in x0 is that of the divergence between the student's samples and the teacher's: the difference of two
    denoised versions of the noised x0, by a network trained on the student's samples (fake_x0) and by the teacher,
    with guidance (real_x0), over the mean distance to the latter.
    """
    x0, real_x0, fake_x0 = x0.float(), real_x0.detach().float(), fake_x0.detach().float()
    scale = (x0.detach() - real_x0).abs().flatten(1).mean(1).clamp(min=1e-6)
    gradient = (fake_x0 - real_x0) / scale.view(-1, *[1] * (x0.ndim - 1))
    return 0.5 * (x0 - (x0.detach() - gradient)).square().flatten(1).mean(1)
