"""Configs in the header of a single file: JSON texts under `minidistill.*`, which other programs ignore.

A single file of another program carries none; see `infer`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from minidistill.diffusion.schedule import ScheduleConfig
from minidistill.errors import InputError
from minidistill.models.clip import CLIPTextModel
from minidistill.models.tokenizer import BOS, EOS, CLIPTokenizer
from minidistill.models.unet import UNet
from minidistill.models.vae import AutoencoderKL

Config = TypeVar("Config")

UNET, VAE, SCHEDULE = "minidistill.unet_config", "minidistill.vae_config", "minidistill.schedule"
TEXT, TOKENIZERS = "minidistill.text_configs", "minidistill.tokenizers"  # lists: SDXL has two of each
PREDICTION = "modelspec.prediction_type"  # a key that others write and read too
HEADER_KEYS = {UNET, VAE, SCHEDULE, TEXT, TOKENIZERS, PREDICTION, "format"}

# Ids by which CLIP's own vocabulary is known.
CLIP_IDS = {"a</w>": 320, "photo</w>": 1125, "of</w>": 539, "cat</w>": 2368, BOS: 49406, EOS: 49407}


def write_configs(
    unet: UNet,
    vae: AutoencoderKL,
    text_encoders: Sequence[CLIPTextModel],
    schedule: ScheduleConfig,
    tokenizers: Sequence[CLIPTokenizer],
) -> dict[str, str]:
    """The header's entries for these parts. Tokenizers with CLIP's own vocabulary are left out."""
    content: dict[str, Any] = {
        UNET: unet.config.to_dict(),
        VAE: vae.config.to_dict(),
        TEXT: [encoder.config.to_dict() for encoder in text_encoders],
        SCHEDULE: schedule.to_dict(),
    }
    if not all(is_clip(tokenizer) for tokenizer in tokenizers):
        content[TOKENIZERS] = [
            {key: getattr(tokenizer, key) for key in ("vocab", "merges", "max_length", "pad_token")}
            for tokenizer in tokenizers
        ]
    header = {key: json.dumps(value, ensure_ascii=False) for key, value in content.items()}
    return {**header, **prediction_entry(schedule)}


def prediction_entry(schedule: ScheduleConfig) -> dict[str, str]:
    """The header's entry on what a U-Net predicts, as other programs spell it."""
    return {PREDICTION: {"v_prediction": "v"}.get(schedule.prediction_type, schedule.prediction_type)}


def read_config(metadata: Mapping[str, str], key: str, build: Callable[[Any], Config]) -> Config | None:
    """What a header has under `key`, built; None where it has nothing. InputError: it cannot be built."""
    if key not in metadata:
        return None
    kind = list if key in (TEXT, TOKENIZERS) else dict
    try:
        content = json.loads(metadata[key])
        if not isinstance(content, kind):
            raise TypeError(f"a {kind.__name__} is needed, it is a {type(content).__name__}")
        return build(content)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"{key} in its header cannot be read: {error}") from error


def load_tokenizers(entries: list[dict]) -> tuple[CLIPTokenizer, ...]:
    """The tokenizers of a header's entry. KeyError, TypeError, ValueError: it is not what was written."""
    return tuple(
        CLIPTokenizer(one["vocab"], [tuple(pair) for pair in one["merges"]], one["max_length"], one["pad_token"])
        for one in entries
    )


def is_clip(tokenizer: CLIPTokenizer) -> bool:
    """Whether its vocabulary is CLIP's own, as in every official Stable Diffusion."""
    return tokenizer.vocab_size == 49408 and all(tokenizer.vocab.get(token) == i for token, i in CLIP_IDS.items())
