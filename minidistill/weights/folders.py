"""Pipeline folders in the diffusers layout: every part loaded and saved on its own.

    model_index.json   unet/   vae/   text_encoder/   tokenizer/   scheduler/   and, optionally, clip/

`clip/` is a whole CLIP (transformers' CLIPModel), for metrics; it is no part of the pipeline and its index.
Models are built on `meta` and filled from files: nothing is initialised at random or in memory twice.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minidistill.diffusion.schedule import ScheduleConfig
from minidistill.errors import InputError
from minidistill.models.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel
from minidistill.models.lora import lora_layers
from minidistill.models.taesd import AutoencoderTiny, TinyConfig
from minidistill.models.tokenizer import CLIPTokenizer
from minidistill.models.unet import UNet, UNetConfig
from minidistill.models.vae import SD_VAE, AutoencoderKL, VAEConfig
from minidistill.weights.choice import DIFFUSERS_STEMS, TRANSFORMERS_STEMS, is_poorer, pick_weights, shards
from minidistill.weights.files import (
    Model,
    load_into,
    on_meta,
    read_json,
    read_tensors,
    write_json,
    write_safetensors,
)
from minidistill.weights.hub import find_source

MINIATURE = Path(__file__).resolve().parents[1] / "miniature"

SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
NONE = [None, None]


def find_model(source: str | Path, dtype: torch.dtype | None = torch.float32) -> Path:
    """The pipeline folder, the folder of one part, or the single file that a SOURCE means; fetched if it must be.

    dtype: float16 prefers weights of that precision where there are two kinds.

    Raises:
        InputError: there is no such thing, or it cannot be had now.
    """
    return MINIATURE if str(source) == "miniature" else find_source(source, dtype)


def read_model_index(folder: Path) -> dict[str, Any]:
    """The index of a pipeline folder. InputError: it has none, or is of a kind that is not computed here."""
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} is not a pipeline folder: it has no model_index.json")
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") not in (SD, SDXL):
        raise InputError(f"{folder} is a {index.get('_class_name')}: a {SD} or {SDXL} is needed")
    return index


# loading: `folder` is always the pipeline's


def load_unet(
    folder: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    part: str = "unet",
) -> UNet:
    """The U-Net of a pipeline folder; part "" if the folder is the U-Net's own.

    InputError: a file is missing, broken or at odds with config.json.
    """
    return _load(Path(folder) / part, lambda c: UNet(UNetConfig.from_dict(c)), DIFFUSERS_STEMS, dtype, device)


def load_vae(
    folder: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    part: str = "vae",
) -> AutoencoderKL | AutoencoderTiny:
    """The autoencoder of a pipeline folder, which may be a TAESD. InputError and part as in `load_unet`."""

    def build(config: dict[str, Any]) -> AutoencoderKL | AutoencoderTiny:
        is_tiny = config.get("_class_name") == "AutoencoderTiny"
        return AutoencoderTiny(TinyConfig.from_dict(config)) if is_tiny else AutoencoderKL(VAEConfig.from_dict(config))

    return _load(Path(folder) / part, build, DIFFUSERS_STEMS, dtype, device)


def load_text_encoder(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    part: str = "text_encoder",
) -> CLIPTextModel:
    """A text encoder, with projection if its config.json says so. InputError as in `load_unet`."""

    def build(config: dict[str, Any]) -> CLIPTextModel:
        projection = "CLIPTextModelWithProjection" in (config.get("architectures") or [])
        return CLIPTextModel(CLIPTextConfig.from_dict(config), projection)

    return _load(Path(folder) / part, build, TRANSFORMERS_STEMS, dtype, device)


def load_vae_config(folder: str | Path) -> VAEConfig:
    """The config of a pipeline folder's VAE, or, where that is a TAESD, Stable Diffusion's."""
    config = read_json(_existing_part(Path(folder) / "vae") / "config.json")
    try:
        return SD_VAE if config.get("_class_name") == "AutoencoderTiny" else VAEConfig.from_dict(config)
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder}/vae/config.json: {error}") from error


def load_clip(folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> CLIPModel:
    """The whole CLIP that may lie beside a pipeline, in `clip/`. InputError as in `load_unet`."""

    def build(config: dict[str, Any]) -> CLIPModel:
        towers = CLIPConfig.from_dict(config)
        return CLIPModel(towers.text_config, towers.vision_config)

    return _load(Path(folder) / "clip", build, TRANSFORMERS_STEMS, dtype, device)


def load_tokenizer(folder: str | Path, part: str = "tokenizer") -> CLIPTokenizer:
    """The tokenizer of a pipeline folder. InputError: a file is missing or not what it should be."""
    path = _existing_part(Path(folder) / part)
    try:
        return CLIPTokenizer.from_folder(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the tokenizer in {path}: {error}") from error


def load_schedule(folder: str | Path) -> ScheduleConfig:
    """The noise schedule. InputError: the file is missing, or of a kind that is not computed here."""
    path = _existing_part(Path(folder) / "scheduler") / "scheduler_config.json"
    config = read_json(path)
    try:
        return ScheduleConfig.from_dict(config)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error


def unet_file(folder: str | Path, dtype: torch.dtype | None = None, part: str = "unet") -> Path:
    """The file, or the first shard, with the weights of a U-Net."""
    return find_weights(_existing_part(Path(folder) / part), DIFFUSERS_STEMS, dtype)[0]


def _load(
    path: Path,
    build: Callable[[dict[str, Any]], Model],
    stems: tuple[str, str],
    dtype: torch.dtype,
    device: str | torch.device,
) -> Model:
    """Build a model from `path`/config.json and fill it from the weights beside it."""
    config = read_json(_existing_part(path) / "config.json")
    try:
        with on_meta():
            model = build(config)
    except (TypeError, ValueError, ArithmeticError) as error:  # the last: a number that is 0 or too large
        raise InputError(f"{path / 'config.json'}: {error}") from error
    files = find_weights(path, stems, dtype)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file)
    return load_into(model, tensors, str(files[0] if len(files) == 1 else path), dtype, device)


def find_weights(path: Path, stems: tuple[str, str], dtype: torch.dtype | None = torch.float32) -> list[Path]:
    """The file, or the shards, with the weights of one part, by the rules of `choice.pick_weights`.

    Warns where they have fewer digits than `dtype` asks for. InputError: there are none.
    """
    names = {file.name for file in path.iterdir() if file.is_file()}
    chosen = pick_weights(names, stems, dtype)
    if not chosen:
        raise InputError(f"no weights in {path}: expected {stems[0]}.safetensors (or its .fp16, sharded or .bin form)")
    if is_poorer(chosen[0], dtype):
        warnings.warn(f"{path / chosen[0]} is all there is; it is used as {dtype}", stacklevel=4)
    return shards(path / chosen[0]) if chosen[0].endswith(".json") else [path / chosen[0]]


def _existing_part(path: Path) -> Path:
    if not path.is_dir():
        raise InputError(f"{path.parent} has no folder {path.name}/, which a pipeline needs")
    return path


# saving


def save_unet(folder: str | Path, unet: UNet, metadata: Mapping[str, str] | None = None, part: str = "unet") -> None:
    """Write `unet/`: the config of this very network and its weights, in their dtype.

    metadata: text kept in the header of the weights file, for example what a student was distilled for.
    part: the folder in `folder`; "" for a folder that is a U-Net and nothing else.
    """
    _save(Path(folder) / part, unet, unet.config.to_dict(), DIFFUSERS_STEMS, metadata)


def save_vae(folder: str | Path, vae: AutoencoderKL) -> None:
    """Write `vae/`."""
    _save(Path(folder) / "vae", vae, vae.config.to_dict(), DIFFUSERS_STEMS)


def save_text_encoder(folder: str | Path, text_encoder: CLIPTextModel, part: str = "text_encoder") -> None:
    """Write `text_encoder/`, in the names that every version of transformers reads."""
    kind = "CLIPTextModel" if text_encoder.text_projection is None else "CLIPTextModelWithProjection"
    config = {"architectures": [kind], **text_encoder.config.to_dict()}
    _save(Path(folder) / part, text_encoder, config, TRANSFORMERS_STEMS)


def save_clip(folder: str | Path, clip: CLIPModel) -> None:
    """Write `clip/`."""
    _save(
        Path(folder) / "clip",
        clip,
        {"architectures": ["CLIPModel"], **clip.config.to_dict()},
        TRANSFORMERS_STEMS,
    )


def save_tokenizer(folder: str | Path, tokenizer: CLIPTokenizer, part: str = "tokenizer") -> None:
    """Write `tokenizer/`."""
    path = Path(folder) / part
    try:
        path.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def save_schedule(folder: str | Path, schedule: ScheduleConfig, scheduler: str = "DDIMScheduler") -> None:
    """Write `scheduler/` for a diffusers scheduler: DDIMScheduler or EulerDiscreteScheduler."""
    config = schedule.to_dict() | {"_class_name": scheduler}
    write_json(Path(folder) / "scheduler" / "scheduler_config.json", config)


def save_model_index(
    folder: str | Path,
    kind: str = SD,
    scheduler: str = "DDIMScheduler",
    vae: str = "AutoencoderKL",
    zero_unconditional: bool = False,
) -> None:
    """Write model_index.json, which makes a folder a pipeline: call it when all the parts are there."""
    parts = {
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae],
        "feature_extractor": NONE,
        "image_encoder": NONE,
    }
    if kind == SDXL:
        parts["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        parts["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        parts["force_zeros_for_empty_prompt"] = zero_unconditional
    else:
        parts |= {"safety_checker": NONE, "requires_safety_checker": False}
    # The version is that of the format: the parts are written as diffusers has read them since then.
    write_json(
        Path(folder) / "model_index.json",
        {"_class_name": kind, "_diffusers_version": "0.21.0", **dict(sorted(parts.items()))},
    )


def _save(
    path: Path,
    model: nn.Module,
    config: Mapping[str, Any],
    stems: tuple[str, str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    if lora_layers(model):
        raise InputError(
            f"cannot write {path}: a live LoRA is no part of a model folder; merge it or take it off first"
        )
    name = f"{stems[0]}.safetensors"
    others = [old.name for stem in set(stems) for old in sorted(path.glob(f"{stem}[.-]*")) if old.name != name]
    if others:
        # A reader might take these, with their old content, for the weights that are being written.
        raise InputError(f"{path} already holds other weights ({others[0]}): save to another folder")
    write_safetensors(path / name, model.state_dict(), metadata)
    write_json(path / "config.json", config)
