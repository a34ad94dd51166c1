"""From a SOURCE to the parts of a pipeline, and back to a folder.

A SOURCE is a pipeline folder, a Hub id, a single file (.safetensors, .ckpt) or `miniature`. What it is, is found by
looking: `hub.py` finds it, `folders.py`, `single_file.py`, `vae_file.py` and `lora_files.py` read it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from minidistill.diffusion.sampling import Sampling, default_solver, find_sampling, sampling_metadata
from minidistill.diffusion.schedule import ScheduleConfig
from minidistill.errors import InputError
from minidistill.interop import lora_files
from minidistill.interop.header import is_clip
from minidistill.interop.single_file import SingleFile, read_single_file
from minidistill.interop.vae_file import read_vae_file
from minidistill.models.clip import CLIPTextModel
from minidistill.models.taesd import AutoencoderTiny, TinyConfig
from minidistill.models.tokenizer import CLIPTokenizer
from minidistill.models.unet import UNet
from minidistill.models.vae import AutoencoderKL, VAEConfig
from minidistill.weights import folders, hub
from minidistill.weights.files import load_into, on_meta, read_metadata

Device = str | torch.device
DType = torch.dtype | None  # None keeps the file's
ENCODERS = ("text_encoder", "text_encoder_2")  # their names in model folders and LoRA files
NO_EMA = "{} is a folder, which has no second U-Net with averaged weights: only single files may hold both"
CLIP = "openai/clip-vit-large-patch14"  # where the Hub has the vocabulary that single files leave out


def named_networks(unet: UNet, text_encoders: Sequence[CLIPTextModel]) -> dict[str, nn.Module]:
    """The networks that LoRAs are for, by their names in model folders and LoRA files."""
    return {"unet": unet, **dict(zip(ENCODERS[: len(text_encoders)], text_encoders, strict=True))}


class Parts(NamedTuple):
    """A whole pipeline; `pipeline.Pipeline` says what each is."""

    unet: UNet
    vae: AutoencoderKL | AutoencoderTiny
    text_encoders: list[CLIPTextModel]
    tokenizers: list[CLIPTokenizer]
    schedule: ScheduleConfig
    sampling: Sampling | None
    zero_unconditional: bool


def load_parts(
    source: str | Path,
    device: Device = "cpu",
    dtype: DType = torch.float32,
    vae_dtype: DType = torch.float32,
    *,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    ema: bool = False,
) -> Parts:
    """Everything of a SOURCE, with another U-Net or VAE laid over it, and LoRAs, (file, scale), merged into it.

    Args:
        ema: of a single file with both, take the averaged weights of the U-Net.

    Raises:
        InputError: something is missing, broken or does not fit together; the message says what.
    """
    base = folders.find_model(source, dtype)
    if base.is_file():
        parts = _from_file(base, device, dtype, vae_dtype, unet, vae, ema)
    else:
        parts = _from_folder(base, device, dtype, vae_dtype, unet, vae, ema)
    if unet and (own := schedule_of(unet, dtype)):
        schedule = replace(
            parts.schedule, prediction_type=own.prediction_type, rescale_betas_zero_snr=own.rescale_betas_zero_snr
        )
        parts = parts._replace(schedule=schedule)
    sampling = merge_loras(named_networks(parts.unet, parts.text_encoders), loras) or parts.sampling
    return parts._replace(schedule=_as_distilled(parts.schedule, sampling), sampling=sampling)


def merge_loras(networks: Mapping[str, nn.Module], loras: Sequence[tuple[str | Path, float]]) -> Sampling | None:
    """Merge LoRAs, (file, scale), into networks, one after the other. What the last that says so was distilled for."""
    sampling = None
    for file, scale in loras:
        path = folders.find_model(file)
        found = lora_files.read_lora(path, networks)
        counts = lora_files.merge_into(networks, found, scale)
        print(f"{path.name}: {lora_files.matched_line(found, counts)}", file=sys.stderr)
        sampling = _find_sampling(path) or sampling
    return sampling


def with_scales(files: Sequence[str] | None, scales: Sequence[float]) -> list[tuple[str, float]]:
    """(file, scale) of each LoRA, from one scale for all or one each. InputError: their numbers do not fit."""
    files = files or ()
    if len(scales) not in (1, len(files)):
        raise InputError(f"{len(scales)} scales for {len(files)} LoRAs: give one for all, or one each")
    return list(zip(files, scales if len(scales) > 1 else [*scales] * len(files), strict=True))


def _from_folder(
    base: Path,
    device: Device,
    dtype: DType,
    vae_dtype: DType,
    unet: str | Path | None,
    vae: str | Path | None,
    ema: bool,
) -> Parts:
    index = folders.read_model_index(base)
    if ema and not unet:
        raise InputError(NO_EMA.format(base))
    suffixes = ("", "_2") if index["_class_name"] == folders.SDXL else ("",)
    config, schedule = folders.load_vae_config(base), folders.load_schedule(base)
    if len(suffixes) == 1:  # old files lack it, and diffusers' pipelines of SD 1.x and 2.x set it too
        schedule = replace(schedule, steps_offset=1)
    return Parts(
        load_unet(unet, device, dtype, ema) if unet else folders.load_unet(base, dtype, device),
        load_vae(vae, device, vae_dtype, config) if vae else folders.load_vae(base, vae_dtype, device),
        [folders.load_text_encoder(base, dtype, device, f"text_encoder{suffix}") for suffix in suffixes],
        [folders.load_tokenizer(base, f"tokenizer{suffix}") for suffix in suffixes],
        schedule,
        sampling_of(unet or base, dtype),
        len(suffixes) == 2 and index.get("force_zeros_for_empty_prompt", True),
    )


def _from_file(
    base: Path,
    device: Device,
    dtype: DType,
    vae_dtype: DType,
    unet: str | Path | None,
    vae: str | Path | None,
    ema: bool,
) -> Parts:
    file = read_single_file(base, ema and not unet)
    if file.vae is None or not file.text_encoders:
        lacks = "text encoder" if file.vae else "VAE and text encoder"
        raise InputError(f"{base} has no {lacks}: give it as --unet, and as --model what it is made for")
    encoders = []
    for config, tensors in file.text_encoders:
        with on_meta():
            encoder = CLIPTextModel(config, "text_projection.weight" in tensors)
        encoders.append(load_into(encoder, tensors, str(base), dtype, device))
    return Parts(
        load_unet(unet, device, dtype, ema) if unet else _unet_of(file, base, device, dtype),
        load_vae(vae, device, vae_dtype, file.vae[0]) if vae else _vae_of(*file.vae, base, device, vae_dtype),
        encoders,
        list(file.tokenizers) or _clip_tokenizers(base, file.family),
        file.schedule,
        sampling_of(unet or base, dtype),
        file.family == "sdxl",
    )


def load_unet(source: str | Path, device: Device, dtype: DType, ema: bool = False) -> UNet:
    """The U-Net of any SOURCE: also of a file or a folder that holds nothing else. ema: as in `load_parts`."""
    path = folders.find_model(source, dtype)
    if path.is_file():
        return _unet_of(read_single_file(path, ema), path, device, dtype)
    if ema:
        raise InputError(NO_EMA.format(path))
    return folders.load_unet(path, dtype, device, _place_of("unet", path))


def load_vae(source: str | Path, device: Device, dtype: DType, base: VAEConfig) -> AutoencoderKL | AutoencoderTiny:
    """The VAE of any SOURCE. base: config of the VAE it replaces, for what a file alone does not say."""
    path = folders.find_model(source, dtype)
    if path.is_file():
        return _vae_of(*read_vae_file(path, base), path, device, dtype)
    return folders.load_vae(path, dtype, device, _place_of("vae", path))


def _place_of(part: str, folder: Path) -> str:
    """Where in a folder the part is: in its own, unless the folder holds nothing else."""
    alone = (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()
    return "" if alone else part


def is_unet_alone(source: str | Path, dtype: DType = None) -> bool:
    """Whether a SOURCE is a U-Net and nothing else. (Of a folder: a part and nothing else, its config says which.)"""
    path = folders.find_model(source, dtype)
    if path.is_dir():
        return _place_of("unet", path) == ""
    file = read_single_file(path)
    return file.vae is None and not file.text_encoders


def _unet_of(file: SingleFile, path: Path, device: Device, dtype: DType) -> UNet:
    config, tensors = file.unet
    return load_into(_on_meta(UNet, config), tensors, str(path), dtype, device)


def _vae_of(
    config: VAEConfig | TinyConfig, tensors: dict, path: Path, device: Device, dtype: DType
) -> AutoencoderKL | AutoencoderTiny:
    kind = AutoencoderTiny if isinstance(config, TinyConfig) else AutoencoderKL
    return load_into(_on_meta(kind, config), tensors, str(path), dtype, device)


def _on_meta(kind: type[nn.Module], config: object) -> nn.Module:
    with on_meta():
        return kind(config)


def sampling_of(source: str | Path, dtype: DType = None) -> Sampling | None:
    """What the U-Net of a SOURCE was distilled for."""
    path = folders.find_model(source, dtype)
    if path.is_dir():
        path = folders.unet_file(path, dtype, _place_of("unet", path))
    return _find_sampling(path)


def schedule_of(unet: str | Path, dtype: DType = None) -> ScheduleConfig | None:
    """The noise schedule that the U-Net of a SOURCE was trained with; None where it does not say."""
    path = folders.find_model(unet, dtype)
    if path.is_file():
        return read_single_file(path).schedule
    return folders.load_schedule(path) if (path / "scheduler").is_dir() else None


def _clip_tokenizers(path: Path, family: str) -> list[CLIPTokenizer]:
    """CLIP's tokenizer, which single files leave out: from beside the file, from the Hub's cache, else from the Hub."""
    for part in ("tokenizer", ""):
        if (path.parent / part / "vocab.json").is_file():
            return _padded(folders.load_tokenizer(path.parent, part), family)
    if cached := _cached_clip_tokenizer():
        return _padded(cached, family)
    try:
        folder = hub.fetch_files(CLIP, ("vocab.json", "merges.txt"))
    except InputError as error:
        raise InputError(
            f"{path} needs CLIP's vocabulary, which no single file holds: put the vocab.json and merges.txt of any "
            f"Stable Diffusion (they are in its tokenizer/ folder) in {path.parent / 'tokenizer'} ({error})"
        ) from error
    return _padded(folders.load_tokenizer(folder, ""), family)


def _cached_clip_tokenizer() -> CLIPTokenizer | None:
    """The first in the Hub's cache: all Stable Diffusions have the same vocabulary, whosever it is."""
    for folder in hub.cached_folders("vocab.json"):
        try:
            tokenizer = CLIPTokenizer.from_folder(folder)
        except (OSError, ValueError, TypeError, AttributeError):  # another kind of model's, or not all of it is here
            continue
        if is_clip(tokenizer) and tokenizer.max_length == 77:  # Long-CLIP reads the same words, but more of them
            return tokenizer
    return None


def _padded(tokenizer: CLIPTokenizer, family: str) -> list[CLIPTokenizer]:
    """SD 1.x pads with the end token, SD 2.x with "!", SDXL has one of each."""
    pads = {"sd1": ("<|endoftext|>",), "sd2": ("!",), "sdxl": ("<|endoftext|>", "!")}[family]
    return [CLIPTokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.max_length, pad) for pad in pads]


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
    if is_sdxl or default_solver(schedule)[0] == "euler" if sampling is None else sampling.sampler == "euler":
        scheduler = "EulerDiscreteScheduler"
    folders.save_unet(folder, parts.unet, sampling_metadata(sampling))
    folders.save_vae(folder, parts.vae)
    suffixes = ("", "_2")[: len(parts.text_encoders)]
    for suffix, encoder, tokenizer in zip(suffixes, parts.text_encoders, parts.tokenizers, strict=True):
        folders.save_text_encoder(folder, encoder, f"text_encoder{suffix}")
        folders.save_tokenizer(folder, tokenizer, f"tokenizer{suffix}")
    folders.save_schedule(folder, schedule, scheduler)
    vae = parts.vae.config.to_dict()["_class_name"]
    kind = folders.SDXL if is_sdxl else folders.SD
    folders.save_model_index(folder, kind, scheduler, vae, parts.zero_unconditional)


def _find_sampling(path: Path) -> Sampling | None:
    if path.suffix != ".safetensors":
        return find_sampling(path, {})
    try:
        return find_sampling(path, read_metadata(path))
    except ValueError as error:
        raise InputError(str(error)) from error


def _as_distilled(schedule: ScheduleConfig, sampling: Sampling | None) -> ScheduleConfig:
    """What the network predicts and the spacing of its timesteps, where the weights say more than the scheduler."""
    if sampling is None:
        return schedule
    return replace(schedule, prediction_type=sampling.prediction, timestep_spacing=sampling.spacing)
