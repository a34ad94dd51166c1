"""Block removal against its originals: the students of BK-SDM and Segmind, to the parameter, the name and the bit.

The oracles are the published counts, the prefix maps of Nota's copying code and Segmind's surgery on a live diffusers
U-Net, written down here once more; and diffusers, which must read and run every student.
"""

import functools
import hashlib
from collections import Counter
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import TINY, TINY_SD21, TINY_SDXL

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
)
from minidistill.errors import InputError
from minidistill.metrics.cost import count_macs, macs_by_module
from minidistill.models.unet import SD15, SD21, SDXL, UNet
from minidistill.weights import folders

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHERS = {"sd15": SD15, "sd21": SD21}
SIZES = {  # the student's parameters, its tensors
    ("sd15", "bk-base"): (579_384_964, 442),
    ("sd15", "bk-small"): (482_346_884, 396),
    ("sd15", "bk-tiny"): (323_384_964, 358),
    ("sd15", "segmind-small"): (579_384_964, 442),
    ("sd15", "segmind-tiny"): (323_384_964, 358),
    ("sd21", "bk-base"): (583_480_964, 442),
    ("sd21", "bk-small"): (485_787_524, 396),
    ("sd21", "bk-tiny"): (326_825_604, 358),
    ("sd21", "segmind-small"): (583_480_964, 442),
    ("sd21", "segmind-tiny"): (326_825_604, 358),
}
SIZES_XL = {  # published as 1161 M and 782 M (the model cards of KOALA), 1.3 B, 0.74 B (arXiv 2401.02677)
    "koala-1b": (1_161_184_324, 790),
    "koala-700m": (782_822_724, 584),
    "ssd-1b": (1_331_334_404, 944),
    "segmind-vega": (745_225_604, 564),
}
FOUR_STAGES = [name for name in RECIPES if name not in SIZES_XL]
every_student = pytest.mark.parametrize(("family", "recipe"), SIZES)
every_recipe = pytest.mark.parametrize("recipe", FOUR_STAGES)
every_xl_recipe = pytest.mark.parametrize("recipe", SIZES_XL)

LEVEL = replace(TINY, block_out_channels=(16, 16, 16, 16))  # of one width, so that any inner stages can go
DEEP_SDXL = replace(TINY_SDXL, transformer_layers_per_block=(1, 2, 7))  # deeper than any recipe leaves it
TINY_SSD = replace(  # transformers of different depths within a stage, as in SSD-1B
    TINY_SDXL,
    mid_block_type="UNetMidBlock2D",
    transformer_layers_per_block=(1, (2, 1), (1, 3)),
    reverse_transformer_layers_per_block=((1, 3, 2), (2, 1, 1), 1),
)

# Teachers and lists that no recipe has, and that fit.
CUSTOM = {
    "nothing": (TINY, ()),
    "mid": (TINY, ("mid",)),
    "one-layer": (TINY, ("down.1.1", "up.2.1")),
    "inner-layers": (TINY, ("up.1.1", "up.0.1", "down.3.1", "down.2.1")),
    "first-layers-of-a-level-stage": (TINY, ("down.3.0", "up.0.0", "down.0.0", "up.3.1")),
    "first-up-layer": (TINY, ("down.2.1", "up.1.0")),
    "last-layer-of-the-innermost-up-stage": (TINY, ("down.3.1", "up.0.2")),
    "tiny-with-both-layers": (TINY, ("mid", "stage.3")),
    "tiny-with-mid": (TINY_SD21, ("stage.3", "down.0.1", "up.3.1")),
    "a-layer-of-a-stage-that-goes-too": (TINY, ("stage.3", "up.0.1", "mid", "up.0.2", "down.3.0")),
    "named-twice": (TINY, ("down.1.1", "mid", "up.2.1", "down.1.1", "mid")),
    "two-stages": (LEVEL, ("stage.2", "stage.3", "mid")),
    "two-stages-inner-first": (LEVEL, ("stage.3", "stage.2", "mid")),
    "two-stages-and-layers-of-them": (LEVEL, ("down.3.0", "stage.2", "up.1.2", "stage.3", "down.1.1", "up.2.1")),
    "all-but-one-stage": (LEVEL, ("mid", "stage.1", "stage.2", "stage.3")),
    "uneven-layers": (replace(TINY, layers_per_block=(1, 3, 2, 2)), ("down.1.1", "down.1.2", "up.2.1", "up.2.2")),
    "sdxl": (TINY_SDXL, ("down.0.1", "up.2.1", "down.2.1", "up.0.1", "mid")),
    "ssd": (TINY_SSD, ("down.1.1", "up.1.1", "down.2.1", "up.0.1")),
    "one-transformer-shorter": (TINY_SDXL, ("up.0.1@1",)),
    "a-depth-shared-with-mid": (TINY_SDXL, ("mid@2", "down.2.0@2", "down.2.1@1", "up.1.0@1")),
    "mid-of-one-resnet": (TINY, ("mid@0",)),
    "mid-of-one-resnet-on-more-pixels": (TINY, ("stage.3", "mid@0")),
    "mid-of-one-resnet-and-a-shorter-transformer": (TINY_SDXL, ("down.2.0@1", "mid@0")),
}


def meta(config) -> UNet:
    with torch.device("meta"):
        return UNet(config)


def numel(unet) -> int:
    return sum(p.numel() for p in unet.parameters())


def make_teacher(config, seed: int = 0) -> UNet:
    """A teacher no two of whose weights are alike: fresh norms and biases would be all ones and zeros."""
    unet = UNet(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in unet.parameters():
            spread = 0.3 if p.dim() == 1 else 1.0 / p[0].numel() ** 0.5
            p.copy_(torch.randn(p.shape, generator=generator) * spread + 0.5 * (p.dim() == 1))
    return unet


plan, shared_teacher = functools.cache(plan_removal), functools.cache(make_teacher)  # neither to be changed


@functools.cache
def make_all(config, remove):
    """(removal, teacher, student), not to be changed."""
    removal, teacher = plan(config, remove), shared_teacher(config)
    return removal, teacher, build_student(removal, teacher)


def make_inputs(config, size=(16, 16)):
    """(x, t, context, added_cond) for a batch of two."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.in_channels, *size, generator=generator)
    context = torch.randn(2, 7, config.cross_attention_dim, generator=generator)
    added = None
    if config.addition_embed_type:
        pooled = torch.randn(2, 12, generator=generator)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64], [48, 64, 0, 8, 64, 64]])}
    return x, torch.tensor([3, 999]), context, added


def run_diffusers(unet, x, t, context, added):
    return unet(x, t, context, added_cond_kwargs=added).sample


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def fingerprint(unet) -> str:
    digest = hashlib.sha256()
    for name, tensor in unet.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------ the published architectures


@every_student
def test_students_have_the_published_number_of_parameters_and_tensors(family, recipe):
    student = meta(plan(TEACHERS[family], RECIPES[recipe].remove).student)
    assert (numel(student), len(student.state_dict())) == SIZES[family, recipe]


def test_every_block_of_bk_base_and_bk_tiny_has_its_published_size():
    base = meta(plan(SD15, RECIPES["bk-base"].remove).student)
    assert [numel(b) for b in base.down_blocks] == [5_723_200, 19_433_600, 74_092_800, 31_138_560]
    assert numel(base.mid_block) == 97_038_080
    assert [numel(b) for b in base.up_blocks] == [113_076_480, 174_405_120, 49_520_640, 12_881_920]
    tiny = meta(plan(SD15, RECIPES["bk-tiny"].remove).student)
    assert [numel(b) for b in tiny.down_blocks] == [5_723_200, 19_433_600, 59_345_920]
    assert [numel(b) for b in tiny.up_blocks] == [174_405_120, 49_520_640, 12_881_920]


@every_student
def test_diffusers_builds_the_same_tensors_from_the_students_config(family, recipe):
    config = plan(TEACHERS[family], RECIPES[recipe].remove).student
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(config.to_dict()).state_dict()
    ours = meta(config).state_dict()
    assert {name: w.shape for name, w in ours.items()} == {name: w.shape for name, w in theirs.items()}


@every_student
def test_the_config_says_what_the_official_config_json_says(family, recipe):
    teacher, tiny, mid = TEACHERS[family], "tiny" in recipe, recipe in ("bk-base", "segmind-small")
    config = plan_removal(teacher, RECIPES[recipe].remove).student.to_dict()
    cross, plain = "CrossAttn{}Block2D", "{}Block2D"
    expected = {
        "block_out_channels": [320, 640, 1280] if tiny else [320, 640, 1280, 1280],
        "layers_per_block": 1,
        "down_block_types": [cross.format("Down")] * 3 + ([] if tiny else [plain.format("Down")]),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if mid else None,
        "up_block_types": ([] if tiny else [plain.format("Up")]) + [cross.format("Up")] * 3,
        "attention_head_dim": {"sd15": 8, "sd21": [5, 10, 20] if tiny else [5, 10, 20, 20]}[family],
        "cross_attention_dim": {"sd15": 768, "sd21": 1024}[family],
        "use_linear_projection": family == "sd21",
        "upcast_attention": family == "sd21",
        "sample_size": {"sd15": 64, "sd21": 96}[family],
        "transformer_layers_per_block": 1,
        "reverse_transformer_layers_per_block": None,
    }
    assert {name: config[name] for name in expected} == expected


@every_xl_recipe
def test_students_of_sdxl_have_the_published_size_and_diffusers_builds_the_same_tensors(recipe):
    config = plan(SDXL, RECIPES[recipe].remove).student
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(config.to_dict()).state_dict()
    student = meta(config)
    assert (numel(student), len(student.state_dict())) == SIZES_XL[recipe]
    assert {name: w.shape for name, w in student.state_dict().items()} == {n: w.shape for n, w in theirs.items()}


def test_transformers_of_sdxls_students_are_as_deep_as_the_published_ones():
    found = {name: plan(SDXL, RECIPES[name].remove).student.transformer_depths() for name in SIZES_XL}
    assert found == {  # stages without transformers count as 1
        "koala-1b": ([(1,), (2,), (6,)], 6, [(6, 6), (2, 2), (1, 1)]),
        "koala-700m": ([(1,), (2,), (5,)], 5, [(5, 5), (2, 2), (1, 1)]),
        "ssd-1b": ([(1, 1), (2, 2), (4, 4)], 4, [(4, 4, 10), (2, 1, 1), (1, 1, 1)]),
        "segmind-vega": ([(1, 1), (1, 1), (2, 2)], 2, [(2, 2, 2), (1, 1, 1), (1, 1, 1)]),
    }
    mids = [plan(SDXL, RECIPES[name].remove).student.mid_block_type for name in SIZES_XL]
    assert mids == ["UNetMidBlock2DCrossAttn", None, "UNetMidBlock2D", "UNetMidBlock2D"]


def test_recipes_carry_the_loss_weights_of_their_papers():
    weights = {name: recipe.loss_weights for name, recipe in RECIPES.items()}
    assert weights == {
        "bk-base": (1, 1, 1),
        "bk-small": (1, 1, 1),
        "bk-tiny": (1, 1, 1),
        "inner": (1, 1, 1),
        "segmind-small": (1, 0.5, 0.5),
        "segmind-tiny": (1, 0.5, 0.5),
        **dict.fromkeys(SIZES_XL, (1, 1, 1)),
    }


# ------------------------------------------------------------------------------------------------- the weights


def nota_map(recipe: str, student_names) -> dict[str, str]:
    """Student name -> teacher name as BK-SDM's copying code has it: a list of prefixes, all else under its own name."""
    prefixes = {}
    if recipe == "bk-tiny":
        for i in range(3):
            for part in ("resnets", "attentions"):
                prefixes[f"up_blocks.{i}.{part}.0."] = f"up_blocks.{i + 1}.{part}.0."
                prefixes[f"up_blocks.{i}.{part}.1."] = f"up_blocks.{i + 1}.{part}.2."
        for i in range(2):
            prefixes[f"up_blocks.{i}.upsamplers."] = f"up_blocks.{i + 1}.upsamplers."
    else:
        for i in range(4):
            prefixes[f"up_blocks.{i}.resnets.1."] = f"up_blocks.{i}.resnets.2."
        for i in range(1, 4):
            prefixes[f"up_blocks.{i}.attentions.1."] = f"up_blocks.{i}.attentions.2."
    result = {name: name for name in student_names}
    for own, teachers in prefixes.items():
        found = [name for name in student_names if name.startswith(own)]
        assert found, own
        result |= {name: name.replace(own, teachers) for name in found}
    return result


@pytest.mark.parametrize("recipe", ["bk-base", "bk-small", "bk-tiny"])
@pytest.mark.parametrize("family", TEACHERS)
def test_weights_come_from_where_nota_takes_them(family, recipe):
    removal = plan(TEACHERS[family], RECIPES[recipe].remove)
    names = list(meta(removal.student).state_dict())
    assert weight_map(removal, names) == nota_map(recipe, names)


def segmind_surgery(unet: UNet2DConditionModel, tiny: bool) -> UNet2DConditionModel:
    """Cut a live diffusers U-Net down in place, as Segmind's prepare_unet does. Its .config stays the teacher's."""
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
    if tiny:
        unet.mid_block = None
        del unet.down_blocks[3]
        unet.down_blocks[2].downsamplers = None
        for i in range(3):
            unet.up_blocks[i] = unet.up_blocks[i + 1]
        del unet.up_blocks[3]
    return unet


@pytest.mark.parametrize("recipe", ["segmind-small", "segmind-tiny", "bk-base", "bk-tiny"])
@pytest.mark.parametrize("config", [TINY, TINY_SD21], ids=["sd15", "sd21"])
def test_students_are_what_segminds_surgery_leaves_of_the_teacher(config, recipe):
    teacher = make_teacher(config)
    carved = UNet2DConditionModel.from_config(config.to_dict())
    carved.load_state_dict(teacher.state_dict())
    carved = segmind_surgery(carved, tiny="tiny" in recipe)
    student = build_student(plan_removal(config, RECIPES[recipe].remove), teacher)
    theirs, ours = carved.state_dict(), student.state_dict()
    assert set(theirs) == set(ours)
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
    inputs = make_inputs(config)
    with torch.no_grad():
        assert_close(student(*inputs), run_diffusers(carved, *inputs))


def removals():
    """(id, Removal) of every recipe and every custom list, on tiny teachers."""
    for name, recipe in RECIPES.items():
        yield name, (DEEP_SDXL if name in SIZES_XL else TINY, recipe.remove)
    yield from CUSTOM.items()


every_removal = pytest.mark.parametrize(("config", "remove"), [pytest.param(*v, id=k) for k, v in removals()])


@every_removal
def test_every_student_tensor_is_a_teacher_tensor_to_the_bit_and_all_others_were_removed(config, remove):
    removal, teacher, student = make_all(config, remove)
    student, weights = student.state_dict(), teacher.state_dict()
    sources = weight_map(removal, student)
    assert list(sources) == list(student) and max(Counter(sources.values()).values()) == 1
    for name, source in sources.items():
        assert torch.equal(student[name], weights[source]), name
    gone = tuple(f"{module}." for entry in remove for module in block_removal.removed_modules(entry, config))
    assert {name for name in weights if name.startswith(gone)} == set(weights) - set(sources.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_student_of_a_half_precision_teacher_is_float32_with_the_same_values(dtype):
    teacher = make_teacher(TINY).to(dtype)
    removal = plan_removal(TINY, RECIPES["bk-tiny"].remove)
    student, weights = build_student(removal, teacher).state_dict(), teacher.state_dict()
    for name, source in weight_map(removal, student).items():
        assert student[name].dtype == torch.float32
        assert torch.equal(student[name], weights[source].float())
    assert {w.dtype for w in weights.values()} == {dtype}


def test_training_the_student_leaves_the_teacher_as_it_was():
    teacher = make_teacher(TINY).eval().requires_grad_(False)
    before = fingerprint(teacher)
    student = build_student(plan_removal(TINY, RECIPES["bk-base"].remove), teacher)
    assert all(p.requires_grad for p in student.parameters()), "a frozen teacher must not freeze its student"
    addresses = {w.untyped_storage().data_ptr() for w in teacher.state_dict().values()}
    own = [w.untyped_storage().data_ptr() for w in student.state_dict().values()]
    assert addresses.isdisjoint(own) and len(set(own)) == len(own)
    untrained = fingerprint(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student(*make_inputs(TINY)).square().mean().backward()
    optimizer.step()
    assert fingerprint(student) != untrained
    assert fingerprint(teacher) == before
    assert all(p.grad is None for p in teacher.parameters())


def test_without_a_teacher_the_weights_are_random_and_decided_by_the_seed():
    removal = plan_removal(TINY, RECIPES["bk-small"].remove)
    prints = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        student = build_student(removal, None)
        assert not any(p.is_meta or not p.isfinite().all() for p in student.parameters())
        prints.append(fingerprint(student))
    assert prints[0] == prints[1] != prints[2]


@every_removal
def test_diffusers_loads_a_saved_student_and_gives_the_same_output(tmp_path, config, remove):
    _, _, student = make_all(config, remove)
    folders.save_unet(tmp_path, student)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert set(theirs.state_dict()) == set(student.state_dict())
    for size in ((16, 16), (10, 13)):
        inputs = make_inputs(config, size)
        with torch.no_grad():
            assert_close(student(*inputs), run_diffusers(theirs, *inputs))


def test_a_cut_transformer_is_its_first_blocks():
    remove = ("mid@2", "down.2.0@2", "down.2.1@1", "up.0.0@1", "up.1.2@1")
    teacher = make_teacher(TINY_SDXL)
    student = build_student(plan_removal(TINY_SDXL, remove), teacher)
    with torch.no_grad():  # a transformer block without its last layers adds nothing to what it reads
        for entry in remove:
            for block in block_removal.removed_modules(entry, TINY_SDXL):
                for name, p in teacher.get_submodule(block).named_parameters():
                    if ".to_out." in name or ".net.2." in name:
                        p.zero_()
        inputs = make_inputs(TINY_SDXL)
        assert_close(student(*inputs), teacher(*inputs))


def test_removing_nothing_is_the_teacher():
    teacher = make_teacher(TINY)
    removal = plan_removal(TINY, ())
    assert removal.student.to_dict() == TINY.to_dict()
    assert fingerprint(build_student(removal, teacher)) == fingerprint(teacher)


# ------------------------------------------------------------------------------------------------- the features

NOTA_TINY = [
    ("down.0", "down.0"),
    ("down.1", "down.1"),
    ("down.2.proj_out", "down.2.proj_out"),
    ("up.1", "up.0"),
    ("up.2", "up.1"),
    ("up.3", "up.2"),
]
SEGMIND_TINY = [("up.0", "down.2") if pair[0] == "down.2.proj_out" else pair for pair in NOTA_TINY]
DOWNS, UPS = ([(f"{side}.{i}",) * 2 for i in range(4)] for side in ("down", "up"))
PAIRS = {
    ("bk-base", "nota"): DOWNS + UPS,
    ("bk-small", "nota"): DOWNS + UPS,
    ("bk-tiny", "nota"): NOTA_TINY,
    ("segmind-small", "segmind"): [*DOWNS, ("mid", "mid"), *UPS],
    ("bk-small", "segmind"): DOWNS + UPS,
    ("segmind-tiny", "segmind"): SEGMIND_TINY,
}


@pytest.mark.parametrize(("recipe", "pairing"), PAIRS)
@pytest.mark.parametrize("config", [SD15, SD21, TINY], ids=["sd15", "sd21", "tiny"])
def test_the_features_compared_are_those_of_the_original(config, recipe, pairing):
    assert feature_pairs(plan(config, RECIPES[recipe].remove), pairing) == PAIRS[recipe, pairing]


@every_recipe
def test_a_recipe_names_its_own_pairing(recipe):
    assert RECIPES[recipe].pairing == ("segmind" if recipe.startswith("segmind") else "nota")


@every_xl_recipe
def test_students_of_sdxl_are_compared_stage_by_stage_and_in_the_mid_block(recipe):
    names = ["down.0", "down.1", "down.2", *["mid"] * (recipe != "koala-700m"), "up.0", "up.1", "up.2"]
    assert feature_pairs(plan(SDXL, RECIPES[recipe].remove), RECIPES[recipe].pairing) == [(n, n) for n in names]


@every_removal
def test_the_two_features_of_every_pair_have_one_shape(config, remove):
    removal, teacher, student = make_all(config, remove)
    pairs = [pair for pairing in PAIRINGS for pair in feature_pairs(removal, pairing)]
    assert len(pairs) >= 4 * len(removal.kept_down) - 1
    for size in ((16, 16), (10, 13)):
        inputs = make_inputs(config, size)
        with torch.no_grad():
            theirs, ours = (unet(*inputs, return_features=True)[1] for unet in (teacher, student))
        for teacher_name, student_name in pairs:
            assert theirs[teacher_name].shape == ours[student_name].shape, (teacher_name, student_name, size)


def test_a_removal_without_a_text_reading_stage_inside_has_no_proj_out_to_compare():
    config = replace(LEVEL, down_block_types=("DownBlock2D",) * 4, up_block_types=("UpBlock2D",) * 4)
    removal = plan_removal(config, ("mid", "stage.3"))
    assert feature_pairs(removal, "nota") == [*DOWNS[:2], ("up.1", "up.0"), ("up.2", "up.1"), ("up.3", "up.2")]
    assert feature_pairs(removal, "segmind")[2] == ("up.0", "down.2")


def test_a_pair_of_other_widths_is_refused_by_its_names():
    removal = plan_removal(TINY, ("down.1.1", "up.2.0", "mid", "stage.3", "stage.2"))
    with pytest.raises(InputError, match=r"teacher's up.1 with the student's down.1, .* 48 and 32 .* --pairing nota"):
        feature_pairs(removal, "segmind")
    assert feature_pairs(removal, "nota")


def test_an_unknown_pairing_is_refused():
    with pytest.raises(InputError, match="nota, segmind"):
        feature_pairs(plan_removal(TINY, ()), "koala")


# ------------------------------------------------------------------------------------------------------ refusals


def refusal(config, *remove) -> str:
    with pytest.raises(InputError) as caught:
        plan_removal(config, remove)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize(
    "entry",
    ["x", "", "down", "down.1", "down.1.2", "down.4.0", "up.0.3", "down.-1.0", "down.0.01", "down.01.1", "down.0.1.0",
     "stage.4", "stage.03", "stage", "stage.-1", "mid.0", "Mid", " mid", "down.².1", "down_blocks.0.resnets.1"],
)  # fmt: skip
def test_an_entry_that_does_not_exist_is_named_with_what_does(entry):
    message = refusal(TINY, "down.1.1", "up.2.1", entry)
    assert repr(entry) in message
    assert "mid, stage.0 to stage.3" in message and "2, 2, 2, 2 layers" in message


def test_a_mid_block_that_the_teacher_has_not_cannot_go():
    message = refusal(replace(TINY, mid_block_type=None), "mid")
    assert "no 'mid'" in message and "has stage.0" in message


@every_recipe
@pytest.mark.parametrize("config", [SDXL, TINY_SDXL], ids=["sdxl", "tiny-sdxl"])
def test_a_recipe_of_four_stages_is_refused_on_three_by_its_first_entry_that_is_not_there(config, recipe):
    message = refusal(config, *RECIPES[recipe].remove)
    absent = "'stage.3'" if recipe == "inner" else "'down.3.1'"
    assert absent in message and "stage.0 to stage.2" in message and "2, 2, 2 layers" in message


@every_xl_recipe
def test_a_recipe_of_deep_transformers_is_refused_where_they_are_not(recipe):
    assert "has 1 blocks, it cannot be cut" in refusal(TINY, *RECIPES[recipe].remove)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("down.2.0@3", "'down.2.0@3': the transformer of down.2.0 has 3 blocks, give 1 to 2"),
        ("down.2.0@0", "give 1 to 2"),
        ("down.2.0@", "give 1 to 2"),
        ("down.2.0@01", "give 1 to 2"),
        ("mid@-1", "give 0 to 2"),
        ("up.2.0@1", "no transformer to cut by 'up.2.0@1': it has mid (3), down.1.0 (2), down.1.1 (2), down.2.0 (3)"),
        ("stage.2@1", "no transformer to cut by 'stage.2@1'"),
    ],
)
def test_a_cut_that_leaves_as_much_or_nothing_is_refused_with_the_depths_there_are(entry, said):
    assert said in refusal(TINY_SDXL, entry)


@pytest.mark.parametrize("entry", ["down.2.0@2", "mid@2"])
def test_the_mid_block_and_the_transformer_that_gives_its_depth_are_cut_as_one(entry):
    message = refusal(TINY_SDXL, entry)
    assert message.endswith("remove mid too, or give it the depth of down.2.0: down.2.0@2,mid@2")
    plan_removal(TINY_SDXL, ("down.2.0@2", "mid@2"))


def test_a_mid_block_without_a_transformer_cannot_be_cut():
    assert "no transformer to cut by 'mid@0'" in refusal(plan_removal(TINY, ("mid@0",)).student, "mid@0")


def test_a_recipe_is_refused_on_its_own_student():
    assert "'down.0.1'" in refusal(plan_removal(TINY, RECIPES["bk-base"].remove).student, *RECIPES["bk-base"].remove)


@pytest.mark.parametrize(
    ("remove", "named"),
    [
        (("stage.2",), "stage.2"),
        (("mid", "stage.1", "stage.3"), "stage.1"),
        (("stage.0",), "stage.0"),
        (("stage.3", "stage.2", "stage.1", "stage.0"), "stage.0"),
    ],
)
def test_stages_go_only_from_the_inside_and_never_all(remove, named):
    assert refusal(LEVEL, *remove).startswith(f"{named} cannot go") and "stage.3 first" in refusal(LEVEL, *remove)


@pytest.mark.parametrize(
    ("remove", "said"),
    [
        (("down.1.1",), "stage 1 would keep 1 down and 3 up"),
        (("up.2.1",), "stage 1 would keep 2 down and 2 up"),
        (("down.1.1", "up.1.1"), "stage 1 would keep 1 down and 3 up"),  # up.1 mirrors down.2
        (("down.0.0", "down.0.1", "up.3.0", "up.3.1"), "stage 0 would keep 0 down"),
    ],
)
def test_a_stage_out_of_balance_is_refused_with_the_stage_that_mirrors_it(remove, said):
    message = refusal(TINY, *remove)
    assert said in message
    stage = int(said.split()[1])
    assert f"up.{3 - stage} mirrors down.{stage}" in message


@pytest.mark.parametrize(
    ("config", "remove"),
    [
        (TINY, ("down.2.1", "up.1.2")),  # the last up layer reads the stage before's skip
        (TINY, ("down.1.1", "up.2.0")),  # the first one reads the stage below
        (TINY, ("down.1.1", "up.2.2")),
        (TINY, ("down.0.1", "up.3.0")),
        (TINY, ("down.1.0", "up.2.1")),  # the first down layer widens
        (TINY, ("mid", "stage.3", "stage.2")),  # of another width
        (TINY_SDXL, ("mid", "stage.2")),
    ],
)
def test_layers_that_do_not_fit_each_other_are_refused_by_name(config, remove):
    message = refusal(config, *remove)
    assert ",".join(remove) in message and "first and the last of an up stage" in message


def test_a_mid_block_that_would_change_its_heads_or_depth_is_refused_not_bent():
    heads = replace(TINY, attention_head_dim=(1, 2, 3, 4))
    depth = replace(
        TINY,
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 4,
        up_block_types=("CrossAttnUpBlock2D",) * 4,
        transformer_layers_per_block=(1, 1, 1, (2, 1)),
        reverse_transformer_layers_per_block=(2, 1, 1, 1),
    )
    for config, remove in ((heads, ("stage.3",)), (depth, ("stage.3",)), (depth, ("down.3.0", "up.0.1"))):
        assert "heads or the depth of the mid block: remove mid too" in refusal(config, *remove)
        plan_removal(config, (*remove, "mid"))


# --------------------------------------------------------------------------------------------- the printed table


@pytest.fixture
def exact(monkeypatch):
    """The table with all its digits."""
    monkeypatch.setattr(block_removal, "format_count", str)


@pytest.fixture(autouse=True)
def count_once(monkeypatch):
    """Counting MACs takes a second: count each teacher once in this file."""
    monkeypatch.setattr(block_removal, "macs_by_module", counted_macs)


counted_macs = functools.cache(macs_by_module)


def read_rows(removal, height=16, width=24):
    """(removed {entry: (parameters, MACs)}, teacher's, student's) of the exact table."""
    header, *rows, change = removal_rows(removal, height, width, 7)
    assert header == ("removed", "parameters", "MACs") and change[0] == "change"
    table = {row[0]: (int(row[1]), int(row[2])) for row in rows}
    assert len(table) == len(rows)
    return table, table.pop("teacher"), table.pop("student")


@every_removal
def test_teacher_less_all_rows_is_the_student_exactly(exact, config, remove):
    removal = plan(config, remove)
    rows, teacher, student = read_rows(removal)
    assert set(rows) - {"(mid on more pixels)"} == set(remove)
    for column in (0, 1):
        assert teacher[column] - sum(row[column] for row in rows.values()) == student[column]
    assert (teacher[0], student[0]) == (numel(meta(config)), numel(meta(removal.student)))
    assert all(count > 0 for entry in set(remove) for count in rows[entry])


@pytest.mark.parametrize(
    "name",
    ["tiny-with-mid", "a-layer-of-a-stage-that-goes-too", "two-stages-and-layers-of-them", "ssd"],
)
def test_the_students_macs_are_those_of_the_student_that_is_built(exact, name):
    removal = plan(*CUSTOM[name])
    _, _, student = read_rows(removal)
    assert student[1] == count_macs(removal.student, 16, 24, 7)["conv_linear"]


def test_a_mid_block_left_on_more_pixels_costs_more_and_the_table_says_so(exact):
    rows, _, _ = read_rows(plan_removal(TINY, ("stage.3",)))
    assert list(rows) == ["stage.3", "(mid on more pixels)"]
    parameters, macs = rows["(mid on more pixels)"]
    assert parameters == 0 and macs < 0
    rows, _, _ = read_rows(plan_removal(TINY, ("stage.3", "mid")))
    assert list(rows) == ["mid", "stage.3"]


@pytest.mark.parametrize(
    ("config", "recipe", "side", "teacher", "student", "change"),
    [
        (SD15, "bk-base", 64, ("859.5 M", "338.6 G"), ("579.4 M", "223.7 G"), ("-32.6 %", "-33.9 %")),
        (SD15, "bk-small", 64, ("859.5 M", "338.6 G"), ("482.3 M", "217.6 G"), ("-43.9 %", "-35.7 %")),
        (SD15, "bk-tiny", 64, ("859.5 M", "338.6 G"), ("323.4 M", "205.0 G"), ("-62.4 %", "-39.5 %")),
        (SD21, "segmind-tiny", 96, ("865.9 M", "760.5 G"), ("326.8 M", "460.4 G"), ("-62.3 %", "-39.5 %")),
    ],
)
def test_the_table_of_the_real_models_holds_the_papers_figures(config, recipe, side, teacher, student, change):
    rows = {row[0]: row[1:] for row in removal_rows(plan(config, RECIPES[recipe].remove), side, side)}
    assert (rows["teacher"], rows["student"], rows["change"]) == (teacher, student, change)
    if "base" not in recipe and config is SD15:
        assert rows["mid"] == ("97.0 M", "6.0 G")


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0"), (999, "999"), (12_340, "12.3 k"), (859_520_964, "859.5 M"), (338.6e9, "338.6 G"), (-2.5e6, "-2.5 M"),
     (1.25e12, "1.2 T")],
)  # fmt: skip
def test_counts_are_short(n, text):
    assert format_count(n) == text
