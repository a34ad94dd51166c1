"""LoRA: a low-rank addition to chosen layers of a network, live (and trainable) or merged into their weights.

    W  ->  W + scale * (alpha / r) * up @ down          down (r, in), up (out, r)

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), equation 3 and section 4.1. For a
convolution `down` is one too, (r, in, k, k), with the layer's stride and padding, and `up` is 1x1, (out, r, 1, 1).

A layer with a live LoRA is still an nn.Linear or nn.Conv2d, with two parameters more. So every other name stays what
it was: the state dict of the network is `base_state` (the official names) and `lora_state`, side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Which layers: a target is the end of a layer's name. Those of the U-Net, and those of the text encoders.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ALL = (  # of LCM-LoRA and SDXL-Lightning: every layer of the down, mid and up blocks, 788 in SDXL
    *ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
    "conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
)  # fmt: skip
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_ALL = (*TEXT_ATTENTION, "fc1", "fc2")

LORA_PARAMETERS = ("lora_down", "lora_up")


class LoRAWeights(NamedTuple):
    """The low-rank addition to one layer."""

    down: Tensor  # (r, in) or (r, in, k, k)
    up: Tensor  # (out, r) or (out, r, 1, 1)
    alpha: float  # the addition is multiplied by alpha / r: 8 / 64 in SDXL-Lightning's files


class LoRALinear(nn.Linear):
    """x (..., in) -> W x + b + scale * (alpha / r) * up (down x). Takes over the parameters of `base`."""

    def __init__(self, base: nn.Linear, weights: LoRAWeights, scale: float):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        _take_over(self, base, weights, scale)

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.lora_down.to(x.dtype))  # the small weights follow the input, not the other way round
        return super().forward(x) + _factor(self) * F.linear(h, self.lora_up.to(h.dtype))


class LoRAConv2d(nn.Conv2d):
    """x (B, in, h, w) -> the convolution of x + scale * (alpha / r) * up (down x). Takes over `base`'s parameters."""

    def __init__(self, base: nn.Conv2d, weights: LoRAWeights, scale: float):
        super().__init__(
            base.in_channels, base.out_channels, base.kernel_size, base.stride, base.padding, base.dilation,
            bias=base.bias is not None, device="meta",
        )  # fmt: skip
        _take_over(self, base, weights, scale)

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(x, self.lora_down.to(x.dtype), None, self.stride, self.padding, self.dilation)
        return super().forward(x) + _factor(self) * F.conv2d(h, self.lora_up.to(h.dtype))


LoRALayer = LoRALinear | LoRAConv2d


def _take_over(layer: LoRALayer, base: nn.Linear | nn.Conv2d, weights: LoRAWeights, scale: float) -> None:
    layer.weight, layer.bias = base.weight, base.bias
    layer.lora_down, layer.lora_up = nn.Parameter(weights.down), nn.Parameter(weights.up)
    layer.alpha, layer.scale = weights.alpha, scale
    layer.train(base.training)


def _factor(layer: LoRALayer) -> float:
    return layer.scale * layer.alpha / len(layer.lora_down)


# which layers


def candidates(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers of a network that can have a LoRA, by name: linear layers and plain convolutions."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros")
    }


def lora_layers(network: nn.Module) -> dict[str, LoRALayer]:
    """The layers of a network that have a live LoRA, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LoRALayer)}


def find_targets(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the layers that end in one of the targets, whole parts compared: "conv1", not "onv1".

    Raises ValueError for a target that no layer has. Those of the sets above may be absent from a network (a student
    may lack whole blocks), as long as one is there.
    """
    names = list(candidates(network))
    found = {target: [name for name in names if f".{name}".endswith(f".{target}")] for target in targets}
    missing = [target for target, matches in found.items() if not matches and target not in (*ALL, *TEXT_ALL)]
    if missing or not any(found.values()):
        raise ValueError(f"LoRA: no layer of {type(network).__name__} is called {', '.join(missing or targets)}")
    wanted = {name for matches in found.values() for name in matches}
    return [name for name in names if name in wanted]


# live


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
    """Give layers a fresh live LoRA, in place, and make it all that trains. Returns how many layers it has now.

    It starts without effect: `down` as nn.Linear starts (as in peft and kohya's scripts), `up` at zero.

    Args:
        targets: ends of layer names, such as the sets above.
        alpha: the rank if not given.
        dtype: of the new parameters alone; keep float32 to train, whatever the network has.
        generator: draws `down`, on its own device; torch's global one if not given.

    Raises:
        ValueError: a target is not there, or has a live LoRA, or rank or alpha is not positive.
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
    """Give layers a live LoRA with these weights, in place, and make LoRA all that trains. Returns how many have it.

    dtype: of the new parameters; each layer's own if not given. Raises ValueError, with nothing changed, where a
    layer already has one (merge or remove it first) or the shapes do not fit.
    """
    taken = [name for name in weights if isinstance(network.get_submodule(name), LoRALayer)]
    if taken:
        raise ValueError(f"LoRA: {taken[0]} has a live one already; merge or remove it first")
    fitted = {name: fit(found, network.get_submodule(name)) for name, found in weights.items()}
    for name, found in fitted.items():
        base = network.get_submodule(name)
        kind = LoRALinear if isinstance(base, nn.Linear) else LoRAConv2d
        down, up = (t.detach().to(base.weight.device, dtype or base.weight.dtype, copy=True) for t in found[:2])
        _replace(network, name, kind(base, LoRAWeights(down, up, found.alpha), scale))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(_is_lora(name))
    return len(lora_layers(network))


def set_scale(network: nn.Module, scale: float) -> None:
    """Set the strength of the live LoRA: 1 as trained, 0 the base model, negative away from it."""
    for layer in lora_layers(network).values():
        layer.scale = scale


def lora_weights(network: nn.Module) -> dict[str, LoRAWeights]:
    """The live LoRA of a network by layer, detached but not copied; its scale is no part of it."""
    return {
        name: LoRAWeights(layer.lora_down.detach(), layer.lora_up.detach(), layer.alpha)
        for name, layer in lora_layers(network).items()
    }


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """The live LoRA's part of the state dict, to go on from: load {**base_state(network), **it} to put it back."""
    return {name: tensor for name, tensor in network.state_dict().items() if _is_lora(name)}


def base_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict without the live LoRA, in the official names: the network as it was before."""
    return {name: tensor for name, tensor in network.state_dict().items() if not _is_lora(name)}


def _is_lora(name: str) -> bool:
    return name.rpartition(".")[2] in LORA_PARAMETERS


def _replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, layer)


# merged


def remove_lora(network: nn.Module) -> int:
    """Take the live LoRA off, in place: the network is the base model again, still frozen. Returns how many."""
    layers = lora_layers(network)
    for name, layer in layers.items():
        if isinstance(layer, LoRALinear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        else:
            plain = nn.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                bias=layer.bias is not None, device="meta",
            )  # fmt: skip
        plain.weight, plain.bias = layer.weight, layer.bias
        _replace(network, name, plain.train(layer.training))
    return len(layers)


def merge_lora(network: nn.Module) -> int:
    """Add the live LoRA to the weights, at its scale, and take it off; all weights stay frozen. Returns how many."""
    for name, layer in lora_layers(network).items():
        found = LoRAWeights(layer.lora_down, layer.lora_up, layer.alpha)
        merge_weights(network, {name: found}, layer.scale)
    return remove_lora(network)


@torch.no_grad()
def merge_weights(network: nn.Module, weights: Mapping[str, LoRAWeights], scale: float = 1.0) -> int:
    """Add LoRA weights to the weights of a network, in place, any number of times. Returns how many layers.

    The sum is made in float32 and rounded once, to the weight's dtype. Raises ValueError, with nothing changed, if
    the shapes do not fit.
    """
    fitted = {name: fit(found, network.get_submodule(name)) for name, found in weights.items()}
    for name, found in fitted.items():
        weight = network.get_submodule(name).weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        down, up = (t.to(weight.device, wide).flatten(1) for t in (found.down, found.up))
        change = (up @ down).view_as(weight) * (scale * found.alpha / len(down))
        weight.copy_(weight.to(wide) + change)
    return len(fitted)


def fit(weights: LoRAWeights, layer: nn.Linear | nn.Conv2d) -> LoRAWeights:
    """The same weights in the shapes of the layer: files write a 1x1 convolution as a linear layer, or the reverse.

    Raises ValueError if they are of another layer.
    """
    down, up, alpha = weights
    shape, rank = layer.weight.shape, len(down) if down.dim() else 0
    expected = (rank, *shape[1:]), (shape[0], rank, *[1] * (len(shape) - 2))
    if rank == 0 or (_matrix(down.shape), _matrix(up.shape)) != (_matrix(expected[0]), _matrix(expected[1])):
        found = f"down {tuple(down.shape)} and up {tuple(up.shape)}"
        raise ValueError(f"LoRA: {found} do not fit a weight of {tuple(shape)}")
    return LoRAWeights(down.reshape(expected[0]), up.reshape(expected[1]), alpha)


def _matrix(shape: Sequence[int]) -> tuple[int, ...]:
    """(n, m, 1, 1) -> (n, m); every other shape as it is."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)
