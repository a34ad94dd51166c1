"""The names of the original Stable Diffusion code (LDM; sgm for SDXL), which single-file checkpoints have.

LDM numbers the layers of a U-Net in one row: input_blocks.1, .2, ... hold a resnet and perhaps a transformer each,
or a downsampler alone. Which of them are a stage follows from where the downsamplers are, so one walk along the
row pairs both spellings (`_pair_unet`): it runs on the row that a config asks for when a file is written, and on
the row found in a file when it is read.

Students have fewer layers in a stage, and their files come in two numberings. We write the dense one, which is
what LDM's own code, diffusers' `from_single_file` and ComfyUI make of a network with one layer in a stage. The other
keeps the numbers of a network with two, with gaps: diffusers' conversion script has them built in, and
stable-diffusion.cpp reads its output. Gaps change nothing for the walk, so both are read.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from minidistill.errors import InputError
from minidistill.models.clip import CLIPTextConfig, CLIPTextModel
from minidistill.models.unet import UNet, UNetConfig
from minidistill.models.vae import AutoencoderKL, VAEConfig

Pairs = dict[str, str]  # a module's name in our models -> its name in LDM
Row = Sequence[tuple[int, set[str]]]  # the numbered blocks, and what is in each: "0", "1", "0.op", "1.conv", "2.conv"

UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.attentions.0": "middle_block.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
TEXT_ENDS = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
TEXT_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.q_proj.weight": "attn.in_proj_weight",  # q, k and v are one tensor there, in this order
    "self_attn.k_proj.weight": "attn.in_proj_weight",
    "self_attn.v_proj.weight": "attn.in_proj_weight",
    "self_attn.q_proj.bias": "attn.in_proj_bias",
    "self_attn.k_proj.bias": "attn.in_proj_bias",
    "self_attn.v_proj.bias": "attn.in_proj_bias",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


# from a config: our name -> LDM's, for every tensor


def ldm_unet_names(config: UNetConfig) -> dict[str, str]:
    """{our name: LDM name} for every tensor of a U-Net, without `model.diffusion_model.`; dense numbering."""
    return _spell(_names(UNet, config), _pair_unet(*_rows_of(config)))


def ldm_vae_names(config: VAEConfig) -> dict[str, str]:
    """{our name: LDM name} for every tensor of a VAE, without `first_stage_model.`."""
    pairs = _pair_vae(len(config.block_out_channels), config.layers_per_block)
    return _spell(_names(AutoencoderKL, config), pairs)


def open_clip_names(config: CLIPTextConfig, projection: bool) -> dict[str, str]:
    """{our name: open_clip name} for every tensor of a text encoder; q, k and v share one name."""
    return _spell(_names(CLIPTextModel, config, projection), _pair_text(config.num_hidden_layers))


def _names(model: type[nn.Module], *args) -> list[str]:
    with torch.device("meta"):
        return list(model(*args).state_dict())


def _spell(names: Iterable[str], pairs: Mapping[str, str]) -> dict[str, str]:
    return {name: _swap(name, pairs) or name for name in names}


# writing: the tensors of a model, by LDM's names


def to_ldm_unet(tensors: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """A U-Net's state dict in LDM's names. The tensors are the same."""
    names = ldm_unet_names(config)
    return {names[name]: tensor for name, tensor in tensors.items()}


def to_ldm_vae(tensors: Mapping[str, Tensor], config: VAEConfig) -> dict[str, Tensor]:
    """A VAE's state dict in LDM's names; its attention's matrices become 1x1 convolutions."""
    names = ldm_vae_names(config)
    is_matrix = {name for name, tensor in tensors.items() if ".attentions.0.to_" in name and tensor.ndim == 2}
    return {names[name]: t[:, :, None, None] if name in is_matrix else t for name, t in tensors.items()}


def to_open_clip(tensors: Mapping[str, Tensor], config: CLIPTextConfig) -> dict[str, Tensor]:
    """A text encoder's state dict in open_clip's names: q, k, v stacked, text projection (in, out)."""
    names = open_clip_names(config, "text_projection.weight" in tensors)
    result = {name: tensors[ours] for ours, name in names.items() if ".attn.in_proj_" not in name}
    for name in dict.fromkeys(name for name in names.values() if ".attn.in_proj_" in name):
        layer, _, kind = name.removeprefix("transformer.resblocks.").partition(".attn.in_proj_")
        ours = f"text_model.encoder.layers.{layer}.self_attn"
        result[name] = torch.cat([tensors[f"{ours}.{part}_proj.{kind}"] for part in "qkv"])
    if "text_projection" in result:
        result["text_projection"] = result["text_projection"].T  # open_clip computes x @ projection
    return result


# reading: LDM's names, whatever the architecture, to ours


def from_ldm_unet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A U-Net in LDM's names, either numbering -> our names. InputError: a name that is not LDM's U-Net's.

    Names that are ours already stay: diffusers' conversion script leaves those it does not expect, which in the
    smallest students are the attentions of up_blocks.0.
    """
    pairs = _pair_unet(_row_in(tensors, "input_blocks"), _row_in(tensors, "output_blocks"))
    return _rename(tensors, pairs, "U-Net", own=("down_blocks.", "up_blocks.", "mid_block."))


def from_ldm_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE in LDM's names -> our names. InputError: a name that is not LDM's VAE's."""
    indices = [re.match(r"(?:encoder\.down|decoder\.up)\.(\d{1,3})\.(?:block\.(\d{1,3})\.)?", name) for name in tensors]
    stages = 1 + max((int(found[1]) for found in indices if found), default=0)
    layers = max((int(found[2]) for found in indices if found and found[2]), default=1)  # up has one more than down
    return _rename(tensors, _pair_vae(stages, layers), "VAE")


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder in open_clip's names -> our names. InputError: a name or a shape that is not open_clip's.

    The text projection may be open_clip's bare parameter (in, out), or diffusers' export of a linear layer,
    `text_projection.weight`, which is (out, in) as ours. Both are often square: only the name tells them apart.
    """
    numbers = [re.match(r"transformer\.resblocks\.(\d{1,3})\.", name) for name in tensors]
    layers = 1 + max((int(found[1]) for found in numbers if found), default=-1)
    plain: dict[str, Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stacked = re.fullmatch(r"transformer\.resblocks\.(\d{1,3})\.attn\.in_proj_(weight|bias)", name)
        if stacked and (tensor.ndim == 0 or len(tensor) % 3):
            raise InputError(f"{name} is {tuple(tensor.shape)}: it should be three matrices stacked, q, k and v")
        if stacked:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                result[f"text_model.encoder.layers.{stacked[1]}.self_attn.{part}_proj.{stacked[2]}"] = piece
        elif name == "text_projection":
            result["text_projection.weight"] = tensor.T
        elif name == "text_projection.weight":
            result[name] = tensor
        else:
            plain[name] = tensor
    return result | _rename(plain, _pair_text(layers), "text encoder")


# the two spellings of every module


def _rows_of(config: UNetConfig) -> tuple[Row, Row]:
    """What the numbered blocks of a U-Net hold, densely numbered: (input_blocks from 1, output_blocks from 0)."""
    last = len(config.block_out_channels) - 1
    down: list[set[str]] = []
    up: list[set[str]] = []
    for i, layers in enumerate(config.layers_per_block):
        parts = {"0", "1"} if config.down_block_types[i] == "CrossAttnDownBlock2D" else {"0"}
        down += [set(parts) for _ in range(layers)]
        down += [{"0.op"}] * (i < last)
    for i, layers in enumerate(config.layers_per_block[::-1]):
        parts = {"0", "1"} if config.up_block_types[i] == "CrossAttnUpBlock2D" else {"0"}
        up += [set(parts) for _ in range(layers + 1)]
        up[-1] |= {f"{len(parts)}.conv"} if i < last else set()
    return list(enumerate(down, 1)), list(enumerate(up))


def _row_in(names: Iterable[str], side: str) -> Row:
    """What the numbered blocks in a file hold, in order; without conv_in, which is input_blocks.0."""
    found: dict[int, set[str]] = defaultdict(set)
    for name in names:
        match = re.match(rf"{side}\.(\d{{1,3}})\.(\d(?:\.(?:op|conv))?)\.", name)
        if match and (side, match[1]) != ("input_blocks", "0"):
            found[int(match[1])].add(match[2])
    return sorted(found.items())


def _pair_unet(down: Row, up: Row) -> Pairs:
    """Walk along the numbered blocks: a downsampler or an upsampler ends a stage.

    Some pairs are of modules that are not there, such as the resnet in a block that has only an upsampler.
    """
    pairs = dict(UNET_ENDS)
    pairs |= _pair_parts("mid_block.resnets.0", "middle_block.0", UNET_RESNET)
    pairs |= _pair_parts("mid_block.resnets.1", "middle_block.2", UNET_RESNET)
    i = j = 0
    for n, parts in down:
        if "0.op" in parts:
            pairs[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            i, j = i + 1, 0
        else:
            pairs |= _pair_parts(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0", UNET_RESNET)
            pairs[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
            j += 1
    i = j = 0
    for n, parts in up:
        pairs |= _pair_parts(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0", UNET_RESNET)
        pairs[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
        j += 1
        for part in parts & {"1.conv", "2.conv"}:
            pairs[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n}.{part}"
            i, j = i + 1, 0
    return pairs


def _pair_vae(stages: int, layers: int) -> Pairs:
    pairs = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        pairs |= {f"{half}.{end}": f"{half}.{end}" for end in ("conv_in", "conv_out")}
        pairs[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for k in range(2):
            pairs |= _pair_parts(f"{half}.mid_block.resnets.{k}", f"{half}.mid.block_{k + 1}", VAE_RESNET)
        for ours, ldm in VAE_ATTENTION.items():
            pairs[f"{half}.mid_block.attentions.0.{ours}"] = f"{half}.mid.attn_1.{ldm}"
    for i in range(stages):
        up = stages - 1 - i  # LDM numbers the decoder's stages from the image inwards
        for j in range(layers + 1):
            pairs |= _pair_parts(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}", VAE_RESNET)
            pairs |= _pair_parts(f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{up}.block.{j}", VAE_RESNET)
        pairs[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        pairs[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{up}.upsample.conv"
    return pairs


def _pair_text(layers: int) -> Pairs:
    pairs = dict(TEXT_ENDS)
    for n in range(layers):
        pairs |= _pair_parts(f"text_model.encoder.layers.{n}", f"transformer.resblocks.{n}", TEXT_LAYER)
    return pairs


def _pair_parts(ours: str, ldm: str, parts: Mapping[str, str]) -> Pairs:
    return {f"{ours}.{part}": f"{ldm}.{original}" for part, original in parts.items()}


def _swap(name: str, pairs: Mapping[str, str]) -> str | None:
    """`name` with the part of it that `pairs` knows, the longest, replaced; None where it knows none."""
    head = name
    while head and head not in pairs:
        head = head.rpartition(".")[0]
    return pairs[head] + name[len(head) :] if head else None


def _rename(tensors: Mapping[str, Tensor], pairs: Pairs, what: str, own: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """LDM's names -> ours; names that start as in `own` are ours already."""
    ours = {ldm: name for name, ldm in pairs.items()}
    result: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        new = _swap(name, ours) or (name if name.startswith(own) and own else None)
        if new is None:
            unknown.append(name)
        elif new in result:
            raise InputError(f"its {what} holds {new} twice, in two spellings")
        else:
            result[new] = tensor
    if unknown:
        raise InputError(f"{len(unknown)} tensors of its {what} are unknown ({first_few(unknown)})")
    return result


def first_few(names: Sequence[str]) -> str:
    """At most three names, for a message."""
    return ", ".join([*names[:3], *["..."] * (len(names) > 3)])
