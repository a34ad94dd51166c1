"""The U-Net of Stable Diffusion 1.x, 2.x and XL, and of their block-removed students.

`UNetConfig` is the architecture as data. State-dict names are those of diffusers, so official weights load without
conversion. The network returns its intermediate features (`return_features=True`): no hooks are needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidistill.models.layers import (
    Downsample,
    ResnetBlock,
    TimestepEmbedding,
    Transformer,
    Upsample,
    timestep_embedding,
)
from minidistill.models.unet_config import UNetConfig


def run(module: nn.Module, *args: Tensor, checkpointing: bool) -> Tensor:
    """module(*args); with `checkpointing` its activations are recomputed in the backward pass instead of stored.

    Non-reentrant, because the reentrant variant detaches features that are read from inside the region.
    """
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(module, *args, use_reentrant=False)
    return module(*args)


def make_resnet(config: UNetConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    """A residual block with the config's norms and time embedding."""
    emb_dim = 4 * config.block_out_channels[0]
    return ResnetBlock(in_channels, out_channels, emb_dim, config.norm_num_groups, config.norm_eps)


def make_transformer(config: UNetConfig, stage: int, depth: int) -> Transformer:
    """A transformer of the width and heads of resolution level `stage` (0 is the outermost)."""
    return Transformer(
        config.block_out_channels[stage],
        config.attention_head_dim[stage],
        depth,
        config.cross_attention_dim,
        groups=config.norm_num_groups,
        linear=config.use_linear_projection,
        upcast=config.upcast_attention,
    )


class DownBlock(nn.Module):
    """A stage of the encoder: resnets, each followed by a transformer if the stage attends to text; a downsampler."""

    def __init__(self, config: UNetConfig, stage: int):
        super().__init__()
        channels = config.block_out_channels
        depths = config.transformer_depths()[0][stage]
        attends = config.down_block_types[stage] == "CrossAttnDownBlock2D"
        inputs = [channels[max(stage - 1, 0)]] + [channels[stage]] * (len(depths) - 1)
        self.resnets = nn.ModuleList(make_resnet(config, n, channels[stage]) for n in inputs)
        self.attentions = nn.ModuleList(make_transformer(config, stage, n) for n in depths if attends)
        is_last = stage == len(channels) - 1
        self.downsamplers = nn.ModuleList([] if is_last else [Downsample(channels[stage])])

    def forward(
        self, h: Tensor, emb: Tensor, context: Tensor, checkpointing: bool
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """-> (output, skip connections, output of the last transformer before its residual, if any)."""
        skips, proj_out = [], None
        for j, resnet in enumerate(self.resnets):
            h = run(resnet, h, emb, checkpointing=checkpointing)
            if len(self.attentions):
                proj_out = run(self.attentions[j], h, context, checkpointing=checkpointing)
                h = h + proj_out
            skips.append(h)
        for downsample in self.downsamplers:
            h = downsample(h)
            skips.append(h)
        return h, skips, proj_out


class MidBlock(nn.Module):
    """The middle block: resnet, transformer, resnet; for UNetMidBlock2D a single resnet."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        channels = config.block_out_channels[-1]
        attends = config.mid_block_type == "UNetMidBlock2DCrossAttn"
        depth = config.transformer_depths()[1]
        self.resnets = nn.ModuleList(make_resnet(config, channels, channels) for _ in range(1 + attends))
        self.attentions = nn.ModuleList([make_transformer(config, -1, depth)] if attends else [])

    def forward(self, h: Tensor, emb: Tensor, context: Tensor, checkpointing: bool) -> Tensor:
        h = run(self.resnets[0], h, emb, checkpointing=checkpointing)
        for attention in self.attentions:
            h = h + run(attention, h, context, checkpointing=checkpointing)
            h = run(self.resnets[1], h, emb, checkpointing=checkpointing)
        return h


class UpBlock(nn.Module):
    """A stage of the decoder: as in the encoder, but each resnet also reads a skip connection; an upsampler."""

    def __init__(self, config: UNetConfig, index: int):
        super().__init__()
        channels = config.block_out_channels
        stage = len(channels) - 1 - index  # the resolution level, as in the encoder
        depths = config.transformer_depths()[2][index]
        attends = config.up_block_types[index] == "CrossAttnUpBlock2D"
        # The first input comes from the stage below; the last skip from the stage above, or from conv_in.
        inputs = [channels[min(stage + 1, len(channels) - 1)]] + [channels[stage]] * (len(depths) - 1)
        skips = [channels[stage]] * (len(depths) - 1) + [channels[max(stage - 1, 0)]]
        widths = [n + m for n, m in zip(inputs, skips, strict=True)]
        self.resnets = nn.ModuleList(make_resnet(config, n, channels[stage]) for n in widths)
        self.attentions = nn.ModuleList(make_transformer(config, stage, n) for n in depths if attends)
        self.upsamplers = nn.ModuleList([] if stage == 0 else [Upsample(channels[stage])])

    def forward(
        self, h: Tensor, skips: list[Tensor], size: torch.Size, emb: Tensor, context: Tensor, checkpointing: bool
    ) -> tuple[Tensor, Tensor | None]:
        """skips: those of this stage, used from the last to the first; size: (h, w) to upsample to.

        -> (output, output of the last transformer before its residual, if any).
        """
        proj_out = None
        for j, resnet in enumerate(self.resnets):
            h = run(resnet, torch.cat([h, skips[-1 - j]], dim=1), emb, checkpointing=checkpointing)
            if len(self.attentions):
                proj_out = run(self.attentions[j], h, context, checkpointing=checkpointing)
                h = h + proj_out
        for upsample in self.upsamplers:
            h = upsample(h, size)
        return h, proj_out


class UNet(nn.Module):
    """The denoising network: predicts eps, v or x0 from noisy latents, timesteps and text states (arXiv 2112.10752)."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # True: recompute activations in the backward pass
        channels, stages = config.block_out_channels, range(len(config.block_out_channels))
        emb_dim = 4 * channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], emb_dim)
        if config.addition_embed_type is not None:
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, emb_dim)
        self.down_blocks = nn.ModuleList(DownBlock(config, stage) for stage in stages)
        self.mid_block = MidBlock(config) if config.mid_block_type else None
        self.up_blocks = nn.ModuleList(UpBlock(config, index) for index in stages)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights: inputs are cast to it, outputs have it."""
        return self.conv_in.weight.dtype

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        added_cond: dict[str, Tensor] | None = None,
        return_features: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Predict from x (B, C, h, w), timesteps t (B,) or 0-d, and text states context (B, L, D).

        added_cond, for SDXL: "text_embeds" (B, 1280), the pooled text, and "time_ids" (B, 6), in pixels: original
        height and width, crop top and left, target height and width.
        Returns (B, C_out, h, w); with return_features also the intermediate features by name: the outputs of the
        stages, "down.i", "mid" and "up.i", and those of their last transformers before the residual,
        "down.i.proj_out" and "up.i.proj_out".
        ValueError: inputs that do not fit the config.
        """
        h, skips, emb, features = self.encode(x, t, context, added_cond)
        context = context.to(self.dtype)
        for i, block in enumerate(self.up_blocks):
            skips, own = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
            # The size of the next skip: not the double where a size was odd. The last stage does not upsample.
            size = (skips or own)[-1].shape[-2:]
            h, proj_out = block(h, own, size, emb, context, self.gradient_checkpointing)
            add_features(features, f"up.{i}", h, proj_out)
        out = self.conv_out(F.silu(self.conv_norm_out(h)))
        return (out, features) if return_features else out

    def encode(
        self, x: Tensor, t: Tensor, context: Tensor, added_cond: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor, dict[str, Tensor]]:
        """The encoder and the mid block, also the backbone of SDXL-Lightning's discriminator.

        Arguments as of `forward`. Returns the hidden state, the skips, the time embedding and the features.
        """
        self._check_inputs(x, context, added_cond)
        x, context, features = x.to(self.dtype), context.to(self.dtype), {}
        emb = F.silu(self.embed(t.to(x.device).expand(x.shape[0]), added_cond))
        h = self.conv_in(x)
        skips = [h]
        for i, block in enumerate(self.down_blocks):
            h, more, proj_out = block(h, emb, context, self.gradient_checkpointing)
            skips.extend(more)
            add_features(features, f"down.{i}", h, proj_out)
        if self.mid_block is not None:
            h = features["mid"] = self.mid_block(h, emb, context, self.gradient_checkpointing)
        return h, skips, emb, features

    def embed(self, t: Tensor, added_cond: dict[str, Tensor] | None = None) -> Tensor:
        """Timesteps (B,), for SDXL also pooled text and sizes -> embedding (B, 4 * block_out_channels[0])."""
        emb = self.time_embedding(timestep_embedding(t, self.config.block_out_channels[0]).to(self.dtype))
        if added_cond is None:
            return emb
        pooled, ids = added_cond["text_embeds"], added_cond["time_ids"]
        sizes = timestep_embedding(ids.flatten(), self.config.addition_time_embed_dim)  # (B, 6) -> (B*6, 256)
        sizes = sizes.unflatten(0, ids.shape).flatten(1)  # (B*6, 256) -> (B, 1536)
        return emb + self.add_embedding(torch.cat([pooled.to(self.dtype), sizes.to(self.dtype)], dim=-1))

    def _check_inputs(self, x: Tensor, context: Tensor, added_cond: dict[str, Tensor] | None) -> None:
        channels, width = self.config.in_channels, self.config.cross_attention_dim
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"U-Net: x must be (B, {channels}, h, w), not {tuple(x.shape)}")
        if context.dim() != 3 or context.shape[2] != width:
            raise ValueError(f"U-Net: context must be (B, L, {width}), not {tuple(context.shape)}")
        if (added_cond is not None) != (self.config.addition_embed_type is not None):
            word = "needs" if added_cond is None else "takes no"
            raise ValueError(f"U-Net: this model {word} added_cond (text_embeds and time_ids)")


def add_features(features: dict[str, Tensor], name: str, h: Tensor, proj_out: Tensor | None) -> None:
    """Add the output of a stage as `name`, and that of its last transformer, if any, as `name`.proj_out."""
    features[name] = h
    if proj_out is not None:
        features[f"{name}.proj_out"] = proj_out


def random_inputs(
    config: UNetConfig, batch: int, height: int, width: int, tokens: int = 77
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor] | None]:
    """Random inputs for one call of a U-Net: x (B, C, h, w), t (B,), context (B, L, D), added_cond or None."""
    added_cond = None
    if config.addition_embed_type is not None:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added_cond = {"text_embeds": torch.randn(batch, pooled), "time_ids": torch.rand(batch, 6) * 1024}
    x = torch.randn(batch, config.in_channels, height, width)
    context = torch.randn(batch, tokens, config.cross_attention_dim)
    return x, torch.rand(batch) * 999, context, added_cond


SD15 = UNetConfig(sample_size=64, cross_attention_dim=768)
SD21 = UNetConfig(  # the 768-pixel model, which predicts v
    sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
    use_linear_projection=True, upcast_attention=True,
)  # fmt: skip
SDXL = UNetConfig(
    sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), use_linear_projection=True,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
