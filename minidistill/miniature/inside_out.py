"""How the miniature's U-Net is trained so that all of its levels take part.

Trained plainly, a U-Net for images as small as these stays idle inside: its two outer levels learn the task first, and
nothing is left for the levels below (with the output of levels 2, 3 and mid block set to zero, its prediction changed
by an MSE of 1e-5). Here the outer levels read no text (`networks.UNET`). The output of the inner ones reaches the last
layer at full scale (`keep_variance`); x0 is predicted from them too (`X0Heads`); and what could do without the levels
further in is dropped now and then (`OuterDropout`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidistill.models.unet import UNet, UNetConfig

HEAD_START = 300  # steps in which new heads learn alone beside a trained U-Net: at first their MSE is 1.4, later 0.3
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

    def forward(self, features: dict[str, Tensor], x0: Tensor, alone: bool = False) -> dict[str, Tensor]:
        """Features of the U-Net and x0 (B, C, h, w) of the first B samples -> the MSE of each head, by name.

        alone: without gradients to the features.
        """
        losses = {}
        for head, (name, side) in zip(self.heads, PATCHES.items(), strict=True):
            read = features[name].detach() if alone else features[name]
            normed = F.group_norm(read[: len(x0)].float(), self.groups)
            losses[f"x0 from {name}"] = (head(normed) - F.pixel_unshuffle(x0, side)).square().mean()
        return losses


def excess(features: dict[str, Tensor]) -> Tensor:
    """By how much the mean squares of the inner features exceed LIMITS, summed."""
    squares = {name: features[name].float().square().mean() for name in LIMITS}
    return torch.stack([F.relu(squares[name] - limit) for name, limit in LIMITS.items()]).sum()


KINDS = ("skips", "attention")
DROPPED = {  # kind and level -> probability. Of level 3 only the skips: it has no transformers.
    ("skips", 3): 0.25,
    ("skips", 2): 0.25,
    ("attention", 2): 0.25,
}


def probability(most: float, progress: float) -> float:
    """Of dropping, at `progress`, 0 to 1, of the run: `most`, which falls to 0 between .90 and .97."""
    return most * min(1.0, max(0.0, (0.97 - progress) / 0.07))


def draw(batch: int, generator: torch.Generator) -> Tensor:
    """One random number in [0, 1) for each kind and sample: (2, batch)."""
    return torch.stack([torch.rand(batch, generator=generator) for _ in KINDS])


class OuterDropout:
    """Drops transformers and skip connections of the outer levels per sample, with the probabilities of DROPPED.

    One random number per sample and kind decides for all levels, so in samples that lose the transformers of level 2
    only the mid block reads the text. Nothing is dropped outside of `at`. A transformer is computed only for the
    samples that keep it.
    """

    def __init__(self, unet: UNet) -> None:
        self.kept: dict[tuple[str, int], Tensor] = {}
        last = len(unet.config.block_out_channels) - 1
        for kind, level in DROPPED:
            if kind == "skips":
                unet.up_blocks[last - level].register_forward_pre_hook(partial(self._drop_skips, level))
                continue
            for block in (unet.down_blocks[level], unet.up_blocks[last - level]):
                for transformer in block.attentions:  # a hook could not save its computation
                    transformer.forward = partial(self._transform, level, transformer.forward)

    @contextlib.contextmanager
    def at(self, progress: float, draws: Tensor) -> Iterator[None]:
        """In this block, drop what the `progress` of the run says. draws: (2, B), those of `draw` for its samples."""
        for (kind, level), most in DROPPED.items():
            if (p := probability(most, progress)) > 0:
                self.kept[kind, level] = draws[KINDS.index(kind)] >= p
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


@torch.no_grad()
def copy_fitting(source: UNet, unet: UNet, generator: torch.Generator) -> list[str]:
    """Copy each weight that fits, in place -> names of the others. Level 0 of `source` may have half the channels.

    Each of those then becomes two equal ones, next to each other (Net2Net, arXiv 1511.05641). A layer that reads them
    has for each pair random shares of the one weight, so that the two learn different things. A U-Net of which all fits
    predicts what `source` does, or nearly: normalisations over level 0 together with wider levels have other groups.
    """
    given, narrow, left = dict(source.named_parameters()), source.config.block_out_channels[0], []
    for name, weight in unet.named_parameters():
        frequencies = name == "time_embedding.linear_1.weight"  # every second one is an old one, the others are new
        old = given.get(name)
        copied = None if old is None else _widen(old, weight.shape, narrow, None if frequencies else generator)
        if copied is None:
            left.append(name)
        else:
            weight.copy_(copied)
    return left


def _widen(old: Tensor, shape: torch.Size, narrow: int, generator: torch.Generator | None) -> Tensor | None:
    """A weight with each of `narrow` channels, or all, twice. None: that is not `shape`.

    generator: of the shares; None: the first of a pair has all, and the second none.
    """
    if old.ndim != len(shape):
        return None
    for dim, (few, wanted) in enumerate(zip(old.shape, shape, strict=True)):
        if (more := wanted - few) not in (0, narrow, few):
            return None
        kept, last = old.split([few - more, more], dim)  # what is read from a skip comes last
        pair = [last, last]
        if dim == 1:
            share = torch.rand(last.shape, generator=generator).to(last) if generator else torch.ones_like(last)
            pair = [share * last, (1 - share) * last]
        old = torch.cat([kept, torch.stack(pair, dim + 1).flatten(dim, dim + 1)], dim)
    return old


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
