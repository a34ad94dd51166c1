"""The variational autoencoder of Stable Diffusion: images <-> latents.

The networks are those of Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv
2112.10752); state-dict names are those of diffusers' `AutoencoderKL`, so the official weights load without conversion.

Three details are easy to get wrong and hard to notice:
- all GroupNorms have eps 1e-6 (those of the U-Net have 1e-5);
- the encoder downsamples by padding one pixel on the right and at the bottom only, then a stride-2 convolution;
- the U-Net's latents are the encoder's *times* `scaling_factor` (0.18215 for SD 1.x and 2.x, 0.13025 for SDXL).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidistill.models.layers import ResnetBlock

NORM_EPS = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    """The architecture, with the names and defaults of diffusers' `AutoencoderKL` config.json.

    The image is downsampled by 2 between stages: by `2 ** (len(block_out_channels) - 1)` in all (`downscale`).
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32  # image side in training; does not affect the layers
    scaling_factor: float = 0.18215  # latents of the U-Net = latents of the encoder * scaling_factor
    force_upcast: bool = True  # the weights overflow in float16 (SDXL): run them in float32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        if not self.block_out_channels or self.layers_per_block < 1:
            raise ValueError("a VAE needs at least one entry in block_out_channels and layers_per_block >= 1")
        widths, groups = self.block_out_channels, self.norm_num_groups
        if groups < 1 or any(channels % groups for channels in widths):
            raise ValueError(f"block_out_channels {widths} must be multiples of norm_num_groups {groups}")

    @property
    def downscale(self) -> int:
        """Image side / latent side: 8 for every official Stable Diffusion VAE."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, d: dict) -> VAEConfig:
        """From the `vae/config.json` of any diffusers version; absent keys take its defaults, keys "_..." are ignored.

        ValueError: a setting that is not supported (another activation, SD3's `shift_factor`, ...).
        """
        d = {key: list(v) if isinstance(v, tuple) else v for key, v in d.items() if not key.startswith("_")}
        values = {field.name: d[field.name] for field in fields(cls) if d.get(field.name) is not None}
        values["block_out_channels"] = tuple(d.get("block_out_channels", cls.block_out_channels))
        if isinstance(values.get("sample_size"), list):
            values["sample_size"] = max(values["sample_size"])
        config = cls(**values)
        written = config.to_dict()
        for key, value in d.items():
            if key not in values and value != written.get(key):
                raise ValueError(f"VAE config: {key} = {value!r} is not supported")
        return config

    def to_dict(self) -> dict:
        """A config.json from which diffusers builds the same `AutoencoderKL`."""
        stages = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            **asdict(self),
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * stages,
            "up_block_types": ["UpDecoderBlock2D"] * stages,
            "act_fn": "silu",
        }


SD_VAE = VAEConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)
SDXL_VAE = VAEConfig(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=1024, scaling_factor=0.13025
)


class Attention(nn.Module):
    """Single-head self-attention over all positions, added to its input: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, C, H, W) -> (B, 1, H*W, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        h = self.to_out[0](h).squeeze(1).transpose(1, 2)  # (B, 1, H*W, C) -> (B, C, H*W)
        return x + h.reshape(x.shape)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H // 2, W // 2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, unlike in the U-Net


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2 H, 2 W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _resnets(in_channels: int, out_channels: int, layers: int, groups: int) -> nn.ModuleList:
    widths = [in_channels] + [out_channels] * layers
    return nn.ModuleList(ResnetBlock(widths[i], widths[i + 1], None, groups, NORM_EPS) for i in range(layers))


class DownBlock(nn.Module):
    """One encoder stage: residual blocks, then (except in the last stage) downsampling by 2."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, down: bool):
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, layers, groups)
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if down else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """One decoder stage: residual blocks, then (except in the last stage) upsampling by 2."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, up: bool):
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, layers, groups)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """Residual block, attention (if the config has it), residual block."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = _resnets(channels, channels, 2, groups)
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> mean and log-variance of the latents: (B, 2 * latent_channels, h, w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[max(i - 1, 0)], width, config.layers_per_block, groups, down=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents (B, latent_channels, h, w) -> images (B, 3, H, W), with one more residual block per stage."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, up=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Images <-> latents.

    `to_latents` and `from_latents` give and take scaled latents, as the U-Net does; `encode` and `decode` do not scale.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(c, c, 1) if config.use_post_quant_conv else None

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and log-variance of the latents, (B, C, h, w) each.

        h = H / downscale, rounded down at each stage. The log-variance is not clamped.
        """
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents (B, C, h, w) -> images (B, 3, h * downscale, w * downscale), not clamped."""
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return self.decoder(z)

    def to_latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images in [-1, 1] -> scaled latents (B, latent_channels, h, w): the mean of the posterior.

        noise: standard normal, of the shape of the latents; gives a sample of the posterior instead.
        """
        mean, logvar = self.encode(images)
        if noise is not None:
            mean = mean + posterior_std(logvar) * noise
        return mean * self.config.scaling_factor

    def from_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, latent_channels, h, w) -> images (B, 3, H, W), about [-1, 1] and not clamped."""
        return self.decode(latents / self.config.scaling_factor)


def posterior_std(logvar: Tensor) -> Tensor:
    """Standard deviation of the posterior, from the log-variance clamped to [-30, 20] as in diffusers."""
    return torch.exp(0.5 * logvar.clamp(-30.0, 20.0))


def decode_tiled(vae: AutoencoderKL, latents: Tensor, tile: int = 64, overlap: int = 16) -> Tensor:
    """`vae.from_latents` in square tiles of `tile` latent positions, whose memory does not depend on the image size.

    Tiles overlap by `overlap` positions and are blended there. Norms are computed per tile, so uniform areas may differ
    slightly between tiles. Latents no larger than a tile are decoded at once.
    """
    height, width = latents.shape[2:]
    if max(height, width) <= tile:
        return vae.from_latents(latents)
    image = weight = None
    for top in _tile_starts(height, tile, overlap):
        for left in _tile_starts(width, tile, overlap):
            part = vae.from_latents(latents[:, :, top : top + tile, left : left + tile])
            factor = part.shape[2] // min(tile, height)
            if image is None:
                image = part.new_zeros(*part.shape[:2], height * factor, width * factor)
                weight = torch.zeros_like(image[:1, :1])
            rise = overlap * factor
            fade = _fade(part.shape[2], rise, part)[:, None] * _fade(part.shape[3], rise, part)[None, :]
            rows = slice(top * factor, top * factor + part.shape[2])
            columns = slice(left * factor, left * factor + part.shape[3])
            image[..., rows, columns] += part * fade
            weight[..., rows, columns] += fade
    return image / weight


def _tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Starts of tiles that cover `length` and overlap by at least `overlap`."""
    last = max(0, length - tile)
    return [*range(0, last, tile - overlap), last]


def _fade(length: int, rise: int, like: Tensor) -> Tensor:
    """Blending weights: 1 inside, falling to 0 over `rise` pixels at both ends (normalised at the image border)."""
    ramp = (torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) / max(1, rise)
    return torch.minimum(ramp, ramp.flip(0)).clamp(max=1)
