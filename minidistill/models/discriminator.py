"""The discriminator of SDXL-Lightning (arXiv 2402.13929, section 3.3): the teacher's encoder and mid block, and a head.

    D (x_t, x_{t-ns}, t, t - ns, c) = sigmoid(head(d(x_{t-ns}, t - ns, c), d(x_t, t, c)))     conditional      (22)
    D'(x_{t-ns}, t - ns, c)         = sigmoid(head(d(x_{t-ns}, t - ns, c)))                   unconditional    (23)

d is the backbone: latents, timesteps and text in, features out. What is returned is the logit, before the sigmoid.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Features = dict[str, Tensor]
BLOCKS = 3  # of a head at most: 32x32 -> 4x4 in SDXL


class Block(nn.Module):
    """4x4 convolution of stride 2, GroupNorm and SiLU, which halve the side: (B, C, h, w) -> (B, C', h/2, w/2)."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 4, stride=2, padding=1)
        # 32 groups as in the paper; fewer where a group would be so few channels that a 1x1 map normalises to nothing
        self.norm = nn.GroupNorm(math.gcd(32, channels, max(1, channels // 4)), channels)

    def forward(self, h: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(h)))


class Head(nn.Module):
    """Features of one or two latents side by side, (B, C, h, w) of any size, -> logits (B,), float32.

    As many blocks as the size it is made for allows, the mean over what is left of it, and a linear layer, which is
    zero at first: D knows nothing. side: the smaller one of the feature map.
    """

    def __init__(self, in_channels: int, channels: int, side: int):
        super().__init__()
        count = min(BLOCKS, int(math.log2(side)))
        self.blocks = nn.ModuleList(Block(channels if i else in_channels, channels) for i in range(count))
        self.out = nn.Linear(channels if count else in_channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            h = h.float()
            for block in self.blocks:
                h = block(h)
            return self.out(h.mean(dim=(2, 3))).squeeze(1)


class Discriminator(nn.Module):
    """Tells the teacher's latents from the student's.

    Args:
        unet: the U-Net with the teacher's original weights. Its encoder and mid block are copied.
        side: the smaller side of the latents, h or w.
        conditional: D, which also reads x_t (22), or D' (23).
        taps: features to read: "mid" as in the paper, and "down.i", the output of encoder stage i at full size. The
            logit is the mean over them.
        train_backbone: the paper trains it all. False trains the heads alone, as in LADD (arXiv 2403.12015); the
            frozen weights are not copied.
    """

    def __init__(
        self,
        unet: nn.Module,
        side: int,
        conditional: bool,
        taps: Sequence[str] = ("mid",),
        train_backbone: bool = True,
    ):
        super().__init__()
        # What the encoder does not need is left out of the copy, and so are frozen weights.
        absent = {id(part): nn.Identity() for part in (unet.up_blocks, unet.conv_norm_out, unet.conv_out)}
        shared = {} if train_backbone else {id(weight): weight for weight in unet.parameters()}
        self.backbone = copy.deepcopy(unet, {**absent, **shared}).requires_grad_(train_backbone)
        self.conditional, self.taps = conditional, tuple(taps)
        widths = unet.config.block_out_channels
        known = ["mid", *(f"down.{i}" for i in range(len(widths)))]
        if not taps or not set(taps) <= set(known):
            raise ValueError(f"a discriminator reads {', '.join(known)}, not {', '.join(taps)}")
        self.shapes: dict[str, tuple[int, int, int]] = {}  # of the heads
        for tap in taps:
            stage = len(widths) - 1 if tap == "mid" else int(tap.removeprefix("down."))
            across = math.ceil(side / 2**stage)
            self.shapes[tap.replace(".", "_")] = (1 + conditional) * widths[stage], widths[stage], across
        self.heads = nn.ModuleDict({tap: Head(*shape) for tap, shape in self.shapes.items()})

    def features(self, x: Tensor, t: Tensor, context: Tensor, added_cond: dict[str, Tensor] | None = None) -> Features:
        """d(x, t, c): the tapped features of latents x (B, C, h, w) at timesteps t (B,). Arguments as of the U-Net."""
        h, skips, _, _ = self.backbone.encode(x, t, context, added_cond)
        found, last = {"mid": h}, 0
        for i, stage in enumerate(self.backbone.down_blocks):
            last += len(stage.resnets)
            found[f"down.{i}"] = skips[last]
            last += len(stage.downsamplers)
        return {tap: found[tap] for tap in self.taps}

    def features_of(
        self,
        latents: Sequence[Tensor],
        timesteps: Sequence[Tensor],
        context: Tensor,
        added_cond: dict[str, Tensor] | None = None,
    ) -> list[Features]:
        """The features of each of several latents of the same samples, which pass the backbone as one batch."""
        n = len(latents)
        added = added_cond and {name: torch.cat([value] * n) for name, value in added_cond.items()}
        found = self.features(torch.cat([*latents]), torch.cat([*timesteps]), torch.cat([context] * n), added)
        parts = zip(*(h.chunk(n) for h in found.values()), strict=True)
        return [dict(zip(found, part, strict=True)) for part in parts]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        added_cond: dict[str, Tensor] | None = None,
        condition: Features | None = None,
    ) -> Tensor:
        """Logits (B,) of latents x (B, C, h, w) at t (B,), float32. condition: the features of x_t; D' takes none.

        ValueError: a condition is missing, or is given to D'.
        """
        return self.compare(self.features(x, t, context, added_cond), condition)

    def compare(self, found: Features, condition: Features | None = None, heads: nn.ModuleDict | None = None) -> Tensor:
        """Logits (B,) from the features of x_{t-ns} and, for D, those of x_t. ValueError: as in `forward`.

        heads: in place of its own.
        """
        if (condition is not None) != self.conditional:
            raise ValueError("the conditional discriminator needs features of x_t, and the other one takes none")
        logits = []
        for tap, h in found.items():
            both = h if condition is None else torch.cat([h, condition[tap]], dim=1)  # x_{t-ns} first
            logits.append((heads or self.heads)[tap.replace(".", "_")](both))
        return torch.stack(logits).mean(0)

    def random_heads(self, seed: int) -> nn.ModuleDict:
        """Heads like its own that have learned nothing, but are not zero: what a ranking may reach by chance."""
        with torch.random.fork_rng(devices=[]):
            heads = nn.ModuleDict({tap: Head(*shape) for tap, shape in self.shapes.items()})
            torch.manual_seed(seed)
            for head in heads.values():
                for block in head.blocks:
                    block.conv.reset_parameters()
                    block.norm.reset_parameters()
                nn.init.normal_(head.out.weight)
        return heads.to(next(self.heads.parameters()).device)
