"""A VAE in a file of its own: the full one in diffusers' or LDM's names, or a TAESD."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from minidistill.errors import InputError
from minidistill.interop import ldm
from minidistill.interop.header import VAE, read_config
from minidistill.interop.infer import infer_vae_config, shape_of
from minidistill.models.taesd import TinyConfig
from minidistill.models.vae import SD_VAE, VAEConfig
from minidistill.weights.files import read_metadata, read_tensors
from minidistill.weights.layouts import tiny_name, without_wrappers

Tensors = dict[str, Tensor]
TRAINING = ("loss.", "model_ema.")  # the discriminator and the running average of a VAE's own training


def read_file(path: str | Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a file, without torch's wrappers in their names, and the text in its header."""
    tensors = {without_wrappers(name): tensor for name, tensor in read_tensors(path).items()}
    return tensors, read_metadata(path) if Path(path).suffix == ".safetensors" else {}


def read_vae_file(path: str | Path, base: VAEConfig = SD_VAE) -> tuple[VAEConfig | TinyConfig, Tensors]:
    """Read a VAE alone, in diffusers' or LDM's names, or a TAESD, in diffusers' or its own.

    A TAESD in its own names is two files, taesd_encoder and taesd_decoder: either means both.

    Args:
        base: gives what no file says, most of all the scaling_factor: the shapes of SD's and SDXL's VAE are equal,
            so this should be the config of the VAE that is replaced.

    Returns:
        (config, tensors in our names), for AutoencoderKL or, with a TinyConfig, AutoencoderTiny.

    Raises:
        InputError: the file is not a VAE, or holds more than one.
    """
    tensors, metadata = read_file(path)
    try:
        if any(re.match(r"\d+\.", name) for name in tensors):
            tensors = _both_halves(Path(path), tensors)
        for prefix in ("first_stage_model.", "vae."):
            if tensors and all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        tiny = {tiny_name(name): tensor for name, tensor in tensors.items()}
        if "decoder.layers.0.weight" in tiny:
            width, latents = (shape_of(tiny, f"{half}.layers.0.weight", 4) for half in ("encoder", "decoder"))
            return TinyConfig(width=width[0], latent_channels=latents[1]), tiny
        if not any(name.endswith("coder.conv_in.weight") for name in tensors):
            raise InputError(f"not a VAE: it holds {len(tensors)} tensors, {ldm.first_few(list(tensors))}")
        return read_vae(tensors, metadata, base)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _both_halves(path: Path, tensors: Tensors) -> Tensors:
    """One half of a TAESD in its own names, and the other from the file beside it."""
    half = "encoder" if "0.weight" in tensors else "decoder"  # the decoder starts with a layer without weights
    other = "decoder" if half == "encoder" else "encoder"
    beside = path.with_name(path.name.replace(half, other))
    if beside == path or not beside.is_file():
        raise InputError(f"it is a TAESD's {half}: its {other} must lie beside it, named alike ({beside.name})")
    both = {f"{half}.{name}": tensor for name, tensor in tensors.items()}
    return both | {f"{other}.{name}": tensor for name, tensor in read_tensors(beside).items()}


def read_vae(tensors: Tensors, metadata: Mapping[str, str], base: VAEConfig) -> tuple[VAEConfig, Tensors]:
    """A VAE's config, from the header or by shapes, and its tensors in our names, from diffusers' or LDM's.

    The attention may still have its old names, or convolutions for matrices: `load_into` knows both.

    base: as in `read_vae_file`. InputError: not a VAE.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(TRAINING)}
    if any(name.startswith(("encoder.down.", "decoder.up.")) for name in tensors):
        tensors = ldm.from_ldm_vae(tensors)
    return read_config(metadata, VAE, VAEConfig.from_dict) or infer_vae_config(tensors, base), tensors
