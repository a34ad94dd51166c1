"""The losses of BK-SDM and the step they cause, against a computation by hand from the paper's formulas.

By hand means: features caught by forward hooks on diffusers' U-Nets where the original code has its hooks, squared and
averaged by numpy in float64. Also that every single feature pair teaches the student, with and
without activation checkpointing, which the original recipe for BK-Tiny fails to do. At the end the options that are
later than the paper, and runs of the command with them and with a tiny SDXL.
"""

import shutil

import numpy as np
import pytest
import tiny
import torch
from conftest import CAPTIONS
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from runs import assert_same_files, contents, metrics, read

from minidistill import pipeline, report, train_kd
from minidistill.data.folders import ImageFolder
from minidistill.diffusion.sampling import Sampling
from minidistill.distill import kd
from minidistill.distill import random_conditioning as rc
from minidistill.distill.block_removal import PAIRINGS, RECIPES, build_student, feature_pairs, plan_removal
from minidistill.miniature.scenes import Scenes
from minidistill.models.unet import UNet
from minidistill.pipeline import load_pipeline
from minidistill.training.batches import Batches, captions_of
from minidistill.training.device import get_precision
from minidistill.training.optim import adamw, optimizer_step

TINY = {"sd15": tiny.TINY, "sd21": tiny.TINY_SD21}
# Where the original codes hook (teacher's module, student's module), read from both repositories.
BLOCKS = [f"{side}_blocks.{i}" for side in ("down", "up") for i in range(4)]
UPS = [("up_blocks.1", "up_blocks.0"), ("up_blocks.2", "up_blocks.1"), ("up_blocks.3", "up_blocks.2")]
HOOKS = {
    "bk-base": [(name, name) for name in BLOCKS],
    "bk-small": [(name, name) for name in BLOCKS],
    "bk-tiny": [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1", "down_blocks.1"),
        ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out"),
        *UPS,
    ],
    "segmind-small": [(name, name) for name in (*BLOCKS[:4], "mid_block", *BLOCKS[4:])],
    "segmind-tiny": [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1", "down_blocks.1"),
        ("up_blocks.0", "down_blocks.2"),
        *UPS,
    ],
}
CASES = [*((name, "sd15") for name in HOOKS), ("bk-tiny", "sd21")]  # (recipe, family)


def make_nets(recipe: str, family: str = "sd15"):
    """(teacher, student that has moved away from it, feature pairs of the recipe)."""
    torch.manual_seed(0)
    teacher = UNet(TINY[family]).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in teacher.parameters():
        p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    removal = plan_removal(teacher.config, RECIPES[recipe].remove)
    student = build_student(removal, teacher)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    return teacher, student, feature_pairs(removal, RECIPES[recipe].pairing)


def make_inputs(batch: int = 3):
    """(x_t, t, context), target."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 16, 16, generator=generator)
    context = torch.randn(batch, 7, 20, generator=generator)
    target = torch.randn(batch, 4, 16, 16, generator=generator)
    return (x, torch.tensor([3, 400, 999])[:batch], context), target


def compute_losses(teacher, student, pairs, inputs, target):
    """As in train_kd: each loss is (B,)."""
    with torch.no_grad():
        teacher_out, teacher_features = teacher(*inputs, return_features=True)
    student_out, student_features = student(*inputs, return_features=True)
    return {
        "task": kd.task_loss(student_out, target),
        "output": kd.output_loss(student_out, teacher_out),
        "feature": kd.feature_loss(student_features, teacher_features, pairs),
    }


def run_oracle(unet: UNet, names, inputs):
    """diffusers' output and what the original's hooks catch, as float64 arrays."""
    theirs = UNet2DConditionModel.from_config(unet.config.to_dict())
    theirs.load_state_dict(unet.state_dict())
    out, caught = tiny.run_hooked(theirs, names, inputs)
    return out.double().numpy(), {name: feature.double().numpy() for name, feature in caught.items()}


# the numbers


@pytest.mark.parametrize(("recipe", "family"), CASES)
def test_every_loss_and_the_total_are_those_of_the_papers_formulas(recipe, family):
    teacher, student, pairs = make_nets(recipe, family)
    inputs, target = make_inputs()
    losses = compute_losses(teacher, student, pairs, inputs, target)
    assert all(loss.shape == (3,) and loss.dtype == torch.float32 for loss in losses.values())

    eps_t, f_t = run_oracle(teacher, [name for name, _ in HOOKS[recipe]], inputs)
    eps_s, f_s = run_oracle(student, [name for _, name in HOOKS[recipe]], inputs)
    expected = {
        "task": np.mean((target.double().numpy() - eps_s) ** 2),
        "output": np.mean((eps_t - eps_s) ** 2),
        "feature": sum(np.mean((f_t[a] - f_s[b]) ** 2) for a, b in HOOKS[recipe]),
    }
    for name, value in expected.items():
        assert value > 1e-4
        assert losses[name].mean().item() == pytest.approx(value, rel=1e-4), name

    weights = {"nota": (1, 1, 1), "segmind": (1, 0.5, 0.5)}[RECIPES[recipe].pairing]
    total = sum(w * loss for w, loss in zip(RECIPES[recipe].loss_weights, losses.values(), strict=True)).mean()
    by_hand = sum(w * value for w, value in zip(weights, expected.values(), strict=True))
    assert total.item() == pytest.approx(by_hand, rel=1e-4)


def test_losses_are_means_over_elements_for_each_sample_and_a_plain_sum_over_pairs():
    student = {"a": torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "b": torch.tensor([[[3.0]], [[1.0]]])}
    teacher = {"x": torch.tensor([[0.0, 0.0], [2.0, 0.0]]), "y": torch.tensor([[[1.0]], [[1.0]]])}
    assert kd.mean_square(student["a"], teacher["x"]).tolist() == [2.5, 2.0]
    assert kd.feature_loss(student, teacher, [("x", "a"), ("y", "b")]).tolist() == [6.5, 2.0]
    assert kd.feature_loss(student, teacher, [("y", "b")]).tolist() == [4.0, 0.0]


def test_an_equal_student_loses_nothing_but_the_task():
    teacher, _, _ = make_nets("bk-base")
    removal = plan_removal(teacher.config, ())
    inputs, target = make_inputs()
    for pairing in PAIRINGS:
        pairs = feature_pairs(removal, pairing)
        losses = compute_losses(teacher, build_student(removal, teacher), pairs, inputs, target)
        assert losses["output"].max() == losses["feature"].max() == 0 < losses["task"].min()


def test_no_gradient_reaches_the_teachers_side():
    ours, theirs = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    kd.output_loss(ours, theirs).sum().backward()
    kd.feature_loss({"a": ours}, {"a": theirs}, [("a", "a")]).sum().backward()
    assert theirs.grad is None and ours.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_of_scale_1000_are_compared_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = ((1e3 * torch.randn(2, 4, 8, 8, generator=generator)).to(dtype) for _ in range(2))
    a.requires_grad_()
    assert dtype != torch.float16 or (a - b).square().isinf().any(), "the test must be able to fail"
    pairs = [("f", "f")] * 9
    losses = [kd.feature_loss({"f": a}, {"f": b}, pairs), kd.output_loss(a, b), kd.task_loss(a, b)]
    by_hand = ((a.detach().double() - b.double()) ** 2).flatten(1).mean(1)
    for loss, times in zip(losses, (9, 1, 1), strict=True):
        assert loss.dtype == torch.float32 and loss.isfinite().all()
        torch.testing.assert_close(loss.double(), times * by_hand, rtol=1e-5, atol=0)
        (gradient,) = torch.autograd.grad(loss.mean(), a)
        assert gradient.isfinite().all() and gradient.abs().max() > 0


# one step


@pytest.mark.parametrize(("recipe", "max_grad_norm"), [("bk-tiny", None), ("segmind-tiny", 0.5)])
def test_a_step_descends_the_gradient_of_the_weighted_sum_of_the_three_losses(recipe, max_grad_norm):
    """By torch's own losses on the whole batch and autograd.grad. AdamW by hand is in test_training_optim.py."""
    teacher, student, pairs = make_nets(recipe)
    inputs, target = make_inputs()
    weights, mse = RECIPES[recipe].loss_weights, torch.nn.functional.mse_loss
    with torch.no_grad():
        out_t, f_t = teacher(*inputs, return_features=True)
    out_s, f_s = student(*inputs, return_features=True)
    parts = mse(out_s, target), mse(out_s, out_t), sum(mse(f_s[b], f_t[a]) for a, b in pairs)
    by_hand = sum(w * loss for w, loss in zip(weights, parts, strict=True))
    gradients = torch.autograd.grad(by_hand, list(student.parameters()))
    norm = torch.stack([g.double().norm() for g in gradients]).norm().item()
    shrink = 1.0 if max_grad_norm is None else max_grad_norm / norm
    assert max_grad_norm is None or shrink < 1

    seen, optimizer = [], adamw(student.parameters(), 1e-3)
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in student.parameters()))
    scaler = get_precision("fp32", torch.device("cpu")).scaler
    losses = compute_losses(teacher, student, pairs, inputs, target)
    per_sample = sum(w * loss for w, loss in zip(weights, losses.values(), strict=True))
    scaler.scale(per_sample.mean()).backward()
    measured = optimizer_step(student, optimizer, scaler, 1e-3, max_grad_norm)
    assert measured.item() == pytest.approx(norm, rel=1e-4)
    for found, expected in zip(seen, gradients, strict=True):
        torch.testing.assert_close(found, expected * shrink, rtol=1e-3, atol=1e-5 * shrink)
    assert all(p.grad is None for p in student.parameters())


# who learns from what


def pair_gradients(recipe, family, checkpointing):
    """{student feature: gradients of its pair's loss alone}."""
    teacher, student, pairs = make_nets(recipe, family)
    student.gradient_checkpointing = checkpointing
    inputs, _ = make_inputs(2)
    with torch.no_grad():
        f_teacher = teacher(*inputs, return_features=True)[1]
    f_student = student(*inputs, return_features=True)[1]
    names, parameters = zip(*student.named_parameters(), strict=True)
    result = {}
    for pair in pairs:
        loss = kd.feature_loss(f_student, f_teacher, [pair]).mean()
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        result[pair[1]] = dict(zip(names, gradients, strict=True))
    return result


@pytest.mark.parametrize(("recipe", "family"), CASES)
def test_every_feature_pair_teaches_and_checkpointing_changes_nothing(recipe, family):
    plain, saving = (pair_gradients(recipe, family, checkpointing) for checkpointing in (False, True))
    assert list(plain) == list(saving) and len(plain) == len(HOOKS[recipe])
    for feature, gradients in plain.items():
        assert gradients["conv_in.weight"].abs().max() > 0, feature  # it reaches all the way down
        # and starts right at the feature: in the last layer before it
        side, *rest = feature.split(".")
        owner = "mid_block" if side == "mid" else f"{side}_blocks.{rest[0]}"
        if rest[1:] == ["proj_out"]:
            owner += ".attentions.0.proj_out"
        own = [g for name, g in gradients.items() if name.startswith(f"{owner}.")]
        assert own and all(g is not None and g.abs().max() > 0 for g in own), feature
        for name, gradient in gradients.items():
            if gradient is None:
                assert saving[feature][name] is None
            else:
                torch.testing.assert_close(saving[feature][name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("recipe", "checkpointing"), [("bk-tiny", False), *((name, True) for name in HOOKS)])
def test_a_sound_run_passes_the_check_and_can_still_go_backward(recipe, checkpointing):
    teacher, student, pairs = make_nets(recipe)
    student.gradient_checkpointing = checkpointing
    losses = compute_losses(teacher, student, pairs, *make_inputs())
    kd.check_gradients(losses, student, teacher)
    assert all(p.grad is None for p in student.parameters())
    sum(losses.values()).mean().backward()
    assert all(p.grad.abs().max() > 0 for p in student.parameters())


@pytest.fixture(scope="module")
def sound():
    """(losses, student, teacher) that pass the check; not to be changed."""
    teacher, student, pairs = make_nets("bk-tiny")
    return compute_losses(teacher, student, pairs, *make_inputs()), student, teacher


@pytest.mark.parametrize("name", ["task", "output", "feature"])
def test_a_loss_without_gradient_in_the_student_is_named_and_an_unfrozen_teacher_refused(sound, name):
    losses, student, teacher = sound
    kd.check_gradients(losses, student, teacher)
    with pytest.raises(RuntimeError, match=f"the {name} loss is detached from the student"):
        kd.check_gradients(losses | {name: losses[name].detach()}, student, teacher)
    with pytest.raises(RuntimeError, match=f"the {name} loss has no gradient in the student"):
        kd.check_gradients(losses | {name: losses[name] * 0}, student, teacher)
    with pytest.raises(RuntimeError, match="freeze it"):
        kd.check_gradients(losses, student, UNet(teacher.config))


@pytest.mark.parametrize("recipe", ["bk-tiny", "segmind-small"])
def test_one_feature_cut_off_from_the_student_is_named_among_others_that_are_not(recipe):
    teacher, student, pairs = make_nets(recipe)
    inputs, _ = make_inputs()
    with torch.no_grad():
        f_teacher = teacher(*inputs, return_features=True)[1]
    f_student = student(*inputs, return_features=True)[1]
    for _, name in pairs:  # as the reentrant checkpoint of the original does to one of the six
        with pytest.raises(RuntimeError, match=f"student {name} is detached"):
            kd.feature_loss(f_student | {name: f_student[name].detach()}, f_teacher, pairs)
    assert kd.feature_loss({k: f.detach() for k, f in f_student.items()}, f_teacher, pairs).isfinite().all()


def test_features_that_do_not_pair_are_named():
    student, teacher = {"down.0": torch.zeros(1, 2, 4, 4)}, {"down.0": torch.zeros(1, 2, 2, 2), "mid": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"teacher down.0 is \(1, 2, 2, 2\), student down.0 \(1, 2, 4, 4\)"):
        kd.feature_loss(student, teacher, [("down.0", "down.0")])
    for pair in (("mid", "mid"), ("up.9", "down.0")):
        with pytest.raises(ValueError, match=f"teacher '{pair[0]}' and student '{pair[1]}'"):
            kd.feature_loss(student, teacher, [pair])
    with pytest.raises(ValueError, match="at least one pair"):
        kd.feature_loss(student, teacher, [])


# options beyond the paper


def test_normalised_features_weigh_alike_whatever_their_size():
    student = {"a": torch.tensor([[1.0, 2.0], [0.0, 0.0]])}
    teacher = {"a": torch.tensor([[2.0, 0.0], [1.0, 1.0]])}
    assert kd.feature_loss(student, teacher, [("a", "a")]).tolist() == [2.5, 1.0]
    assert kd.feature_loss(student, teacher, [("a", "a")], normalized=True).tolist() == [1.25, 1.0]  # by 2 and by 1
    for scale in (1e-3, 1e3):
        student["b"], teacher["b"] = scale * student["a"], scale * teacher["a"]
        both = kd.feature_loss(student, teacher, [("a", "a"), ("b", "b")], normalized=True)
        torch.testing.assert_close(both, torch.tensor([2.5, 2.0]))
    silent = {"a": torch.zeros(2, 2)}
    assert kd.feature_loss(student, silent, [("a", "a")], normalized=True).isfinite().all()


def test_random_captions_are_rare_in_clear_images_and_the_rule_in_noise():
    p = rc.random_caption_probability(torch.tensor([0, 500, 900, 1000]))
    assert p.tolist() == pytest.approx([0.00673795, 0.0820850, 0.6065307, 1.0], rel=1e-5)
    assert rc.random_caption_probability(torch.tensor([50]), 100).item() == pytest.approx(0.0820850, rel=1e-5)


@pytest.fixture(scope="module")
def pipe(tiny_sd1):
    """A pipeline, not to be changed."""
    return load_pipeline(tiny_sd1)


def folder_data(images) -> ImageFolder:
    return ImageFolder(images, 32)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_random_conditioning_changes_captions_and_nothing_else(pipe, sources, images, kind):
    pipe = pipe if kind == "sd1" else load_pipeline(sources["sdxl"])
    settings = {"batch_size": 24, "seed": 3, "caption_dropout": 0.3, "cache": False}
    plain = Batches(folder_data(images), pipe, **settings)[2]
    found = rc.RandomCaptions(folder_data(images), pipe, **settings)[2]
    for name in ("x0", "eps", "t"):
        assert torch.equal(getattr(found, name), getattr(plain, name))
    changed = [a != b for a, b in zip(found.captions, plain.captions, strict=True)]
    assert 1 <= sum(changed) <= 12 and None in found.captions
    assert [c is None for c in found.captions] == [c is None for c in plain.captions]
    assert set(found.captions) <= {*CAPTIONS, None}
    text = pipe.encode_prompts(found.captions)
    assert torch.equal(found.context, text.context) and not torch.equal(found.context, plain.context)
    if kind == "sdxl":
        assert torch.equal(found.added_cond["text_embeds"], text.pooled)
        assert torch.equal(found.added_cond["time_ids"], plain.added_cond["time_ids"])


def test_random_captions_do_not_depend_on_the_batch_size_and_are_as_frequent_as_the_formula_says(pipe, images):
    data = folder_data(images)
    large = rc.RandomCaptions(data, pipe, batch_size=200, seed=0)[0]
    small = rc.RandomCaptions(data, pipe, batch_size=4, seed=0)
    assert [c for k in range(5) for c in small[k].captions] == large.captions[:20]
    plain = Batches(data, pipe, batch_size=200, seed=0)[0].captions
    other = torch.tensor([a != b for a, b in zip(plain, large.captions, strict=True)]).float()
    p = 0.9 * rc.random_caption_probability(large.t)  # one in ten draws its own
    deviation = (p * (1 - p)).sum().sqrt()
    assert abs(other.sum() - p.sum()) < 4 * deviation
    assert other[large.t < 300].mean() < 0.1 and other[large.t > 850].mean() > 0.4


def test_captions_are_found_without_reading_images(images, monkeypatch):
    data = folder_data(images)
    monkeypatch.setattr(ImageFolder, "sample", None)
    monkeypatch.setattr(Scenes, "__getitem__", None)
    assert captions_of(data, 3) == (CAPTIONS[3],)
    assert captions_of(Scenes("test"), 7) == (Scenes("test").caption(7),)
    assert captions_of([("image", "a caption")], 0) == ("a caption",)


def test_image_free_latents_are_the_teachers_samples(pipe, sources, monkeypatch):
    monkeypatch.setattr(pipeline, "STEPS", 3)
    for teacher in (pipe, load_pipeline(sources["sdxl"])):
        made = rc.sample_latents(teacher, CAPTIONS[:5], 32, seed=4, guidance=3.0, batch_size=2)
        expected = teacher(CAPTIONS[:5], seed=4, output="latents", steps=3, guidance=3.0, batch_size=5)
        batch = Batches(made, teacher, batch_size=5, seed=0)[0]
        order = [CAPTIONS.index(caption) for caption in batch.captions]
        assert sorted(order) == list(range(5))
        assert (batch.x0 - expected[order]).abs().max() < 1e-4 * expected.abs().max()
        assert len(made) == 5 and made.size == (32, 32) and made.origin(1) == (32, 32, 0, 0)
    assert batch.added_cond["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 5
    again = Batches(made, teacher, batch_size=5, seed=0)[1]  # another epoch: the same latents, other noise
    assert set(again.captions) == set(batch.captions) and not torch.equal(again.eps, batch.eps)
    teacher.sampling = Sampling(2)  # a distilled one knows better: two steps, guidance off
    own = rc.sample_latents(teacher, CAPTIONS[:1], 32, seed=4, guidance=3.0).mean[0] * teacher.vae.config.scaling_factor
    torch.testing.assert_close(own, teacher(CAPTIONS[:1], seed=4, output="latents"), rtol=1e-4, atol=1e-4)


# through the command


@pytest.fixture(scope="module")
def train(images):
    """train(teacher, out, **settings): a short run on ten images, without what takes time and is tested elsewhere."""

    def run(teacher, out, **settings):
        usual = {"data": str(images), "batch_size": 4, "steps": 4, "warmup": 0, "learning_rate": 1e-3}
        usual |= {"log_every": 1, "sample_every": 100, "checkpoint_every": 2, "precision": "fp32"}
        train_kd.main(train_kd.Config(teacher=str(teacher), out=str(out), **{**usual, **settings}))
        return metrics(out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "STEPS", 2)
        patch.setattr(train_kd, "PROBES", 16)
        patch.setattr(report, "count_macs", lambda *_: {"conv_linear": 0})
        patch.setattr(report, "milliseconds", lambda *_: 0.0)
        patch.setattr(train_kd.block_removal, "removal_rows", lambda *_: [("removed",), ("",)])
        yield run


EVERY_OPTION = {"feature_norm": True, "random_conditioning": True, "image_free": 6, "remove": ("mid", "stage.3")}


def test_a_run_with_every_option_resumes_to_the_same_bits(train, tiny_sd1, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert all(line["feature"] > 0 for line in train(tiny_sd1, whole, **EVERY_OPTION))
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "student")
    shutil.rmtree(resumed / "checkpoints/step-000004")
    train(tiny_sd1, resumed, **EVERY_OPTION, resume=True)
    names = [f"student/{name}" for name in contents(whole / "student")]
    assert_same_files(whole, resumed, [*names, "checkpoints/step-000004/state.safetensors"])


def test_every_option_changes_what_is_learned(train, tiny_sd1, tmp_path):
    remove = EVERY_OPTION["remove"]
    runs = {"plain": train(tiny_sd1, tmp_path / "plain", remove=remove, steps=1)}
    for name in ("feature_norm", "random_conditioning", "image_free"):
        runs[name] = train(tiny_sd1, tmp_path / name, remove=remove, steps=1, **{name: EVERY_OPTION[name]})
    losses = {name: [lines[0][loss] for loss in train_kd.LOSSES] for name, lines in runs.items()}
    assert losses["feature_norm"][:2] == losses["plain"][:2] and losses["feature_norm"][2] != losses["plain"][2]
    assert len({tuple(values) for values in losses.values()}) == 4


def test_a_student_of_sdxl_learns_and_loads_in_diffusers(train, sources, tmp_path):
    settings = {"pairing": "segmind", "loss_weights": (0, 1, 0.1), "ema_decay": 0, "steps": 60, "batch_size": 8}
    lines = train(sources["sdxl"], tmp_path / "run", remove=("mid@0", "down.2.0@1", "up.0.0@1", "up.0.1@1"), **settings)
    for name in ("output", "feature"):
        first, last = (np.mean([line[name] for line in some]) for some in (lines[:5], lines[-5:]))
        assert last < 0.8 * first, name
    results = read(tmp_path / "run/results.json")
    before, after = (results[f"student {when}"]["distance_to_teacher"] for when in ("before", "after"))
    assert after < 0.95 * before  # on noise that no step saw, of a teacher with random weights
    student = tmp_path / "run/student"
    oracle = StableDiffusionXLPipeline.from_pretrained(student, add_watermarker=False)
    oracle.set_progress_bar_config(disable=True)
    assert oracle.unet.config.mid_block_type == "UNetMidBlock2D"
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    settings = {"latents": noise, "height": 32, "width": 32}
    expected = oracle(CAPTIONS[:2], num_inference_steps=4, guidance_scale=7.5, **settings).images
    found = load_pipeline(student)(CAPTIONS[:2], steps=4, sampler="euler", **settings)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 2 and np.asarray(a).std() > 1
