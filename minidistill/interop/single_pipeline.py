"""From a single file to the parts of a pipeline: networks, and the tokenizers that such a file may leave out."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidistill.errors import InputError
from minidistill.interop.single_file import SingleFile, read_single_file
from minidistill.models.clip import CLIPTextConfig, CLIPTextModel
from minidistill.models.taesd import AutoencoderTiny, TinyConfig
from minidistill.models.tokenizer import CLIPTokenizer
from minidistill.models.unet import UNet, UNetConfig
from minidistill.models.vae import SD_VAE, SDXL_VAE, AutoencoderKL, VAEConfig
from minidistill.weights import folders, hub
from minidistill.weights.files import load_into, on_meta
from minidistill.weights.folders import Device, DType

CLIP = "openai/clip-vit-large-patch14"  # where the Hub has the vocabulary that single files leave out
VOCABULARY = ("vocab.json", "merges.txt")
Config = UNetConfig | VAEConfig | TinyConfig | CLIPTextConfig
NETWORKS = {UNetConfig: UNet, VAEConfig: AutoencoderKL, TinyConfig: AutoencoderTiny, CLIPTextConfig: CLIPTextModel}


def load_parts(
    path: Path,
    device: Device = "cpu",
    dtype: DType = torch.float32,
    vae_dtype: DType = torch.float32,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """The arguments of `pipeline.Pipeline` from a single file; those and InputError as in `pipeline.load_pipeline`."""
    file = read_single_file(path)
    vae = file.vae
    if vae is None and "vae" in without:  # another takes its place
        vae = (SDXL_VAE if file.family == "sdxl" else SD_VAE), {}
    if not file.text_encoders:
        lacks = "text encoder" if file.vae else "VAE and text encoder"
        raise InputError(f"{path} has no {lacks}: give it as --unet, and as --model what it is made for")
    if vae is None:
        raise InputError(f"{path} has no VAE: give one as --vae, such as that of the model it was made from")
    return {
        "unet": build_network(*file.unet, path, "meta" if "unet" in without else device, dtype),
        "vae": build_network(*vae, path, "meta" if "vae" in without else device, vae_dtype),
        "text_encoders": [build_network(*encoder, path, device, dtype) for encoder in file.text_encoders],
        "tokenizers": list(file.tokenizers) or clip_tokenizers(path, file),
        "schedule": file.schedule,
        "sampling": None if "unet" in without else folders.read_sampling(path),
        "zero_unconditional": file.family == "sdxl",
    }


def build_network(
    config: Config, tensors: dict[str, Tensor], path: Path, device: Device, dtype: DType
) -> UNet | AutoencoderKL | AutoencoderTiny | CLIPTextModel:
    """The network of a config, filled from the tensors of a file; not filled on the device "meta"."""
    with on_meta():
        if isinstance(config, CLIPTextConfig):
            network = CLIPTextModel(config, "text_projection.weight" in tensors)
        else:
            network = NETWORKS[type(config)](config)
    return network if str(device) == "meta" else load_into(network, tensors, str(path), dtype, device)


def clip_tokenizers(path: Path, file: SingleFile) -> list[CLIPTokenizer]:
    """CLIP's tokenizer, which single files leave out: from beside the file, else from the Hub or its cache.

    SD 1.x pads with the end token, SD 2.x with "!", SDXL has one of each.
    """
    beside = [folder for folder in (path.parent / "tokenizer", path.parent) if (folder / VOCABULARY[0]).is_file()]
    try:
        folder = beside[0] if beside else hub.fetch_files(CLIP, VOCABULARY)
    except InputError as error:
        raise InputError(
            f"{path} needs CLIP's vocabulary, which no single file holds: put the vocab.json and merges.txt of any "
            f"Stable Diffusion (they are in its tokenizer/ folder) in {path.parent / 'tokenizer'} ({error})"
        ) from error
    found = folders.load_tokenizer(folder, "")
    pads = {"sd1": ("<|endoftext|>",), "sd2": ("!",), "sdxl": ("<|endoftext|>", "!")}[file.family]
    return [CLIPTokenizer(found.vocab, found.merges, found.max_length, pad) for pad in pads]
