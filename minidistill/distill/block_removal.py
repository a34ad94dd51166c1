"""Block removal: the architecture edit of BK-SDM (arXiv 2305.15798, section 3), as data.

A U-Net of Stable Diffusion has, in every down stage i, layers down.i.0, down.i.1 (a resnet and, where the stage reads
the text, a transformer), in every up stage layers up.i.0, up.i.1, up.i.2, and a mid block. A recipe is the list of what
goes away, in the teacher's numbering:

    down.1.1   up.2.1   one layer           mid   the mid block
    stage.3             a whole resolution level: its down and its up stage, and the downsampler that led to it

From that one list follow the student's config, which teacher weight fills which student weight, which features are
compared in distillation, and the table of what was saved. A student is built from its config and filled by the map;
nothing is ever cut out of a live network.

Of an up stage's three layers the middle one goes. Skips drop from three to two a stage: the kept down layer's and the
previous stage's. Layer 0 has always read the first kind, layer 2 the second, so their channel counts match; layer 1
would not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minidistill.errors import InputError
from minidistill.models.unet import UNet, UNetConfig, macs_by_module

SECOND_LAYERS = (*(f"down.{i}.1" for i in range(4)), *(f"up.{i}.1" for i in range(4)))
PAIRINGS = ("nota", "segmind")


@dataclass(frozen=True)
class Recipe:
    """What to remove, which features to compare, and the weights of the three losses (task, output, feature)."""

    remove: tuple[str, ...]
    pairing: str = "nota"
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)


# Mind the names: Segmind's "small" is BK-SDM's *Base* (it keeps the mid block); Segmind has no BK-Small.
RECIPES = {
    "bk-base": Recipe(SECOND_LAYERS),
    "bk-small": Recipe((*SECOND_LAYERS, "mid")),
    "bk-tiny": Recipe((*SECOND_LAYERS, "mid", "stage.3")),
    "segmind-small": Recipe(SECOND_LAYERS, "segmind", (1.0, 0.5, 0.5)),
    "segmind-tiny": Recipe((*SECOND_LAYERS, "mid", "stage.3"), "segmind", (1.0, 0.5, 0.5)),
}


@dataclass(frozen=True)
class Removal:
    """A checked edit of one teacher: what stays, in the teacher's numbering.

    down[i] and up[j] are the kept layers of the teacher's stages; the last `lost` down and first `lost` up stages are
    gone. `student` is the config that follows.
    """

    teacher: UNetConfig
    student: UNetConfig
    removed: tuple[str, ...]
    down: tuple[tuple[int, ...], ...]
    up: tuple[tuple[int, ...], ...]
    lost: int


def plan_removal(teacher: UNetConfig, remove: Sequence[str]) -> Removal:
    """Check a list of removals against a teacher and derive the student's config.

    Raises InputError naming the entry that does not exist or does not fit, and what would.
    """
    stages = len(teacher.block_out_channels)
    numbers = [str(i) for i in range(stages)]
    down = [list(range(n)) for n in teacher.layers_per_block]
    up = [list(range(n + 1)) for n in teacher.layers_per_block[::-1]]
    has_mid = teacher.mid_block_type is not None
    lost = 0
    removed = tuple(dict.fromkeys(remove))
    for entry in removed:
        match entry.split("."):
            case ["mid"] if has_mid:
                has_mid = False
            case ["stage", i] if i in numbers:
                lost = max(lost, stages - int(i))
            case [("down" | "up") as side, i, j] if i in numbers:
                kept = (down if side == "down" else up)[int(i)]
                if j not in map(str, kept):
                    raise InputError(_no_such(entry, teacher))
                kept.remove(int(j))
            case _:
                raise InputError(_no_such(entry, teacher))
    gone = sorted({int(e.split(".")[1]) for e in removed if e.startswith("stage.")})
    if gone and (gone[0] == 0 or gone != list(range(gone[0], stages))):
        raise InputError(
            f"stage.{gone[0]} cannot go like this: stages go from the innermost outwards, stage.{stages - 1} first, "
            f"and stage.0 stays"
        )

    down, up = down[: stages - lost], up[lost:]
    for i, (kept_down, kept_up) in enumerate(zip(down, up[::-1], strict=True)):
        if not kept_down or len(kept_up) != len(kept_down) + 1:
            raise InputError(
                f"stage {i} would keep {len(kept_down)} down and {len(kept_up)} up layers; it needs one down layer or "
                f"more, and one up layer more than down layers (up.{stages - 1 - i} mirrors down.{i})"
            )
    keep = stages - lost
    depths_down, depth_mid, depths_up = teacher.transformer_depths()
    chosen_down = tuple(tuple(depths_down[i][j] for j in kept) for i, kept in enumerate(down))
    chosen_up = tuple(tuple(depths_up[lost + i][j] for j in kept) for i, kept in enumerate(up))
    student = replace(
        teacher,
        block_out_channels=teacher.block_out_channels[:keep],
        layers_per_block=tuple(len(kept) for kept in down),
        attention_head_dim=teacher.attention_head_dim[:keep],
        down_block_types=teacher.down_block_types[:keep],
        up_block_types=teacher.up_block_types[lost:],
        mid_block_type=teacher.mid_block_type if has_mid else None,
        **_depths(chosen_down, chosen_up, depth_mid if has_mid else None),
    )
    removal = Removal(teacher, student, removed, tuple(map(tuple, down)), tuple(map(tuple, up)), lost)
    _check_shapes(removal)
    return removal


def _depths(down: tuple, up: tuple, mid: int | None) -> dict:
    """Transformer depths in the shortest form that says the same: one number a stage, if its layers agree."""
    flat = tuple(stage[0] if len(set(stage)) == 1 else stage for stage in down)
    flat_up = tuple(stage[0] if len(set(stage)) == 1 else stage for stage in up)
    if flat_up == flat[::-1] and not any(isinstance(d, tuple) for d in flat) and mid in (None, flat[-1]):
        return {"transformer_layers_per_block": flat, "reverse_transformer_layers_per_block": None}
    return {"transformer_layers_per_block": flat, "reverse_transformer_layers_per_block": flat_up}


def _no_such(entry: str, teacher: UNetConfig) -> str:
    n = len(teacher.block_out_channels)
    layers = ", ".join(str(count) for count in teacher.layers_per_block)
    mid = "mid, " if teacher.mid_block_type else ""
    return (
        f"this teacher has no {entry!r} to remove: it has {mid}stage.0 to stage.{n - 1}, down.i.j with {layers} layers "
        f"a stage and up.i.j with one more"
    )


def _check_shapes(removal: Removal) -> None:
    """Every student weight must get a teacher weight of its shape, and a mid block that stays all of its own."""
    with torch.device("meta"):
        teacher, student = UNet(removal.teacher).state_dict(), UNet(removal.student).state_dict()
    for name, source in weight_map(removal, student).items():
        if source not in teacher or teacher[source].shape != student[name].shape:
            found = tuple(teacher[source].shape) if source in teacher else "nothing"
            raise InputError(
                f"removing {','.join(removal.removed)} does not fit together: {name} needs "
                f"{tuple(student[name].shape)}, the teacher's {source} is {found}; keep the first layer of a down "
                "stage, the first and the last of an up stage, and a stage of other width than the one before it"
            )
    # A config has no heads and depth for the mid block: it takes those of the innermost stage and its first layer.
    mids = [(c.attention_head_dim[-1], c.transformer_depths()[1]) for c in (removal.teacher, removal.student)]
    if removal.student.mid_block_type == "UNetMidBlock2DCrossAttn" and mids[0] != mids[1]:
        raise InputError(
            f"removing {','.join(removal.removed)} would change the heads or the depth of the mid block: remove mid too"
        )


def weight_map(removal: Removal, student_names: Sequence[str] | Mapping[str, Tensor]) -> dict[str, str]:
    """Student weight -> teacher weight that fills it, for every student weight."""
    result = {}
    for name in student_names:
        part, *rest = name.split(".")
        if part in ("down_blocks", "up_blocks"):
            stage = int(rest[0])
            kept = (removal.down if part == "down_blocks" else removal.up)[stage]
            if part == "up_blocks":
                rest[0] = str(stage + removal.lost)
            if rest[1] in ("resnets", "attentions"):
                rest[2] = str(kept[int(rest[2])])
        result[name] = ".".join([part, *rest])
    return result


def build_student(removal: Removal, teacher: UNet | None, device: torch.device | str = "cpu") -> UNet:
    """The student network in float32, filled with copies of the teacher's weights; random if teacher is None."""
    with torch.device("cpu" if teacher is None else "meta"):
        student = UNet(removal.student)
    if teacher is not None:
        weights = teacher.state_dict()
        filled = {
            name: weights[source].detach().to(device, torch.float32, copy=True)
            for name, source in weight_map(removal, student.state_dict()).items()
        }
        student.load_state_dict(filled, assign=True)
    return student.to(device)


def feature_pairs(removal: Removal, pairing: str = "nota") -> list[tuple[str, str]]:
    """(teacher feature, student feature) for the feature loss, in the names of `UNet(..., return_features=True)`.

    Both pair every kept stage's output with its own. They differ in the rest:
    - "nota" (BK-SDM): no mid block. Where the innermost stages are gone, the new innermost stage has lost its
      downsampler, so its output has another size: its last transformer's proj_out is compared instead.
    - "segmind": the mid block too. The new innermost stage is compared with what the lost ones gave back to the up
      path, so that it learns to stand in for them.
    """
    if pairing not in PAIRINGS:
        raise InputError(f"pairing must be one of {', '.join(PAIRINGS)}, not {pairing!r}")
    last = len(removal.down) - 1
    pairs = [(f"down.{i}", f"down.{i}") for i in range(last + 1)]
    if removal.lost:
        attends = removal.student.down_block_types[last] == "CrossAttnDownBlock2D"
        if pairing == "segmind":
            pairs[last] = (f"up.{removal.lost - 1}", f"down.{last}")
        elif attends:
            pairs[last] = (f"down.{last}.proj_out", f"down.{last}.proj_out")
        else:
            pairs.pop()
    if pairing == "segmind" and removal.student.mid_block_type and not removal.lost:
        pairs.append(("mid", "mid"))
    return pairs + [(f"up.{i + removal.lost}", f"up.{i}") for i in range(len(removal.up))]


# ------------------------------------------------------------------------- what went away, and what it saved


def removal_rows(removal: Removal, height: int, width: int, tokens: int = 77) -> list[tuple[str, ...]]:
    """A table of what was removed: its parameters, and its MACs in one call on a (height, width) latent.

    MACs are those of convolutions and linear layers, as the paper counts them. A stage's row holds what the rows of
    its layers have not counted, so teacher less all rows is the student, exactly.
    """
    parameters = _parameters_by_module(removal.teacher)
    macs = macs_by_module(removal.teacher, height, width, tokens)
    rows = [("removed", "parameters", "MACs")]
    counted: list[str] = []
    left = [parameters[""], macs[""]]
    for entry in sorted(removal.removed, key=lambda e: ("down", "up", "mid", "stage").index(e.split(".")[0])):
        modules = [m for m in _modules(entry, removal.teacher) if m in parameters]
        modules = [m for m in modules if not m.startswith(tuple(f"{c}." for c in counted))]
        inside = [c for c in counted if c.startswith(tuple(f"{m}." for m in modules))]
        spent = [
            sum(cost.get(m, 0) for m in modules) - sum(cost.get(c, 0) for c in inside) for cost in (parameters, macs)
        ]
        counted += modules
        left = [a - b for a, b in zip(left, spent, strict=True)]
        rows.append((entry, *map(format_count, spent)))
    if removal.lost and removal.student.mid_block_type:
        more = macs_by_module(removal.student, height, width, tokens)["mid_block"] - macs["mid_block"]
        left[1] += more
        rows.append(("(mid on more pixels)", "0", format_count(-more)))
    rows.append(("teacher", format_count(parameters[""]), format_count(macs[""])))
    rows.append(("student", *map(format_count, left)))
    change = [100 * (b / a - 1) for a, b in zip((parameters[""], macs[""]), left, strict=True)]
    return [*rows, ("change", *(f"{percent:+.1f} %" for percent in change))]


def _modules(entry: str, teacher: UNetConfig) -> list[str]:
    """The teacher's modules behind an entry, some of which may not exist."""
    kind, *numbers = entry.split(".")
    if kind == "mid":
        return ["mid_block"]
    i = int(numbers[0])
    if kind == "stage":
        mirror = len(teacher.block_out_channels) - 1 - i
        return [f"down_blocks.{i}", f"up_blocks.{mirror}", f"down_blocks.{i - 1}.downsamplers.0"]
    return [f"{kind}_blocks.{i}.{part}.{numbers[1]}" for part in ("resnets", "attentions")]


def _parameters_by_module(config: UNetConfig) -> dict[str, int]:
    with torch.device("meta"):
        modules = dict(UNet(config).named_modules())
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}


def format_count(n: float) -> str:
    """859.5 M, 338.6 G, 12.3 k: three to four figures."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.1f} {unit}" if n < 1e13 else f"{n / size:.0f} {unit}"
    return f"{n:.0f}"
