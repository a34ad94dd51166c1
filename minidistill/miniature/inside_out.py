"""How the miniature's U-Net is trained so that all of its levels take part.

Trained plainly, a U-Net for images as small as these stays idle inside: its two outer levels learn the task first, and
nothing is left for the levels below (with the output of levels 2, 3 and mid block set to zero, its prediction changed
by an MSE of 1e-5). Here it learns from the inside out, in three PHASES. Level 1 never reads the text (`networks.UNET`),
level 0 only in the last phase, when the inner levels know what words mean. The output of the inner levels reaches the
last layer at full scale (`keep_variance`); x0 is predicted from them too (`X0Heads`); and what could do without the
levels further in is dropped now and then (`OuterDropout`).

A teacher that was trained plainly lends its outer levels: at first their convolutions (`copy_outer`), and in the last
phase its whole level 0, with transformers (`take_level_0`). That keeps most of what the inner levels have learned, for
they were trained between the same convolutions: the MSE to the teacher, at t = 550, was 0.010 before and 0.019 then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidistill.models.unet import UNet, UNetConfig

KINDS = ("skips", "attention")


@dataclass(frozen=True)
class Phase:
    """A part of the U-Net's training."""

    share: float  # of the run's steps
    falls: float  # over this last share of the phase the learning rate falls to 0
    ranges: tuple[tuple[int, int], ...]  # of t, that the samples take in turn
    gamma: float  # of the loss weights (`p2_weight`)
    heads: float  # weight of the losses of X0Heads
    contrast: float  # weight of contrast_loss
    dropped: dict[tuple[str, int], float]  # kind and level -> probability. Level 3 has no transformers


# Most attributes of a scene are decided between 500 and 950; noise that is left below 300 makes an image grainy. The
# losses of heads and contrast teach much at first, and weigh little later, when they are mostly noise: at weight 0.5
# the gradient of the contrast varied 4 times (levels 0 and 1) to 12 times (further in) as much as that of eps.
OUTER_PARTS = {("skips", 3): 0.25, ("skips", 2): 0.25, ("attention", 2): 0.25}
LATER = ((0, 300), (300, 800), (0, 1000))
PHASES = (
    Phase(0.25, 0.0, ((500, 950), (0, 1000)), 0.25, 0.2, 0.5, {**OUTER_PARTS, ("attention", 0): 1.0}),
    Phase(0.5, 0.6, LATER, 0.0, 0.2, 0.25, {**OUTER_PARTS, ("attention", 0): 1.0}),
    Phase(0.25, 0.7, LATER, 0.0, 0.05, 0.08, {**dict.fromkeys(OUTER_PARTS, 0.2), ("attention", 0): 0.4}),
)


def phase_at(step: int, steps: int, phases: Sequence[Phase]) -> tuple[Phase, float, bool]:
    """At `step` of a run, counted from 0 -> (phase, progress of it from 0 to 1, whether this is its first step)."""
    first, parts = 0.0, sum(phase.share for phase in phases)
    for phase in phases:
        length = steps * phase.share / parts
        if step < first + length or phase is phases[-1]:
            return phase, (step - first) / length, step - 1 < first
        first += length
    raise ValueError("a run has at least one phase")


PATCHES = {"mid": 8, "up.0": 4, "up.1": 2}  # feature -> side of the patch of x0 that it predicts at each position
# Mean squares to which features may grow at no cost; what enters the mid block is less than what it adds.
LIMITS = {"down.3": 2.0, "mid": 50.0, "up.0": 30.0, "up.1": 50.0}


class X0Heads(nn.Module):
    """One 1x1 convolution on each normalised inner feature predicts x0, in patches. Only for training, as in GoogLeNet.

    Of normalised features the scale is free, and it grows, for the more the inner levels count in the sums with the
    outer ones. `excess` limits it: features at a hundred times the scale would be all that a feature loss sees.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.groups = config.norm_num_groups
        widths = {"mid": config.block_out_channels[3], "up.0": config.block_out_channels[3]}
        widths["up.1"] = config.block_out_channels[2]
        outputs = {name: config.out_channels * side**2 for name, side in PATCHES.items()}
        self.heads = nn.ModuleList(nn.Conv2d(widths[name], outputs[name], 1) for name in PATCHES)

    def forward(self, features: dict[str, Tensor], x0: Tensor) -> dict[str, Tensor]:
        """Features of the U-Net and x0 (B, C, h, w) of the first B samples -> the MSE of each head, by name."""
        losses = {}
        for head, (name, side) in zip(self.heads, PATCHES.items(), strict=True):
            normed = F.group_norm(features[name][: len(x0)].float(), self.groups)
            losses[f"x0 from {name}"] = (head(normed) - F.pixel_unshuffle(x0, side)).square().mean()
        return losses


def excess(features: dict[str, Tensor]) -> Tensor:
    """By how much the mean squares of the inner features exceed LIMITS, summed."""
    squares = {name: features[name].float().square().mean() for name in LIMITS}
    return torch.stack([F.relu(squares[name] - limit) for name, limit in LIMITS.items()]).sum()


def fading(phase: Phase, progress: float) -> dict[tuple[str, int], float]:
    """The probabilities of a phase at `progress`, 0 to 1. In the last one they fall to 0 between .90 and .97 of it."""
    factor = min(1.0, max(0.0, (0.97 - progress) / 0.07)) if phase is PHASES[-1] else 1.0
    return {key: factor * probability for key, probability in phase.dropped.items()}


def draw(batch: int, generator: torch.Generator) -> Tensor:
    """One random number in [0, 1) for each kind and sample: (2, batch)."""
    return torch.stack([torch.rand(batch, generator=generator) for _ in KINDS])


class OuterDropout:
    """Drops transformers and skip connections of the outer levels per sample, with given probabilities.

    One random number per sample and kind decides for all levels, so in samples that lose the transformers of level 2
    only the mid block reads the text. Nothing is dropped outside of `at`. A transformer is computed only for the
    samples that keep it.
    """

    def __init__(self, unet: UNet) -> None:
        self.kept: dict[tuple[str, int], Tensor] = {}
        last = len(unet.config.block_out_channels) - 1
        for kind, level in PHASES[-1].dropped:
            if kind == "skips":
                unet.up_blocks[last - level].register_forward_pre_hook(partial(self._drop_skips, level))
                continue
            for block in (unet.down_blocks[level], unet.up_blocks[last - level]):
                for transformer in block.attentions:  # a hook could not save its computation
                    transformer.forward = partial(self._transform, level, transformer.forward)

    @contextlib.contextmanager
    def at(self, probabilities: dict[tuple[str, int], float], draws: Tensor) -> Iterator[None]:
        """In this block, drop with `probabilities`, of kind and level. draws: (2, B), of `draw` for the samples."""
        self.kept = {key: draws[KINDS.index(key[0])] >= p for key, p in probabilities.items() if p > 0}
        try:
            yield
        finally:
            self.kept = {}

    def _drop_skips(self, level: int, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        h, skips, *rest = args
        if (kept := self.kept.get(("skips", level))) is None:
            return args
        return (h, [skip * kept[:, None, None, None].to(skip) for skip in skips], *rest)

    def _transform(self, level: int, forward: Any, x: Tensor, context: Tensor) -> Tensor:
        kept = self.kept.get(("attention", level), torch.ones(len(x))).nonzero().flatten().to(x.device)
        if len(kept) == len(x):
            return forward(x, context)
        if len(kept) == 0:
            return torch.zeros_like(x)
        out = forward(x[kept], context[kept])
        return torch.zeros_like(x, dtype=out.dtype).index_copy(0, kept, out)


LEVEL_0 = ("conv_in", "time_embedding", "down_blocks.0", "up_blocks.3", "conv_norm_out", "conv_out")
OUTER = (*LEVEL_0, "down_blocks.1", "up_blocks.2")


def unfit(given: UNet, wanted: UNet, beginnings: tuple[str, ...]) -> list[str]:
    """Weights of `wanted`, of names with these beginnings, that are not in `given` or have another shape there."""
    shapes = {name: weight.shape for name, weight in given.named_parameters()}
    named = wanted.named_parameters()
    return [name for name, weight in named if name.startswith(beginnings) and shapes.get(name) != weight.shape]


@torch.no_grad()
def copy_outer(teacher: UNet, unet: UNet) -> None:
    """Copy the weights of levels 0 and 1 that have the same shape in a teacher, in place."""
    given, other = dict(teacher.named_parameters()), unfit(teacher, unet, OUTER)
    for name, weight in unet.named_parameters():
        if name.startswith(OUTER) and name not in other:
            weight.copy_(given[name])


@torch.no_grad()
def take_level_0(teacher: UNet, unet: UNet) -> None:
    """Copy a teacher's level 0, with the embedding of the timestep, in place.

    Of that embedding each resnet further in makes what it did of the old one, by least squares over all timesteps.
    ValueError: the teacher has another level 0.
    """
    if other := unfit(teacher, unet, LEVEL_0):
        raise ValueError(f"take_level_0: the teacher's {other[0]} has another shape, or is not there")
    timesteps = torch.arange(1000, device=unet.conv_in.weight.device)
    old = F.silu(unet.embed(timesteps)).double()
    given = dict(teacher.named_parameters())
    for name, weight in unet.named_parameters():
        if name.startswith(LEVEL_0):
            weight.copy_(given[name])
    new = F.pad(F.silu(unet.embed(timesteps)).double(), (0, 1), value=1.0)  # with a column for the bias
    for name, module in unet.named_modules():
        if name.endswith("time_emb_proj") and not name.startswith(LEVEL_0):
            wanted = old @ module.weight.double().T + module.bias.double()
            solution = torch.linalg.lstsq(new.cpu(), wanted.cpu(), driver="gelsd").solution
            module.weight.copy_(solution[:-1].T)
            module.bias.copy_(solution[-1])


@torch.no_grad()
def keep_variance(unet: UNet) -> None:
    """Draw anew the weights of the convolutions through which the inner levels reach the output, in place.

    From the mid block to the output, features pass 15 convolutions that nothing normalises: those of the upsamplers,
    and the shortcuts of the resnets in the decoder. Each reduces the variance to a third with PyTorch's default weights
    (uniform, variance 1 / (3 fan_in)), and keeps it with a variance of 1 / fan_in.
    """
    for name, module in unet.named_modules():
        if name.endswith(("conv_shortcut", "samplers.0.conv")):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")


def squeeze(t: Tensor, numbers: Sequence[int], ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Timesteps (B,) of 0 .. 999 rescaled into ranges [low, high), which the samples take in turn, by their numbers."""
    low, high = torch.tensor(ranges, device=t.device)[torch.tensor(numbers) % len(ranges)].T
    return low + t * (high - low) // 1000


def p2_weight(t: Tensor, alpha_bar: Tensor, gamma: float, k: float = 0.015) -> Tensor:
    """Weight 1 / (k + SNR)^gamma of an eps loss at timesteps t (B,): (B,). Source: P2, arXiv 2204.00227."""
    a = alpha_bar.to(t.device)[t]
    return (k + a / (1 - a)) ** -gamma
