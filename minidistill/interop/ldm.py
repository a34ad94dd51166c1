"""The names of the original Stable Diffusion code (LDM; sgm for SDXL), which single-file checkpoints have.

LDM numbers the layers of a U-Net in one row: input_blocks.1, .2, ... hold a resnet and perhaps a transformer each,
or a downsampler alone, which ends a stage. So one walk along the row pairs both spellings (`_pair_row`): the row that
a config asks for when a file is written, the row found in a file when it is read.

Students have fewer layers in a stage, and their files come in two numberings. The dense one is what LDM's own code,
diffusers' `from_single_file` and ComfyUI make of a network with one layer in a stage. The other keeps the numbers of
the teacher, with gaps: diffusers' conversion script writes it, and stable-diffusion.cpp knows BK-Tiny by it.

A name that no rule explains stays as it is: the strict loader (`loading.load_into`) reports it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from minidistill.errors import InputError
from minidistill.models.unet import UNetConfig

Pairs = dict[str, str]  # the head of a name in our models -> in LDM
Row = Sequence[tuple[int, set[str]]]  # the numbered blocks, and what is in each: "0", "1", "0.op", "1.conv", "2.conv"
Tensors = dict[str, Tensor]

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
# Parts of names, ours and theirs, replaced one after the other.
VAE = {
    ".mid_block.resnets.0.": ".mid.block_1.",
    ".mid_block.resnets.1.": ".mid.block_2.",
    ".mid_block.attentions.0.group_norm.": ".mid.attn_1.norm.",
    ".mid_block.attentions.0.to_q.": ".mid.attn_1.q.",
    ".mid_block.attentions.0.to_k.": ".mid.attn_1.k.",
    ".mid_block.attentions.0.to_v.": ".mid.attn_1.v.",
    ".mid_block.attentions.0.to_out.0.": ".mid.attn_1.proj_out.",
    ".down_blocks.": ".down.",
    ".up_blocks.": ".up.",
    ".resnets.": ".block.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".conv_shortcut.": ".nin_shortcut.",
    ".conv_norm_out.": ".norm_out.",
}
OPEN_CLIP = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    ".self_attn.": ".attn.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


def to_ldm_unet(tensors: Mapping[str, Tensor], config: UNetConfig) -> Tensors:
    """A U-Net's state dict in LDM's names, without `model.diffusion_model.`.

    config: of this U-Net; or of a student's teacher, whose block numbers the student then has, with gaps.
    """
    pairs = unet_pairs(config)
    return {swap(name, pairs): tensor for name, tensor in tensors.items()}


def from_ldm_unet(tensors: Mapping[str, Tensor]) -> Tensors:
    """A U-Net in LDM's names, either numbering -> our names. InputError: a tensor is there in two spellings.

    Names that are ours stay: diffusers' script leaves the attentions of up_blocks.0, which the smallest students have.
    """
    pairs = _pair_row(_row_in(tensors, "input_blocks"), _row_in(tensors, "output_blocks"))
    ours = {theirs: name for name, theirs in pairs.items()}
    result: Tensors = {}
    for name, tensor in tensors.items():
        new = swap(name, ours)
        if new in result:
            raise InputError(f"its U-Net holds {new} twice, in two spellings")
        result[new] = tensor
    return result


def unet_pairs(config: UNetConfig) -> Pairs:
    """{the head of a name: its name in LDM}, for `swap`, which also renames a module of the U-Net."""
    down: list[tuple[int, set[str]]] = []
    up: list[tuple[int, set[str]]] = []
    last = len(config.block_out_channels) - 1
    for i, layers in enumerate(config.layers_per_block):
        parts = {"0", "1"} if config.down_block_types[i].startswith("CrossAttn") else {"0"}
        down += [(len(down) + 1 + j, parts) for j in range(layers)]
        down += [(len(down) + 1, {"0.op"})] * (i < last)
    for i, layers in enumerate(config.layers_per_block[::-1]):
        parts = {"0", "1"} if config.up_block_types[i].startswith("CrossAttn") else {"0"}
        up += [(len(up) + j, parts) for j in range(layers + 1)]
        if i < last:
            up[-1] = (up[-1][0], parts | {f"{len(parts)}.conv"})
    return _pair_row(down, up)


def _row_in(names: Iterable[str], side: str) -> Row:
    """What the numbered blocks in a file hold, in order; without conv_in, which is input_blocks.0."""
    found: dict[int, set[str]] = defaultdict(set)
    for name in names:
        match = re.match(rf"{side}\.(\d{{1,3}})\.(\d(?:\.(?:op|conv))?)\.", name)
        if match and (side, match[1]) != ("input_blocks", "0"):
            found[int(match[1])].add(match[2])
    return sorted(found.items())


def _pair_row(down: Row, up: Row) -> Pairs:
    """Walk along the numbered blocks: a downsampler or an upsampler ends a stage.

    Some pairs are of modules that are not there, such as the resnet in a block that has only an upsampler.
    """
    pairs = UNET_ENDS | _pair_resnet("mid_block.resnets.0", "middle_block.0")
    pairs |= _pair_resnet("mid_block.resnets.1", "middle_block.2")
    for ours, theirs, row, sampler in (
        ("down_blocks", "input_blocks", down, "downsamplers.0.conv"),
        ("up_blocks", "output_blocks", up, "upsamplers.0.conv"),
    ):
        i = j = 0
        for n, parts in row:
            pairs |= _pair_resnet(f"{ours}.{i}.resnets.{j}", f"{theirs}.{n}.0")
            pairs[f"{ours}.{i}.attentions.{j}"] = f"{theirs}.{n}.1"
            j += 1
            for part in parts & {"0.op", "1.conv", "2.conv"}:
                pairs[f"{ours}.{i}.{sampler}"] = f"{theirs}.{n}.{part}"
                i, j = i + 1, 0
    return pairs


def _pair_resnet(ours: str, ldm: str) -> Pairs:
    return {f"{ours}.{part}": f"{ldm}.{original}" for part, original in UNET_RESNET.items()}


def swap(name: str, pairs: Mapping[str, str]) -> str:
    """`name` with its longest head that `pairs` knows replaced; a name of which it knows no head stays."""
    head = name
    while head and head not in pairs:
        head = head.rpartition(".")[0]
    return pairs[head] + name[len(head) :] if head else name


def to_ldm_vae(tensors: Mapping[str, Tensor]) -> Tensors:
    """A VAE's state dict in LDM's names; the matrices of its attention become 1x1 convolutions."""
    ours = {name: t[:, :, None, None] if ".to_" in name and t.ndim == 2 else t for name, t in tensors.items()}
    return {_replace(name, VAE): tensor for name, tensor in _mirror(ours).items()}


def from_ldm_vae(tensors: Mapping[str, Tensor]) -> Tensors:
    """A VAE in LDM's names -> our names."""
    ours = {theirs: name for name, theirs in VAE.items()}
    return _mirror({_replace(name, ours): tensor for name, tensor in tensors.items()})


def _mirror(tensors: Tensors) -> Tensors:
    """Number the stages of the decoder the other way round: LDM does so from the image inwards."""
    stage = re.compile(r"(?<=^decoder\.up_blocks\.)\d{1,3}(?=\.)")
    last = max((int(found[0]) for found in map(stage.search, tensors) if found), default=0)
    return {stage.sub(lambda found: str(last - int(found[0])), name): tensor for name, tensor in tensors.items()}


def to_open_clip(tensors: Mapping[str, Tensor]) -> Tensors:
    """A text encoder's state dict in open_clip's names: q, k, v stacked, text projection (in, out)."""
    result = {_replace(name, OPEN_CLIP): tensor for name, tensor in tensors.items()}
    for name in [name for name in result if ".attn.q_proj." in name]:
        pieces = [result.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        result[name.replace("q_proj.", "in_proj_")] = torch.cat(pieces)
    if "text_projection.weight" in result:
        result["text_projection"] = result.pop("text_projection.weight").T  # open_clip computes x @ projection
    return result


def from_open_clip(tensors: Mapping[str, Tensor]) -> Tensors:
    """A text encoder in open_clip's names -> our names. InputError: a stack is not of three matrices.

    The text projection may be open_clip's bare parameter (in, out), or, as `text_projection.weight`, diffusers' export
    of a linear layer (out, in). Both are often square: only the name tells them apart.
    """
    ours = {theirs: name for name, theirs in OPEN_CLIP.items()}
    result: Tensors = {}
    for name, tensor in tensors.items():
        new = _replace(name, ours)
        if name == "text_projection":
            result["text_projection.weight"] = tensor.T
        elif ".attn.in_proj_" not in name:
            result[new] = tensor
        elif tensor.ndim == 0 or len(tensor) % 3:
            raise InputError(f"{name} is {tuple(tensor.shape)}: it should be three matrices stacked, q, k and v")
        else:
            pieces = zip("qkv", tensor.chunk(3), strict=True)
            result |= {new.replace("in_proj_", f"{part}_proj."): piece for part, piece in pieces}
    return result


def _replace(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name
