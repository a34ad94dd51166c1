"""SDXL's unconditional prompt, low memory and distilled models, against diffusers' pipelines.

Tiny pipelines with seeded random weights, saved by diffusers: equal noise must give equal images, to 2 levels of 255.
Architectures, samplers, prompts, sizes and image to image are compared in `test_pipeline_parity`.
"""

import pytest
import torch
from tiny import PROMPTS, SCHEDULERS, apart, levels, load_oracle, noise

from minidistill.diffusion.sampling import Sampling, find_sampling, sampling_metadata
from minidistill.models.clip import CLIPTextModel
from minidistill.models.vae import decode_tiled
from minidistill.pipeline import load_pipeline
from minidistill.weights.files import read_json

oracle_of = load_oracle


def differ(one, other) -> int:
    return max(apart(one, other))


@pytest.mark.parametrize(("spacing", "negatives"), [("leading", None), ("trailing", "")])
def test_sdxl_images_without_a_negative_prompt_and_with_an_empty_one_are_those_of_diffusers(
    sources, spacing, negatives
):
    oracle, pipe = load_oracle(sources["sdxl"]), load_pipeline(sources["sdxl"])
    oracle.scheduler = SCHEDULERS["euler"].from_config(oracle.scheduler.config, timestep_spacing=spacing)
    settings = {"negative_prompt": None if negatives is None else [negatives] * 2, "num_inference_steps": 4}
    settings |= {"guidance_scale": 7.5, "height": 32, "width": 32}
    expected = oracle(PROMPTS, latents=noise(), **settings).images
    assert levels(expected).std() > 20, "the oracle's images must not be uniform"
    settings = {"steps": 4, "guidance": 7.5, "sampler": "euler", "spacing": spacing, "latents": noise()}
    found = pipe(PROMPTS, negatives, **settings)
    assert differ(found, expected) <= 2
    assert differ(pipe(PROMPTS, "" if negatives is None else None, **settings), found) > 5


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


def test_settings_of_lightning_files_follow_from_their_names():
    expected = {
        "sdxl_lightning_4step_unet": Sampling(4),
        "sdxl_lightning_8step_lora": Sampling(8),
        "sdxl_lightning_2step": Sampling(2),
        "sdxl_lightning_1step_x0": Sampling(1, prediction="sample"),
        "sdxl_lightning_1step_unet_x0": Sampling(1, prediction="sample"),
        "my_sdxl_lightning_4step_unet_v2": None,
        "diffusion_pytorch_model": None,
    }
    assert {name: find_sampling(f"some/where/{name}.safetensors", {}) for name in expected} == expected


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
