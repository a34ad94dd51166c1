"""Pipeline folders in the diffusers layout: every part loaded and saved on its own.

    model_index.json   unet/   vae/   text_encoder/   tokenizer/   scheduler/   and, optionally, clip/

`clip/` is a whole CLIP (transformers' CLIPModel), for metrics; it is no part of the pipeline and its index.
Models are built on `meta` and filled from files: nothing is initialised at random or in memory twice.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minidistill.diffusion.sampling import Sampling, as_distilled, default_solver, find_sampling, sampling_metadata
from minidistill.diffusion.schedule import ScheduleConfig
from minidistill.errors import InputError
from minidistill.models.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel
from minidistill.models.lora import lora_layers
from minidistill.models.taesd import AutoencoderTiny, TinyConfig
from minidistill.models.tokenizer import CLIPTokenizer
from minidistill.models.unet import UNet, UNetConfig
from minidistill.models.vae import AutoencoderKL, VAEConfig
from minidistill.weights.choice import (
    DIFFUSERS_STEMS,
    NETWORKS,
    SINGLE_FILES,
    TOKENIZERS,
    TRANSFORMERS_STEMS,
    is_poorer,
    missing_files,
    pick_weights,
    shards,
    some,
)
from minidistill.weights.files import (
    Model,
    load_into,
    on_meta,
    read_json,
    read_metadata,
    read_tensors,
    write_json,
    write_safetensors,
)
from minidistill.weights.hub import PLACE, WEIGHTS, find_source

Device = str | torch.device
DType = torch.dtype | None  # None keeps the file's

MINIATURE = Path(__file__).resolve().parents[1] / "miniature"
SHIPPED = {"miniature": MINIATURE}  # models inside this package, by the names that mean them

FLAGS = {"UNet2DConditionModel": "--unet", "AutoencoderKL": "--vae", "AutoencoderTiny": "--vae"}

SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"


def find_model(source: str | Path, dtype: DType = torch.float32) -> Path:
    """The pipeline folder, the folder of one part, or the single file that a SOURCE means; fetched if it must be.

    dtype: float16 prefers weights of that precision where there are two kinds.

    Raises:
        InputError: there is no such thing, or it cannot be had now.
    """
    if not isinstance(source, str | Path):
        raise InputError(f"a SOURCE is text or a Path, not {type(source).__name__}")
    if str(source) in SHIPPED:
        return SHIPPED[str(source)]
    path = find_source(source, dtype)
    if path.is_dir():
        return _model_in(path)
    if path.suffix not in WEIGHTS:
        hint = f"give its folder, {path.parent}" if path.suffix == ".json" else f"weights end in {', '.join(WEIGHTS)}"
        raise InputError(f"{path} is no model: {hint}")
    return path


def _model_in(folder: Path) -> Path:
    """The folder, or the only weights file in it. InputError: it is no model, and what to give instead."""
    match = PLACE.fullmatch(str(folder))
    on_hub = f"; rename or remove it if the model {folder} on the Hub is meant" if match and not match["file"] else ""
    inside = {path.name: path for path in folder.iterdir()}
    models = [path for path in inside.values() if (path / "model_index.json").is_file()]
    if models and "model_index.json" not in inside:  # the folder of a run, say, with a config.json of its own
        inside.pop("config.json", None)
    if on_hub and {"model_index.json", "config.json"} & inside.keys() and (lacking := missing_files(folder)):
        raise InputError(f"{folder} is not complete, it lacks {some(lacking)}{on_hub}")
    if {"model_index.json", "config.json", *NETWORKS, *TOKENIZERS} & inside.keys():
        return folder
    files = [path for name, path in inside.items() if name.endswith(SINGLE_FILES)]
    others = models or files
    if len(files) == 1 and others == files:
        return files[0]
    hint = f"give {some(map(str, others))}" if others else f"it has no model_index.json{on_hub}"
    raise InputError(f"{folder} is not a model folder: {hint}")


def check_placement(device: Device, *dtypes: DType) -> None:
    """InputError: no device that can be used here, or no dtype."""
    if wrong := [dtype for dtype in dtypes if not isinstance(dtype, DType)]:
        raise InputError(f"a dtype such as torch.float16 is needed, not {wrong[0]!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def read_model_index(folder: Path) -> dict[str, Any]:
    """The index of a pipeline folder. InputError: it has none, or is of a kind that is not computed here."""
    if not (folder / "model_index.json").is_file():
        part = (folder / "config.json").is_file()
        hint = f" (a part is for --unet or --vae; its pipeline may be {folder.absolute().parent})" if part else ""
        raise InputError(f"{folder} is not a pipeline folder: it has no model_index.json{hint}")
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") not in (SD, SDXL):
        raise InputError(f"{folder} is a {index.get('_class_name')}: a {SD} or {SDXL} is needed")
    return index


# loading: `folder` is the pipeline's, `part` the folder in it; "" if the folder holds this part and nothing else


def load_unet(folder: str | Path, dtype: DType = torch.float32, device: Device = "cpu", part: str = "unet") -> UNet:
    """The U-Net of a pipeline folder. On the device "meta" it has a config and no weights: no file of them is read.

    InputError: a file is missing, broken or at odds with config.json.
    """

    def build(config: dict[str, Any]) -> UNet:
        _check_class(config, "UNet2DConditionModel")
        return UNet(UNetConfig.from_dict(config))

    return _load(Path(folder) / part, build, DIFFUSERS_STEMS, dtype, device)


def load_vae(
    folder: str | Path, dtype: DType = torch.float32, device: Device = "cpu", part: str = "vae"
) -> AutoencoderKL | AutoencoderTiny:
    """The autoencoder of a pipeline folder, which may be a TAESD. "meta" and InputError as in `load_unet`."""

    def build(config: dict[str, Any]) -> AutoencoderKL | AutoencoderTiny:
        _check_class(config, "AutoencoderKL", "AutoencoderTiny")
        is_tiny = config.get("_class_name") == "AutoencoderTiny"
        return AutoencoderTiny(TinyConfig.from_dict(config)) if is_tiny else AutoencoderKL(VAEConfig.from_dict(config))

    return _load(Path(folder) / part, build, DIFFUSERS_STEMS, dtype, device)


def _check_class(config: Mapping[str, Any], *known: str) -> None:
    """ValueError: a config is of another class; the oldest ones name none."""
    name = config.get("_class_name") or (config.get("architectures") or known)[0]
    if name not in known:
        hint = f" (give it as {FLAGS[name]})" if name in FLAGS else ""
        raise ValueError(f"a {' or '.join(known)} is needed, it is a {name}{hint}")


def load_text_encoder(
    folder: str | Path, dtype: DType = torch.float32, device: Device = "cpu", part: str = "text_encoder"
) -> CLIPTextModel:
    """A text encoder, with projection if its config.json says so. InputError as in `load_unet`."""

    def build(config: dict[str, Any]) -> CLIPTextModel:
        projection = "CLIPTextModelWithProjection" in (config.get("architectures") or [])
        return CLIPTextModel(CLIPTextConfig.from_dict(config), projection)

    return _load(Path(folder) / part, build, TRANSFORMERS_STEMS, dtype, device)


def load_clip(folder: str | Path, dtype: DType = torch.float32, device: Device = "cpu") -> CLIPModel:
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


def load_sampling(folder: str | Path, dtype: DType = torch.float32, part: str = "unet") -> Sampling | None:
    """What the U-Net in a folder was distilled for. InputError as in `load_unet`."""
    return read_sampling(find_weights(_existing_part(Path(folder) / part), DIFFUSERS_STEMS, dtype)[0])


def read_sampling(path: Path) -> Sampling | None:
    """What the weights in a file were distilled for, by its header or its name; None: for nothing in particular."""
    try:
        return find_sampling(path, read_metadata(path) if path.suffix == ".safetensors" else {})
    except ValueError as error:
        raise InputError(str(error)) from error


def part_in(folder: Path, part: str) -> str:
    """`part`, or "" if the folder holds one part of a pipeline and nothing else."""
    alone = (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()
    return "" if alone else part


def _load(
    path: Path, build: Callable[[dict[str, Any]], Model], stems: tuple[str, str], dtype: DType, device: Device
) -> Model:
    """Build a model from `path`/config.json and fill it from the weights beside it."""
    config = read_json(_existing_part(path) / "config.json")
    try:
        with on_meta():
            model = build(config)
    except (TypeError, ValueError, ArithmeticError) as error:  # the last: a number that is 0 or too large
        raise InputError(f"{path / 'config.json'}: {error}") from error
    if torch.device(device).type == "meta":
        return model
    files = find_weights(path, stems, dtype)
    if dtype is not None and is_poorer(files[0].name, dtype):
        warnings.warn(f"{files[0]} is all there is; it is used as {dtype}", stacklevel=3)
    tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    return load_into(model, tensors, str(files[0] if len(files) == 1 else path), dtype, device)


def find_weights(path: Path, stems: tuple[str, str], dtype: DType = torch.float32) -> list[Path]:
    """The file, or the shards, with the weights of one part, by the rules of `choice.pick_weights`.

    InputError: there are none.
    """
    chosen = pick_weights({file.name for file in path.iterdir() if file.is_file()}, stems, dtype)
    if not chosen:
        raise InputError(f"no weights in {path}: expected {stems[0]}.safetensors (or its .fp16, sharded or .bin form)")
    return shards(path / chosen[0]) if chosen[0].endswith(".json") else [path / chosen[0]]


def _existing_part(path: Path) -> Path:
    if not path.is_dir():
        raise InputError(f"{path.parent} has no folder {path.name}/, which a pipeline needs")
    return path


# saving


def save_pipeline(
    folder: str | Path,
    unet: UNet,
    vae: AutoencoderKL | AutoencoderTiny,
    text_encoders: Sequence[CLIPTextModel],
    tokenizers: Sequence[CLIPTokenizer],
    schedule: ScheduleConfig,
    sampling: Sampling | None = None,
    zero_unconditional: bool = False,
) -> None:
    """Write a pipeline folder that diffusers reads, and samples as the model was made to be sampled.

    `pipeline.Pipeline` says what the parts are. The index is removed first and written last: a folder without it is
    one that was not finished. InputError: it cannot be written, or holds other weights.
    """
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        (folder / "model_index.json").unlink()
    is_sdxl = len(text_encoders) == 2
    usual = "euler" if is_sdxl else default_solver(schedule)[0]
    is_euler = (sampling.sampler if sampling else usual) == "euler"
    scheduler = "EulerDiscreteScheduler" if is_euler else "DDIMScheduler"
    save_unet(folder, unet, sampling_metadata(sampling))
    save_vae(folder, vae)
    for i, (encoder, tokenizer) in enumerate(zip(text_encoders, tokenizers, strict=True)):
        save_text_encoder(folder, encoder, f"text_encoder{'_2' * i}")
        save_tokenizer(folder, tokenizer, f"tokenizer{'_2' * i}")
    config = as_distilled(schedule, sampling).to_dict() | {"_class_name": scheduler}
    write_json(folder / "scheduler" / "scheduler_config.json", config)
    parts = {
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae.config.to_dict()["_class_name"]],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if is_sdxl:
        parts["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        parts["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        parts["force_zeros_for_empty_prompt"] = zero_unconditional
    else:
        parts |= {"safety_checker": [None, None], "requires_safety_checker": False}
    # The version is that of the format: the parts are written as diffusers has read them since then.
    head = {"_class_name": SDXL if is_sdxl else SD, "_diffusers_version": "0.21.0"}
    write_json(folder / "model_index.json", {**head, **dict(sorted(parts.items()))})


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
    config = {"architectures": ["CLIPModel"], **clip.config.to_dict()}
    _save(Path(folder) / "clip", clip, config, TRANSFORMERS_STEMS)


def save_tokenizer(folder: str | Path, tokenizer: CLIPTokenizer, part: str = "tokenizer") -> None:
    """Write `tokenizer/`."""
    path = Path(folder) / part
    try:
        path.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _save(
    path: Path,
    model: nn.Module,
    config: Mapping[str, Any],
    stems: tuple[str, str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    if lora_layers(model):
        raise InputError(f"cannot write {path}: a model folder has no place for a live LoRA; merge or remove it first")
    name = f"{stems[0]}.safetensors"
    others = [old.name for stem in set(stems) for old in sorted(path.glob(f"{stem}[.-]*")) if old.name != name]
    if others:
        # A reader might take these, with their old content, for the weights that are being written.
        raise InputError(f"{path} already holds other weights ({others[0]}): save to another folder")
    write_safetensors(path / name, model.state_dict(), metadata)
    write_json(path / "config.json", config)
