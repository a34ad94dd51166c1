"""Images from the same noise and prompts equal those of diffusers' pipelines, for all architectures.

Each pipeline has the real structure of its model (blocks, transformer depths, heads, 77 positions, paddings, scheduler)
at tiny widths, with seeded random weights; diffusers writes it, both load it. Images may differ by 2 levels of 255.
Weights are scaled so that all tested settings change the image by much more, which is tested too.
"""

import functools
import json
import shutil
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from test_tokenizer import official_tokenizer
from tiny import (
    PROMPTS,
    SCHEDULERS,
    TINY,
    TINY_SD21,
    TINY_SDXL_DEEP,
    apart,
    levels,
    load_oracle,
    noise,
    save_like_official,
)  # fmt: skip

from minidistill.distill.block_removal import RECIPES, build_student, plan_removal
from minidistill.errors import InputError
from minidistill.pipeline import Pipeline, load_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = 2  # of 255: maximum difference of equal images
FAR = 3 * LEVELS  # minimum difference of images with different settings
LATENTS = 0.01  # maximum difference of equal latents: the samplers differ by less than 3 levels
NEGATIVES = ["a blue ground", "a green ring"]

TEACHERS = {"sd1": (TINY, "epsilon"), "sd2": (TINY_SD21, "v_prediction"), "sdxl": (TINY_SDXL_DEEP, "epsilon")}
STUDENTS = {  # name: teacher, recipe, prediction of the published weights
    "bk-base-v1": ("sd1", "bk-base", "epsilon"),
    "bk-small-v1": ("sd1", "bk-small", "epsilon"),
    "bk-tiny-v1": ("sd1", "bk-tiny", "epsilon"),
    "bk-tiny-v2": ("sd2", "bk-tiny", "epsilon"),  # of SD 2.1-base, which predicts eps
    "bk-base-v-prediction": ("sd2", "bk-base", "v_prediction"),
    "koala-1b": ("sdxl", "koala-1b", "epsilon"),
    "koala-700m": ("sdxl", "koala-700m", "epsilon"),
    "ssd-1b": ("sdxl", "ssd-1b", "epsilon"),
    "segmind-vega": ("sdxl", "segmind-vega", "epsilon"),
}
MODELS = TEACHERS | {
    name: (plan_removal(TEACHERS[teacher][0], RECIPES[recipe].remove).student, prediction)
    for name, (teacher, recipe, prediction) in STUDENTS.items()
}

every_teacher = pytest.mark.parametrize("name", TEACHERS)
every_sampler = pytest.mark.parametrize("sampler", SCHEDULERS)


class Both(NamedTuple):
    """One pipeline folder, loaded by diffusers and by minidistill."""

    theirs: diffusers.DiffusionPipeline
    ours: Pipeline
    scheduler: dict  # the settings as written
    folder: object

    def set_sampler(self, sampler: str, **changes) -> None:
        self.theirs.scheduler = SCHEDULERS[sampler].from_config(self.scheduler, **changes)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(name of a model, vocabulary) -> Both, cached; not to be changed."""

    @functools.cache
    def make(name: str, vocabulary: str = "trained") -> Both:
        folder = tmp_path_factory.mktemp(name) / "model"
        config, prediction = MODELS[name]
        words = official_tokenizer() if vocabulary == "official" else None
        theirs = save_like_official(folder, config, prediction, words, seed=list(MODELS).index(name))
        return Both(theirs, load_pipeline(folder), dict(theirs.scheduler.config), folder)

    return make


def one_noise(count: int) -> torch.Tensor:
    """The same noise for all, so that images differ by their prompts."""
    return noise(1).expand(count, -1, -1, -1)


def draw_theirs(both: Both, prompts, negatives, latents, steps, guidance) -> tuple[list[Image.Image], list]:
    """diffusers' images, and its latents after each step."""
    seen = []

    def keep(pipe, i, t, tensors):
        seen.append(tensors["latents"])
        return {}

    images = both.theirs(
        prompts,
        negative_prompt=negatives,
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=4 * latents.shape[2],
        width=4 * latents.shape[3],
        callback_on_step_end=keep,
    ).images
    return images, seen


def photos(count: int, width: int, height: int) -> list[Image.Image]:
    numbers = np.random.default_rng(1).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC) for pixels in numbers]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_gives_the_images_of_diffusers(load, name):
    """With guidance for both samplers; without it for one, alternately."""
    both = load(name)
    for sampler, guidance in (("ddim", 7.5), ("euler", 7.5), (list(SCHEDULERS)[len(name) % 2], 1.0)):
        both.set_sampler(sampler)
        expected, states = draw_theirs(both, PROMPTS, NEGATIVES, noise(), 3, guidance)
        settings = {"latents": noise(), "steps": 3, "guidance": guidance, "sampler": sampler}
        found = both.ours(PROMPTS, NEGATIVES, output="latents", **settings)
        assert levels(expected).std() > 20, "the oracle's images must not be uniform"
        assert max(apart(both.ours.decode(found), expected)) <= LEVELS
        assert (found - states[-1]).abs().max() < LATENTS


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "bk-tiny-v1", "ssd-1b"])
def test_every_setting_changes_the_image_by_more_than_the_tolerance(load, name):
    """Otherwise the parity above would show little."""
    pipe = load(name).ours
    settings = {"steps": 3, "latents": one_noise(4)}
    prompts, negatives = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]], [NEGATIVES[0]] * 2 + [NEGATIVES[1], None]
    guided = pipe(prompts, negatives, **settings)
    prompt, negative, no_negative = apart(guided[:1] * 3, guided[1:])
    alone = pipe(prompts[:2], steps=3, latents=one_noise(2), guidance=1)
    moved = {"prompt": prompt, "negative": negative, "no negative": no_negative}
    moved |= {"guidance": apart(guided[:1], alone[:1])[0], "prompt alone": apart(alone[:1], alone[1:])[0]}
    assert min(moved.values()) > FAR, moved
    one, other = (
        pipe(prompts[:2], **settings | {"latents": one_noise(2)}, guidance=1, sampler=sampler, output="latents")
        for sampler in SCHEDULERS
    )
    assert (one - other).abs().max() > 2 * LATENTS, "the samplers"


@pytest.mark.parametrize("name", ["bk-base-v1", "bk-small-v1", "bk-tiny-v1", "koala-700m", "ssd-1b"])
def test_a_student_built_and_saved_here_gives_the_same_images_in_diffusers(load, name, tmp_path):
    teacher_name, recipe, _ = STUDENTS[name]
    teacher = load(teacher_name).ours
    unet = build_student(plan_removal(teacher.unet.config, RECIPES[recipe].remove), teacher.unet)
    parts = unet, teacher.vae, teacher.text_encoders, teacher.tokenizers, teacher.schedule
    Pipeline(*parts, zero_unconditional=teacher.zero_unconditional).save(tmp_path)
    expected, _ = draw_theirs(Both(load_oracle(tmp_path), teacher, {}, tmp_path), PROMPTS, NEGATIVES, noise(), 3, 5.0)
    sampler = "euler" if teacher.is_sdxl else "ddim"
    settings = {"latents": noise(), "steps": 3, "guidance": 5.0, "sampler": sampler}
    assert max(apart(load_pipeline(tmp_path)(PROMPTS, NEGATIVES, **settings), expected)) <= LEVELS
    assert min(apart(teacher(PROMPTS, NEGATIVES, **settings), expected)) > FAR, "the teacher's differ"


def words(count: int) -> str:
    return " ".join((["red", "ring"] * 100)[:count])


TEXTS = {
    "no words": "",
    "5 words": words(5),
    "74 words": words(74),
    "75 words": words(75),
    "200 words": words(200),
    "capitals": "A Red CIRCLE",
    "accents": "café où",
    "emoji": "a 😀 ring",
    "white space": "  red  ring\n blue",
    "a mark alone": "!",
    "marks": "stop! red !! ring!?",
}
every_vocabulary = pytest.mark.parametrize("vocabulary", ["trained", "official"])


def read_marks_as_words(pipe: diffusers.DiffusionPipeline, value: bool) -> None:
    """Whether transformers reads a typed "!" as a word where the tokenizer pads with "!". Its default is padding.

    The models were trained on the word, which is why minidistill reads it so: `models.tokenizer`.
    """
    for part in ("tokenizer", "tokenizer_2"):
        if getattr(pipe, part, None) is not None:
            getattr(pipe, part).split_special_tokens = value


@every_vocabulary
@every_teacher
def test_all_kinds_of_prompts_give_the_images_of_diffusers(load, name, vocabulary):
    both = load(name, vocabulary)
    prompts = list(TEXTS.values())
    count = len(prompts)
    both.set_sampler("ddim")
    read_marks_as_words(both.theirs, True)
    expected, _ = draw_theirs(both, prompts, prompts[::-1], one_noise(count), 2, 3.0)
    read_marks_as_words(both.theirs, False)
    settings = {"latents": one_noise(count), "steps": 2, "batch_size": count}
    found = both.ours(prompts, prompts[::-1], guidance=3.0, **settings)
    off = dict(zip(TEXTS, apart(found, expected), strict=True))
    assert max(off.values()) <= LEVELS, off

    assert len(both.ours.tokenizers[0].encode(TEXTS["75 words"])) == 75, "these just fit"
    drawn = dict(zip(TEXTS, both.ours(prompts, guidance=1, **settings), strict=True))
    assert apart([drawn.pop("200 words")], [drawn["75 words"]]) == [0], "prompts are truncated after 75 words"
    for one, other in combinations(drawn, 2):
        assert apart([drawn[one]], [drawn[other]])[0] > FAR, f"{one} and {other} must differ"


@every_teacher
def test_a_typed_mark_is_a_word_where_it_is_padding_in_transformers(load, name):
    both = load(name)
    both.set_sampler("ddim")
    expected, _ = draw_theirs(both, ["stop! ring"], None, noise(1), 2, 1.0)
    found = both.ours(["stop! ring"], latents=noise(1), steps=2, guidance=1)
    assert (apart(found, expected)[0] <= LEVELS) == (name == "sd1")


@pytest.mark.parametrize("name", [*TEACHERS, "bk-tiny-v1"])
def test_other_sizes_than_the_trained_one_give_the_images_of_diffusers(load, name):
    """10 x 14 latents become odd in the down stages, and the up stages must restore their sizes."""
    both = load(name)
    both.set_sampler("euler")
    expected, _ = draw_theirs(both, PROMPTS, NEGATIVES, noise(2, 10, 14), 2, 5.0)
    found = both.ours(PROMPTS, NEGATIVES, latents=noise(2, 10, 14), steps=2, guidance=5.0, sampler="euler")
    assert both.ours.trained_size() == (32, 32)
    assert found[0].size == (56, 40)
    assert max(apart(found, expected)) <= LEVELS


@pytest.mark.parametrize(("sampler", "strength"), [("ddim", 0.4), ("euler", 0.4), ("euler", 1.0)])
@every_teacher
def test_image_to_image_equals_diffusers(load, name, sampler, strength):
    """diffusers samples the VAE's posterior, we take its mean; the posteriors of these VAEs have no variance."""
    both = load(name)
    both.set_sampler(sampler)
    kinds = diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionXLImg2ImgPipeline
    theirs = kinds[name == "sdxl"].from_pipe(both.theirs)
    theirs.set_progress_bar_config(disable=True)
    images, generators = photos(2, 40, 24), [torch.Generator().manual_seed(i) for i in range(2)]
    expected = theirs(
        PROMPTS,
        negative_prompt=NEGATIVES,
        image=images,
        strength=strength,
        num_inference_steps=5,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(i) for i in range(2)],
    ).images
    draws = [torch.randn(2, 4, 6, 10, generator=generator) for generator in generators]
    fresh = torch.stack([draw[1] for draw in draws])  # the first is for the posterior
    settings = {"strength": strength, "latents": fresh, "steps": 5, "guidance": 4.0, "sampler": sampler}
    found = both.ours(PROMPTS, NEGATIVES, image=images, **settings)
    assert found[0].size == (40, 24)
    assert max(apart(found, expected)) <= LEVELS
    if strength < 1:
        assert min(apart(found, both.ours(PROMPTS, NEGATIVES, image=images[::-1], **settings))) > FAR


def test_eps_prediction_from_zero_terminal_snr_is_sampled_and_saved_with_euler(load, tmp_path):
    both = load("sd1")
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    both.set_sampler("euler", **zero)
    expected, _ = draw_theirs(both, PROMPTS, NEGATIVES, noise(), 3, 5.0)
    parts = both.ours.unet, both.ours.vae, both.ours.text_encoders, both.ours.tokenizers
    pipe = Pipeline(*parts, replace(both.ours.schedule, **zero))
    assert max(apart(pipe(PROMPTS, NEGATIVES, latents=noise(), steps=3, guidance=5.0), expected)) <= LEVELS
    pipe.save(tmp_path)
    saved, _ = draw_theirs(Both(load_oracle(tmp_path), pipe, {}, tmp_path), PROMPTS, NEGATIVES, noise(), 3, 5.0)
    assert max(apart(saved, expected)) <= LEVELS
    with pytest.raises(InputError, match="alpha_bar = 0"):
        pipe(PROMPTS, sampler="ddim", steps=3)


@every_sampler
def test_a_scheduler_config_without_later_keys_gives_the_images_of_diffusers(load, sampler, tmp_path):
    """Old folders of SD 1.x: the pipeline sets the offset to 1 and clip_sample to false; samplers have own spacings."""
    shutil.copytree(load("sd1").folder, tmp_path / "old")
    path = tmp_path / "old/scheduler/scheduler_config.json"
    config = json.loads(path.read_text())
    old = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "_class_name")
    path.write_text(json.dumps({key: config[key] for key in old} | {"set_alpha_to_one": False}))
    theirs = load_oracle(tmp_path / "old")
    if sampler == "euler":  # not for ddim: `from_config` would revert what the pipeline has set
        theirs.scheduler = SCHEDULERS[sampler].from_config(theirs.scheduler.config)
    both = Both(theirs, load_pipeline(tmp_path / "old"), {}, tmp_path)
    _, states = draw_theirs(both, PROMPTS, NEGATIVES, noise(), 4, 5.0)
    settings = {"latents": noise(), "steps": 4, "guidance": 5.0, "sampler": sampler}
    with pytest.warns(UserWarning, match="clip_sample = True"):
        found = both.ours(PROMPTS, NEGATIVES, output="latents", **settings)
    assert (found - states[-1]).abs().max() < LATENTS


@every_sampler
def test_the_callback_gets_the_latents_of_diffusers_between_its_steps(load, sampler):
    both = load("sd1")
    both.set_sampler(sampler)
    _, states = draw_theirs(both, PROMPTS, NEGATIVES, noise(), 4, 5.0)
    scheduler, seen = both.theirs.scheduler, []
    settings = {"latents": noise(), "steps": 4, "guidance": 5.0, "sampler": sampler}
    images = both.ours(PROMPTS, NEGATIVES, callback=seen.append, **settings)
    assert [step["i"] for step in seen] == [0, 1, 2, 3]
    assert [step["t"] for step in seen] == scheduler.timesteps.tolist()
    torch.testing.assert_close(seen[0]["x"], noise())
    for after, step in enumerate(seen[1:]):
        # in Euler their latents have variance 1 + sigma^2
        scale = (scheduler.sigmas[after + 1] ** 2 + 1) ** 0.5 if sampler == "euler" else 1
        torch.testing.assert_close(step["x"], states[after] / scale, atol=LATENTS, rtol=0)
    grids = [both.ours.decode(step["x0"]) for step in seen]
    changes = [max(apart(grid, images)) for grid in grids]
    assert changes[0] > FAR, "the first prediction differs"
    assert changes[-1] <= (0 if sampler == "euler" else FAR), "the last is the result, for DDIM up to abar_0"
    seen.clear()
    both.ours(PROMPTS, steps=2, callback=seen.append, batch_size=1)
    assert [(step["i"], len(step["x"]), len(step["x0"])) for step in seen] == [(0, 1, 1), (1, 1, 1)] * 2


def test_low_memory_decodes_large_images_in_tiles_without_visible_seams(load, monkeypatch):
    pipe = load_pipeline(load("sd1").folder)
    sizes, steps, from_latents = [], [], pipe.vae.from_latents

    def count(latents):
        sizes.append(tuple(latents.shape))
        return from_latents(latents)

    monkeypatch.setattr(pipe.vae, "from_latents", count)
    settings = {"steps": 1, "guidance": 1, "sampler": "euler", "callback": steps.append}
    tiled = pipe(PROMPTS[:1], latents=noise(1, 80, 72), low_memory=True, **settings)
    assert tiled[0].size == (288, 320)
    assert sizes == [(1, 4, 64, 64)] * 4
    whole = pipe.decode(steps[-1]["x0"])
    off = np.abs(levels(tiled) - levels(whole))
    assert 0 < off.mean() < 0.5 and off.max() <= 24, (off.mean(), off.max())
