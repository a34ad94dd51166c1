"""Sensitivity: how much the U-Net's prediction changes when a block is removed, without retraining.

    sensitivity(r) = mean over x_t, t, c of || eps_T(x_t, t, c) - eps_S(x_t, t, c) ||^2 / number of elements

where S is the teacher T without r. LAPTOP-Diff (arXiv 2404.11098) found that the sensitivities of several removals
nearly add up, so a list of removals can be chosen from the scores of single ones: greedily, the least sensitivity per
parameter (or MAC, or millisecond) first. As the sum is not exact, `choose` returns the greedy list together with its
nearest neighbours, to be scored as a whole. What a student recovers in training is not measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from minidistill.distill.block_removal import (
    Removal,
    plan_removal,
    removal_costs,
    transformer_depths,
    weight_map,
    weight_shapes,
)
from minidistill.distill.probes import Probe, distance_to_teacher
from minidistill.errors import InputError
from minidistill.models.unet import UNet, UNetConfig

# What is left out when the output of a part is set to zero, for a U-Net of four levels.
LEVELS = {"levels 2, 3 and mid": "up_blocks.1", "level 3 and mid": "up_blocks.0", "mid": "mid_block"}


@contextmanager
def zeroed(module: nn.Module) -> Iterator[None]:
    """In the `with` block, the output of `module` is zero."""

    def zeros(module: nn.Module, args: object, out: Any) -> Any:
        return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

    handle = module.register_forward_hook(zeros)
    try:
        yield
    finally:
        handle.remove()


def measure_levels(unet: UNet, probes: Sequence[Probe]) -> dict[str, float]:
    """The sensitivity of the inner levels of a U-Net of four levels: {"levels 2, 3 and mid zeroed": 0.01, ...}."""
    result = {}
    for name, module in LEVELS.items():
        with zeroed(unet.get_submodule(module)):
            result[f"{name} zeroed"] = distance_to_teacher(unet, probes)
    return result


@dataclass(frozen=True)
class Score:
    """Sensitivity of one removal, and what it saves."""

    remove: tuple[str, ...]
    sensitivity: float
    parameters: int
    macs: int  # of one call
    weights: frozenset[str]  # names of the teacher's weights removed
    latency: float = 0.0  # of one call, as a share of the teacher's; 0 if not measured


def smallest_removals(teacher: UNetConfig) -> list[Removal]:
    """All removals that are possible alone: the mid block, the innermost stage, each layer, each transformer depth.

    Some need two entries: a down layer and an up layer of the same level (as the numbers of skip connections must
    match), and the transformers of the mid block and of the innermost down stage's first layer (which share a depth).
    """
    stages, depths = len(teacher.block_out_channels), transformer_depths(teacher)
    candidates = [("mid",), (f"stage.{stages - 1}",)]
    candidates += [(f"{layer}@{n}",) for layer, depth in depths.items() for n in range(depth)]
    shared = f"down.{stages - 1}.0"
    candidates += [(f"{shared}@{n}", f"mid@{n}") for n in range(1, depths.get(shared, 0)) if "mid" in depths]
    for i, layers in enumerate(teacher.layers_per_block):
        mirror = stages - 1 - i
        candidates += [(f"down.{i}.{j}", f"up.{mirror}.{k}") for j in range(layers) for k in range(layers + 1)]
    return [removal for removal in (_plan(teacher, remove) for remove in candidates) if removal]


def _plan(teacher: UNetConfig, remove: Sequence[str]) -> Removal | None:
    try:
        return plan_removal(teacher, remove)
    except InputError:
        return None


def share_weights(removal: Removal, teacher: UNet) -> UNet:
    """The untrained student, made of the teacher's own tensors: nothing is copied, and it must not be trained."""
    with torch.device("meta"):
        student = UNet(removal.student)
    weights, sources = teacher.state_dict(), weight_map(removal, student.state_dict())
    student.load_state_dict({name: weights[sources[name]] for name in sources}, assign=True)
    return student.eval().requires_grad_(False)


def score(removal: Removal, teacher: UNet, probes: Sequence[Probe]) -> Score:
    """Sensitivity and savings of one removal; MACs are those of a call with the size and the tokens of the probes."""
    height, width, tokens = *probes[0].x_t.shape[-2:], probes[0].context.shape[1]
    costs = removal_costs(removal, height, width, tokens).values()
    kept = weight_map(removal, weight_shapes(removal.student)).values()
    return Score(
        removal.removed,
        distance_to_teacher(share_weights(removal, teacher), probes),
        sum(parameters for parameters, _ in costs),
        sum(macs for _, macs in costs),
        frozenset(weight_shapes(removal.teacher)) - frozenset(kept),
    )


def choose(
    teacher: UNetConfig, scores: Sequence[Score], saving: float, by: str = "parameters", count: int = 8
) -> list[tuple[str, ...]]:
    """At most `count` lists of removals that save at least `saving` with little sensitivity.

    by: what is to be saved, "parameters", "macs" or "latency" (latencies add up only roughly).
    The first list is the greedy one; the others differ from it by one removal, in the order of their summed
    sensitivities. Which of them has the least sensitivity as a whole, `score` tells.

    Raises:
        InputError: all removals together save less.
    """
    chosen = _greedy(teacher, scores, saving, by)
    neighbours = []
    for old in chosen:
        rest = [s for s in chosen if s is not old]
        for new in scores:
            overlaps = new in chosen or any(s.weights & new.weights for s in rest)
            if not overlaps and _saved([*rest, new], by) >= saving:
                neighbours.append([*rest, new])
    neighbours.sort(key=_sensitivity)
    fitting = (some for some in neighbours if _plan(teacher, _entries(some)))
    return [_entries(some) for some in (chosen, *islice(fitting, count - 1))]


def _greedy(teacher: UNetConfig, scores: Sequence[Score], saving: float, by: str) -> list[Score]:
    """Each round adds the removal with the least sensitivity for what it saves, if it fits those chosen before.

    A removal replaces chosen ones that it overlaps. In the end, removals that are not needed are dropped again.
    """
    chosen: list[Score] = []
    while (missing := saving - _saved(chosen, by)) > 0:
        options = []
        for new in scores:
            option = [*(old for old in chosen if not old.weights & new.weights), new]
            gain = _saved(option, by) - _saved(chosen, by)
            if gain > 0:
                options.append(((_sensitivity(option) - _sensitivity(chosen)) / min(gain, missing), option))
        options.sort(key=lambda option: option[0])
        chosen = next((option for _, option in options if _plan(teacher, _entries(option))), [])
        if not chosen:
            raise InputError(f"no list of removals saves so much ({by}): ask for a larger student")
    for old in sorted(chosen, key=lambda s: -s.sensitivity):
        rest = [s for s in chosen if s is not old]
        if _saved(rest, by) >= saving and _plan(teacher, _entries(rest)):
            chosen = rest
    return chosen


def _saved(scores: Iterable[Score], by: str) -> float:
    return sum(getattr(s, by) for s in scores)


def _sensitivity(scores: Iterable[Score]) -> float:
    return sum(s.sensitivity for s in scores)


def _entries(scores: Iterable[Score]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry for s in scores for entry in s.remove))
