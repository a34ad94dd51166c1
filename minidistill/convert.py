"""Turn any model into a pipeline folder or a single file, bit by bit the same.

python -m minidistill.convert runs/kd/student student.safetensors
python -m minidistill.convert model.ckpt folder --dtype fp16
python -m minidistill.convert path/to/sdxl lightning --lora sdxl_lightning_4step_lora.safetensors

Folders open in diffusers, single files (LDM's layout) in ComfyUI and AUTOMATIC1111. Nothing is rounded unless --dtype
or --lora asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minidistill.errors import InputError
from minidistill.training.config import REQUIRED, option, run_command
from minidistill.training.optim import PRECISIONS
from minidistill.weights.sampling import sampling_metadata
from minidistill.weights.single_file import write_single_file
from minidistill.weights.sources import load_parts, save_parts

LAYOUTS = ("folder", "single-file")


@dataclass(frozen=True)
class Config:
    source: str = option(
        REQUIRED, "SOURCE: pipeline folder, Hub id, .safetensors or .ckpt file, or miniature", positional=True
    )
    dest: str = option(REQUIRED, "new folder, or .safetensors file, to write", positional=True)
    layout: str | None = option(None, "of DEST; none goes by its name", choices=LAYOUTS)
    dtype: str | None = option(None, "of all weights; none keeps them as they are", choices=PRECISIONS)
    unet: str | None = option(None, "SOURCE of another U-Net for the model")
    vae: str | None = option(None, "SOURCE of another VAE for the model")
    lora: str | None = option(None, "LoRA file to merge into the model")
    lora_scale: float = option(1.0, "how strongly the LoRA acts")
    ema: bool = option(False, "of a checkpoint with both, take the averaged weights")


def main(config: Config) -> None:
    """Load, write. What is there already is not touched."""
    dest = Path(config.dest)
    layout = config.layout or ("single-file" if dest.suffix == ".safetensors" else "folder")
    if layout == "single-file" and dest.suffix != ".safetensors":
        raise InputError(f"{dest}: a single file is written as .safetensors: end its name so, or leave out --layout")
    if dest.is_file() or (dest.is_dir() and (layout == "single-file" or any(dest.iterdir()))):
        raise InputError(f"{dest} exists: give the name of a new {'file' if layout == 'single-file' else 'folder'}")
    dtype = PRECISIONS.get(config.dtype)
    loras = [(config.lora, config.lora_scale)] if config.lora else []
    parts = load_parts(
        config.source, "cpu", dtype, dtype, unet=config.unet, vae=config.vae, loras=loras, ema=config.ema
    )
    if layout == "single-file":
        write_single_file(
            dest,
            parts.unet,
            parts.vae,
            parts.text_encoders,
            parts.schedule,
            parts.tokenizers,
            metadata=sampling_metadata(parts.sampling),
        )
    else:
        save_parts(dest, parts)
    print(dest)


if __name__ == "__main__":
    run_command(main, Config, prog="python -m minidistill.convert", description=__doc__)
