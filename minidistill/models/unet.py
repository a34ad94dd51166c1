"""The U-Net of Stable Diffusion 1.x, 2.x and XL, and of their block-removed students.

`UNetConfig` is the architecture as data: every student (BK-SDM, Segmind) is only another value of it.
State-dict names are diffusers', so official weights load as they are. The network returns its features
(`return_features=True`), so distillation needs no hooks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

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

DOWN_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_TYPES = ("CrossAttnUpBlock2D", "UpBlock2D")
MID_TYPES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)  # the second is a single resnet (SSD-1B)
PER_STAGE = ("layers_per_block", "attention_head_dim", "transformer_layers_per_block")

# What a diffusers config can also say, with the only value implemented here (diffusers' own default).
FIXED = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}


@dataclass(frozen=True)
class UNetConfig:
    """A U-Net's architecture, in the names and with the defaults of diffusers' config.json.

    What is given per stage (a resolution level, outermost first) is kept as a tuple; an int that stands for
    all stages is spread out to one. Raises ValueError if the parts do not fit together.
    """

    sample_size: int | tuple[int, int] | None = None  # latent size it was trained at; the network takes any
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2  # of a down stage; an up stage has one more
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    # Depth of the transformers, per stage. A stage may give each of its transformers a depth (SSD-1B); then
    # the up stages, innermost first, must be given too.
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    attention_head_dim: int | tuple[int, ...] = 8  # the NUMBER of heads per stage: a historical misnomer
    use_linear_projection: bool = False
    upcast_attention: bool = False
    addition_embed_type: str | None = None  # "text_time" for SDXL
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    def __post_init__(self):
        for name in PER_STAGE:
            value = getattr(self, name)
            if isinstance(value, int):
                object.__setattr__(self, name, (value,) * len(self.block_out_channels))
        self._check_names()
        self._check_numbers()

    def _check_names(self) -> None:
        for name, known in (("down_block_types", DOWN_TYPES), ("up_block_types", UP_TYPES)):
            for kind in getattr(self, name):
                if kind not in known:
                    raise ValueError(f"U-Net config: {name} {kind!r} is not one of {known}")
        if self.mid_block_type not in MID_TYPES:
            raise ValueError(f"U-Net config: mid_block_type {self.mid_block_type!r} not one of {MID_TYPES}")
        if self.addition_embed_type not in (None, "text_time"):
            raise ValueError(f"U-Net config: addition_embed_type {self.addition_embed_type!r} is unknown")
        if self.addition_embed_type is not None:
            for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
                if not getattr(self, name):
                    raise ValueError(f"U-Net config: addition_embed_type text_time needs {name}")

    def _check_numbers(self) -> None:
        stages, groups = len(self.block_out_channels), self.norm_num_groups
        blocks = ("down_block_types", "up_block_types")
        for name in (*blocks, *PER_STAGE, "reverse_transformer_layers_per_block"):
            value = getattr(self, name)
            if value is not None and len(value) != stages:
                raise ValueError(f"U-Net config: {name} has {len(value)} entries for {stages} stages")
        for channels, heads in zip(self.block_out_channels, self.attention_head_dim, strict=True):
            if min(groups, heads) < 1 or channels % groups or channels % heads or channels % 2:
                raise ValueError(
                    f"U-Net config: {channels} channels must be even and divide into {groups} groups "
                    f"(norm_num_groups) and {heads} heads (attention_head_dim)"
                )
        self.transformer_depths()

    def transformer_depths(self) -> tuple[list[tuple[int, ...]], int, list[tuple[int, ...]]]:
        """Depth of every transformer: (per down stage one for each layer, mid, per up stage likewise)."""
        down, up = self.transformer_layers_per_block, self.reverse_transformer_layers_per_block
        if up is None:
            if any(isinstance(depth, tuple) for depth in down):
                raise ValueError(
                    "U-Net config: transformer_layers_per_block with lists inside needs "
                    "reverse_transformer_layers_per_block for the up stages"
                )
            up = down[::-1]

        def per_layer(depth: int | tuple[int, ...], layers: int) -> tuple[int, ...]:
            depths = depth if isinstance(depth, tuple) else (depth,) * layers
            if len(depths) != layers:
                raise ValueError(f"U-Net config: {len(depths)} transformer depths for {layers} layers")
            return depths

        layers = self.layers_per_block
        return (
            [per_layer(depth, n) for depth, n in zip(down, layers, strict=True)],
            down[-1][0] if isinstance(down[-1], tuple) else down[-1],
            [per_layer(depth, n + 1) for depth, n in zip(up, layers[::-1], strict=True)],
        )

    @classmethod
    def from_dict(cls, d: dict) -> UNetConfig:
        """Read a diffusers config.json of any version: absent keys take the defaults, "_..." are ignored.

        Raises ValueError naming the first key that asks for something this U-Net does not have.
        """
        defaults = {f.name: f.default for f in fields(cls)}
        values = {}
        for name, value in d.items():
            if name in defaults:
                if value is None and defaults[name] not in (None, False) and name != "mid_block_type":
                    raise ValueError(f"U-Net config: {name} must not be null")
                values[name] = False if value is None and defaults[name] is False else _tuples(value)
            elif not name.startswith("_"):
                only = FIXED.get(name)  # None for a key of a version yet to come: it has to be off
                both_off = value in (None, False) and only in (None, False)
                if value != only and not both_off:
                    raise ValueError(f"U-Net config: {name} = {value!r} is not supported")
        width = values.get("cross_attention_dim")
        if isinstance(width, tuple):
            if len(set(width)) > 1:
                raise ValueError(f"U-Net config: cross_attention_dim {width} differs between stages")
            values["cross_attention_dim"] = width[0]
        return cls(**values)

    def to_dict(self) -> dict:
        """A config.json with every key diffusers knows; its UNet2DConditionModel builds this net from it."""
        d = {**FIXED, **{f.name: _lists(getattr(self, f.name)) for f in fields(self)}}
        for name in PER_STAGE:  # official files give one number where all stages agree
            if all(value == d[name][0] for value in d[name]) and isinstance(d[name][0], int):
                d[name] = d[name][0]
        return {"_class_name": "UNet2DConditionModel", **dict(sorted(d.items()))}


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _lists(value):
    return [_lists(v) for v in value] if isinstance(value, tuple) else value


def run(module: nn.Module, *args: Tensor, checkpointing: bool) -> Tensor:
    """module(*args), keeping only its inputs for the backward pass if `checkpointing`.

    Non-reentrant, because the reentrant kind cuts the gradient of whatever is taken out of the region.
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
    """A stage of the encoder: resnets, a transformer after each if it attends to text, then a downsampler."""

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
        """-> (output, skips for the decoder, the last transformer's output before its residual, if any)."""
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
    """The innermost block: resnet, transformer, resnet; or for UNetMidBlock2D a single resnet."""

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
    """A stage of the decoder: like the encoder's, but each resnet takes in a skip; then an upsampler."""

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
        self,
        h: Tensor,
        skips: list[Tensor],
        size: torch.Size,
        emb: Tensor,
        context: Tensor,
        *,
        checkpointing: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """skips: this stage's own, used from the end; size: what to upsample to. -> (output, proj_out)."""
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
    """The denoising network: latents, timesteps and text states in; noise, velocity or clean latents out."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # set it to recompute activations in backward, not keep them
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
        """The weights' dtype: inputs are cast to it, and outputs have it."""
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

        added_cond is for SDXL: "text_embeds" (B, 1280), the pooled text, and "time_ids" (B, 6), in pixels:
        original height and width, crop top and left, target height and width.
        Returns (B, C_out, h, w); with return_features also a dict of what the stages put out: "down.i",
        "mid", "up.i", and "down.i.proj_out" / "up.i.proj_out", the stage's last transformer before its
        residual. Raises ValueError for inputs the config does not take.
        """
        h, skips, emb, features = self.encode(x, t, context, added_cond)
        context = context.to(self.dtype)
        for i, block in enumerate(self.up_blocks):
            skips, own = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
            # Upsample to the next skip's size: not the double where a size was odd. The last stage has none.
            size = (skips or own)[-1].shape[-2:]
            h, proj_out = block(h, own, size, emb, context, checkpointing=self.gradient_checkpointing)
            note_features(features, f"up.{i}", h, proj_out)
        out = self.conv_out(F.silu(self.conv_norm_out(h)))
        return (out, features) if return_features else out

    def encode(
        self, x: Tensor, t: Tensor, context: Tensor, added_cond: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor, dict[str, Tensor]]:
        """The first half, through the mid block; it is also the trunk of SDXL-Lightning's discriminator.

        Takes what forward takes. Returns the hidden state, the skips, the time embedding and the features.
        """
        self._check_inputs(x, context, added_cond)
        x, context, features = x.to(self.dtype), context.to(self.dtype), {}
        emb = F.silu(self._embed(t.to(x.device).expand(x.shape[0]), added_cond))
        h = self.conv_in(x)
        skips = [h]
        for i, block in enumerate(self.down_blocks):
            h, more, proj_out = block(h, emb, context, self.gradient_checkpointing)
            skips.extend(more)
            note_features(features, f"down.{i}", h, proj_out)
        if self.mid_block is not None:
            h = features["mid"] = self.mid_block(h, emb, context, self.gradient_checkpointing)
        return h, skips, emb, features

    def _embed(self, t: Tensor, added_cond: dict[str, Tensor] | None) -> Tensor:
        """Embed timesteps (B,), for SDXL also pooled text and sizes -> (B, 4 * block_out_channels[0])."""
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


def note_features(features: dict[str, Tensor], name: str, h: Tensor, proj_out: Tensor | None) -> None:
    """Enter a stage's output as `name`, and its last transformer's, if it has one, as `name`.proj_out."""
    features[name] = h
    if proj_out is not None:
        features[f"{name}.proj_out"] = proj_out


def random_inputs(
    config: UNetConfig, batch: int, height: int, width: int, tokens: int = 77
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor] | None]:
    """Noise in the shapes that a call takes: x (B, C, h, w), t (B,), context (B, L, D), added_cond."""
    added_cond = None
    if config.addition_embed_type is not None:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added_cond = {"text_embeds": torch.randn(batch, pooled), "time_ids": torch.rand(batch, 6) * 1024}
    x, context = (
        torch.randn(batch, config.in_channels, height, width),
        torch.randn(batch, tokens, config.cross_attention_dim),
    )
    return x, torch.rand(batch) * 999, context, added_cond


SD15 = UNetConfig(sample_size=64, cross_attention_dim=768)
SD21 = UNetConfig(  # the 768-pixel model, which predicts v
    sample_size=96,
    cross_attention_dim=1024,
    attention_head_dim=(5, 10, 20, 20),
    use_linear_projection=True,
    upcast_attention=True,
)
SDXL = UNetConfig(
    sample_size=128,
    cross_attention_dim=2048,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
