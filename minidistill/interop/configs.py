"""Configs of the models in a single file: from its header, where we keep them, else from names and shapes of tensors.

The header has JSON texts under `minidistill.*`, which other programs ignore. What shapes cannot say comes from the
family, by the width of the text states: 768 is SD 1.x, 1024 SD 2.x, 2048 SDXL, for students as for their teachers.
"""

import json
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from minidistill.diffusion.schedule import PREDICTIONS, ScheduleConfig
from minidistill.errors import InputError
from minidistill.models.tokenizer import CLIPTokenizer
from minidistill.models.unet import SD15, SD21, SDXL, UNetConfig
from minidistill.models.unet_config import MOST_BLOCKS
from minidistill.weights.typed import MISSHAPEN, STAGES

UNET, VAE, SCHEDULE = "minidistill.unet_config", "minidistill.vae_config", "minidistill.schedule"
TEXT, TOKENIZERS = "minidistill.text_configs", "minidistill.tokenizers"  # lists: SDXL has two of each
PREDICTION = "modelspec.prediction_type"  # a key that others write and read too
UNETS = {config.cross_attention_dim: config for config in (SD15, SD21, SDXL)}
HEAD_WIDTH = 64  # of SD 2.x and SDXL at every stage; SD 1.x has 8 heads at every stage instead


def prediction_entry(schedule: ScheduleConfig) -> dict[str, str]:
    """The header's entry on what a U-Net predicts, as other programs spell it."""
    return {PREDICTION: {"v_prediction": "v"}.get(schedule.prediction_type, schedule.prediction_type)}


def read_config(metadata: Mapping[str, str], key: str, build: Callable[[Any], Any]) -> Any:
    """What a header has under `key`, built; None where it has nothing. InputError: it cannot be built."""
    try:
        return build(json.loads(metadata[key])) if key in metadata else None
    except MISSHAPEN as error:
        raise InputError(f"{key} in its header cannot be read: {error}") from error


def load_tokenizers(entries: list[dict]) -> tuple[CLIPTokenizer, ...]:
    """The tokenizers of a header's entry. KeyError, TypeError, ValueError: it is not what was written."""
    return tuple(CLIPTokenizer(**one) for one in entries)


def tokenizer_entry(tokenizers: Sequence[CLIPTokenizer]) -> dict[str, list[dict]]:
    """The header's entry for tokenizers; {} if all have CLIP's own vocabulary, as those of official models."""
    if all(len(one.vocab) == 49408 and one.vocab.get("cat</w>") == 2368 for one in tokenizers):
        return {}
    names = ("vocab", "merges", "max_length", "pad_token")
    return {TOKENIZERS: [{name: getattr(one, name) for name in names} for one in tokenizers]}


def infer_unet_config(tensors: Mapping[str, Tensor]) -> UNetConfig:
    """The architecture of a U-Net, from its tensors in our names; `meta` is fine.

    Any number of stages, of layers in each, and any widths, depths and in_channels. `sample_size` and
    `upcast_attention` are the family's (of SD 2.x: the 768-pixel model's).

    InputError: not a U-Net, or one of another family: with other text states, or with class embeddings where SDXL
    has text and sizes (unCLIP, upscalers, SDXL's refiner).
    """
    stages = range(_count(tensors, "down_blocks"))
    if len(stages) > STAGES:
        raise InputError(f"its U-Net has {len(stages)} stages, more than {STAGES}")
    channels = tuple(shape_of(tensors, f"down_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in stages)
    layers = tuple(_count(tensors, f"down_blocks.{i}.resnets") for i in stages)
    if sum(layers) > MOST_BLOCKS:
        raise InputError(f"its U-Net has {sum(layers)} layers, more than {MOST_BLOCKS}")
    attention = next((name for name in tensors if name.endswith(".attn2.to_k.weight")), None)
    if attention is None:
        raise InputError("its U-Net reads no text: it has no cross-attention")
    width, pooled = shape_of(tensors, attention, 2)[1], "add_embedding.linear_1.weight"
    family = UNETS.get(width)
    if family is None or (pooled in tensors) != (family is SDXL):
        added = " and an added embedding" * (pooled in tensors)
        raise InputError(
            f"its U-Net reads text states of width {width}{added} and carries no config, but SD 1.x has 768, SD 2.x "
            "1024, SDXL 2048 and an added embedding: for other sizes use the model's folder; no other kind is supported"
        )

    def types(side: str) -> tuple[str, ...]:
        attends = [f"{side.lower()}_blocks.{i}.attentions.0.norm.weight" in tensors for i in stages]
        return tuple(f"{'CrossAttn' * there}{side}Block2D" for there in attends)

    values = {
        "in_channels": shape_of(tensors, "conv_in.weight", 4)[1],
        "out_channels": shape_of(tensors, "conv_out.weight", 4)[0],
        "down_block_types": types("Down"),
        "up_block_types": types("Up"),
        "mid_block_type": "UNetMidBlock2D" if "mid_block.resnets.0.norm1.weight" in tensors else None,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "attention_head_dim": 8 if family is SD15 else tuple(max(1, n // HEAD_WIDTH) for n in channels),
        "use_linear_projection": any(t.ndim == 2 for name, t in tensors.items() if name.endswith(".proj_in.weight")),
        **_depths(tensors, layers),
    }
    if "mid_block.attentions.0.norm.weight" in tensors:
        values["mid_block_type"] = "UNetMidBlock2DCrossAttn"
    if family is SDXL:
        values["projection_class_embeddings_input_dim"] = shape_of(tensors, pooled, 2)[1]
    try:
        return replace(family, **values)
    except ValueError as error:
        raise InputError(f"the shapes of its U-Net fit no config: {error}") from error


def _depths(tensors: Mapping[str, Tensor], layers: tuple[int, ...]) -> dict:
    """Transformer depths, one number for a stage whose layers agree, as UNetConfig wants them.

    A stage without transformers is given depth 1, except for the innermost: the mid block takes its depth there.
    """

    def depth(transformer: str) -> int:
        return len(_numbers(tensors, f"{transformer}.transformer_blocks"))

    def stage(block: str, n: int, without: int) -> int | tuple[int, ...]:
        depths = tuple(depth(f"{block}.attentions.{j}") for j in range(n))
        return (depths[0] if len(set(depths)) == 1 else depths) if any(depths) else without

    last, mid = len(layers) - 1, depth("mid_block.attentions.0")
    down = [stage(f"down_blocks.{i}", n, mid if mid and i == last else 1) for i, n in enumerate(layers)]
    mirrored = [d if isinstance(d, int) else 1 for d in down[::-1]]
    up = [stage(f"up_blocks.{i}", n + 1, mirrored[i]) for i, n in enumerate(layers[::-1])]
    return {
        "transformer_layers_per_block": tuple(down),
        "reverse_transformer_layers_per_block": None if up == mirrored == down[::-1] else tuple(up),
    }


def infer_prediction(
    config: UNetConfig, weights: Mapping[str, Tensor], names: Container[str], metadata: Mapping[str, str]
) -> str:
    """What a U-Net predicts: "epsilon" or "v_prediction". The official files of SD 2.x do not say.

    The signs that programs go by, the surest first: an (empty) tensor `v_pred` in the file; the header's
    `modelspec.prediction_type`; and for SD 2.x, inpainting excepted, the standard deviation of one bias, which ComfyUI
    found above 0.09 in the models trained to predict v and below in the others. Without a sign it is epsilon.

    config, weights: the U-Net, in our names. names: of all tensors in the file. metadata: the file's header.
    """
    if "v_pred" in names:
        return "v_prediction"
    if PREDICTION in metadata:
        said = metadata[PREDICTION].lower()
        return said if said in PREDICTIONS else "v_prediction" if said.startswith("v") else "epsilon"
    last = f"up_blocks.{len(config.layers_per_block) - 1}.attentions.{config.layers_per_block[0]}"
    bias = weights.get(f"{last}.transformer_blocks.0.norm1.bias")
    if config.cross_attention_dim != 1024 or config.in_channels != config.out_channels or bias is None:
        return "epsilon"
    return "v_prediction" if bias.float().std(correction=0) > 0.09 else "epsilon"


def shape_of(tensors: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor. InputError: it is not there, or has another number of dimensions."""
    if name not in tensors:
        raise InputError(f"a part of it is not complete: there is no {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != ndim or 0 in shape:
        raise InputError(f"{name} should have {ndim} dimensions, it is {shape}")
    return shape


def _numbers(tensors: Mapping[str, Tensor], prefix: str) -> set[int]:
    found = (re.match(rf"{re.escape(prefix)}\.(\d{{1,3}})\.", name) for name in tensors if name.startswith(prefix))
    return {int(match[1]) for match in found if match}


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    numbers = _numbers(tensors, prefix)
    if not numbers or max(numbers) + 1 != len(numbers):
        raise InputError(f"a part of it is not complete: {prefix} has numbers {sorted(numbers)[:9]}")
    return len(numbers)
