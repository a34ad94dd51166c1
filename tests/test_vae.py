"""The VAE against diffusers' `AutoencoderKL`: outputs, gradients, parameter names and config files."""

import diffusers
import pytest
import torch
from tiny import assert_close, assert_same_gradients
from torch import nn

from minidistill.models.vae import SD_VAE, SDXL_VAE, AutoencoderKL, VAEConfig

CONFIGS = {
    "four stages": VAEConfig(block_out_channels=(8, 16, 16, 16), layers_per_block=2, norm_num_groups=4),
    "three stages": VAEConfig(block_out_channels=(32, 64, 64), norm_num_groups=16, scaling_factor=0.5),
    "one stage": VAEConfig(block_out_channels=(8,), norm_num_groups=4, latent_channels=3),
    "no quant convs": VAEConfig(
        block_out_channels=(8, 16), norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False
    ),
    "no mid attention": VAEConfig(block_out_channels=(8, 16), norm_num_groups=4, mid_block_add_attention=False),
}


def pair(config: VAEConfig, seed: int = 0) -> tuple[AutoencoderKL, diffusers.AutoencoderKL]:
    """Our VAE and diffusers' with the same random weights, biases and norms included."""
    torch.manual_seed(seed)
    oracle = diffusers.AutoencoderKL.from_config(config.to_dict())
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = AutoencoderKL(config)
    ours.load_state_dict(oracle.state_dict())
    return ours, oracle


@pytest.mark.parametrize("name", CONFIGS)
def test_encode_and_decode_equal_diffusers_at_even_and_odd_sizes(name):
    """Padding on the right and at the bottom only gives these values and sizes."""
    ours, oracle = pair(CONFIGS[name])
    for size in ((32, 48), (37, 50), (9, 65)):
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
        with torch.no_grad():
            mean, logvar = ours.encode(images)
            posterior = oracle.encode(images).latent_dist
            assert_close(mean, posterior.mean)
            assert_close(logvar, posterior.parameters.chunk(2, 1)[1])
            assert_close(ours.decode(mean), oracle.decode(mean).sample)
        if size == (32, 48):
            assert mean.shape[2:] == (32 // CONFIGS[name].downscale, 48 // CONFIGS[name].downscale)


def test_gradients_of_all_parameters_and_of_the_image_equal_diffusers():
    ours, oracle = pair(CONFIGS["four stages"])
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    x, y = images.clone().requires_grad_(), images.clone().requires_grad_()
    mean, logvar = ours.encode(x)
    (ours.decode(mean).square().mean() + logvar.square().mean()).backward()
    posterior = oracle.encode(y).latent_dist
    loss = oracle.decode(posterior.mean).sample.square().mean()
    (loss + posterior.parameters.chunk(2, 1)[1].square().mean()).backward()
    assert_close(x.grad, y.grad, 1e-4)
    assert_same_gradients(ours, dict(oracle.named_parameters()))


def test_the_norms_have_the_official_eps():
    """At a variance of about 1e-5, an eps of 1e-5 instead of 1e-6 changes the result by tens of percent."""
    ours, oracle = pair(CONFIGS["four stages"])
    images = 1e-3 * torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for vae in (ours, oracle):
            vae.encoder.conv_in.bias.zero_()
        assert_close(ours.encode(images)[0], oracle.encode(images).latent_dist.mean)
    assert {m.eps for m in ours.modules() if isinstance(m, nn.GroupNorm)} == {1e-6}


@pytest.mark.parametrize("config", [SD_VAE, SDXL_VAE])
def test_full_size_has_the_official_tensors(config):
    with torch.device("meta"):
        ours = AutoencoderKL(config)
        oracle = diffusers.AutoencoderKL.from_config(config.to_dict())
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in oracle.state_dict().items()}
    assert len(shapes) == 248
    assert sum(parameter.numel() for parameter in ours.parameters()) == 83_653_863
    assert config.downscale == 8


def test_latents_are_the_scaled_mean_or_a_scaled_sample():
    config = CONFIGS["three stages"]
    ours, oracle = pair(config)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        posterior = oracle.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(7))
        sample = posterior.sample(generator=torch.Generator().manual_seed(7))
        assert_close(ours.to_latents(images), 0.5 * posterior.mean)
        assert_close(ours.to_latents(images, noise), 0.5 * sample)
        assert_close(ours.from_latents(0.5 * sample), oracle.decode(sample).sample)


def test_a_sample_is_finite_for_any_log_variance():
    """The log-variance is unbounded; sampling clamps it to [-30, 20] as in diffusers."""
    ours, _ = pair(CONFIGS["one stage"])
    with torch.no_grad():
        ours.quant_conv.bias[3:] = 1e4
        latents = ours.to_latents(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8))
        mean, logvar = ours.encode(torch.zeros(1, 3, 8, 8))
    assert logvar.min() > 1e3  # `encode` itself does not clamp
    scale = CONFIGS["one stage"].scaling_factor
    assert_close(latents, (mean + torch.e**10) * scale)


def test_a_config_of_any_version_is_read_and_round_trips_through_diffusers():
    first_release = {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.2.2", "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "out_channels": 3, "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }  # fmt: skip
    assert VAEConfig.from_dict(first_release) == SD_VAE and SD_VAE.scaling_factor == 0.18215
    newest = dict(diffusers.AutoencoderKL.from_config({**SDXL_VAE.to_dict(), "norm_num_groups": 16}).config)
    assert newest["shift_factor"] is None
    assert (VAEConfig.from_dict(newest).scaling_factor, VAEConfig.from_dict(newest).norm_num_groups) == (0.13025, 16)
    assert VAEConfig.from_dict({}) == VAEConfig()
    for config in CONFIGS.values():
        assert VAEConfig.from_dict(config.to_dict()) == config
        oracle = diffusers.AutoencoderKL.from_config(config.to_dict())
        assert VAEConfig.from_dict(dict(oracle.config)) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"act_fn": "gelu"}, "act_fn"),
        ({"shift_factor": 0.1159}, "shift_factor"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types"),
        ({"layers": 3}, "layers"),
        ({"block_out_channels": [30]}, "norm_num_groups"),
        ({"block_out_channels": []}, "block_out_channels"),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        VAEConfig.from_dict({"block_out_channels": [64], **change})
