"""Turn any model, U-Net or LoRA file into another layout, bit by bit the same.

python -m minidistill.convert runs/kd/student student.safetensors
python -m minidistill.convert model.ckpt folder --dtype fp16
python -m minidistill.convert path/to/sdxl lightning --lora sdxl_lightning_4step_lora.safetensors
python -m minidistill.convert sdxl_lightning_4step_unet.safetensors lightning_unet
python -m minidistill.convert lora.safetensors lora_peft.safetensors --layout peft
python -m minidistill.convert runs/lightning/4-step 4-step.safetensors --lora-of miniature --lora-rank 16

Folders open in diffusers, single files (LDM's layout) in ComfyUI and, but for students, AUTOMATIC1111. A U-Net alone
stays one: a folder with config.json and weights, or a file. Nothing is rounded unless --dtype or --lora asks for it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from minidistill.cli import REQUIRED, option, run_command
from minidistill.diffusion.sampling import Sampling, sampling_metadata
from minidistill.diffusion.schedule import ScheduleConfig
from minidistill.distill.block_removal import weight_shapes
from minidistill.errors import InputError
from minidistill.generate import load_model
from minidistill.interop.configs import UNET, prediction_entry
from minidistill.interop.ldm import to_ldm_unet
from minidistill.interop.lora_files import FORMS, rewrite_lora, write_lora
from minidistill.interop.replace import is_unet_alone, load_unet, merge_files, with_scales
from minidistill.interop.single_file import CPP, marks, write_single_file
from minidistill.models.lora import extract_lora
from minidistill.training.device import PRECISIONS
from minidistill.weights.choice import INDEX, SCHEDULE
from minidistill.weights.files import existing_file, read_json, write_json, write_safetensors
from minidistill.weights.folders import find_model, read_sampling, save_unet

LAYOUTS = ("folder", "single-file", CPP, *FORMS)
NOT_WRITTEN = (".ckpt", ".bin", ".pt", ".pth", ".gguf", ".onnx")  # suffixes of single files in other formats
CONSISTENCY = ("LCMScheduler", "TCDScheduler")


@dataclass(frozen=True)
class Config:
    source: str = option(
        REQUIRED,
        "SOURCE: pipeline folder, Hub id, .safetensors or .ckpt file, or miniature; a U-Net alone; a LoRA file",
        positional=True,
    )
    dest: str = option(REQUIRED, "new folder, or .safetensors file, to write", positional=True)
    layout: str | None = option(
        None,
        "layout of DEST; stable-diffusion.cpp: a file for that program; kohya, peft: LoRA files (default: by DEST)",
        choices=LAYOUTS,
    )
    dtype: str | None = option(None, "precision of all weights (default: unchanged)", choices=PRECISIONS)
    unet: str | None = option(None, "SOURCE of another U-Net for the model")
    vae: str | None = option(None, "SOURCE of another VAE for the model")
    lora: tuple[str, ...] | None = option(None, "LoRA files to merge into the model")
    lora_scale: tuple[float, ...] = option((1.0,), "scale of the LoRAs: one for all, or one each")
    lora_of: str | None = option(None, "write a LoRA for this model, from what SOURCE changes in its U-Net")
    lora_rank: int = option(16, "rank of that LoRA: the larger, the nearer to SOURCE", minimum=1)
    ema: bool = option(False, "use the averaged U-Net weights of a single file that has both kinds")


def main(config: Config) -> None:
    """Load, write. What is there already is not touched."""
    dest = Path(config.dest)
    by_dest = "single-file" if dest.suffix == ".safetensors" else "folder"
    layout = config.layout or (FORMS[0] if config.lora_of else by_dest)
    if config.lora_rank != Config.lora_rank and not config.lora_of:
        raise InputError("--lora-rank is for --lora-of, which is not given")
    if config.lora_of and layout not in FORMS:
        raise InputError(f"--lora-of writes a LoRA, whose --layout is {' or '.join(FORMS)}, not {layout}")
    if layout != "folder" and dest.suffix != ".safetensors":
        what, other = "a LoRA" if layout in FORMS else "a single file", ", or leave out --layout" * bool(config.layout)
        raise InputError(f"{dest}: {what} is written as .safetensors: end its name so{other}")
    if config.layout is None and layout == "folder" and dest.suffix.lower() in (".safetensors", *NOT_WRITTEN):
        raise InputError(
            f"{dest}: a single file is written as .safetensors; for a folder of that name: --layout folder"
        )
    if dest.is_file() or (dest.is_dir() and (layout != "folder" or any(dest.iterdir()))):
        raise InputError(f"{dest} exists: give the name of a new {'folder' if layout == 'folder' else 'file'}")
    if config.lora_of:
        refuse(config, ("unet", "vae", "lora"), "a LoRA is written")
        extract(config, dest, layout)
    elif layout in FORMS:
        refuse(config, ("unet", "vae", "lora", "ema"), "it is a LoRA file that is rewritten")
        convert_lora(config, dest)
    elif is_unet_alone(config.source, PRECISIONS.get(config.dtype)):
        refuse(config, ("unet", "vae"), f"{config.source} is a U-Net alone")
        if layout == CPP:
            raise InputError(f"{config.source} is a U-Net alone: {CPP} opens whole models")
        convert_unet(config, dest, layout)
    else:
        convert_pipeline(config, dest, layout)
    print(dest)


def convert_pipeline(config: Config, dest: Path, layout: str) -> None:
    """A whole model to a pipeline folder or to a single file."""
    dtype = PRECISIONS.get(config.dtype)
    pipe = load_model(config.source, config, "cpu", dtype, dtype)
    if layout == "folder":
        pipe.save(dest)
        if pipe.sampling is None and not config.unet:
            keep_scheduler(find_model(config.source, dtype), dest)
        return
    write_single_file(dest, pipe, for_cpp=layout == CPP)


def keep_scheduler(source: Path, dest: Path) -> None:
    """Of a model distilled for consistency sampling keep the scheduler: in diffusers, no other samples it well."""
    config = read_json(source / SCHEDULE) if (source / SCHEDULE).is_file() else {}
    if config.get("_class_name") in CONSISTENCY:
        write_json(dest / SCHEDULE, config)
        write_json(dest / INDEX, read_json(dest / INDEX) | {"scheduler": ["diffusers", config["_class_name"]]})


def convert_unet(config: Config, dest: Path, layout: str) -> None:
    """A U-Net alone to a folder of its own, which diffusers opens, or to a file in the layout of whole checkpoints."""
    dtype = PRECISIONS.get(config.dtype)
    unet, schedule, sampling = load_unet(config.source, "cpu", dtype, config.ema)
    merged = merge_files({"unet": unet}, with_scales(config.lora, config.lora_scale))
    header = sampling_metadata(merged or sampling)
    if layout == "folder":
        if schedule and schedule.prediction_type != "epsilon":
            print(
                f"note: this U-Net predicts {schedule.prediction_type}, for which a folder of a U-Net alone has no "
                "place: its user has to know",
                file=sys.stderr,
            )
        save_unet(dest, unet, header, part="")
        return
    tensors = to_ldm_unet(unet.state_dict(), unet.config)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    if schedule:
        tensors |= marks(unet.config, schedule)
        header |= prediction_entry(schedule)
    write_safetensors(dest, tensors, {**header, UNET: json.dumps(unet.config.to_dict())})


def convert_lora(config: Config, dest: Path) -> None:
    """A LoRA file to another of kohya's or PEFT's form."""
    source = existing_file(find_model(config.source))
    sampling = read_sampling(source)  # it may be in the file's name alone
    rewrite_lora(source, dest, config.layout, PRECISIONS.get(config.dtype), sampling_metadata(sampling))


def extract(config: Config, dest: Path, layout: str) -> None:
    """What a U-Net changes in that of another model, as a LoRA for the latter, and how much of it the LoRA has."""
    tuned, schedule, sampling = load_unet(config.source, "cpu", None, config.ema)
    base, *of_base = load_unet(config.lora_of, "cpu", None)
    one, other = predicts(schedule, sampling), predicts(*of_base)
    if one and other and one != other:
        raise InputError(
            f"{config.source} predicts {one}, {config.lora_of} {other}: that changes conv_out, of which "
            "a LoRA holds nothing; convert it to a U-Net alone instead"
        )
    if differ := sorted(weight_shapes(tuned.config).items() ^ weight_shapes(base.config).items()):
        what = f"{differ[0][0]} is absent, or of another shape"
        raise InputError(f"{config.source} is no version of {config.lora_of}: {what}")
    weights = extract_lora(tuned, base, config.lora_rank)
    write_lora(dest, {"unet": weights}, layout, PRECISIONS.get(config.dtype), sampling_metadata(sampling))
    held = sum((found.up.flatten(1) @ found.down.flatten(1)).square().sum() for found in weights.values())
    both = zip(tuned.state_dict().values(), base.state_dict().values(), strict=True)
    change = sum((after.float() - before.float()).square().sum() for after, before in both)
    share = 100 * float(held / change) if change else 100.0
    print(f"rank {config.lora_rank}: {share:.0f} % of the change, in squares of all weights", file=sys.stderr)


def predicts(schedule: ScheduleConfig | None, sampling: Sampling | None) -> str | None:
    """What a U-Net predicts, where its SOURCE says it: what it was distilled for goes first."""
    if sampling:
        return sampling.prediction
    return schedule.prediction_type if schedule else None


def refuse(config: Config, flags: tuple[str, ...], because: str) -> None:
    """InputError: one of the flags is given, which has no meaning here."""
    for flag in flags:
        if getattr(config, flag):
            raise InputError(f"--{flag} is for whole models, and {because}")


if __name__ == "__main__":
    run_command(main, Config, prog="python -m minidistill.convert", description=__doc__)
