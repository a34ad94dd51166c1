"""Pipelines from single files, and other parts for a loaded pipeline: another U-Net, another VAE, LoRAs.

pipe = load_pipeline("path/to/sdxl", without=("unet",))
replace_unet(pipe, "sdxl_lightning_4step_unet.safetensors")
merge_loras(pipe, [("style.safetensors", 0.8)])
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minidistill.diffusion.sampling import Sampling
from minidistill.diffusion.schedule import ScheduleConfig
from minidistill.errors import InputError
from minidistill.interop import lora_files
from minidistill.interop.single_file import SingleFile, read_single_file, read_vae_file
from minidistill.models.clip import CLIPTextConfig, CLIPTextModel
from minidistill.models.taesd import AutoencoderTiny, TinyConfig
from minidistill.models.tokenizer import EOS, CLIPTokenizer
from minidistill.models.unet import UNet, UNetConfig
from minidistill.models.vae import SD_VAE, SDXL_VAE, AutoencoderKL, VAEConfig
from minidistill.weights import folders, hub
from minidistill.weights.folders import Device, DType
from minidistill.weights.loading import load_into, on_meta

if TYPE_CHECKING:
    from minidistill.pipeline import Pipeline

Loras = Sequence[tuple[str | Path, float]]  # (SOURCE, scale)

CLIP = "openai/clip-vit-large-patch14"  # where the Hub has the vocabulary that single files leave out
PADS = {"sd1": (EOS,), "sd2": ("!",), "sdxl": (EOS, "!")}  # of the tokenizers of each family
NETWORKS = {UNetConfig: UNet, VAEConfig: AutoencoderKL, TinyConfig: AutoencoderTiny, CLIPTextConfig: CLIPTextModel}


def load_parts(
    path: Path, device: Device, dtype: DType, vae_dtype: DType, without: Collection[str] = ()
) -> dict[str, Any]:
    """The arguments of `pipeline.Pipeline` from a single file; those and InputError as in `pipeline.load_pipeline`."""
    file = read_single_file(path)
    vae = file.vae
    if vae is None and "vae" in without:  # another takes its place
        vae = (SDXL_VAE if file.family == "sdxl" else SD_VAE), {}
    if not file.text_encoders or vae is None:
        what, flag = ("VAE", "another as --vae") if file.text_encoders else ("text encoder", "it as --unet")
        raise InputError(f"{path} has no {what}: give {flag}, and as --model what it is made for")
    return {
        "unet": build_network(*file.unet, path, "meta" if "unet" in without else device, dtype),
        "vae": build_network(*vae, path, "meta" if "vae" in without else device, vae_dtype),
        "text_encoders": [build_network(*encoder, path, device, dtype) for encoder in file.text_encoders],
        "tokenizers": list(file.tokenizers) or clip_tokenizers(path, file),
        "schedule": file.schedule,
        "sampling": None if "unet" in without else folders.read_sampling(path),
        "zero_unconditional": file.family == "sdxl",
    }


def build_network(config: Any, tensors: dict[str, Tensor], path: Path, device: Device, dtype: DType) -> Any:
    """The network of a config, filled from the tensors of a file; not filled on the device "meta"."""
    options = {"projection": True} if "text_projection.weight" in tensors else {}
    with on_meta():
        network = NETWORKS[type(config)](config, **options)
    return network if str(device) == "meta" else load_into(network, tensors, str(path), dtype, device)


def clip_tokenizers(path: Path, file: SingleFile) -> list[CLIPTokenizer]:
    """CLIP's tokenizer, which single files leave out: from beside the file, else from the Hub or its cache."""
    beside = [folder for folder in (path.parent / "tokenizer", path.parent) if (folder / "vocab.json").is_file()]
    try:
        folder = beside[0] if beside else hub.fetch_files(CLIP, ("vocab.json", "merges.txt"))
    except InputError as error:
        raise InputError(
            f"{path} needs CLIP's vocabulary, which no single file holds: put the vocab.json and merges.txt of any "
            f"Stable Diffusion (they are in its tokenizer/ folder) in {path.parent / 'tokenizer'} ({error})"
        ) from error
    found = folders.load_tokenizer(folder, "")
    return [CLIPTokenizer(found.vocab, found.merges, found.max_length, pad) for pad in PADS[file.family]]


def replace_unet(pipe: Pipeline, source: str | Path, dtype: DType = torch.float32, ema: bool = False) -> None:
    """Give a pipeline the U-Net of any SOURCE, its prediction type, if the SOURCE says it, and its sampling settings.

    pipe: load it with `without=("unet",)`: then the U-Net that is replaced is not read from disk.
    dtype: of the U-Net; None keeps the file's. ema: of a single file with both, take the averaged weights.
    InputError: there is no such U-Net, or it does not fit the other parts.
    """
    device = next(pipe.text_encoders[0].parameters()).device
    unet, own, sampling = load_unet(source, device, dtype, ema)
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
    path, device = folders.find_model(source, dtype), next(pipe.text_encoders[0].parameters()).device
    base = SD_VAE if isinstance(pipe.vae, AutoencoderTiny) else pipe.vae.config
    if path.is_file():
        pipe.vae = build_network(*read_vae_file(path, base), path, device, dtype)
    else:
        pipe.vae = folders.load_vae(path, dtype, device, folders.part_in(path, "vae"))
    new, old = pipe.vae.config.scaling_factor, base.scaling_factor
    if new != old and isinstance(pipe.vae, AutoencoderKL):
        what = f"{path} is for latents scaled by {new:g}, this model's are scaled by {old:g}"
        warnings.warn(f"{what}: it is of another kind of model, expect poor images", stacklevel=2)
    pipe.check_parts()


def merge_loras(pipe: Pipeline, loras: Loras) -> None:
    """Merge LoRAs into a pipeline, one after the other; sampling settings are those of the last that has any."""
    pipe.set_sampling(merge_files(pipe.networks, loras) or pipe.sampling)


def merge_files(networks: Mapping[str, nn.Module], loras: Loras) -> Sampling | None:
    """Merge LoRAs into networks by their names in model folders. What the last that says so was distilled for."""
    sampling = None
    for source, scale in loras:
        path = folders.find_model(source)
        counts = lora_files.merge_into(networks, lora_files.read_lora(path, networks), scale)
        print(f"{path.name}: {lora_files.matched_line(counts)}", file=sys.stderr)
        sampling = folders.read_sampling(path) or sampling
    return sampling


def with_scales(files: Sequence[str] | None, scales: Sequence[float]) -> list[tuple[str, float]]:
    """(file, scale) of each LoRA, from one scale for all or one each. InputError: their numbers do not fit."""
    files = files or ()
    if len(scales) not in (1, len(files)):
        raise InputError(f"{len(scales)} scales for {len(files)} LoRAs: give one for all, or one each")
    return list(zip(files, scales if len(scales) > 1 else [*scales] * len(files), strict=True))


def load_unet(
    source: str | Path, device: Device, dtype: DType, ema: bool = False
) -> tuple[UNet, ScheduleConfig | None, Sampling | None]:
    """The U-Net of any SOURCE, also of a file or a folder that holds nothing else, the schedule it was trained with and
    what it was distilled for, where the SOURCE says them. Arguments as in `replace_unet`."""
    path = folders.find_model(source, dtype)
    if path.is_file():
        file = read_single_file(path, ema)
        return build_network(*file.unet, path, device, dtype), file.schedule, folders.read_sampling(path)
    if ema:
        raise InputError(f"{path} is a folder, which has no averaged weights: only single files may hold both kinds")
    part = folders.part_in(path, "unet")
    schedule = folders.load_schedule(path) if (path / "scheduler").is_dir() else None
    return folders.load_unet(path, dtype, device, part), schedule, folders.load_sampling(path, dtype, part)


def is_unet_alone(source: str | Path, dtype: DType = None) -> bool:
    """Whether a SOURCE is a U-Net and nothing else. (Of a folder: a part and nothing else, its config says which.)"""
    path = folders.find_model(source, dtype)
    if path.is_dir():
        return folders.part_in(path, "unet") == ""
    file = read_single_file(path)
    return file.vae is None and not file.text_encoders
