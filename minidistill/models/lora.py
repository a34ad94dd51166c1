"""LoRA: low-rank updates of chosen layers of a network, attached (trainable) or merged into their weights.

    W  ->  W + scale * (alpha / r) * up @ down          down (r, in), up (out, r)

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), equation 3 and section 4.1. For a
convolution, `down` is a convolution (r, in, k, k) with the layer's stride and padding, and `up` is 1x1, (out, r, 1, 1).

A layer with an attached LoRA is the same module, of a subclass of nn.Linear or nn.Conv2d, with two more parameters. All
other names stay the same: the state dict of the network is `base_state` (the official names) plus `lora_state`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Targets are the ends of layer names: of the U-Net, and of the text encoders.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ALL = (  # as in LCM-LoRA and SDXL-Lightning: all layers of the down, mid and up blocks, 788 in SDXL
    *ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
    "conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
)  # fmt: skip
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_ALL = (*TEXT_ATTENTION, "fc1", "fc2")

LORA_PARAMETERS = ("lora_down", "lora_up")


class LoRAWeights(NamedTuple):
    """The low-rank update of one layer."""

    down: Tensor  # (r, in) or (r, in, k, k)
    up: Tensor  # (out, r) or (out, r, 1, 1)
    alpha: float  # the update is multiplied by alpha / r: 8 / 64 in SDXL-Lightning's files


class LoRALinear(nn.Linear):
    """x (..., in) -> W x + b + scale * (alpha / r) * up (down x)."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.lora_down.to(x.dtype))  # cast the small weights, not the input
        return super().forward(x) + _factor(self) * F.linear(h, self.lora_up.to(h.dtype))


class LoRAConv2d(nn.Conv2d):
    """x (B, in, h, w) -> conv(x) + scale * (alpha / r) * up (down x)."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(x, self.lora_down.to(x.dtype), None, self.stride, self.padding, self.dilation)
        return super().forward(x) + _factor(self) * F.conv2d(h, self.lora_up.to(h.dtype))


LoRALayer = LoRALinear | LoRAConv2d


def _factor(layer: LoRALayer) -> float:
    return layer.scale * layer.alpha / len(layer.lora_down)


def candidates(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers of a network that can have a LoRA, by name: linear layers and ungrouped convolutions."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros")
    }


def lora_layers(network: nn.Module) -> dict[str, LoRALayer]:
    """The layers of a network that have an attached LoRA, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LoRALayer)}


def find_targets(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the layers that end in one of the targets, compared part by part: "conv1", not "onv1".

    ValueError: a target matches no layer. Targets of the sets above may be absent (a student lacks whole blocks) as
    long as one of them matches.
    """
    names = list(candidates(network))
    found = {target: [name for name in names if f".{name}".endswith(f".{target}")] for target in targets}
    missing = [target for target, matches in found.items() if not matches and target not in (*ALL, *TEXT_ALL)]
    if missing or not any(found.values()):
        raise ValueError(f"LoRA: no layer of {type(network).__name__} is called {', '.join(missing or targets)}")
    wanted = {name for matches in found.values() for name in matches}
    return [name for name in names if name in wanted]


@torch.no_grad()
def add_lora(
    network: nn.Module,
    targets: Sequence[str] = ATTENTION,
    rank: int = 4,
    alpha: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> int:
    """Attach a new LoRA to layers, in place, and freeze all other parameters. Returns the number of LoRA layers.

    Its initial effect is zero: `down` is initialised as nn.Linear (as in peft and kohya's scripts), `up` to zeros.

    Args:
        targets: ends of layer names, such as the sets above.
        alpha: default: the rank.
        dtype: of the new parameters; keep float32 for training in any precision.
        generator: for `down`; default: torch's global one.

    Raises:
        ValueError: a target is missing or already has a LoRA, or rank or alpha is not positive.
    """
    alpha = float(rank if alpha is None else alpha)
    if rank < 1 or not 0 < alpha < math.inf:
        raise ValueError(f"LoRA: rank {rank} and alpha {alpha} must be positive")
    fresh = {}
    for name in find_targets(network, targets):
        weight = network.get_submodule(name).weight
        device = generator.device if generator else weight.device
        down = torch.empty(rank, *weight.shape[1:], dtype=dtype, device=device)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        up = torch.zeros(len(weight), rank, *[1] * (weight.dim() - 2), dtype=dtype, device=weight.device)
        fresh[name] = LoRAWeights(down, up, alpha)
    return attach_lora(network, fresh, dtype=dtype)


def attach_lora(
    network: nn.Module, weights: Mapping[str, LoRAWeights], scale: float = 1.0, dtype: torch.dtype | None = None
) -> int:
    """Attach a LoRA with given weights, in place, and freeze all other parameters. Returns the number of LoRA layers.

    dtype: of the new parameters; default: that of each layer. ValueError, with nothing changed: a layer already has a
    LoRA, or the shapes do not match.
    """
    taken = [name for name in weights if isinstance(network.get_submodule(name), LoRALayer)]
    if taken:
        raise ValueError(f"LoRA: {taken[0]} has a live one already; merge or remove it first")
    fitted = {name: fit(found, network.get_submodule(name)) for name, found in weights.items()}
    for name, found in fitted.items():
        base = network.get_submodule(name)
        down, up = (t.detach().to(base.weight.device, dtype or base.weight.dtype, copy=True) for t in found[:2])
        base.__class__ = LoRALinear if isinstance(base, nn.Linear) else LoRAConv2d
        base.lora_down, base.lora_up = nn.Parameter(down), nn.Parameter(up)
        base.alpha, base.scale = found.alpha, scale
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(_is_lora(name))
    return len(lora_layers(network))


def set_scale(network: nn.Module, scale: float) -> None:
    """Set the scale of the attached LoRA: 1 as trained, 0 the base model; may be negative."""
    for layer in lora_layers(network).values():
        layer.scale = scale


def lora_weights(network: nn.Module) -> dict[str, LoRAWeights]:
    """The attached LoRA of a network by layer, detached but not copied, without its scale."""
    return {
        name: LoRAWeights(layer.lora_down.detach(), layer.lora_up.detach(), layer.alpha)
        for name, layer in lora_layers(network).items()
    }


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """The LoRA's part of the state dict: {**base_state(network), **lora_state(network)} is the whole."""
    return {name: tensor for name, tensor in network.state_dict().items() if _is_lora(name)}


def base_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict without the LoRA, in the official names: the base model."""
    return {name: tensor for name, tensor in network.state_dict().items() if not _is_lora(name)}


def _is_lora(name: str) -> bool:
    return name.rpartition(".")[2] in LORA_PARAMETERS


def remove_lora(network: nn.Module) -> int:
    """Detach the LoRA, in place, which leaves the base model, still frozen. Returns the number of layers."""
    layers = lora_layers(network)
    for layer in layers.values():
        layer.__class__ = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
        del layer.lora_down, layer.lora_up, layer.alpha, layer.scale
    return len(layers)


def merge_lora(network: nn.Module) -> int:
    """Merge the attached LoRA, with its scale, into the weights, which stay frozen. Returns the number of layers."""
    for name, weights in lora_weights(network).items():
        merge_weights(network, {name: weights}, network.get_submodule(name).scale)
    return remove_lora(network)


@torch.no_grad()
def merge_weights(network: nn.Module, weights: Mapping[str, LoRAWeights], scale: float = 1.0) -> int:
    """Add LoRA weights to the weights of a network, in place. Returns the number of layers.

    The sum is computed in float32 and rounded once, to the weight's dtype. ValueError, with nothing changed: the shapes
    do not match.
    """
    fitted = {name: fit(found, network.get_submodule(name)) for name, found in weights.items()}
    for name, found in fitted.items():
        weight = network.get_submodule(name).weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        down, up = (t.to(weight.device, wide).flatten(1) for t in (found.down, found.up))
        change = (up @ down).view_as(weight) * (scale * found.alpha / len(down))
        weight.copy_(weight.to(wide) + change)
    return len(fitted)


@torch.no_grad()
def extract_lora(tuned: nn.Module, base: nn.Module, rank: int, targets: Sequence[str] = ALL) -> dict[str, LoRAWeights]:
    """The LoRA of `base` that comes nearest to `tuned`, a network of the same shapes, by layer; float32.

    Of each layer's change of weights it keeps the `rank` largest singular values, or all where there are fewer: no
    other matrix of that rank is nearer (Eckart and Young, 1936). What else differs, such as biases, is left out.
    ValueError: the shapes of a layer differ.
    """
    found = {}
    for name in find_targets(base, targets):
        before, after = (network.get_submodule(name).weight for network in (base, tuned))
        if before.shape != after.shape:
            raise ValueError(f"LoRA: {name} is {tuple(after.shape)}, not {tuple(before.shape)}")
        left, values, right = torch.linalg.svd((after.float() - before.float()).flatten(1), full_matrices=False)
        r = min(rank, len(values))
        root = values[:r].sqrt()
        down = (root[:, None] * right[:r]).reshape(r, *before.shape[1:])
        up = (left[:, :r] * root).reshape(-1, r, *[1] * (before.dim() - 2))
        found[name] = LoRAWeights(down.contiguous(), up.contiguous(), float(r))
    return found


def fit(weights: LoRAWeights, layer: nn.Linear | nn.Conv2d) -> LoRAWeights:
    """The weights in the shapes of the layer: files may store a 1x1 convolution as a linear layer, or the reverse.

    ValueError: the shapes do not match.
    """
    down, up, alpha = weights
    shape, rank = layer.weight.shape, len(down) if down.dim() else 0
    expected = (rank, *shape[1:]), (shape[0], rank, *[1] * (len(shape) - 2))
    if rank == 0 or (_matrix(down.shape), _matrix(up.shape)) != (_matrix(expected[0]), _matrix(expected[1])):
        found = f"down {tuple(down.shape)} and up {tuple(up.shape)}"
        raise ValueError(f"LoRA: {found} do not fit a weight of {tuple(shape)}")
    return LoRAWeights(down.reshape(expected[0]), up.reshape(expected[1]), alpha)


def _matrix(shape: Sequence[int]) -> tuple[int, ...]:
    """(n, m, 1, 1) -> (n, m); other shapes unchanged."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)
