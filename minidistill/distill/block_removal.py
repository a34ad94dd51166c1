"""Block removal: the compact architectures of BK-SDM (arXiv 2305.15798, section 3) as lists of blocks to remove.

Stage i of a Stable Diffusion U-Net's encoder has layers down.i.0 and down.i.1, stage i of its decoder layers up.i.0,
up.i.1 and up.i.2. A layer is a resnet, followed by a transformer where the stage attends to the text. Blocks:

    down.1.1   up.2.1     one layer           mid   the mid block
    stage.3               a resolution level: its down stage, its up stage, and the downsampler before it
    down.2.0@6   mid@6    all but the first 6 blocks of one transformer; those of SDXL have up to 10
    mid@0                 the transformer and the second resnet of the mid block, as in SSD-1B

Such a list determines the student's config, the teacher weight that initialises each student weight, the features
compared in distillation, and a table of what is removed. The teacher itself is not modified.

Of the three layers of an up stage the middle one is removed. The two layers kept read two skip connections: that of the
down layer kept, and that of the previous stage. In the teacher, layer 0 reads one of the first kind and layer 2 one of
the second, so their channel counts match; those of layer 1 would not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain

import numpy as np
import torch

from minidistill.errors import InputError
from minidistill.metrics.cost import format_count, macs_by_module
from minidistill.models.unet import UNet, UNetConfig

PAIRINGS = ("nota", "segmind")
SECOND_LAYERS = (*(f"down.{i}.1" for i in range(4)), *(f"up.{i}.1" for i in range(4)))
SECOND_LAYERS_XL = (*(f"down.{i}.1" for i in range(3)), *(f"up.{i}.1" for i in range(3)))
LEVEL_1_XL = ("down.1.0", "down.1.1", "up.1.0", "up.1.1", "up.1.2")
LEVEL_2_XL = ("down.2.0", "down.2.1", "up.0.0", "up.0.1", "up.0.2")


def shorten_to(depth: int, *layers: str) -> tuple[str, ...]:
    """Entries that keep the first `depth` blocks of the transformer of each of these layers."""
    return tuple(f"{layer}@{depth}" for layer in layers)


@dataclass(frozen=True)
class Recipe:
    """Blocks to remove, pairing of the features compared, weights of the three losses (task, output, feature)."""

    remove: tuple[str, ...]
    pairing: str = "nota"
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)


RECIPES = {
    "bk-base": Recipe(SECOND_LAYERS),
    "bk-small": Recipe((*SECOND_LAYERS, "mid")),
    "bk-tiny": Recipe((*SECOND_LAYERS, "mid", "stage.3")),
    # Segmind's "small" is BK-SDM's *Base*: it keeps the mid block. Segmind has no BK-Small.
    "segmind-small": Recipe(SECOND_LAYERS, "segmind", (1.0, 0.5, 0.5)),
    "segmind-tiny": Recipe((*SECOND_LAYERS, "mid", "stage.3"), "segmind", (1.0, 0.5, 0.5)),
    # SDXL: the architectures of KOALA (arXiv 2312.04005), SSD-1B and Vega (arXiv 2401.02677). The papers compare
    # features inside the layers, KOALA those of self-attention; here the outputs of stages and mid block are compared.
    "koala-1b": Recipe((*SECOND_LAYERS_XL, *shorten_to(6, "down.2.0", "mid", "up.0.0", "up.0.2")), "segmind"),
    "koala-700m": Recipe((*SECOND_LAYERS_XL, "mid", *shorten_to(5, "down.2.0", "up.0.0", "up.0.2")), "segmind"),
    "ssd-1b": Recipe(("mid@0", *shorten_to(4, *LEVEL_2_XL[:4]), *shorten_to(1, *LEVEL_1_XL[3:])), "segmind"),
    "segmind-vega": Recipe(("mid@0", *shorten_to(2, *LEVEL_2_XL), *shorten_to(1, *LEVEL_1_XL)), "segmind"),
}


@dataclass(frozen=True)
class Removal:
    """A list of blocks to remove, checked against one teacher, and the student's config.

    kept_down[i] and kept_up[i] are the layers of the student's stage i, numbered as in the teacher. stages_removed is
    the number of resolution levels removed: the last down stages and the first up stages.
    """

    teacher: UNetConfig
    student: UNetConfig
    removed: tuple[str, ...]
    kept_down: tuple[tuple[int, ...], ...]
    kept_up: tuple[tuple[int, ...], ...]
    stages_removed: int


def find_removal(teacher: UNetConfig, source: str, recipe: str | None, remove: Sequence[str] | None) -> Removal:
    """What --recipe, or --remove in its place, removes from the teacher `source`. InputError: it does not fit."""
    if remove is not None and not remove:
        raise InputError("--remove names no block: name one at least, or leave it out for those of the recipe")
    usual = RECIPES[recipe].remove if recipe else ()
    wanted = usual if remove is None else tuple(remove)
    try:
        return plan_removal(teacher, wanted)
    except InputError as error:
        flag = f"--recipe {recipe}" if wanted == usual else f"--remove {','.join(wanted)}"
        raise InputError(f"{flag} does not fit {source}: {error}; --remove takes any list") from error


def plan_removal(teacher: UNetConfig, remove: Sequence[str]) -> Removal:
    """Check a list of blocks to remove against a teacher and derive the student's config.

    Raises:
        InputError: an entry does not exist in this teacher, or what is kept does not fit together.
    """
    removed, depths = tuple(dict.fromkeys(remove)), transformer_depths(teacher)
    mid = ["mid"] if teacher.mid_block_type else []
    levels = [f"stage.{i}" for i in range(len(teacher.block_out_channels))]
    down = [[f"down.{i}.{j}" for j in range(n)] for i, n in enumerate(teacher.layers_per_block)]
    up = [[f"up.{i}.{j}" for j in range(n + 1)] for i, n in enumerate(teacher.layers_per_block[::-1])]
    groups = (mid, levels, *down, *up)
    for entry in removed:
        if "@" in entry:
            _shorten(depths, entry, teacher)
        elif group := next((names for names in groups if entry in names), None):
            group.remove(entry)
        else:
            raise InputError(f"this teacher has no {entry!r} to remove; it has {', '.join(chain(*groups))}")
    kept, dropped = len(levels), len(down) - len(levels)
    kept_down, kept_up = (
        tuple(tuple(int(layer.split(".")[2]) for layer in stage) for stage in side)
        for side in (down[:kept], up[dropped:])
    )
    _check_stages(levels, kept_down, kept_up, len(down))
    mid_type = "UNetMidBlock2D" if depths.get("mid") == 0 else teacher.mid_block_type
    down_depths, _, up_depths = teacher.transformer_depths()
    student = replace(
        teacher,
        block_out_channels=teacher.block_out_channels[:kept],
        layers_per_block=tuple(map(len, kept_down)),
        attention_head_dim=teacher.attention_head_dim[:kept],
        down_block_types=teacher.down_block_types[:kept],
        up_block_types=teacher.up_block_types[dropped:],
        mid_block_type=mid_type if mid else None,
        **_depth_fields(
            [[depths.get(f"down.{i}.{j}", down_depths[i][j]) for j in stage] for i, stage in enumerate(kept_down)],
            [[depths.get(f"up.{i}.{j}", up_depths[i][j]) for j in stage] for i, stage in enumerate(kept_up, dropped)],
        ),
    )
    removal = Removal(teacher, student, removed, kept_down, kept_up, dropped)
    _check_mid(removal, depths.get("mid"))
    _check_shapes(removal)
    return removal


def transformer_depths(config: UNetConfig) -> dict[str, int]:
    """Number of blocks of each transformer, by its layer: {"mid": 10, "down.1.0": 2, ...}."""
    down, mid, up = config.transformer_depths()
    found = {"mid": mid} if config.mid_block_type == "UNetMidBlock2DCrossAttn" else {}
    for side, types, depths in (("down", config.down_block_types, down), ("up", config.up_block_types, up)):
        for i, stage in enumerate(depths):
            if types[i].startswith("CrossAttn"):
                found |= {f"{side}.{i}.{j}": depth for j, depth in enumerate(stage)}
    return found


def _shorten(depths: dict[str, int], entry: str, teacher: UNetConfig) -> None:
    """Apply an entry such as "down.2.0@6" to `depths`."""
    layer, _, depth = entry.partition("@")
    if layer not in depths:
        found = ", ".join(f"{name} ({blocks})" for name, blocks in transformer_depths(teacher).items())
        raise InputError(f"this teacher has no transformer {entry!r}: it has, with their depths, {found or 'none'}")
    least = 0 if layer == "mid" else 1
    if depth not in map(str, range(least, depths[layer])):
        allowed = f"give {least} to {depths[layer] - 1}" if depths[layer] > least else "it cannot be shortened"
        raise InputError(f"{entry!r}: the transformer of {layer} has depth {depths[layer]}, {allowed}")
    depths[layer] = int(depth)


def _depth_fields(down: list[list[int]], up: list[list[int]]) -> dict:
    """Transformer depths as config fields, in their shortest form: one number for a stage whose layers agree."""
    flat, flat_up = (tuple(stage[0] if len(set(stage)) == 1 else tuple(stage) for stage in side) for side in (down, up))
    mirrored = flat_up == flat[::-1] and not any(isinstance(depth, tuple) for depth in flat)
    reverse = None if mirrored else flat_up
    return {"transformer_layers_per_block": flat, "reverse_transformer_layers_per_block": reverse}


def _check_stages(levels: list[str], down: tuple, up: tuple, count: int) -> None:
    if not levels or levels[-1] != f"stage.{len(levels) - 1}":
        raise InputError(f"stages are removed from the innermost outwards only: stage.{count - 1} first, never stage.0")
    for i, (kept_down, kept_up) in enumerate(zip(down, up[::-1], strict=True)):
        if not kept_down or len(kept_up) != len(kept_down) + 1:
            raise InputError(
                f"stage {i} would keep {len(kept_down)} down and {len(kept_up)} up layers; it needs at least one down "
                f"layer, and one up layer more than down layers (up.{count - 1 - i} mirrors down.{i})"
            )


def _check_mid(removal: Removal, mid_depth: int | None) -> None:
    """InputError: the mid block would change. Configs give it the heads and depth of the innermost down layer."""
    student, first = removal.student, f"down.{len(removal.kept_down) - 1}.{removal.kept_down[-1][0]}"
    heads, depth = student.attention_head_dim[-1], student.transformer_depths()[1]
    changed = (heads, depth) != (removal.teacher.attention_head_dim[-1], mid_depth)
    if student.mid_block_type == "UNetMidBlock2DCrossAttn" and changed:
        raise InputError(
            f"removing {','.join(removal.removed)} would change the heads or depth of the mid block, as they are those "
            f"of {first}: remove mid too, or shorten both to one depth N ({first}@N,mid@N)"
        )


def _check_shapes(removal: Removal) -> None:
    """InputError: a student weight has no teacher weight of its shape."""
    teacher, student = weight_shapes(removal.teacher), weight_shapes(removal.student)
    for name, source in weight_map(removal, student).items():
        if teacher.get(source) != student[name]:
            found = tuple(teacher.get(source, ())) or "absent"
            misfit = f"{name} needs {tuple(student[name])}, the teacher's {source} is {found}"
            way = "keep the first layer of a down stage, the first and last of an up stage, and stages of growing width"
            raise InputError(f"removing {','.join(removal.removed)} does not fit together: {misfit}; {way}")


@lru_cache(maxsize=64)
def weight_shapes(config: UNetConfig) -> Mapping[str, torch.Size]:
    """{name of a weight: its shape}; cached, not to be changed."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in UNet(config).state_dict().items()}


def weight_map(removal: Removal, student_names: Iterable[str]) -> dict[str, str]:
    """{name of a student weight: name of the teacher weight that initialises it}."""
    result = {}
    for name in student_names:
        part, *rest = name.split(".")
        if part in ("down_blocks", "up_blocks"):
            stage = int(rest[0])
            kept = (removal.kept_down if part == "down_blocks" else removal.kept_up)[stage]
            if part == "up_blocks":  # up stages are numbered from the innermost, down stages from the outermost
                rest[0] = str(stage + removal.stages_removed)
            if rest[1] in ("resnets", "attentions"):
                rest[2] = str(kept[int(rest[2])])
        result[name] = ".".join([part, *rest])
    return result


def build_student(removal: Removal, teacher: UNet | None, device: torch.device | str = "cpu") -> UNet:
    """The student in float32, initialised with copies of the teacher's weights; random if teacher is None."""
    with torch.device("cpu" if teacher is None else "meta"):
        student = UNet(removal.student)
    if teacher is not None:
        weights, sources = teacher.state_dict(), weight_map(removal, student.state_dict())
        copies = {name: weights[sources[name]].detach().to(device, torch.float32, copy=True) for name in sources}
        student.load_state_dict(copies, assign=True)
    return student.to(device)


def feature_pairs(removal: Removal, pairing: str = "nota") -> list[tuple[str, str]]:
    """Pairs (teacher feature, student feature) for the feature loss, named as by `UNet(..., return_features=True)`.

    The output of each stage is compared with that of the same stage of the teacher. The pairings differ in the rest:
    - "nota" (BK-SDM) does not compare mid blocks. Where stages were removed, the innermost down stage has no
      downsampler, so its output has another size: the output of its last transformer (proj_out) is compared.
    - "segmind" compares mid blocks. Where stages were removed, the innermost down stage is compared with the output of
      the last up stage removed, so that it learns to replace them all.

    Raises:
        InputError: the pairing is unknown, or "segmind" would compare features of different widths.
    """
    if pairing not in PAIRINGS:
        raise InputError(f"pairing must be one of {', '.join(PAIRINGS)}, not {pairing!r}")
    student, dropped, last = removal.student, removal.stages_removed, len(removal.kept_down) - 1
    down = [(f"down.{i}", f"down.{i}") for i in range(last + 1)]
    mid = [("mid", "mid")] if pairing == "segmind" and student.mid_block_type and not dropped else []
    up = [(f"up.{i + dropped}", f"up.{i}") for i in range(len(removal.kept_up))]
    if dropped and pairing == "segmind":
        theirs, ours = down[last] = (f"up.{dropped - 1}", f"down.{last}")
        widths = removal.teacher.block_out_channels[last + 1], student.block_out_channels[last]
        if widths[0] != widths[1]:
            compared = f"pairing segmind compares the teacher's {theirs} with the student's {ours}"
            raise InputError(f"{compared}, but they have {widths[0]} and {widths[1]} channels: use --pairing nota")
    elif dropped and student.down_block_types[last] == "CrossAttnDownBlock2D":
        down[last] = (f"down.{last}.proj_out", f"down.{last}.proj_out")
    elif dropped:
        down.pop()
    return down + mid + up


def removal_rows(removal: Removal, height: int, width: int, tokens: int = 77) -> list[tuple[str, ...]]:
    """Table of the parameters removed, and of the MACs removed from one call on a (height, width) latent.

    MACs are those of convolutions and linear layers, as the paper counts them. The teacher minus all rows is the
    student exactly: what an entry shares with those above it is counted once.
    """
    removed = removal_costs(removal, height, width, tokens)
    teacher = sum(_module_costs(removal.teacher, height, width, tokens).values())
    student = teacher - sum(removed.values())
    costs = {**removed, "teacher": teacher, "student": student}
    rows = [(name, *map(format_count, cost)) for name, cost in costs.items()]
    change = [f"{percent:+.1f} %" for percent in 100 * (student / teacher - 1)]
    return [("removed", "parameters", "MACs"), *rows, ("change", *change)]


def removal_costs(removal: Removal, height: int, width: int, tokens: int = 77) -> dict[str, np.ndarray]:
    """{entry: [parameters, MACs of one call] that it removes beyond the entries before it}; stages come last."""
    before = _module_costs(removal.teacher, height, width, tokens)
    kept = {source.rpartition(".")[0] for source in weight_map(removal, weight_shapes(removal.student)).values()}
    removed, costs = {name: cost for name, cost in before.items() if name not in kept}, {}
    for entry in sorted(removal.removed, key=lambda entry: entry.startswith("stage")):
        scope = _scope(entry, len(removal.teacher.block_out_channels))
        names = [name for name in removed if f"{name}.".startswith(scope)]
        costs[entry] = sum((removed.pop(name) for name in names), np.zeros(2, np.int64))
    if removal.stages_removed and removal.student.mid_block_type:
        after = _module_costs(removal.student, height, width, tokens)
        costs["(mid on more pixels)"] = sum(before.values()) - sum(after.values()) - sum(costs.values())
    return costs


def _scope(entry: str, stages: int) -> tuple[str, ...]:
    """Prefixes of the names of the teacher's modules that an entry removes or shortens."""
    kind, *numbers = entry.partition("@")[0].split(".")
    if kind == "mid":
        return ("mid_block.",)
    i = int(numbers[0])
    if kind == "stage":
        return f"down_blocks.{i}.", f"up_blocks.{stages - 1 - i}.", f"down_blocks.{i - 1}.downsamplers."
    return tuple(f"{kind}_blocks.{i}.{part}.{numbers[1]}." for part in ("resnets", "attentions"))


def _module_costs(config: UNetConfig, height: int, width: int, tokens: int) -> dict[str, np.ndarray]:
    """{name: [parameters, MACs of one call]} of every module with weights."""
    parameters: Counter[str] = Counter()
    for name, shape in weight_shapes(config).items():
        parameters[name.rpartition(".")[0]] += shape.numel()
    macs = macs_by_module(config, height, width, tokens)
    return {name: np.array([count, macs.get(name, 0)]) for name, count in parameters.items()}
