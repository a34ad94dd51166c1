"""Which blocks matter least: each is removed alone, without retraining, and scored by how far the output moves.

    sensitivity(r) = mean over x_t, t, c of || eps_T(x_t, t, c) - eps_S(x_t, t, c) ||^2 / number of elements

where S is the teacher T without r. LAPTOP-Diff (arXiv 2404.11098) found that the sensitivities of several removals
nearly add up; so a whole list can be chosen from the scores of its entries, here greedily: the least sensitivity for
what is saved is removed first. They do not add up exactly: of the list and its nearest neighbours, each scored as a
whole, the best is taken. What a student recovers in training is not measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

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


@dataclass(frozen=True)
class Score:
    """One smallest removal: what it costs in output and saves in size."""

    remove: tuple[str, ...]
    sensitivity: float
    parameters: int  # saved
    macs: int  # saved in one call
    weights: frozenset[str]  # of the teacher, that go
    latency: float = 0.0  # saved in one call, as a share of the teacher's; 0 where nobody measured it


def smallest_removals(teacher: UNetConfig) -> list[Removal]:
    """Everything that can go alone: each block, each stage, each depth of each transformer.

    Two go together where neither fits alone: a down layer with an up layer of its stage, and the mid block's
    transformer with the one whose depth it shares.
    """
    stages, depths = len(teacher.block_out_channels), transformer_depths(teacher)
    tries = [("mid",), (f"stage.{stages - 1}",)]
    tries += [(f"{layer}@{n}",) for layer, blocks in depths.items() for n in range(blocks)]
    shared = f"down.{stages - 1}.0"
    tries += [(f"{shared}@{n}", f"mid@{n}") for n in range(1, depths.get(shared, 0)) if "mid" in depths]
    for i, layers in enumerate(teacher.layers_per_block):
        tries += [(f"down.{i}.{j}", f"up.{stages - 1 - i}.{k}") for j in range(layers) for k in range(layers + 1)]
    return [removal for removal in (_plan(teacher, remove) for remove in tries) if removal]


def _plan(teacher: UNetConfig, remove: Sequence[str]) -> Removal | None:
    try:
        return plan_removal(teacher, remove)
    except InputError:
        return None


def share_weights(removal: Removal, teacher: UNet) -> UNet:
    """The student made of the teacher's own tensors: nothing is copied, and nothing may be trained."""
    with torch.device("meta"):
        student = UNet(removal.student)
    weights = teacher.state_dict()
    sources = weight_map(removal, student.state_dict())
    student.load_state_dict({name: weights[source] for name, source in sources.items()}, assign=True)
    return student.eval().requires_grad_(False)


def score(removal: Removal, teacher: UNet, probes: Sequence[Probe], tokens: int = 77) -> Score:
    """Damage and savings of one removal; MACs are those of a call at the probes' size."""
    costs = removal_costs(removal, *probes[0].x_t.shape[-2:], tokens).values()
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

    by: what is saved, parameters, macs or latency; latencies add up only roughly.
    The first is the greedy one, the others differ from it by one removal, the least sums of sensitivities first: which
    of them has the least sensitivity as a whole, `score` tells. InputError: not so much can go.
    """
    taken = _greedy(teacher, scores, saving, by)
    found = []
    for old in taken:
        rest = [s for s in taken if s is not old]
        for new in scores:
            some = [*rest, new]
            apart = new not in taken and not any(s.weights & new.weights for s in rest)
            if apart and _saved(some, by) >= saving and _plan(teacher, _entries(some)):
                found.append(some)
    found.sort(key=lambda some: sum(s.sensitivity for s in some))
    return [_entries(some) for some in [taken, *found][:count]]


def _greedy(teacher: UNetConfig, scores: Sequence[Score], saving: float, by: str) -> list[Score]:
    """Each round takes what does the least sensitivity for what it saves and fits what was taken before.

    A removal takes the place of those it overlaps. What turns out not to be needed at the end stays in the student.
    """
    taken: list[Score] = []
    while (short := saving - _saved(taken, by)) > 0:
        options = []
        for new in scores:
            apart = [old for old in taken if not old.weights & new.weights]
            more = _saved([*apart, new], by) - _saved(taken, by)
            harm = sum(s.sensitivity for s in [*apart, new]) - sum(s.sensitivity for s in taken)
            if more > 0:
                options.append((harm / min(more, short), [*apart, new]))
        options.sort(key=lambda option: option[0])
        taken = next((some for _, some in options if _plan(teacher, _entries(some))), [])
        if not taken:
            raise InputError(f"no list of removals saves so much ({by}): ask for a larger student")
    for old in sorted(taken, key=lambda s: -s.sensitivity):
        rest = [s for s in taken if s is not old]
        if _saved(rest, by) >= saving and _plan(teacher, _entries(rest)):
            taken = rest
    return taken


def _saved(some: Iterable[Score], by: str) -> float:
    return sum(getattr(s, by) for s in some)


def _entries(some: Iterable[Score]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry for s in some for entry in s.remove))
