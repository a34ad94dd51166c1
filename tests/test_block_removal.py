"""Block removal against its originals: the students of BK-SDM and Segmind, to the parameter, the name and the bit.

The oracles are the published counts, Segmind's surgery on a live diffusers U-Net, written down here once more, and
diffusers, which must load and run every student.
"""

import functools
import hashlib
from collections import Counter
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import TINY, TINY_SD21, TINY_SDXL, TINY_SSD, assert_close, randomize, run_diffusers, unet_inputs

from minidistill.distill import block_removal
from minidistill.distill.block_removal import (
    PAIRINGS,
    RECIPES,
    build_student,
    feature_pairs,
    format_count,
    plan_removal,
    removal_rows,
    weight_map,
    weight_shapes,
)
from minidistill.errors import InputError
from minidistill.metrics.cost import count_macs
from minidistill.models.unet import SD15, SD21, SDXL, UNet
from minidistill.weights import folders

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHERS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}
SIZES = {  # the student's parameters, its tensors
    ("sd15", "bk-base"): (579_384_964, 442),
    ("sd15", "bk-small"): (482_346_884, 396),
    ("sd15", "bk-tiny"): (323_384_964, 358),
    ("sd21", "bk-base"): (583_480_964, 442),
    ("sd21", "bk-small"): (485_787_524, 396),
    ("sd21", "bk-tiny"): (326_825_604, 358),
    # published as 1161 M and 782 M (the model cards of KOALA), 1.3 B, 0.74 B (arXiv 2401.02677)
    ("sdxl", "koala-1b"): (1_161_184_324, 790),
    ("sdxl", "koala-700m"): (782_822_724, 584),
    ("sdxl", "ssd-1b"): (1_331_334_404, 944),
    ("sdxl", "segmind-vega"): (745_225_604, 564),
}
SD_RECIPES, XL_RECIPES = ("bk-base", "bk-small", "bk-tiny"), ("koala-1b", "koala-700m", "ssd-1b", "segmind-vega")

LEVEL = replace(TINY, block_out_channels=(16, 16, 16, 16))  # of one width, so that any inner stages can be removed
DEEP_SDXL = replace(TINY_SDXL, transformer_layers_per_block=(1, 2, 7))  # deeper than any recipe leaves it

REMOVALS = {  # (teacher, blocks to remove): the recipes on tiny teachers, and lists that no recipe has
    **{name: (TINY, RECIPES[name].remove) for name in SD_RECIPES},
    **{name: (DEEP_SDXL, RECIPES[name].remove) for name in XL_RECIPES},
    "all-of-the-outermost-stage-kept": (TINY, ("down.1.1", "down.2.1", "up.1.1", "up.2.1", "mid", "stage.3")),
    "nothing": (TINY, ()),
    "mid-named-twice": (TINY, ("mid", "down.1.1", "up.2.1", "mid")),
    "inner-layers": (TINY, ("up.1.1", "up.0.1", "down.3.1", "down.2.1")),
    "first-layers": (TINY, ("down.3.0", "up.0.0", "down.0.0", "up.3.1", "down.2.1", "up.1.0")),
    "last-layer-of-the-innermost-up-stage": (TINY, ("down.3.1", "up.0.2")),
    "stage-without-mid": (TINY_SD21, ("stage.3", "down.0.1", "up.3.1")),
    "stage-and-its-layers": (TINY, ("stage.3", "up.0.1", "mid", "up.0.2", "down.3.0")),
    "two-stages-and-their-layers": (LEVEL, ("down.3.0", "stage.2", "up.1.2", "stage.3", "down.1.1", "up.2.1")),
    "all-but-one-stage": (LEVEL, ("mid", "stage.1", "stage.3", "stage.2")),
    "uneven-layers": (replace(TINY, layers_per_block=(1, 3, 2, 2)), ("down.1.1", "down.1.2", "up.2.1", "up.2.2")),
    "sdxl": (TINY_SDXL, ("down.0.1", "up.2.1", "down.2.1", "up.0.1", "mid")),
    "ssd": (TINY_SSD, ("down.1.1", "up.1.1", "down.2.1", "up.0.1")),
    "depth-shared-with-mid": (TINY_SDXL, ("mid@2", "down.2.0@2", "down.2.1@1", "up.1.0@1")),
    "mid-of-one-resnet": (TINY, ("stage.3", "mid@0")),
    "mid-of-one-resnet-sdxl": (TINY_SDXL, ("down.2.0@1", "mid@0")),
}
every_removal = pytest.mark.parametrize(("config", "remove"), REMOVALS.values(), ids=REMOVALS)


def meta(config) -> UNet:
    with torch.device("meta"):
        return UNet(config)


def numel(unet) -> int:
    return sum(p.numel() for p in unet.parameters())


def make_teacher(config) -> UNet:
    """A teacher whose weights all differ."""
    return randomize(UNet(config))


plan, shared_teacher = functools.cache(plan_removal), functools.cache(make_teacher)  # results not to be changed


@functools.cache
def make_all(config, remove):
    """(removal, teacher, student), not to be changed."""
    removal, teacher = plan(config, remove), shared_teacher(config)
    return removal, teacher, build_student(removal, teacher)


make_inputs = functools.partial(unet_inputs, size=(10, 13))


def fingerprint(unet) -> str:
    digest = hashlib.sha256()
    for name, tensor in unet.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


# published architectures


@pytest.mark.parametrize(("family", "recipe"), SIZES)
def test_students_have_the_published_size_and_diffusers_builds_the_same_tensors_from_the_config(family, recipe):
    config = plan(TEACHERS[family], RECIPES[recipe].remove).student
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(config.to_dict()).state_dict()
    assert weight_shapes(config) == {name: w.shape for name, w in theirs.items()}
    assert (sum(w.numel() for w in theirs.values()), len(theirs)) == SIZES[family, recipe]


def test_the_config_is_the_official_config_json():
    assert plan(TINY, ()).student == TINY
    config = plan(SD21, RECIPES["bk-tiny"].remove).student.to_dict()
    assert config == {
        **SD21.to_dict(),
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3,
        "mid_block_type": None,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        "attention_head_dim": [5, 10, 20],
    }


def test_transformers_of_sdxls_students_are_as_deep_as_the_published_ones():
    found = {name: plan(SDXL, RECIPES[name].remove).student.transformer_depths() for name in XL_RECIPES}
    assert found == {  # stages without transformers count as 1
        "koala-1b": ([(1,), (2,), (6,)], 6, [(6, 6), (2, 2), (1, 1)]),
        "koala-700m": ([(1,), (2,), (5,)], 5, [(5, 5), (2, 2), (1, 1)]),
        "ssd-1b": ([(1, 1), (2, 2), (4, 4)], 4, [(4, 4, 10), (2, 1, 1), (1, 1, 1)]),
        "segmind-vega": ([(1, 1), (1, 1), (2, 2)], 2, [(2, 2, 2), (1, 1, 1), (1, 1, 1)]),
    }


def test_recipes_have_the_loss_weights_and_the_pairing_of_their_papers_and_segminds_the_blocks_of_bk_sdms():
    assert RECIPES["segmind-small"].remove == RECIPES["bk-base"].remove
    assert RECIPES["segmind-tiny"].remove == RECIPES["bk-tiny"].remove
    settings = {name: (recipe.loss_weights, recipe.pairing) for name, recipe in RECIPES.items()}
    assert settings == {
        **dict.fromkeys(SD_RECIPES, ((1, 1, 1), "nota")),
        **dict.fromkeys(("segmind-small", "segmind-tiny"), ((1, 0.5, 0.5), "segmind")),
        **dict.fromkeys(XL_RECIPES, ((1, 1, 1), "segmind")),
    }


# weights


def surgery(unet: UNet2DConditionModel, recipe: str) -> UNet2DConditionModel:
    """Cut a live diffusers U-Net down in place, as Segmind's prepare_unet does. Its .config stays the teacher's.

    Nota's list of the weights to copy, by prefixes of names, comes to the same weights.
    """
    for block in unet.down_blocks:
        del block.resnets[1]
        if hasattr(block, "attentions"):
            del block.attentions[1]
    for block in unet.up_blocks:
        block.resnets[1] = block.resnets[2]
        del block.resnets[2]
        if hasattr(block, "attentions"):
            block.attentions[1] = block.attentions[2]
            del block.attentions[2]
    if recipe != "bk-base":
        unet.mid_block = None
    if recipe == "bk-tiny":
        del unet.down_blocks[3]
        unet.down_blocks[2].downsamplers = None
        for i in range(3):
            unet.up_blocks[i] = unet.up_blocks[i + 1]
        del unet.up_blocks[3]
    return unet


@pytest.mark.parametrize("recipe", SD_RECIPES)
@pytest.mark.parametrize("config", [TINY, TINY_SD21], ids=["sd15", "sd21"])
def test_students_are_what_surgery_leaves_of_the_teacher(config, recipe):
    _, teacher, student = make_all(config, RECIPES[recipe].remove)
    carved = UNet2DConditionModel.from_config(config.to_dict())
    carved.load_state_dict(teacher.state_dict())
    carved = surgery(carved, recipe)
    theirs, ours = carved.state_dict(), student.state_dict()
    assert set(theirs) == set(ours)
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
    inputs = make_inputs(config)
    with torch.no_grad():
        assert_close(student(*inputs), run_diffusers(carved, *inputs))


def prefixes(entry, config) -> tuple[str, ...]:
    """Of the names of the teacher's weights that an entry removes, spelled out."""
    layer, _, depth = entry.partition("@")
    side, *numbers = layer.split(".")
    if side == "mid":
        attention, block_depth = "mid_block.attentions.0", config.transformer_depths()[1]
    elif side == "stage":
        i = int(numbers[0])
        mirror = len(config.block_out_channels) - 1 - i
        return f"down_blocks.{i}.", f"up_blocks.{mirror}.", f"down_blocks.{i - 1}.downsamplers."
    else:
        i, j = map(int, numbers)
        attention = f"{side}_blocks.{i}.attentions.{j}"
        block_depth = config.transformer_depths()[0 if side == "down" else 2][i][j]
    if depth == "0":
        return attention, "mid_block.resnets.1."
    if depth:
        return tuple(f"{attention}.transformer_blocks.{n}." for n in range(int(depth), block_depth))
    return ("mid_block.",) if side == "mid" else (f"{attention}.", attention.replace("attentions", "resnets") + ".")


@every_removal
def test_every_student_tensor_is_a_teacher_tensor_to_the_bit_and_all_others_were_removed(config, remove):
    removal, teacher, student = make_all(config, remove)
    student, weights = student.state_dict(), teacher.state_dict()
    sources = weight_map(removal, student)
    assert list(sources) == list(student) and max(Counter(sources.values()).values()) == 1
    for name, source in sources.items():
        assert torch.equal(student[name], weights[source]), name
    removed = tuple(prefix for entry in remove for prefix in prefixes(entry, config))
    assert {name for name in weights if name.startswith(removed)} == set(weights) - set(sources.values())


def test_a_student_of_a_half_precision_teacher_is_float32_with_the_same_values():
    teacher = make_teacher(TINY).half()
    removal = plan(TINY, RECIPES["bk-tiny"].remove)
    student, weights = build_student(removal, teacher).state_dict(), teacher.state_dict()
    for name, source in weight_map(removal, student).items():
        assert weights[source].dtype == torch.float16 and student[name].dtype == torch.float32
        assert torch.equal(student[name], weights[source].float())


def test_training_the_student_leaves_the_teacher_as_it_was():
    teacher = make_teacher(TINY).requires_grad_(False)
    student = build_student(plan(TINY, RECIPES["bk-base"].remove), teacher)
    assert all(p.requires_grad for p in student.parameters()), "a frozen teacher must not freeze its student"
    theirs = {w.untyped_storage().data_ptr() for w in teacher.state_dict().values()}
    ours = [w.untyped_storage().data_ptr() for w in student.state_dict().values()]
    assert theirs.isdisjoint(ours) and len(set(ours)) == len(ours)
    before = fingerprint(teacher), fingerprint(student)
    student(*make_inputs(TINY)).square().mean().backward()
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    assert fingerprint(teacher) == before[0] and fingerprint(student) != before[1]


def test_without_a_teacher_the_weights_are_random_and_decided_by_the_seed():
    removal = plan_removal(TINY, RECIPES["bk-small"].remove)
    prints = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        student = build_student(removal, None)
        assert not any(p.is_meta or not p.isfinite().all() for p in student.parameters())
        prints.append(fingerprint(student))
    assert prints[0] == prints[1] != prints[2]


@functools.cache
def outputs(config, remove):
    """(teacher's, student's) prediction and features, not to be changed."""
    _, teacher, student = make_all(config, remove)
    with torch.no_grad():
        return [unet(*make_inputs(config), return_features=True) for unet in (teacher, student)]


@every_removal
def test_diffusers_loads_a_saved_student_and_gives_the_same_output(tmp_path, config, remove):
    _, _, student = make_all(config, remove)
    folders.save_unet(tmp_path, student)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert set(theirs.state_dict()) == set(student.state_dict())
    with torch.no_grad():
        assert_close(outputs(config, remove)[1][0], run_diffusers(theirs, *make_inputs(config)))


def test_a_shortened_transformer_is_its_first_blocks():
    remove = ("mid@2", "down.2.0@2", "down.2.1@1", "up.0.0@1", "up.1.2@1")
    teacher = make_teacher(TINY_SDXL)
    student = build_student(plan(TINY_SDXL, remove), teacher)
    removed = tuple(prefix for entry in remove for prefix in prefixes(entry, TINY_SDXL))
    with torch.no_grad():  # a transformer block whose last layers are 0 adds nothing to its input
        for name, p in teacher.named_parameters():
            if name.startswith(removed) and (".to_out." in name or ".net.2." in name):
                p.zero_()
        inputs = make_inputs(TINY_SDXL)
        assert_close(student(*inputs), teacher(*inputs))


# features

DOWNS, UPS = ([(f"{side}.{i}",) * 2 for i in range(4)] for side in ("down", "up"))
UPS_TINY = [("up.1", "up.0"), ("up.2", "up.1"), ("up.3", "up.2")]
PAIRS = {
    ("bk-base", "nota"): DOWNS + UPS,
    ("bk-small", "nota"): DOWNS + UPS,
    ("bk-tiny", "nota"): [*DOWNS[:2], ("down.2.proj_out", "down.2.proj_out"), *UPS_TINY],
    ("segmind-small", "segmind"): [*DOWNS, ("mid", "mid"), *UPS],
    ("bk-small", "segmind"): DOWNS + UPS,
    ("segmind-tiny", "segmind"): [*DOWNS[:2], ("up.0", "down.2"), *UPS_TINY],
    **{(name, "segmind"): [*DOWNS[:3], ("mid", "mid"), *UPS[:3]] for name in XL_RECIPES},
    ("koala-700m", "segmind"): DOWNS[:3] + UPS[:3],
}


@pytest.mark.parametrize(("recipe", "pairing"), PAIRS)
def test_the_features_compared_are_those_of_the_original(recipe, pairing):
    teacher = SDXL if recipe in XL_RECIPES else SD15
    assert feature_pairs(plan(teacher, RECIPES[recipe].remove), pairing) == PAIRS[recipe, pairing]


@every_removal
def test_the_two_features_of_every_pair_have_one_shape(config, remove):
    removal = plan(config, remove)
    pairs = [pair for pairing in PAIRINGS for pair in feature_pairs(removal, pairing)]
    assert len(pairs) >= 4 * len(removal.kept_down) - 1
    theirs, ours = (features for _, features in outputs(config, remove))
    for teacher_name, student_name in pairs:
        assert theirs[teacher_name].shape == ours[student_name].shape, (teacher_name, student_name)


def test_an_innermost_stage_without_transformer_has_no_proj_out_to_compare():
    config = replace(LEVEL, down_block_types=("DownBlock2D",) * 4, up_block_types=("UpBlock2D",) * 4)
    removal = plan_removal(config, ("mid", "stage.3"))
    assert feature_pairs(removal, "nota") == [*DOWNS[:2], *UPS_TINY]
    assert feature_pairs(removal, "segmind")[2] == ("up.0", "down.2")


def test_pairs_of_different_widths_and_unknown_pairings_are_refused():
    removal = plan_removal(TINY, ("down.1.1", "up.2.0", "mid", "stage.3", "stage.2"))
    with pytest.raises(InputError, match=r"teacher's up.1 with the student's down.1, .* 48 and 32 .* --pairing nota"):
        feature_pairs(removal, "segmind")
    assert feature_pairs(removal, "nota")
    with pytest.raises(InputError, match="nota, segmind"):
        feature_pairs(removal, "koala")


# refusals

HEADS = replace(TINY, attention_head_dim=(1, 2, 3, 4))
DEPTHS = replace(
    TINY,
    block_out_channels=(16, 32, 32, 32),
    down_block_types=("CrossAttnDownBlock2D",) * 4,
    up_block_types=("CrossAttnUpBlock2D",) * 4,
    transformer_layers_per_block=(1, 1, 1, (2, 1)),
    reverse_transformer_layers_per_block=(2, 1, 1, 1),
)
SHARED = "remove mid too, or shorten both to one depth N (down.2.0@N,mid@N)"
STAGES = "from the innermost outwards only: stage.3 first, never stage.0"
MISFIT = "does not fit together"
REFUSED = [  # (teacher, blocks to remove, what the message says)
    *((TINY, (entry,), f"no {entry!r} to remove; it has mid, stage.0, stage.1, stage.2, stage.3, down.0.0, down.0.1")
      for entry in ("", "down", "down.1", "down.1.2", "down.4.0", "up.0.3", "down.-1.0", "down.0.01", "stage.4",
                    "stage.03", "mid.0", "Mid", " mid", "down.².1", "down_blocks.0.resnets.1")),
    (replace(TINY, mid_block_type=None), ("mid",), "no 'mid' to remove; it has stage.0"),
    (SDXL, RECIPES["bk-base"].remove, "no 'down.3.1' to remove"),
    (SDXL, ("mid", "stage.3"), "no 'stage.3' to remove"),
    *((TINY, RECIPES[recipe].remove, "has depth 1, it cannot be shortened") for recipe in XL_RECIPES),
    (TINY_SDXL, ("down.2.0@3",), "'down.2.0@3': the transformer of down.2.0 has depth 3, give 1 to 2"),
    (TINY_SDXL, ("down.2.0@0",), "give 1 to 2"),
    (TINY_SDXL, ("down.2.0@",), "give 1 to 2"),
    (TINY_SDXL, ("down.2.0@01",), "give 1 to 2"),
    (TINY_SDXL, ("mid@-1",), "give 0 to 2"),
    (TINY_SDXL, ("up.2.0@1",), "no transformer 'up.2.0@1': it has, with their depths, mid (3), down.1.0 (2), "),
    (TINY_SDXL, ("stage.2@1",), "no transformer 'stage.2@1'"),
    (plan_removal(TINY, ("mid@0",)).student, ("mid@0",), "no transformer 'mid@0'"),
    (TINY_SDXL, ("down.2.0@2",), SHARED),
    (TINY_SDXL, ("mid@2",), SHARED),
    (HEADS, ("stage.3",), "would change the heads or depth of the mid block"),
    (DEPTHS, ("stage.3",), "would change the heads or depth of the mid block"),
    (DEPTHS, ("down.3.0", "up.0.1"), "would change the heads or depth of the mid block"),
    (LEVEL, ("stage.2",), STAGES),
    (LEVEL, ("mid", "stage.1", "stage.3"), STAGES),
    (LEVEL, ("stage.0",), STAGES),
    (LEVEL, ("stage.3", "stage.2", "stage.1", "stage.0"), STAGES),
    (TINY, ("down.1.1",), "stage 1 would keep 1 down and 3 up layers"),
    (TINY, ("up.2.1",), "stage 1 would keep 2 down and 2 up layers"),
    (TINY, ("down.1.1", "up.1.1"), "one up layer more than down layers (up.2 mirrors down.1)"),
    (TINY, ("down.0.0", "down.0.1", "up.3.0", "up.3.1"), "stage 0 would keep 0 down"),
    (TINY, ("down.2.1", "up.1.2"), MISFIT),  # the last up layer reads the skip connection of the stage before
    (TINY, ("down.1.1", "up.2.0"), MISFIT),  # the first one reads the stage below
    (TINY, ("down.1.0", "up.2.1"), MISFIT),  # the first down layer has more output than input channels
    (TINY, ("mid", "stage.3", "stage.2"), MISFIT),  # of another width
    (TINY_SDXL, ("mid", "stage.2"), MISFIT),
]  # fmt: skip


@pytest.mark.parametrize(("config", "remove", "said"), REFUSED)
def test_what_does_not_exist_or_does_not_fit_is_refused_in_one_line(config, remove, said):
    with pytest.raises(InputError) as caught:
        plan_removal(config, remove)
    message = str(caught.value)
    assert said in message and "\n" not in message
    if said.startswith("would change"):
        plan_removal(config, (*remove, "mid"))


# the printed table


def read_rows(monkeypatch, removal, height=16, width=24):
    """(removed {entry: (parameters, MACs)}, teacher's, student's) of the table, with all digits."""
    monkeypatch.setattr(block_removal, "format_count", str)
    header, *rows, change = removal_rows(removal, height, width, 7)
    assert header == ("removed", "parameters", "MACs") and change[0] == "change"
    table = {row[0]: (int(row[1]), int(row[2])) for row in rows}
    assert len(table) == len(rows)
    return table, table.pop("teacher"), table.pop("student")


@every_removal
def test_rows_hold_the_weights_that_an_entry_removes_and_teacher_less_all_rows_is_the_student(
    monkeypatch, config, remove
):
    removal = plan(config, remove)
    rows, teacher, student = read_rows(monkeypatch, removal)
    assert set(rows) - {"(mid on more pixels)"} == set(remove)
    for column in (0, 1):
        assert teacher[column] - sum(row[column] for row in rows.values()) == student[column]
    sizes = {name: shape.numel() for name, shape in weight_shapes(config).items()}
    assert (teacher[0], student[0]) == (sum(sizes.values()), numel(meta(removal.student)))
    for entry in filter(remove.__contains__, rows):
        counted = [sizes.pop(name) for name in list(sizes) if name.startswith(prefixes(entry, config))]
        assert rows[entry][0] == sum(counted) and rows[entry][1] > 0


@pytest.mark.parametrize("name", ["stage-without-mid", "two-stages-and-their-layers", "ssd", "depth-shared-with-mid"])
def test_the_students_macs_are_those_of_the_student_that_is_built(monkeypatch, name):
    removal = plan(*REMOVALS[name])
    _, _, student = read_rows(monkeypatch, removal)
    assert student[1] == count_macs(removal.student, 16, 24, 7)["conv_linear"]


def test_a_mid_block_left_on_more_pixels_has_a_row_of_its_own(monkeypatch):
    rows, _, _ = read_rows(monkeypatch, plan(TINY, ("stage.3",)))
    assert list(rows) == ["stage.3", "(mid on more pixels)"]
    parameters, macs = rows["(mid on more pixels)"]
    assert parameters == 0 and macs < 0
    assert list(read_rows(monkeypatch, plan(TINY, ("stage.3", "mid")))[0]) == ["mid", "stage.3"]


@pytest.mark.parametrize(
    ("config", "recipe", "side", "student", "change"),
    [
        (SD15, "bk-base", 64, ("579.4 M", "223.7 G"), ("-32.6 %", "-33.9 %")),
        (SD15, "bk-small", 64, ("482.3 M", "217.6 G"), ("-43.9 %", "-35.7 %")),
        (SD15, "bk-tiny", 64, ("323.4 M", "205.0 G"), ("-62.4 %", "-39.5 %")),
        (SD21, "bk-tiny", 96, ("326.8 M", "460.4 G"), ("-62.3 %", "-39.5 %")),
    ],
)
def test_the_table_of_the_real_models_holds_the_papers_figures(config, recipe, side, student, change):
    rows = {row[0]: row[1:] for row in removal_rows(plan(config, RECIPES[recipe].remove), side, side)}
    assert rows["teacher"] == (("859.5 M", "338.6 G") if config is SD15 else ("865.9 M", "760.5 G"))
    assert (rows["student"], rows["change"]) == (student, change)
    if config is SD15:
        assert rows.get("mid", ("97.0 M", "6.0 G")) == ("97.0 M", "6.0 G")


def test_counts_are_short():
    counts = {0: "0", 999: "999", 12_340: "12.3 k", 859_520_964: "859.5 M", 338.6e9: "338.6 G", -2.5e6: "-2.5 M"}
    assert {n: format_count(n) for n in counts} == counts
    assert format_count(1.25e12) == "1.2 T"
