"""What a command trains or measures on, checked and opened before it writes a file."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from minidistill.data.cache import LatentCache, is_cache
from minidistill.data.folders import ImageFolder
from minidistill.errors import InputError
from minidistill.interop.publish import open_repo
from minidistill.miniature.scenes import SIDE, Scenes
from minidistill.models.unet import UNetConfig
from minidistill.pipeline import Pipeline
from minidistill.training import parallel
from minidistill.training.run_folder import RunFolder

Data = Scenes | ImageFolder | LatentCache


class Training(Protocol):
    """Settings that every training has."""

    data: str
    flip: bool
    max_grad_norm: float | None
    ema_decay: float | None
    caption_dropout: float
    learning_rate: float | None
    warmup: int
    steps: int


def check_training(config: Training) -> None:
    """InputError: settings that no flag's minimum can refuse. A warning: a learning rate that is never reached."""
    if config.learning_rate == 0:
        raise InputError("--learning-rate must be above 0, or nothing trains")
    if config.warmup > config.steps:
        short = f"--warmup {config.warmup} is longer than --steps {config.steps}"
        reached = f"{config.steps / config.warmup:.0%} of --learning-rate is all that is reached"
        warnings.warn(f"{short}: {reached}; give a shorter --warmup", stacklevel=2)
    if config.ema_decay is not None and config.ema_decay >= 1:
        raise InputError(f"--ema-decay must be below 1, not {config.ema_decay:g}: the average would never move")
    if config.caption_dropout > 1:
        raise InputError(f"--caption-dropout is a share of the samples, 0 to 1, not {config.caption_dropout:g}")
    if config.max_grad_norm == 0:
        raise InputError("--max-grad-norm must be above 0, or nothing trains; none leaves gradients as they are")
    if config.flip and config.data == "scenes":
        raise InputError("--flip: the captions of scenes say left and right; give --data a folder, or --no-flip")


def check_weights(pipe: Pipeline, source: str) -> None:
    """InputError: nan or infinity among a model's weights; the first is named."""
    for part, network in {**pipe.networks, "vae": pipe.vae}.items():
        for name, weight in network.named_parameters():
            if not weight.isfinite().all():
                raise InputError(f"{source}: {part}/ {name} is not finite; download or save this model again")


def find_run(config: Mapping[str, Any], pipe: Pipeline, data: Data) -> tuple[dict[str, Any], RunFolder]:
    """The settings of a run, for its config.json, and the folder they may be written to; nothing is written there yet.

    The settings are those of `config`, and in place of paths, which --resume does not compare, fingerprints of the
    model's weights and of the examples. The repository of --push-to-hub is made now, if there is one.

    InputError: as in `RunFolder.find` and `open_repo`.
    """
    settings = {**config, "weights": weights_fingerprint(pipe), "examples": data.fingerprint()}
    folder = RunFolder.find(settings["out"], settings, settings["resume"])
    if settings["push_to_hub"] and parallel.is_first():
        open_repo(settings["push_to_hub"], settings["private"])
    return settings, folder


def weights_fingerprint(pipe: Pipeline) -> str:
    """A hash of a model's tokenizers, schedule and weights, the same on every device and under every path.

    Of each tensor it takes the name, shape and dtype, the sum of all bytes, eight at a time as integers, which is exact
    in any order, and 256 bytes as they are. As fast as memory is read: seconds for SDXL.
    """
    texts = [(sorted(t.vocab.items()), t.merges, t.max_length, t.pad_token) for t in pipe.tokenizers]
    digest = hashlib.sha256(repr((texts, pipe.schedule, pipe.zero_unconditional)).encode())
    for part, network in sorted({**pipe.networks, "vae": pipe.vae}.items()):
        for name, tensor in sorted(network.state_dict().items()):
            octets = tensor.detach().flatten().view(torch.uint8)
            eights = octets[: len(octets) // 8 * 8].view(torch.int64)
            some = eights[torch.arange(32, device=eights.device) * len(eights) // 32] if len(eights) else eights
            content = part, name, tuple(tensor.shape), str(tensor.dtype), int(eights.sum()), some.tolist()
            digest.update(repr((*content, octets[8 * len(eights) :].tolist())).encode())
    return digest.hexdigest()[:16]


def resolution_for(pipe: Pipeline, asked: int | None, source: str) -> int:
    """Pixels to train at: those asked for, else the model's own. InputError: it cannot."""
    if asked is None and pipe.unet.config.sample_size is None:
        raise InputError(f"{source}: unet/config.json names no sample_size: give --resolution in pixels")
    resolution, factor = asked or pipe.trained_size()[0], pipe.vae.config.downscale
    if resolution % factor:
        raise InputError(f"--resolution must be a multiple of {factor} for this model, not {resolution}")
    return resolution


def smallest_map(unet: UNetConfig, side: int) -> int:
    """Pixels across the smallest feature map that a U-Net downsamples, from latents of `side`: 64 -> 16 for SD 1.x."""
    return -(-side // 2 ** max(0, len(unet.block_out_channels) - 2))  # the last stage does not


def open_data(
    data: str, resolution: int, scenes: Scenes, split: str | None = None, caption_column: str | None = None
) -> Data:
    """The images of --data: `scenes`, which have one size, or a folder's, cropped to a square and resized, or cached.

    scenes: those that the word `scenes` means here. split, caption_column: of a folder, as in `find_examples`.
    """
    if data != "scenes":
        return (LatentCache if is_cache(data) else ImageFolder)(data, resolution, split, caption_column)
    if split or caption_column:
        raise InputError("--split and --caption-column are of folders: give --data a folder of images")
    if resolution != SIDE:
        raise InputError(
            f"scenes are {SIDE}x{SIDE} images, not {resolution}x{resolution} (the model's own size "
            f"if --resolution is not given): give --data a folder of images, or --resolution {SIDE}"
        )
    return scenes


def print_summary(data: Data) -> None:
    """Print what a folder or a cache holds, and what was left out."""
    if not isinstance(data, Scenes):
        print(data.summary(), flush=True)
