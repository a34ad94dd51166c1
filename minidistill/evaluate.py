"""Evaluate a model of the miniature's scenes: the share of correct attributes in its images.

    python -m minidistill.evaluate --model SOURCE
    python -m minidistill.evaluate --lightning 4

Images are generated from held-out captions; the scene judge (`miniature/judge.py`) tells which attributes of a caption
each one shows. Image i always has the same caption and the same noise, so models can be compared image by image.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from minidistill.cli import option, run_command
from minidistill.diffusion.sampling import SAMPLERS
from minidistill.errors import InputError
from minidistill.generate import GenerateConfig, load_model, with_student
from minidistill.metrics.clip_score import clip_scores, retrieval
from minidistill.metrics.reconstruction import evaluate_vae
from minidistill.miniature.judge import judge, score_verdicts
from minidistill.miniature.scenes import SIDE, held_out_captions
from minidistill.pipeline import GUIDANCE, STEPS
from minidistill.report import MANY, frechet_to_scenes, save_image_grid
from minidistill.training.device import get_device
from minidistill.training.log import format_table
from minidistill.weights import folders
from minidistill.weights.files import write_json


@dataclass(frozen=True)
class Config:
    model: str = option("miniature", "SOURCE: a model folder, or miniature")
    lightning: int | None = option(None, "the student for N steps beside the model, as in generate", minimum=1)
    samples: int = option(1000, "number of images, one for each held-out caption", minimum=1)
    steps: int | None = option(None, f"sampling steps (default: the model's own, else {STEPS})", minimum=1)
    sampler: str | None = option(None, "sampler (default: the model's own, else ddim)", choices=SAMPLERS)
    guidance: float | None = option(
        None, f"scale of classifier-free guidance; 1 disables it (default: the model's own, else {GUIDANCE:g})"
    )
    seed: int = option(0, "seed of the noise")
    batch_size: int = option(16, "images per batch; the result does not depend on it", minimum=1)
    parts: bool = option(False, "evaluate the VAE's reconstructions too, and retrieval if the folder has a clip/")
    device: str = option("auto", "cpu, cuda, cuda:N, mps, or auto: the first available of cuda, mps, cpu")
    out: str | None = option(None, "write the numbers to this JSON file")
    grid: str | None = option(None, "write an image grid of the first 16 images with their captions to this PNG file")


def main(config: Config) -> None:
    """Generate images, judge them, print a table."""
    if config.grid and not config.grid.lower().endswith(".png"):
        raise InputError(f"--grid {config.grid}: the name of a .png file is needed")
    if config.out and Path(config.out).is_dir():
        raise InputError(f"--out {config.out} is a folder: the name of a .json file is needed")
    edits = with_student(GenerateConfig(model=config.model, lightning=config.lightning))
    pipe = load_model(config.model, edits, get_device(config.device), torch.float32, torch.float32)
    if pipe.trained_size() != (SIDE, SIDE):
        size = f"{config.model} makes images of {pipe.trained_size()}"
        raise InputError(f"{size}; the judge reads {SIDE}x{SIDE} scenes only")
    folder = folders.find_model(config.model)
    captions = held_out_captions(config.samples)
    verdicts, drawn, similarity = [], [], []
    clip = folders.load_clip(folder) if (folder / "clip").is_dir() else None
    settings = {name: getattr(config, name) for name in ("steps", "guidance", "seed", "sampler", "batch_size")}
    begin = time.perf_counter()
    with tqdm(total=len(captions), desc="generating", unit="image", disable=None) as bar:
        for start in range(0, len(captions), config.batch_size):
            some = captions[start : start + config.batch_size]
            images = pipe(some, first_index=start, **settings)
            verdicts += [judge(image, caption) for image, caption in zip(images, some, strict=True)]
            drawn += images
            if clip:
                similarity += clip_scores(clip, pipe.tokenizers[0], images, some).diagonal().tolist()
            bar.update(len(some))
    seconds = time.perf_counter() - begin

    results = {"samples": len(captions), "seconds": round(seconds, 1), "judge": score_verdicts(verdicts)}
    if clip:
        results["clip_similarity"] = sum(similarity) / len(similarity)
    if len(drawn) >= MANY:
        results["frechet"] = frechet_to_scenes(drawn)
    if config.parts:
        results["vae"] = evaluate_vae(pipe.vae, config.samples)
        if clip:
            results["clip_retrieval_top1_of_100"] = retrieval(clip, pipe.tokenizers[0])
    rows = [("attribute", "correct")] + [(kind, f"{share:.1%}") for kind, share in results["judge"].items()]
    print(format_table(rows))
    print(f"\n{len(captions)} held-out captions in {seconds:.0f} s")
    print(describe_parts(results), end="")
    if config.out:
        write_json(config.out, results)
    if config.grid:
        save_image_grid(Path(config.grid), [drawn[:16]], captions[:16])


def describe_parts(results: Mapping[str, Any]) -> str:
    """What was measured of CLIP and VAE, a line each."""
    lines = []
    if "clip_similarity" in results:
        lines.append(f"CLIP: similarity of image and caption {results['clip_similarity']:.3f}")
    if "frechet" in results:
        lines.append(f"CLIP: Frechet distance to the scenes of these captions {results['frechet']:.4f}")
    if "clip_retrieval_top1_of_100" in results:
        lines.append(f"CLIP: the right one of 100 captions in {results['clip_retrieval_top1_of_100']:.1%} of cases")
    if "vae" in results:
        vae = results["vae"]
        plain = f", {vae['psnr_plain']:.1f} dB on plain backgrounds" if "psnr_plain" in vae else ""
        lines.append(f"VAE: {vae['psnr']:.1f} dB{plain}; {vae['all_correct']:.1%} of reconstructions all correct")
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    run_command(main, Config, prog="python -m minidistill.evaluate", description=__doc__)
