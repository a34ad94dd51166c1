"""Pipeline folders in the diffusers layout: every part loaded and saved on its own.

    model_index.json   unet/   vae/   text_encoder/   tokenizer/   scheduler/   and, optionally, clip/

`clip/` is a whole CLIP, for metrics, and no part of the pipeline. Models are built on `meta` and filled from files:
nothing is initialised at random or in memory twice.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from minidistill.weights import choice, files, loading
from minidistill.weights.hub import PLACE, WEIGHTS, find_source
from minidistill.weights.typed import MISSHAPEN, read_as

if TYPE_CHECKING:
    from minidistill.pipeline import Pipeline

Device = str | torch.device
DType = torch.dtype | None  # None keeps the file's

MINIATURE = Path(__file__).resolve().parents[1] / "miniature"
# Models inside this package, by the names that mean them; the second is a bk-tiny of the first.
SHIPPED = {"miniature": MINIATURE, "miniature-tiny": MINIATURE / "tiny"}
STUDENT = re.compile(r"(\d+)-step(\.safetensors|-x0)?")  # of few sampling steps, beside a model

SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
CLASSES = {  # in config.json -> the network's config and class here
    "UNet2DConditionModel": (UNetConfig, UNet),
    "AutoencoderKL": (VAEConfig, AutoencoderKL),
    "AutoencoderTiny": (TinyConfig, AutoencoderTiny),
    "CLIPTextModel": (CLIPTextConfig, CLIPTextModel),
    "CLIPTextModelWithProjection": (CLIPTextConfig, lambda config: CLIPTextModel(config, projection=True)),
    "CLIPModel": (CLIPConfig, lambda config: CLIPModel(config.text_config, config.vision_config)),
}
FLAGS = {"UNet2DConditionModel": "--unet", "AutoencoderKL": "--vae", "AutoencoderTiny": "--vae"}


def find_model(source: str | Path, dtype: DType = torch.float32) -> Path:
    """The pipeline folder, the folder of one part, or the single file that a SOURCE means; fetched if it must be.

    dtype: float16 prefers weights of that precision where there are two kinds.
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


def find_student(source: str | Path, steps: int) -> Path:
    """The student of a model for so many sampling steps, as it comes with the model, in its folder lightning/.

    N-step.safetensors is a LoRA; a folder N-step, or N-step-x0 if it predicts x0, a U-Net. InputError: there is none.
    """
    beside = (find_model(source) / "lightning").glob("*")
    found = {int(match[1]): path for path in beside if (match := STUDENT.fullmatch(path.name))}
    if steps not in found:
        there = f"it has them for {', '.join(map(str, sorted(found)))} steps" if found else "it has none for few steps"
        raise InputError(f"--lightning {steps}: {source} comes with no such student; {there}")
    return found[steps]


def _model_in(folder: Path) -> Path:
    """The folder, or the only weights file in it. InputError: it is no model, and what to give instead."""
    match = PLACE.fullmatch(str(folder))
    on_hub = f"; rename or remove it if the model {folder} on the Hub is meant" if match and not match["file"] else ""
    inside = {path.name: path for path in folder.iterdir()}
    models = [path for path in inside.values() if (path / choice.INDEX).is_file()]
    singles = [path for name, path in inside.items() if name.endswith(choice.SINGLE_FILES)]
    if choice.INDEX not in inside and (models or (singles and not choice.pick_weights(inside))):
        inside.pop("config.json", None)  # of a run, not of the part of a pipeline
    if on_hub and {choice.INDEX, "config.json"} & inside.keys() and (lacking := choice.missing_files(folder)):
        raise InputError(f"{folder} is not complete, it lacks {files.some(lacking)}{on_hub}")
    if {choice.INDEX, "config.json", *choice.NETWORKS, *choice.TOKENIZERS} & inside.keys():
        return folder
    if len(singles) == 1 and not models:
        return singles[0]
    others = models or singles
    hint = f"it has no {choice.INDEX}, only {files.some(sorted(inside))}{on_hub}"
    if others:
        hint = f"give {files.some(sorted(map(str, others)))}"
    raise InputError(f"{folder} is not a model folder: {hint}")


def check_placement(device: Device, *dtypes: DType) -> None:
    """InputError: no device that can be used here, or no dtype."""
    for dtype in dtypes:
        if not isinstance(dtype, DType) or (dtype and not (dtype.is_floating_point and dtype.itemsize > 1)):
            raise InputError(f"a dtype such as torch.float16 is needed, not {dtype!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def read_model_index(folder: Path) -> dict[str, Any]:
    """The index of a pipeline folder. InputError: it has none, or is of a kind that is not computed here."""
    if not (folder / choice.INDEX).is_file():
        hint = " (its unet/ is for --unet)" if (folder / "unet").is_dir() else ""  # a checkpoint of diffusers' scripts
        if (folder / "config.json").is_file():
            hint = f" (a part is for --unet or --vae; its pipeline may be {folder.absolute().parent})"
        raise InputError(f"{folder} is not a pipeline folder: it has no {choice.INDEX}{hint}")
    index = files.read_json(folder / choice.INDEX)
    kind = str(index.get("_class_name")).replace("Img2ImgPipeline", "Pipeline")  # which has the same parts
    if kind not in (SD, SDXL):
        raise InputError(f"{folder} is a {kind}: a {SD} or {SDXL} is needed")
    return {**index, "_class_name": kind}


def load_unet(folder: str | Path, dtype: DType = torch.float32, device: Device = "cpu", part: str = "unet") -> UNet:
    """The U-Net of a pipeline folder. On the device "meta" it has a config and no weights: no file of them is read.

    part: the folder in `folder`; "" for a folder that is a U-Net and nothing else.
    InputError: a file is missing, broken or at odds with config.json.
    """
    return _load(Path(folder) / part, ("UNet2DConditionModel",), dtype, device)


def load_vae(
    folder: str | Path, dtype: DType = torch.float32, device: Device = "cpu", part: str = "vae"
) -> AutoencoderKL | AutoencoderTiny:
    """The autoencoder of a pipeline folder, which may be a TAESD. "meta" and InputError as in `load_unet`."""
    return _load(Path(folder) / part, ("AutoencoderKL", "AutoencoderTiny"), dtype, device)


def load_text_encoder(
    folder: str | Path, dtype: DType = torch.float32, device: Device = "cpu", part: str = "text_encoder"
) -> CLIPTextModel:
    """A text encoder, with projection if its config.json says so. InputError as in `load_unet`."""
    return _load(Path(folder) / part, ("CLIPTextModel", "CLIPTextModelWithProjection"), dtype, device)


def load_clip(folder: str | Path, dtype: DType = torch.float32, device: Device = "cpu") -> CLIPModel:
    """The whole CLIP that may lie beside a pipeline, in `clip/`. InputError as in `load_unet`."""
    return _load(Path(folder) / "clip", ("CLIPModel",), dtype, device)


def _load(path: Path, classes: tuple[str, ...], dtype: DType, device: Device) -> Any:
    """Build a model of one of the classes from `path`/config.json and fill it from the weights beside it."""
    config = files.read_json(_existing(path) / "config.json")
    try:
        name = config.get("_class_name") or (config.get("architectures") or classes)[0]  # the oldest configs name none
        if name not in classes:
            hint = f" (give it as {FLAGS[name]})" if name in FLAGS else ""
            raise ValueError(f"a {' or '.join(classes)} is needed, it is a {name}{hint}")
        kind, build = CLASSES[name]
        with loading.on_meta():
            model = build(read_as(kind, config))
    except MISSHAPEN as error:
        raise InputError(f"{path / 'config.json'}: {error}") from error
    if torch.device(device).type == "meta":
        return model
    paths = find_weights(path, dtype)
    if choice.is_poorer(paths[0].name, dtype):
        warnings.warn(f"{paths[0]} is all there is; it is used as {dtype}", stacklevel=3)
    tensors = {name: tensor for one in paths for name, tensor in files.read_tensors(one).items()}
    return loading.load_into(model, tensors, str(paths[0] if len(paths) == 1 else path), dtype, device)


def _existing(path: Path) -> Path:
    if not path.is_dir():
        raise InputError(f"{path.parent} has no folder {path.name}/, which a pipeline needs")
    return path


def find_weights(path: Path, dtype: DType = torch.float32) -> list[Path]:
    """The file, or the shards, with the weights of one part, by `choice.pick_weights`. InputError: there are none."""
    there = {file.name for file in path.glob("*") if file.is_file()}
    chosen = choice.pick_weights(there, dtype)
    if not chosen:
        forms = " or ".join(f"{stems['safetensors']}.safetensors" for stems in (choice.DIFFUSERS, choice.TRANSFORMERS))
        forms += " (or its .fp16, sharded or .bin form)"
        raise InputError(f"no weights in {path}: expected {forms}, not {files.some(there)}")
    return choice.shards(path / chosen[0]) if chosen[0].endswith(".json") else [path / chosen[0]]


def load_tokenizer(folder: str | Path, part: str = "tokenizer") -> CLIPTokenizer:
    """The tokenizer of a pipeline folder. InputError: a file is missing or not what it should be."""
    path = _existing(Path(folder) / part)
    try:
        return CLIPTokenizer.from_folder(path)
    except (OSError, *MISSHAPEN) as error:
        raise InputError(f"cannot read the tokenizer in {path}: {error}") from error


def load_schedule(folder: str | Path) -> ScheduleConfig:
    """The noise schedule. InputError: the file is missing, or of a kind that is not computed here."""
    path = _existing(Path(folder) / "scheduler") / "scheduler_config.json"
    try:
        return read_as(ScheduleConfig, files.read_json(path))
    except MISSHAPEN as error:
        raise InputError(f"{path}: {error}") from error


def load_sampling(folder: str | Path, dtype: DType = torch.float32, part: str = "unet") -> Sampling | None:
    """What the U-Net in a folder was distilled for. InputError as in `load_unet`."""
    return read_sampling(find_weights(Path(folder) / part, dtype)[0])


def read_sampling(path: Path) -> Sampling | None:
    """What the weights in a file were distilled for, by its header or its name; None: for nothing in particular."""
    try:
        return find_sampling(path, files.read_metadata(path))
    except ValueError as error:
        raise InputError(str(error)) from error


def part_in(folder: Path, part: str) -> str:
    """`part`, or "" if the folder holds one part of a pipeline and nothing else."""
    alone = (folder / "config.json").is_file() and not (folder / choice.INDEX).is_file()
    return "" if alone else part


def save_pipeline(folder: str | Path, pipe: Pipeline, dtype: DType = None) -> None:
    """Write a pipeline folder that diffusers reads, and samples as the model was made to be sampled.

    The index is removed first and written last: a folder without it is one that was not finished.
    dtype: of all weights in the files; None: that of each network.
    InputError: it cannot be written, holds other weights, or a weight is too large for the dtype.
    """
    folder = Path(folder).expanduser()
    with files.writing(folder):
        if (folder / choice.INDEX).is_file():
            (folder / choice.INDEX).unlink()
    sampler = pipe.sampling.sampler if pipe.sampling else "euler" if pipe.is_sdxl else default_solver(pipe.schedule)[0]
    scheduler = "EulerDiscreteScheduler" if sampler == "euler" else "DDIMScheduler"
    save_unet(folder, pipe.unet, sampling_metadata(pipe.sampling), dtype=dtype)
    save_vae(folder, pipe.vae, dtype)
    for i, (encoder, tokenizer) in enumerate(zip(pipe.text_encoders, pipe.tokenizers, strict=True)):
        save_text_encoder(folder, encoder, f"text_encoder{'_2' * i}", dtype)
        save_tokenizer(folder, tokenizer, f"tokenizer{'_2' * i}")
    config = as_distilled(pipe.schedule, pipe.sampling).to_dict() | {"_class_name": scheduler}
    files.write_json(folder / choice.SCHEDULE, config)
    parts = {
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", pipe.vae.config.to_dict()["_class_name"]],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if pipe.is_sdxl:
        parts["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        parts["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        parts["force_zeros_for_empty_prompt"] = pipe.zero_unconditional
    else:
        parts |= {"safety_checker": [None, None], "requires_safety_checker": False}
    # The version is that of the format: the parts are written as diffusers has read them since then.
    head = {"_class_name": SDXL if pipe.is_sdxl else SD, "_diffusers_version": "0.21.0"}
    files.write_json(folder / choice.INDEX, {**head, **dict(sorted(parts.items()))})


def save_unet(
    folder: str | Path, unet: UNet, metadata: Mapping[str, str] | None = None, part: str = "unet", dtype: DType = None
) -> None:
    """Write `unet/`: the config of this very network and its weights, in a dtype or their own.

    metadata: text for the header of the weights file, as what a student was distilled for. part: as in `load_unet`.
    """
    _save(Path(folder) / part, unet, dtype, metadata=metadata)


def save_vae(folder: str | Path, vae: AutoencoderKL | AutoencoderTiny, dtype: DType = None) -> None:
    """Write `vae/`."""
    _save(Path(folder) / "vae", vae, dtype)


def save_text_encoder(
    folder: str | Path, text_encoder: CLIPTextModel, part: str = "text_encoder", dtype: DType = None
) -> None:
    """Write `text_encoder/`, in the names that every version of transformers reads."""
    kind = "CLIPTextModel" if text_encoder.text_projection is None else "CLIPTextModelWithProjection"
    _save(Path(folder) / part, text_encoder, dtype, kind)


def save_clip(folder: str | Path, clip: CLIPModel) -> None:
    """Write `clip/`."""
    _save(Path(folder) / "clip", clip, None, "CLIPModel")


def _save(
    path: Path, model: nn.Module, dtype: DType, architecture: str = "", metadata: Mapping[str, str] | None = None
) -> None:
    """Write a folder of one part; architecture: the class in transformers, if it is one of theirs."""
    if lora_layers(model):
        raise InputError(f"cannot write {path}: a model folder has no place for a live LoRA; merge or remove it first")
    name = f"{(choice.TRANSFORMERS if architecture else choice.DIFFUSERS)['safetensors']}.safetensors"
    if others := choice.pick_weights({old.name for old in path.glob("*")} - {name}):
        # A reader might take these, with their old content, for the weights that are being written.
        raise InputError(f"{path} already holds other weights ({others[0]}): save to another folder")
    tensors = {key: tensor.to(dtype or tensor.dtype) for key, tensor in model.state_dict().items()}
    if bad := [key for key, tensor in tensors.items() if dtype and not tensor.isfinite().all()]:
        raise InputError(f"cannot write {path / name}: {bad[0]} is too large for {dtype}: use --dtype bf16 or fp32")
    files.write_safetensors(path / name, tensors, metadata)
    head = {"architectures": [architecture]} if architecture else {}
    files.write_json(path / "config.json", {**head, **model.config.to_dict()})


def save_tokenizer(folder: str | Path, tokenizer: CLIPTokenizer, part: str = "tokenizer") -> None:
    """Write `tokenizer/`."""
    path = Path(folder) / part
    with files.writing(path):
        path.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
