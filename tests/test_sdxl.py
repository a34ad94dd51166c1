"""SDXL, image to image, low memory and distilled models, against diffusers' pipelines.

Tiny pipelines with seeded random weights, saved by diffusers: equal noise must give equal images, to 2 levels of 255.
Architectures, samplers, prompts, sizes and image to image are compared in `test_pipeline_parity`.
"""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from test_pipeline import change_json, levels, refused
from tiny import PROMPTS

from minidistill.diffusion.sampling import Sampling, find_sampling, sampling_metadata
from minidistill.models.clip import CLIPTextModel
from minidistill.models.vae import decode_tiled
from minidistill.pipeline import load_pipeline
from minidistill.weights.files import read_json

SCHEDULERS = {"ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler}


def oracle_of(folder) -> diffusers.StableDiffusionXLPipeline:
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(count: int = 2, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randn(count, 4, height, width, generator=torch.Generator().manual_seed(5))


def differ(one, other) -> int:
    return np.abs(levels(one) - levels(other)).max()


def photo(width: int = 32, height: int = 32) -> Image.Image:
    numbers = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(numbers).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("sampler", "spacing", "guidance", "negatives"),
    [
        ("euler", "leading", 1.0, None),
        ("euler", "leading", 7.5, None),
        ("euler", "trailing", 7.5, ""),
        ("ddim", "leading", 7.5, "a green ring"),
    ],
)
def test_sdxl_images_are_those_of_diffusers(sources, sampler, spacing, guidance, negatives):
    oracle = oracle_of(sources["sdxl"])
    oracle.scheduler = SCHEDULERS[sampler].from_config(
        oracle.scheduler.config, timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=False
    )
    expected = oracle(
        PROMPTS,
        negative_prompt=None if negatives is None else [negatives] * 2,
        latents=noise(),
        num_inference_steps=4,
        guidance_scale=guidance,
        height=32,
        width=32,
    ).images
    assert levels(expected).std() > 20, "the oracle's images must not be uniform"
    pipe = load_pipeline(sources["sdxl"])
    pipe.schedule = replace(pipe.schedule, set_alpha_to_one=False)  # not in the config of an Euler scheduler
    found = pipe(PROMPTS, negatives, latents=noise(), steps=4, guidance=guidance, sampler=sampler, spacing=spacing)
    assert differ(found, expected) <= 2


def test_no_negative_prompt_differs_from_an_empty_one(sources):
    pipe = load_pipeline(sources["sdxl"])
    assert pipe.zero_unconditional
    none, empty = (pipe(PROMPTS[0], negative, steps=2, seed=1) for negative in (None, ""))
    assert differ(none, empty) > 5


def test_diffusers_reads_a_saved_sdxl_folder_and_makes_the_same_images(sources, tmp_path):
    settings = {"latents": noise(), "num_inference_steps": 3, "height": 32, "width": 32}
    expected = oracle_of(sources["sdxl"])(PROMPTS, **settings).images
    load_pipeline(sources["sdxl"]).save(tmp_path)
    again = oracle_of(tmp_path)
    assert type(again.scheduler) is diffusers.EulerDiscreteScheduler
    assert again.config.force_zeros_for_empty_prompt is True
    assert differ(again(PROMPTS, **settings).images, expected) == 0


def test_an_sdxl_without_its_second_encoder_is_refused(sources, tmp_path):
    load_pipeline(sources["sdxl"]).save(tmp_path)
    change_json(tmp_path / "model_index.json", _class_name="StableDiffusionPipeline")
    assert "needs 2 text encoder(s), there are 1" in refused(load_pipeline, tmp_path)


def test_images_that_do_not_fit_are_refused(sources):
    pipe = load_pipeline(sources["sd1"])
    assert "multiples of 4" in refused(pipe, "a", image=photo(30, 32))
    assert "same size" in refused(pipe, ["a", "b"], image=[photo(), photo(64, 64)])
    assert "3 images for 1" in refused(pipe, "a", image=[photo()] * 3)
    assert "leave out height" in refused(pipe, "a", image=photo(), height=64)
    for strength in (0, -1, 1.5, 0.01):
        assert "strength" in refused(pipe, "a", image=photo(), strength=strength)


# memory


def test_low_memory_gives_the_same_images_and_leaves_the_pipeline_whole(sources, tmp_path, monkeypatch):
    pipe = load_pipeline(sources["sdxl"])
    expected = pipe(PROMPTS, steps=2)
    moves, steps = [], []
    to = CLIPTextModel.to
    monkeypatch.setattr(CLIPTextModel, "to", lambda self, d: moves.append((str(d), len(steps))) or to(self, d))
    for _ in range(2):
        assert differ(pipe(PROMPTS, steps=2, low_memory=True, batch_size=1, callback=steps.append), expected) <= 1
    assert moves == [("cpu", 0)] * 2 + [("cpu", 4)] * 4 + [("cpu", 8)] * 2, "away from the first step to the end"
    pipe.save(tmp_path)
    assert differ(load_pipeline(tmp_path)(PROMPTS, steps=2), expected) == 0


class Local(torch.nn.Module):
    """A decoder with a small receptive field, which tiles with enough overlap do not change."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 3, 5, padding=2)

    def from_latents(self, latents):
        return self.conv(torch.nn.functional.interpolate(latents, scale_factor=4.0))


def test_tiles_cover_the_image_and_are_blended():
    torch.manual_seed(0)
    vae, latents = Local(), torch.randn(2, 4, 43, 30)
    with torch.no_grad():
        whole = vae.from_latents(latents)
        tiled = decode_tiled(vae, latents, tile=24, overlap=8)
        cut = decode_tiled(vae, latents, tile=24, overlap=0)
    assert tiled.shape == whole.shape and tiled.isfinite().all()
    alone = (..., slice(0, 4 * 16), slice(0, 4 * 6))  # only in the first tile
    torch.testing.assert_close(tiled[alone], whole[alone])
    assert (tiled - whole).abs().max() < 0.2 * (cut - whole).abs().max()
    small = latents[:, :, :16, :12]
    assert torch.equal(decode_tiled(vae, small), vae.from_latents(small)), "small latents are not tiled"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sdxl_lightning_4step_unet.safetensors", Sampling(4)),
        ("sdxl_lightning_8step_lora.safetensors", Sampling(8)),
        ("sdxl_lightning_2step.safetensors", Sampling(2)),
        ("sdxl_lightning_1step_x0.safetensors", Sampling(1, prediction="sample")),
        ("sdxl_lightning_1step_unet_x0.safetensors", Sampling(1, prediction="sample")),
        ("my_sdxl_lightning_4step_unet_v2.safetensors", None),
        ("diffusion_pytorch_model.safetensors", None),
    ],
)
def test_settings_of_lightning_files_follow_from_their_names(name, expected):
    assert find_sampling(f"some/where/{name}", {}) == expected


def test_sampling_settings_are_stored_in_metadata():
    own = Sampling(2, "ddim", "leading", 3.0, "v_prediction")
    assert find_sampling("sdxl_lightning_4step_unet.safetensors", sampling_metadata(own)) == own
    assert sampling_metadata(None) == {}
    for broken in ("{", "[]", '{"steps": 0}', '{"steps": 4, "sampler": "plms"}', '{"steps": "4"}'):
        with pytest.raises(ValueError, match=r"steps|sampler|metadata"):
            find_sampling("x", {"minidistill.sampling": broken})


def test_a_distilled_model_has_its_own_settings_and_warns_about_others(sources, tmp_path):
    pipe = load_pipeline(sources["sdxl"])
    pipe.sampling = Sampling(2)
    pipe.save(tmp_path)
    again = load_pipeline(tmp_path)
    assert again.sampling == Sampling(2)
    own = again(PROMPTS, latents=noise())
    assert differ(own, pipe(PROMPTS, latents=noise(), steps=2, sampler="euler", spacing="trailing", guidance=0)) == 0
    with pytest.warns(UserWarning, match="made for 2 steps of euler with trailing timesteps, guidance off"):
        again(PROMPTS, steps=3)
    with pytest.warns(UserWarning, match=r"guidance 7\.5"):
        again(PROMPTS, guidance=7.5)
    oracle = oracle_of(tmp_path)
    settings = {"num_inference_steps": 2, "guidance_scale": 0.0, "height": 32, "width": 32}
    assert differ(oracle(PROMPTS, latents=noise(), **settings).images, own) <= 2, "as saved, also in diffusers"
    assert read_json(tmp_path / "scheduler/scheduler_config.json")["timestep_spacing"] == "trailing"


def test_a_one_step_model_predicts_x0(sources, tmp_path):
    pipe = load_pipeline(sources["sdxl"])
    pipe.sampling = Sampling(1, prediction="sample")
    pipe.save(tmp_path)
    again = load_pipeline(tmp_path)
    assert again.schedule.prediction_type == "sample"
    text = again.encode_prompts(PROMPTS)
    with torch.no_grad():
        t, added = torch.full((2,), 999), again.added_cond(text.pooled, 32, 32)
        # Euler with trailing spacing starts slightly below variance 1
        x0 = again.unet(noise() * (1 - 0.0046601) ** 0.5, t, text.context, added)
    torch.testing.assert_close(again(PROMPTS, latents=noise(), output="latents"), x0, rtol=1e-2, atol=1e-2)
    oracle = oracle_of(tmp_path)
    settings = {"num_inference_steps": 1, "guidance_scale": 0.0, "height": 32, "width": 32}
    assert differ(oracle(PROMPTS, latents=noise(), **settings).images, again(PROMPTS, latents=noise())) <= 2
