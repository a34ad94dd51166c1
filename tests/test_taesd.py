"""TAESD against diffusers' AutoencoderTiny: images and latents, and files of all layouts."""

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from minidistill.errors import InputError
from minidistill.interop.replace import replace_vae
from minidistill.interop.vae_file import read_vae_file
from minidistill.metrics.reconstruction import evaluate_vae
from minidistill.miniature.scenes import Scenes
from minidistill.models.taesd import AutoencoderTiny, TinyConfig
from minidistill.models.vae import SDXL_VAE
from minidistill.pipeline import load_pipeline, to_pixels
from minidistill.training.batches import Batches
from minidistill.weights.files import load_into

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


def own_spelling(state: dict[str, torch.Tensor], half: str) -> dict[str, torch.Tensor]:
    """Encoder or decoder with the names of TAESD's own code, whose decoder starts with a layer without weights."""
    first = 1 if half == "decoder" else 0
    names = {name: name.removeprefix(f"{half}.layers.") for name in state if name.startswith(half)}
    return {
        f"{int(rest.split('.')[0]) + first}.{rest.partition('.')[2]}": state[name].clone()
        for name, rest in names.items()
    }


@pytest.mark.parametrize("config", [{}, SMALL], ids=["taesd", "small"])
@torch.no_grad()
def test_latents_and_images_are_diffusers(config):
    theirs = oracle(**config)
    model = ours(theirs)
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


def test_it_has_the_official_number_of_tensors_and_parameters():
    model = AutoencoderTiny()
    assert len(model.state_dict()) == 134
    assert sum(p.numel() for p in model.parameters()) == 2_445_063
    assert model.state_dict().keys() == oracle().state_dict().keys()


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
    assert config == TinyConfig(
        latent_channels=3, width=8, num_encoder_blocks=(1, 1, 2, 1), num_decoder_blocks=(2, 1, 1, 1)
    )
    again = diffusers.AutoencoderTiny.from_config(config.to_dict())
    assert again.state_dict().keys() == oracle(**SMALL).state_dict().keys()
    assert TinyConfig.from_dict(config.to_dict()) == config
    assert TinyConfig.from_dict({"_class_name": "AutoencoderTiny"}) == TinyConfig()


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "gelu"},
        {"encoder_block_out_channels": [64, 64, 32, 64]},
        {"encoder_block_out_channels": [64] * 4, "decoder_block_out_channels": [32] * 4},
        {"use_midblock": True},
    ],
)
def test_unsupported_configs_are_refused(change):
    with pytest.raises(ValueError, match=list(change)[-1]):
        TinyConfig.from_dict(change)


@pytest.mark.parametrize("spelling", ["diffusers", "whole", "halves", "prefixed"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_of_all_layouts_are_read(tmp_path, spelling, suffix):
    state = oracle().state_dict()
    save = save_file if suffix == ".safetensors" else torch.save
    halves = {half: own_spelling(state, half) for half in ("encoder", "decoder")}
    path = tmp_path / f"taesd_decoder{suffix}"
    if spelling == "diffusers":
        save(state, path)
    elif spelling == "halves":
        for half, tensors in halves.items():
            save(tensors, tmp_path / f"taesd_{half}{suffix}")
    else:
        prefix = "taesd_" if spelling == "prefixed" else ""
        save({f"{prefix}{half}.{n}": t for half, part in halves.items() for n, t in part.items()}, path)
    for half in ("decoder", "encoder")[: 1 + (spelling == "halves")]:  # either half names both
        config, tensors = read_vae_file(tmp_path / f"taesd_{half}{suffix}", SDXL_VAE)
        assert config == TinyConfig()
        assert tensors.keys() == state.keys()
        assert all(torch.equal(tensors[name], state[name]) for name in state)


def test_an_encoder_or_decoder_alone_is_refused_with_the_name_of_the_other(tmp_path):
    save_file(own_spelling(oracle().state_dict(), "decoder"), tmp_path / "taesd_decoder.safetensors")
    with pytest.raises(InputError, match=r"taesd_encoder\.safetensors"):
        read_vae_file(tmp_path / "taesd_decoder.safetensors")
    save_file(own_spelling(oracle().state_dict(), "encoder"), tmp_path / "preview.safetensors")
    with pytest.raises(InputError, match="decoder must lie beside it"):
        read_vae_file(tmp_path / "preview.safetensors")
