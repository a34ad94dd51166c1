"""From a SOURCE to the parts of a pipeline, and back to a folder.

A SOURCE is a pipeline folder, a Hub id, a single file (.safetensors, .ckpt) or `miniature`. What it is, is found by
looking: `hub.py` finds it, `folders.py` and `single_file.py` read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from minidistill.diffusion.schedule import ScheduleConfig
from minidistill.models.clip import CLIPTextModel
from minidistill.models.tokenizer import CLIPTokenizer
from minidistill.models.unet import UNet
from minidistill.models.vae import AutoencoderKL
from minidistill.weights import folders
from minidistill.weights.sampling import Sampling, sampling_metadata

Device = str | torch.device


class Parts(NamedTuple):
    """A whole pipeline; `pipeline.Pipeline` says what each is."""

    unet: UNet
    vae: AutoencoderKL
    text_encoders: list[CLIPTextModel]
    tokenizers: list[CLIPTokenizer]
    schedule: ScheduleConfig
    sampling: Sampling | None
    zero_unconditional: bool


def load_parts(
    source: str | Path,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype = torch.float32,
    *,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
) -> Parts:
    """Everything of a SOURCE, with another U-Net or VAE laid over it, and LoRAs merged into it.

    Raises:
        InputError: something is missing, broken or does not fit together; the message says what.
    """
    base = folders.find_model(source, dtype)
    sampling = folders.load_sampling(base, dtype)
    index = folders.read_model_index(base)
    suffixes = ("", "_2") if index["_class_name"] == folders.SDXL else ("",)
    return Parts(
        folders.load_unet(base, dtype, device),
        folders.load_vae(base, vae_dtype, device),
        [folders.load_text_encoder(base, dtype, device, f"text_encoder{suffix}") for suffix in suffixes],
        [folders.load_tokenizer(base, f"tokenizer{suffix}") for suffix in suffixes],
        _as_distilled(folders.load_schedule(base), sampling),
        sampling,
        len(suffixes) == 2 and index.get("force_zeros_for_empty_prompt", True),
    )


def save_parts(folder: str | Path, parts: Parts) -> None:
    """Write a pipeline folder that diffusers reads, and samples as the model was made to be sampled.

    The index goes first and comes last: a folder without it is one that was not finished.
    """
    index = Path(folder) / "model_index.json"
    if index.is_file():
        index.unlink()
    schedule, sampling = parts.schedule, parts.sampling
    is_sdxl = len(parts.text_encoders) == 2
    scheduler = "DDIMScheduler"
    if sampling is not None:
        schedule = _as_distilled(schedule, sampling)
    if is_sdxl if sampling is None else sampling.sampler == "euler":
        scheduler = "EulerDiscreteScheduler"
    folders.save_unet(folder, parts.unet, sampling_metadata(sampling))
    folders.save_vae(folder, parts.vae)
    for suffix, encoder, tokenizer in zip(("", "_2"), parts.text_encoders, parts.tokenizers, strict=False):
        folders.save_text_encoder(folder, encoder, f"text_encoder{suffix}")
        folders.save_tokenizer(folder, tokenizer, f"tokenizer{suffix}")
    folders.save_schedule(folder, schedule, scheduler)
    vae = parts.vae.config.to_dict()["_class_name"]
    kind = folders.SDXL if is_sdxl else folders.SD
    folders.save_model_index(folder, kind, scheduler, vae, parts.zero_unconditional)


def _as_distilled(schedule: ScheduleConfig, sampling: Sampling | None) -> ScheduleConfig:
    """What the network predicts and the spacing of its timesteps, where the weights say more than the scheduler."""
    if sampling is None:
        return schedule
    return replace(schedule, prediction_type=sampling.prediction, timestep_spacing=sampling.spacing)
