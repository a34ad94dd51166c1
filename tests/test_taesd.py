"""TAESD against diffusers' AutoencoderTiny: images and latents."""

import diffusers
import pytest
import torch

from minidistill.interop.replace import replace_vae
from minidistill.metrics.reconstruction import evaluate_vae
from minidistill.miniature.scenes import Scenes
from minidistill.models.taesd import AutoencoderTiny, TinyConfig
from minidistill.pipeline import load_pipeline, to_pixels
from minidistill.training.batches import Batches
from minidistill.weights.loading import load_into

SMALL = {
    "encoder_block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "latent_channels": 3,
    "num_encoder_blocks": (1, 1, 2, 1),
    "num_decoder_blocks": (2, 1, 1, 1),
}


def oracle(**config) -> diffusers.AutoencoderTiny:
    torch.manual_seed(0)
    return diffusers.AutoencoderTiny(**config).eval()


def ours(theirs: diffusers.AutoencoderTiny) -> AutoencoderTiny:
    with torch.device("meta"):
        model = AutoencoderTiny(TinyConfig.from_dict(dict(theirs.config)))
    return load_into(model, theirs.state_dict(), "x")


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [{}, SMALL], ids=["taesd", "small"])
@torch.no_grad()
def test_latents_and_images_are_diffusers(config):
    theirs = oracle(**config)
    model = ours(theirs)
    if not config:
        assert len(model.state_dict()) == 134 and sum(p.numel() for p in model.parameters()) == 2_445_063
    images, channels = random(2, 3, 32, 48).clamp(-1, 1), theirs.config.latent_channels
    latents = random(2, channels, 4, 6, scale=4.0)  # beyond +-3, where tanh limits them
    assert (model.to_latents(images) - theirs.encode(images).latents).abs().max() < 1e-5
    assert (model.from_latents(latents) - theirs.decode(latents).sample).abs().max() < 1e-5


@torch.no_grad()
def test_training_and_evaluation_use_its_latents(tmp_path):
    oracle().save_pretrained(tmp_path / "taesd")
    pipe, data = load_pipeline("miniature", without=("vae",)), Scenes("train", length=2)
    replace_vae(pipe, tmp_path / "taesd")
    for cache in (True, False):
        x0 = Batches(data, pipe, batch_size=2, seed=0, cache=cache)[0][0]
        expected = pipe.vae.to_latents(to_pixels([image for image, _ in data]))
        assert min((x0 - torch.stack(some)).abs().max() for some in (tuple(expected), tuple(expected.flip(0)))) < 1e-5
    assert evaluate_vae(pipe.vae, 16)["psnr"] > 0


@torch.no_grad()
def test_noise_has_no_effect_and_the_scaling_factor_is_applied_in_both_directions():
    images = random(1, 3, 16, 24).clamp(-1, 1)
    plain, scaled = ours(oracle(**SMALL)), ours(oracle(**SMALL, scaling_factor=2.0))
    latents = plain.to_latents(images)
    assert latents.shape == (1, 3, 2, 3) and plain.config.downscale == 8 and plain.config.scaling_factor == 1
    assert torch.equal(latents, plain.to_latents(images, noise=random(1, 3, 2, 3)))
    assert torch.allclose(scaled.to_latents(images), 2 * latents)
    assert torch.allclose(scaled.from_latents(2 * latents), plain.from_latents(latents), atol=1e-6)


def test_configs_round_trip_through_diffusers():
    config = TinyConfig.from_dict(dict(oracle(**SMALL).config))
    assert (config.latent_channels, config.width) == (3, 8)
    again = diffusers.AutoencoderTiny.from_config(config.to_dict())
    assert again.state_dict().keys() == oracle(**SMALL).state_dict().keys()
    assert TinyConfig.from_dict(config.to_dict()) == config
    assert TinyConfig.from_dict({"_class_name": "AutoencoderTiny"}) == TinyConfig()


def test_unsupported_configs_are_refused():
    other = {"encoder_block_out_channels": [64] * 4, "decoder_block_out_channels": [32] * 4}
    uneven = {"encoder_block_out_channels": [64, 64, 32, 64]}
    for change in ({"act_fn": "gelu"}, uneven, other, {"use_midblock": True}):
        with pytest.raises(ValueError, match=list(change)[-1]):
            TinyConfig.from_dict(change)
