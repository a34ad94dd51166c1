"""Steps applied to a loaded pipeline: another U-Net, another VAE, LoRAs.

pipe = load_pipeline("path/to/sdxl", without=("unet",))
replace_unet(pipe, "sdxl_lightning_4step_unet.safetensors")
merge_loras(pipe, [("style.safetensors", 0.8)])
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from minidistill.diffusion.sampling import Sampling
from minidistill.diffusion.schedule import ScheduleConfig
from minidistill.errors import InputError
from minidistill.interop import lora_files
from minidistill.interop.single_file import read_single_file
from minidistill.interop.single_pipeline import build_network
from minidistill.interop.vae_file import read_vae_file
from minidistill.models.taesd import AutoencoderTiny
from minidistill.models.unet import UNet
from minidistill.models.vae import SD_VAE
from minidistill.weights import folders
from minidistill.weights.folders import Device, DType

if TYPE_CHECKING:
    from minidistill.pipeline import Pipeline

Loras = Sequence[tuple[str | Path, float]]  # (SOURCE, scale)


class LoadedUNet(NamedTuple):
    """A U-Net, and what its SOURCE says about it."""

    unet: UNet
    schedule: ScheduleConfig | None  # that it was trained with
    sampling: Sampling | None  # that it was distilled for


def replace_unet(pipe: Pipeline, source: str | Path, dtype: DType = torch.float32, ema: bool = False) -> None:
    """Give a pipeline the U-Net of any SOURCE, its prediction type, if the SOURCE says it, and its sampling settings.

    Args:
        pipe: load it with `without=("unet",)`: then the U-Net that is replaced is not read from disk.
        dtype: of the U-Net; None keeps the file's.
        ema: of a single file with both, take the averaged weights.

    Raises:
        InputError: there is no such U-Net, or it does not fit the other parts.
    """
    unet, own, sampling = load_unet(source, _device(pipe), dtype, ema)
    if own:
        pipe.schedule = replace(
            pipe.schedule, prediction_type=own.prediction_type, rescale_betas_zero_snr=own.rescale_betas_zero_snr
        )
    pipe.unet = unet
    pipe.set_sampling(sampling)
    pipe.check_parts()


def replace_vae(pipe: Pipeline, source: str | Path, dtype: DType = torch.float32) -> None:
    """Give a pipeline the VAE of any SOURCE, also a TAESD. dtype and InputError as in `replace_unet`.

    What a file alone does not say, most of all the scaling factor, is taken from the VAE that is replaced.
    """
    path = folders.find_model(source, dtype)
    if path.is_file():
        base = SD_VAE if isinstance(pipe.vae, AutoencoderTiny) else pipe.vae.config
        pipe.vae = build_network(*read_vae_file(path, base), path, _device(pipe), dtype)
    else:
        pipe.vae = folders.load_vae(path, dtype, _device(pipe), folders.part_in(path, "vae"))
    pipe.check_parts()


def merge_loras(pipe: Pipeline, loras: Loras) -> None:
    """Merge LoRAs into a pipeline, one after the other; sampling settings are those of the last that has any."""
    pipe.set_sampling(merge_files(pipe.networks, loras) or pipe.sampling)


def merge_files(networks: Mapping[str, nn.Module], loras: Loras) -> Sampling | None:
    """Merge LoRAs into networks by their names in model folders. What the last that says so was distilled for."""
    sampling = None
    for source, scale in loras:
        path = folders.find_model(source)
        found = lora_files.read_lora(path, networks)
        counts = lora_files.merge_into(networks, found, scale)
        print(f"{path.name}: {lora_files.matched_line(found, counts)}", file=sys.stderr)
        sampling = folders.read_sampling(path) or sampling
    return sampling


def with_scales(files: Sequence[str] | None, scales: Sequence[float]) -> list[tuple[str, float]]:
    """(file, scale) of each LoRA, from one scale for all or one each. InputError: their numbers do not fit."""
    files = files or ()
    if len(scales) not in (1, len(files)):
        raise InputError(f"{len(scales)} scales for {len(files)} LoRAs: give one for all, or one each")
    return list(zip(files, scales if len(scales) > 1 else [*scales] * len(files), strict=True))


def load_unet(source: str | Path, device: Device, dtype: DType, ema: bool = False) -> LoadedUNet:
    """The U-Net of any SOURCE: also of a file or a folder that holds nothing else. Arguments as in `replace_unet`."""
    path = folders.find_model(source, dtype)
    if path.is_file():
        file = read_single_file(path, ema)
        return LoadedUNet(build_network(*file.unet, path, device, dtype), file.schedule, folders.read_sampling(path))
    if ema:
        raise InputError(f"{path} is a folder, which has no averaged weights: only single files may hold both kinds")
    part = folders.part_in(path, "unet")
    unet = folders.load_unet(path, dtype, device, part)
    schedule = folders.load_schedule(path) if (path / "scheduler").is_dir() else None
    return LoadedUNet(unet, schedule, folders.load_sampling(path, dtype, part))


def is_unet_alone(source: str | Path, dtype: DType = None) -> bool:
    """Whether a SOURCE is a U-Net and nothing else. (Of a folder: a part and nothing else, its config says which.)"""
    path = folders.find_model(source, dtype)
    if path.is_dir():
        return folders.part_in(path, "unet") == ""
    file = read_single_file(path)
    return file.vae is None and not file.text_encoders


def _device(pipe: Pipeline) -> torch.device:
    """Where a pipeline is whose U-Net may not have been loaded."""
    return next(pipe.text_encoders[0].parameters()).device
