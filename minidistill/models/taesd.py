"""TAESD: a tiny autoencoder for the latents of Stable Diffusion, for previews and fast decoding.

One file, on torch alone. The network is Ollin Boer Bohan's TAESD (github.com/madebyollin/taesd); SDXL (TAESDXL) has the
same one with other weights. State-dict names are those of diffusers' `AutoencoderTiny`. It can replace
`models.vae.AutoencoderKL` where only `config`, `to_latents` and `from_latents` are used.

Two details are easy to get wrong and hard to notice:
- it is trained on the U-Net's latents, which are already scaled: its own `scaling_factor` is 1;
- it is trained on images in [0, 1]. Here they are in [-1, 1], as everywhere else, and converted inside.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Other keys of a diffusers config, with their only supported values.
FIXED = {
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
    "latent_magnitude": 3,  # this and the next store latents as images: not part of the network
    "latent_shift": 0.5,
    "force_upcast": False,
    "shift_factor": 0.0,
}


@dataclass(frozen=True)
class TinyConfig:
    """The architecture. All stages have the same width; `num_*_blocks` are residual blocks per stage."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    width: int = 64
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)  # downsampling before all stages but the first
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)  # upsampling after all stages but the last
    scaling_factor: float = 1.0  # latents of the U-Net = latents of the encoder * scaling_factor

    @property
    def downscale(self) -> int:
        """Image side / latent side: 8."""
        return 2 ** (len(self.num_encoder_blocks) - 1)

    @classmethod
    def from_dict(cls, d: dict) -> TinyConfig:
        """From the config.json of diffusers' `AutoencoderTiny`; absent keys take its defaults.

        ValueError: a setting that is not supported (stages of different widths, another activation).
        """
        d = {key: list(v) if isinstance(v, tuple) else v for key, v in d.items() if v is not None and key[0] != "_"}
        known = {field.name: d[field.name] for field in fields(cls) if field.name in d and field.name != "width"}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
        width = d.get("encoder_block_out_channels", [cls.width])[0]
        config = cls(**values, width=width)
        written = config.to_dict()
        written["block_out_channels"] = written["decoder_block_out_channels"]
        for key, value in d.items():
            if value != written.get(key):
                raise ValueError(f"TAESD config: {key} = {value!r} is not supported (only {written.get(key)!r} is)")
        return config

    def to_dict(self) -> dict:
        """A config.json from which diffusers builds the same `AutoencoderTiny`."""
        encoder, decoder = list(self.num_encoder_blocks), list(self.num_decoder_blocks)
        return {
            "_class_name": "AutoencoderTiny",
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "latent_channels": self.latent_channels,
            "encoder_block_out_channels": [self.width] * len(encoder),
            "decoder_block_out_channels": [self.width] * len(decoder),
            "num_encoder_blocks": encoder,
            "num_decoder_blocks": decoder,
            "scaling_factor": self.scaling_factor,
            **FIXED,
        }


class Block(nn.Module):
    """relu(x + conv(relu(conv(relu(conv(x)))))): no norms, constant width."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def _conv(in_channels: int, out_channels: int, **options) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, **options)


class Encoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> latents (B, latent_channels, H / 8, W / 8)."""

    def __init__(self, config: TinyConfig):
        super().__init__()
        width, layers = config.width, []
        for stage, blocks in enumerate(config.num_encoder_blocks):
            layers.append(_conv(width, width, stride=2, bias=False) if stage else _conv(config.in_channels, width))
            layers += [Block(width) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, _conv(width, config.latent_channels))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers((images + 1) / 2)


class Decoder(nn.Module):
    """Latents (B, latent_channels, h, w) -> images (B, 3, 8 h, 8 w), about [-1, 1]."""

    def __init__(self, config: TinyConfig):
        super().__init__()
        width, layers = config.width, [_conv(config.latent_channels, config.width), nn.ReLU()]
        for blocks in config.num_decoder_blocks[:-1]:
            layers += [Block(width) for _ in range(blocks)]
            layers += [nn.Upsample(scale_factor=2), _conv(width, width, bias=False)]
        layers += [Block(width) for _ in range(config.num_decoder_blocks[-1])]
        self.layers = nn.Sequential(*layers, _conv(width, config.out_channels))

    def forward(self, latents: Tensor) -> Tensor:
        x = torch.tanh(latents / 3) * 3  # limits latents to +-3: early steps are out of range
        return self.layers(x) * 2 - 1


class AutoencoderTiny(nn.Module):
    """Images <-> latents, with the interface of `AutoencoderKL`."""

    def __init__(self, config: TinyConfig | None = None):
        super().__init__()
        self.config = config or TinyConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> unscaled latents (B, latent_channels, h, w), and log-variances of -inf.

        Unlike `AutoencoderKL`, this encoder is deterministic: its posterior has no variance.
        """
        latents = self.encoder(images)
        return latents, torch.full_like(latents, -torch.inf)

    def to_latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images in [-1, 1] -> scaled latents (B, latent_channels, h, w).

        noise: has no effect, because the encoder is deterministic; accepted for the interface of `AutoencoderKL`.
        """
        return self.encoder(images) * self.config.scaling_factor

    def from_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, latent_channels, h, w) -> images (B, 3, H, W), about [-1, 1] and not clamped."""
        return self.decoder(latents / self.config.scaling_factor)
