"""The architecture of a Stable Diffusion U-Net as data: `UNetConfig`, read from and written to config.json.

Every model (SD 1.x, SD 2.x, SDXL) and every block-removed student (BK-SDM, Segmind) is a value of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

KINDS = {  # supported values
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),  # UNetMidBlock2D: a single resnet (SSD-1B)
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": ("text_time", None),
}
MOST_BLOCKS = 1000  # of transformers, and of layers; SDXL has 70. A config of strangers might ask for any number
PER_STAGE = ("layers_per_block", "attention_head_dim", "transformer_layers_per_block")

# Other keys of a diffusers config, with their only supported values (the defaults of diffusers).
FIXED = {
    "act_fn": "silu", "attention_type": "default", "center_input_sample": False, "downsample_padding": 1,
    "class_embed_type": None, "class_embeddings_concat": False, "num_class_embeds": None,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "dropout": 0.0, "num_attention_heads": None,
    "cross_attention_norm": None, "dual_cross_attention": False, "only_cross_attention": False,
    "encoder_hid_dim": None, "encoder_hid_dim_type": None, "addition_embed_type_num_heads": 64,
    "flip_sin_to_cos": True, "freq_shift": 0, "time_embedding_type": "positional", "time_embedding_dim": None,
    "time_embedding_act_fn": None, "time_cond_proj_dim": None, "timestep_post_act": None,
    "mid_block_only_cross_attention": None, "mid_block_scale_factor": 1,
    "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False, "resnet_time_scale_shift": "default",
}  # fmt: skip


@dataclass(frozen=True)
class UNetConfig:
    """A U-Net's architecture, with the names and defaults of diffusers' config.json.

    Values per stage (resolution level, outermost first) are tuples; an int is expanded to a tuple. ValueError: the
    values are unknown or inconsistent.
    """

    sample_size: int | tuple[int, int] | None = None  # size of the latents in training; the network takes any
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
    # Depth of the transformers per stage, or one depth for each of its transformers (SSD-1B); in that case the up
    # stages, innermost first, must be given too.
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    attention_head_dim: int | tuple[int, ...] = 8  # the NUMBER of heads per stage; the name is a historical error
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
        for name, known in KINDS.items():
            value = getattr(self, name)
            for kind in value if isinstance(value, tuple) else (value,):
                if kind not in known:
                    raise ValueError(f"U-Net config: {name} {kind!r} is not one of {known}")
        sizes = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
        if self.addition_embed_type and not all(getattr(self, name) for name in sizes):
            raise ValueError(f"U-Net config: addition_embed_type text_time needs {' and '.join(sizes)}")

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
        """Depth of every transformer: (down stages, one depth per layer; mid block; up stages likewise)."""
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
        if sum(layers) > MOST_BLOCKS:
            raise ValueError(f"U-Net config: {sum(layers)} layers, more than {MOST_BLOCKS}")
        found = (
            [per_layer(depth, n) for depth, n in zip(down, layers, strict=True)],
            down[-1][0] if isinstance(down[-1], tuple) else down[-1],
            [per_layer(depth, n + 1) for depth, n in zip(up, layers[::-1], strict=True)],
        )
        if (total := sum(map(sum, (*found[0], *found[2]))) + found[1]) > MOST_BLOCKS:
            raise ValueError(f"U-Net config: {total} transformer blocks, more than {MOST_BLOCKS}")
        return found

    @classmethod
    def from_dict(cls, d: dict) -> UNetConfig:
        """From the config.json of any diffusers version: absent keys take the defaults, keys "_..." are ignored.

        ValueError: a key has a value that is not supported.
        """
        defaults = {f.name: f.default for f in fields(cls)}
        values = {}
        for name, value in d.items():
            if name in defaults:
                if value is None and defaults[name] not in (None, False) and name != "mid_block_type":
                    raise ValueError(f"U-Net config: {name} must not be null")
                values[name] = False if value is None and defaults[name] is False else _tuples(value)
            elif not name.startswith("_"):
                only = FIXED.get(name)  # a key unknown here, of a later version, must be off
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
        """A complete config.json for diffusers' UNet2DConditionModel."""
        d = {**FIXED, **{f.name: _lists(getattr(self, f.name)) for f in fields(self)}}
        for name in PER_STAGE:  # as in official files: one number where all stages agree
            if all(value == d[name][0] for value in d[name]) and isinstance(d[name][0], int):
                d[name] = d[name][0]
        return {"_class_name": "UNet2DConditionModel", **dict(sorted(d.items()))}


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _lists(value):
    return [_lists(v) for v in value] if isinstance(value, tuple) else value
