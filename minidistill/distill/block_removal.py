"""Block removal: the architecture edit of BK-SDM (arXiv 2305.15798, section 3), as data.

A U-Net of Stable Diffusion has, in every down stage i, layers down.i.0, down.i.1 (a resnet and, where the stage reads
the text, a transformer), in every up stage layers up.i.0, up.i.1, up.i.2, and a mid block. A recipe is the list of what
goes away, in the teacher's numbering:

    down.1.1   up.2.1     one layer           mid   the mid block
    stage.3               a whole resolution level: its down and its up stage, and the downsampler that led to it
    down.2.0@6   mid@6    all but the first 6 blocks of one transformer: SDXL's are up to 10 deep
    mid@0                 the mid block's transformer and second resnet, as SSD-1B has it

From that one list follow the student's config, which teacher weight fills which student weight, which features are
compared in distillation, and the table of what was saved. A student is built from its config and filled by the map;
nothing is ever cut out of a live network.

Of an up stage's three layers the middle one goes. Skips drop from three to two a stage: the kept down layer's and the
previous stage's. Layer 0 has always read the first kind, layer 2 the second, so their channel counts match; layer 1
would not.

SDXL's students cut transformers too: KOALA (arXiv 2312.04005), SSD-1B and Vega (arXiv 2401.02677). A config has no
depth for the mid block's own transformer, it is that of the innermost down stage's first; so those are cut as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from minidistill.errors import InputError
from minidistill.metrics.cost import macs_by_module
from minidistill.models.unet import UNet, UNetConfig

SECOND_LAYERS = (*(f"down.{i}.1" for i in range(4)), *(f"up.{i}.1" for i in range(4)))
SECOND_LAYERS_XL = (*(f"down.{i}.1" for i in range(3)), *(f"up.{i}.1" for i in range(3)))
PAIRINGS = ("nota", "segmind")


def cut(depth: int, *transformers: str) -> tuple[str, ...]:
    """Entries that keep the first `depth` blocks of each of these transformers."""
    return tuple(f"{name}@{depth}" for name in transformers)


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
    # Not published: bk-tiny, but the outermost stage stays whole. Where that stage does most of the work, as in the
    # miniature (python -m minidistill.sensitivity), this is soon learned.
    "inner": Recipe(("down.1.1", "down.2.1", "up.1.1", "up.2.1", "mid", "stage.3")),
    "segmind-small": Recipe(SECOND_LAYERS, "segmind", (1.0, 0.5, 0.5)),
    "segmind-tiny": Recipe((*SECOND_LAYERS, "mid", "stage.3"), "segmind", (1.0, 0.5, 0.5)),
    # Of SDXL: the published architectures. Of a transformer the first blocks stay. Their papers compare features inside
    # the layers (KOALA the self-attention's); here it is every stage's output, and the mid block's.
    "koala-1b": Recipe((*SECOND_LAYERS_XL, *cut(6, "down.2.0", "mid", "up.0.0", "up.0.2")), "segmind"),
    "koala-700m": Recipe((*SECOND_LAYERS_XL, "mid", *cut(5, "down.2.0", "up.0.0", "up.0.2")), "segmind"),
    "ssd-1b": Recipe(
        ("mid@0", *cut(4, "down.2.0", "down.2.1", "up.0.0", "up.0.1"), *cut(1, "up.1.1", "up.1.2")), "segmind"
    ),
    "segmind-vega": Recipe(
        (
            "mid@0",
            *cut(2, "down.2.0", "down.2.1", "up.0.0", "up.0.1", "up.0.2"),
            *cut(1, "down.1.0", "down.1.1", "up.1.0", "up.1.1", "up.1.2"),
        ),
        "segmind",
    ),
}


@dataclass(frozen=True)
class Removal:
    """A checked edit of one teacher: what stays, in the teacher's numbering.

    kept_down[i] and kept_up[j] are the layers that stay of the teacher's stages; the last `stages_removed` down and the
    first `stages_removed` up stages are
    gone. `student` is the config that follows.
    """

    teacher: UNetConfig
    student: UNetConfig
    removed: tuple[str, ...]
    kept_down: tuple[tuple[int, ...], ...]
    kept_up: tuple[tuple[int, ...], ...]
    stages_removed: int


def plan_removal(teacher: UNetConfig, remove: Sequence[str]) -> Removal:
    """Check a list of removals against a teacher and derive the student's config.

    Raises InputError naming the entry that does not exist or does not fit, and what would.
    """
    stages = len(teacher.block_out_channels)
    numbers = [str(i) for i in range(stages)]
    down = [list(range(n)) for n in teacher.layers_per_block]
    up = [list(range(n + 1)) for n in teacher.layers_per_block[::-1]]
    depths = transformer_depths(teacher)
    has_mid = teacher.mid_block_type is not None
    lost = 0
    removed = tuple(dict.fromkeys(remove))
    for entry in removed:
        match entry.split("."):
            case _ if "@" in entry:
                _cut_depth(depths, entry, teacher)
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
    _check_stages(removed, stages)
    down, up = down[: stages - lost], up[lost:]
    _check_balance(down, up, stages)
    mid = teacher.mid_block_type if has_mid else None
    if mid and depths.get("mid") == 0:
        mid = "UNetMidBlock2D"
    before_down, _, before_up = teacher.transformer_depths()
    student = replace(
        teacher,
        block_out_channels=teacher.block_out_channels[: len(down)],
        layers_per_block=tuple(len(kept) for kept in down),
        attention_head_dim=teacher.attention_head_dim[: len(down)],
        down_block_types=teacher.down_block_types[: len(down)],
        up_block_types=teacher.up_block_types[lost:],
        mid_block_type=mid,
        **_depths(
            [[depths.get(f"down.{i}.{j}", before_down[i][j]) for j in kept] for i, kept in enumerate(down)],
            [[depths.get(f"up.{i}.{j}", before_up[i][j]) for j in kept] for i, kept in enumerate(up, lost)],
            depths.get("mid") if mid == "UNetMidBlock2DCrossAttn" else None,
        ),
    )
    removal = Removal(teacher, student, removed, tuple(map(tuple, down)), tuple(map(tuple, up)), lost)
    _check_shapes(removal, depths.get("mid"))
    return removal


def transformer_depths(config: UNetConfig) -> dict[str, int]:
    """How many blocks every transformer has, by its layer: {"mid": 10, "down.1.0": 2, ...}."""
    down, mid, up = config.transformer_depths()
    found = {"mid": mid} if config.mid_block_type == "UNetMidBlock2DCrossAttn" else {}
    for side, kinds, depths in (("down", config.down_block_types, down), ("up", config.up_block_types, up)):
        for i, (kind, stage) in enumerate(zip(kinds, depths, strict=True)):
            if kind.startswith("CrossAttn"):
                found |= {f"{side}.{i}.{j}": depth for j, depth in enumerate(stage)}
    return found


def _cut_depth(depths: dict[str, int], entry: str, teacher: UNetConfig) -> None:
    """Enter what "down.2.0@6" leaves. InputError: no such transformer, or it is no shorter after it."""
    layer, _, depth = entry.partition("@")
    if layer not in depths:
        names = ", ".join(f"{name} ({blocks})" for name, blocks in transformer_depths(teacher).items())
        raise InputError(
            f"this teacher has no transformer to cut by {entry!r}: it has {names or 'none'} with so many blocks"
        )
    least = 0 if layer == "mid" else 1
    if depth not in map(str, range(least, depths[layer])):
        reason = f"give {least} to {depths[layer] - 1}" if depths[layer] > least else "it cannot be cut"
        raise InputError(f"{entry!r}: the transformer of {layer} has {depths[layer]} blocks, {reason}")
    depths[layer] = int(depth)


def _check_stages(removed: Sequence[str], stages: int) -> None:
    gone = sorted({int(e.split(".")[1]) for e in removed if e.startswith("stage.")})
    if gone and (gone[0] == 0 or gone != list(range(gone[0], stages))):
        raise InputError(
            f"stage.{gone[0]} cannot go like this: stages go from the innermost outwards, stage.{stages - 1} first, "
            f"and stage.0 stays"
        )


def _check_balance(down: list[list[int]], up: list[list[int]], stages: int) -> None:
    for i, (kept_down, kept_up) in enumerate(zip(down, up[::-1], strict=True)):
        if not kept_down or len(kept_up) != len(kept_down) + 1:
            raise InputError(
                f"stage {i} would keep {len(kept_down)} down and {len(kept_up)} up layers; it needs one down layer or "
                f"more, and one up layer more than down layers (up.{stages - 1 - i} mirrors down.{i})"
            )


def _depths(down: list[list[int]], up: list[list[int]], mid: int | None) -> dict:
    """Transformer depths in the shortest form that says the same: one number a stage, if its layers agree."""
    flat, flat_up = (tuple(stage[0] if len(set(stage)) == 1 else tuple(stage) for stage in side) for side in (down, up))
    mirrored = flat_up == flat[::-1] and not any(isinstance(d, tuple) for d in flat) and mid in (None, flat[-1])
    return {
        "transformer_layers_per_block": flat,
        "reverse_transformer_layers_per_block": None if mirrored else flat_up,
    }


def _no_such(entry: str, teacher: UNetConfig) -> str:
    n = len(teacher.block_out_channels)
    layers = ", ".join(str(count) for count in teacher.layers_per_block)
    mid = "mid, " if teacher.mid_block_type else ""
    return (
        f"this teacher has no {entry!r} to remove: it has {mid}stage.0 to stage.{n - 1}, down.i.j with {layers} layers "
        f"a stage and up.i.j with one more"
    )


def _check_shapes(removal: Removal, mid_depth: int | None) -> None:
    """Every student weight must get a teacher weight of its shape, and a mid block that stays what it should be."""
    # A config has no heads and depth for the mid block: it takes those of the innermost stage and its first layer.
    student = removal.student
    heads, depth = student.attention_head_dim[-1], student.transformer_depths()[1]
    bent = (heads, depth) != (removal.teacher.attention_head_dim[-1], mid_depth)
    if student.mid_block_type == "UNetMidBlock2DCrossAttn" and bent:
        first, n = f"down.{len(removal.kept_down) - 1}.{removal.kept_down[-1][0]}", min(depth, mid_depth)
        raise InputError(
            f"removing {','.join(removal.removed)} would change the heads or the depth of the mid block: remove mid too"
            + (f", or give it the depth of {first}: {first}@{n},mid@{n}" if depth != mid_depth else "")
        )
    teacher, own = weight_shapes(removal.teacher), weight_shapes(student)
    for name, source in weight_map(removal, own).items():
        if source not in teacher or teacher[source] != own[name]:
            raise InputError(
                f"removing {','.join(removal.removed)} does not fit together: {name} needs {tuple(own[name])}, the "
                f"teacher's {source} is {tuple(teacher[source]) if source in teacher else 'nothing'}; keep the first "
                "layer of a down stage, the first and the last of an up stage, and a stage of other width than the "
                "one before it"
            )


@lru_cache(maxsize=64)
def weight_shapes(config: UNetConfig) -> Mapping[str, torch.Size]:
    """{name of a weight: its shape}; not to be changed."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in UNet(config).state_dict().items()}


def weight_map(removal: Removal, student_names: Iterable[str]) -> dict[str, str]:
    """Student weight -> teacher weight that fills it, for every student weight."""
    result = {}
    for name in student_names:
        part, *rest = name.split(".")
        if part in ("down_blocks", "up_blocks"):
            stage = int(rest[0])
            kept = (removal.kept_down if part == "down_blocks" else removal.kept_up)[stage]
            if part == "up_blocks":
                rest[0] = str(stage + removal.stages_removed)
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

    InputError: these two have other widths.
    """
    if pairing not in PAIRINGS:
        raise InputError(f"pairing must be one of {', '.join(PAIRINGS)}, not {pairing!r}")
    last = len(removal.kept_down) - 1
    pairs = [(f"down.{i}", f"down.{i}") for i in range(last + 1)]
    if removal.stages_removed:
        attends = removal.student.down_block_types[last] == "CrossAttnDownBlock2D"
        if pairing == "segmind":
            pairs[last] = (f"up.{removal.stages_removed - 1}", f"down.{last}")
            theirs, ours = removal.teacher.block_out_channels[last + 1], removal.student.block_out_channels[last]
            if theirs != ours:
                raise InputError(
                    f"pairing segmind compares the teacher's {pairs[last][0]} with the student's {pairs[last][1]}, but "
                    f"they have {theirs} and {ours} channels: take --pairing nota"
                )
        elif attends:
            pairs[last] = (f"down.{last}.proj_out", f"down.{last}.proj_out")
        else:
            pairs.pop()
    if pairing == "segmind" and removal.student.mid_block_type and not removal.stages_removed:
        pairs.append(("mid", "mid"))
    return pairs + [(f"up.{i + removal.stages_removed}", f"up.{i}") for i in range(len(removal.kept_up))]


# ------------------------------------------------------------------------- what went away, and what it saved


def removal_rows(removal: Removal, height: int, width: int, tokens: int = 77) -> list[tuple[str, ...]]:
    """A table of what was removed: its parameters, and its MACs in one call on a (height, width) latent.

    MACs are those of convolutions and linear layers, as the paper counts them. A stage's row holds what the rows of
    its layers have not counted, so teacher less all rows is the student, exactly.
    """
    costs = removal_costs(removal, height, width, tokens)
    whole = _parameters_by_module(removal.teacher)[""], macs_by_module(removal.teacher, height, width, tokens)[""]
    left = [whole[k] - sum(spent[k] for spent in costs.values()) for k in (0, 1)]
    change = [f"{100 * (b / a - 1):+.1f} %" for a, b in zip(whole, left, strict=True)]
    named = {**costs, "teacher": whole, "student": left}
    rows = [(name, *map(format_count, counts)) for name, counts in named.items()]
    return [("removed", "parameters", "MACs"), *rows, ("change", *change)]


def removal_costs(removal: Removal, height: int, width: int, tokens: int = 77) -> dict[str, tuple[int, int]]:
    """{entry: (parameters, MACs of one call) saved by it beyond the entries before it}, outermost first."""
    parameters = _parameters_by_module(removal.teacher)
    macs = macs_by_module(removal.teacher, height, width, tokens)
    costs: dict[str, tuple[int, int]] = {}
    counted: list[str] = []
    for entry in sorted(removal.removed, key=_order):
        modules = [m for m in removed_modules(entry, removal.teacher) if m in parameters and m not in counted]
        modules = [m for m in modules if not m.startswith(tuple(f"{c}." for c in counted))]
        inside = [c for c in counted if c.startswith(tuple(f"{m}." for m in modules))]
        costs[entry] = tuple(
            sum(cost.get(m, 0) for m in modules) - sum(cost.get(c, 0) for c in inside) for cost in (parameters, macs)
        )
        counted += modules
    if removal.stages_removed and removal.student.mid_block_type:
        left = macs["mid_block"] - sum(macs.get(c, 0) for c in counted if c.startswith("mid_block."))
        more = macs_by_module(removal.student, height, width, tokens)["mid_block"] - left
        costs["(mid on more pixels)"] = (0, -more)
    return costs


def _order(entry: str) -> int:
    return ("down", "up", "mid", "stage").index(entry.partition("@")[0].split(".")[0])


def removed_modules(entry: str, teacher: UNetConfig) -> list[str]:
    """The teacher's modules behind an entry, some of which may not exist."""
    layer, _, depth = entry.partition("@")
    kind, *numbers = layer.split(".")
    if depth:
        attention = "mid_block.attentions.0" if kind == "mid" else removed_modules(layer, teacher)[1]
        if depth == "0":
            return [attention, "mid_block.resnets.1"]
        blocks = range(int(depth), transformer_depths(teacher)[layer])
        return [f"{attention}.transformer_blocks.{n}" for n in blocks]
    if kind == "mid":
        return ["mid_block"]
    i = int(numbers[0])
    if kind == "stage":
        mirror = len(teacher.block_out_channels) - 1 - i
        return [f"down_blocks.{i}", f"up_blocks.{mirror}", f"down_blocks.{i - 1}.downsamplers.0"]
    return [f"{kind}_blocks.{i}.{part}.{numbers[1]}" for part in ("resnets", "attentions")]


@lru_cache
def _parameters_by_module(config: UNetConfig) -> Mapping[str, int]:
    with torch.device("meta"):
        modules = dict(UNet(config).named_modules())
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}


def format_count(n: float) -> str:
    """859.5 M, 338.6 G, 12.3 k: three to four figures."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.1f} {unit}" if n < 1e13 else f"{n / size:.0f} {unit}"
    return f"{n:.0f}"
