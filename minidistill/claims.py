"""Test the claims of SDXL-Lightning on the miniature, each beside its control, with several seeds.

    python -m minidistill.claims                           hours on a CPU
    python -m minidistill.claims --only one-step --seeds 1

Each run is one of `train_lightning`, in OUT/NAME-seedN, with a plan of `lightning.TRIALS`: in about the same time, what
becomes of the miniature or of one of its students. The same command resumes what was interrupted. All students are
judged on the same captions, from the same noise. Tables are printed and written to OUT/claims.md, all numbers to
OUT/claims.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from minidistill import train_lightning
from minidistill.cli import option, run_command
from minidistill.diffusion.sampling import Sampling
from minidistill.distill.lightning import TRIALS
from minidistill.interop.replace import merge_loras
from minidistill.miniature.judge import has_two_colours, score
from minidistill.miniature.scenes import Scenes, held_out_captions
from minidistill.pipeline import load_pipeline
from minidistill.report import MANY, SEED, draw, frechet_to_scenes
from minidistill.study import check_same_run, spread, to_markdown
from minidistill.training.device import PRECISIONS, best_precision, get_device, get_precision
from minidistill.weights.files import atomic_path, read_json, write_json
from minidistill.weights.folders import find_student


class Group(NamedTuple):
    """Trials that are compared."""

    trials: tuple[str, ...]
    start: int | None  # steps of the miniature's student that they start from; None: its teacher
    mosaics: bool = False  # trained on mosaics of scenes, and compared with such


GROUPS = {
    "eight-steps": Group(("8-mse", "8-own-path"), None),
    "two-steps": Group(("2-mse", "2-unfixed", "2-conditional", "2-unconditional", "2-both", "2-matching"), 8),
    "one-step": Group(("1-mse", "1-x0", "1-noised", "1-clean", "1-matching"), 8),
    "new-style": Group(("4-keep", "4-finetune"), 4, mosaics=True),
}
SETTINGS: dict[str, dict[str, Any]] = {"2-unfixed": {"pure_noise": False}}  # of some trials
COMMON = {"judged": 0, "log_every": 5, "sample_every": 1000, "keep_checkpoints": 1}  # settings of all runs
TILE, MOSAICS = 2, 1024  # pixels across the tiles of a mosaic, and how many mosaics there are
COLUMNS = {  # measures in the table: heading, format
    "correct": ("all attributes correct", ".1%"),
    "relative": ("relative to teacher", ".2f"),
    "frechet": ("Frechet distance", ".4f"),
    "sharpness": ("sharpness, of the teacher's", ".2f"),
    "two_coloured": ("two colours in one", ".1%"),
    "tiled": ("steps within tiles", ".2f"),
    "minutes": ("minutes", ".1f"),
}


@dataclass(frozen=True)
class Config:
    only: str | None = option(None, "run one group of trials (default: all)", choices=GROUPS)
    seeds: int = option(3, "runs of each trial", minimum=1)
    length: float = option(1.0, "multiply the optimizer steps of every run", minimum=0)
    judged: int = option(MANY, "held-out captions judged for each model", minimum=MANY, maximum=len(Scenes("test")))
    precision: str | None = option(
        None, "of the forward passes (default: bf16 if the device computes it, else fp32)", choices=PRECISIONS
    )
    device: str = option("auto", "cpu, cuda, cuda:N, mps, or auto: the first available of cuda, mps, cpu")
    out: str = option("runs/claims", "folder for the runs, claims.md and claims.json")


def main(config: Config) -> None:
    """Train and judge what is not done yet, and write the tables."""
    device = get_device(config.device)
    config = replace(config, device=str(device), precision=config.precision or best_precision(device))
    out = Path(config.out)
    chosen = {config.only: GROUPS[config.only]} if config.only else GROUPS
    teacher = measured(config, None, out / "teacher.json")
    results: dict[str, list[dict[str, Any]]] = {name: [] for group in chosen.values() for name in group.trials}
    for seed in range(config.seeds):  # all trials with one seed first: an interrupted run can be compared
        for group in chosen.values():
            for name in group.trials:
                folder = out / f"{name}-seed{seed}"
                student = run(config, name, group, seed, folder)
                found = measured(config, str(student), folder / "measured.json", group.mosaics)
                results[name].append({**compared(found, teacher), "minutes": minutes(folder)})
    text = ""
    for title, group in chosen.items():
        first, before = "teacher, 32 steps", teacher
        if group.mosaics:
            first, start = f"{group.start} steps, before", str(find_student("miniature", group.start))
            before = measured(config, start, out / "before.json", mosaics=True)
        rows = table_rows({first: [compared(before, teacher)], **{name: results[name] for name in group.trials}})
        text += f"{title}: {config.seeds} seeds, {config.judged} captions\n\n{to_markdown(rows)}\n\n"
    (out / "claims.md").write_text(text.rstrip() + "\n")
    write_json(out / "claims.json", {"settings": dataclasses.asdict(config), "teacher": teacher, "results": results})
    print(f"\n{text}tables   {out / 'claims.md'}\nnumbers  {out / 'claims.json'}")


def run(config: Config, name: str, group: Group, seed: int, folder: Path) -> Path:
    """The student's folder of one run, which is trained unless it is there."""
    (stage,) = TRIALS[name]
    student, is_begun = folder / stage.name, (folder / "config.json").is_file()
    settings = train_lightning.Config(
        **COMMON,
        **SETTINGS.get(name, {}),
        plan=name,
        start_from=str(find_student("miniature", group.start)) if group.start else None,
        data=str(write_mosaics(Path(config.out) / "mosaics")) if group.mosaics else "scenes",
        seed=seed,
        length=config.length,
        device=config.device,
        precision=config.precision,
        out=str(folder),
        resume=is_begun,
    )
    if (student / "model_index.json").is_file():
        check_same_run(folder, settings)
    else:
        print(f"\n=== {name}, seed {seed}", flush=True)
        train_lightning.main(settings)
    return student


def measured(config: Config, student: str | None, file: Path, mosaics: bool = False) -> dict[str, Any]:
    """What the images of a student show in its own steps, or None: of the teacher in 32; cached in `file`.

    student: a model folder, or the LoRA of one. mosaics: the Frechet distance is to mosaics of the captions' scenes.
    """
    asked = {"captions": config.judged, "seed": SEED, "precision": config.precision}
    known = read_json(file) if file.is_file() else {}
    if not asked.items() <= known.items():
        is_lora = bool(student) and student.endswith(".safetensors")
        pipe = load_pipeline("miniature" if is_lora or not student else student, config.device)
        if is_lora:
            merge_loras(pipe, [(student, 1.0)])
        elif not student:
            pipe.set_sampling(Sampling(train_lightning.REFERENCE, guidance=train_lightning.GUIDANCE))
        captions = held_out_captions(config.judged)
        autocast = get_precision(config.precision, pipe.device).autocast
        images = draw(pipe, captions, pipe.trained_size(), SEED, autocast=autocast)
        known = {**asked, **measures(images, captions, mosaics)}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, known)
    return {name: value for name, value in known.items() if name not in asked}


def measures(images: Sequence[Image.Image], captions: Sequence[str], mosaics: bool) -> dict[str, Any]:
    """All that is measured of images."""
    judge = score(images, captions)
    apart = [image for image, caption in zip(images, captions, strict=True) if " inside " not in caption]
    found = {
        "judge": judge,
        "correct": judge["all"],
        "frechet": frechet_to_scenes(images, mosaic if mosaics else None),
        "sharpness": sharpness(images),
        "two_coloured": float(np.mean([has_two_colours(image) for image in apart])),
    }
    return {**found, "tiled": tiled(images)} if mosaics else found


def mosaic(image: Image.Image) -> Image.Image:
    """The image in tiles of TILE x TILE pixels, each of its mean colour: a new style, in which all attributes stay."""
    small = image.resize((image.width // TILE, image.height // TILE), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


def write_mosaics(folder: Path) -> Path:
    """A folder of MOSAICS captioned mosaics of training scenes."""
    if not (folder / "metadata.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        scenes, lines = Scenes("train"), []
        for i in range(MOSAICS):
            image, caption = scenes[i]
            mosaic(image).save(folder / f"{i:05}.png")
            lines.append(json.dumps({"file_name": f"{i:05}.png", "text": caption}))
        with atomic_path(folder / "metadata.jsonl") as temporary:
            Path(temporary).write_text("\n".join(lines) + "\n")
    return folder


def sharpness(images: Sequence[Image.Image]) -> float:
    """Mean absolute Laplacian of the images in grey, in grey levels: the larger, the sharper, or the noisier."""
    grey = in_grey(images)
    centre, (up, down) = grey[:, 1:-1, 1:-1], (grey[:, :-2, 1:-1], grey[:, 2:, 1:-1])
    return float(np.abs(up + down + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * centre).mean())


def tiled(images: Sequence[Image.Image]) -> float:
    """Mean step between neighbours in one tile over that between neighbours in two: 0 in mosaics, 0.7 in scenes."""
    steps = np.abs(np.diff(in_grey(images), axis=2)).mean((0, 1))
    across = np.arange(len(steps)) % TILE == TILE - 1
    return float(steps[~across].mean() / steps[across].mean())


def in_grey(images: Sequence[Image.Image]) -> np.ndarray:
    """(N, height, width) float32, in grey levels."""
    return np.stack([np.asarray(image.convert("L"), np.float32) for image in images])


def minutes(folder: Path) -> float:
    """How long the optimizer steps of a run took."""
    before, total = 0, 0.0
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        total += (line["step"] - before) * line["ms_per_step"] / 60_000
        before = line["step"]
    return total


def compared(found: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """Measures of a student, some of them relative to the teacher's."""
    relative = found["correct"] / max(teacher["correct"], 1e-9)
    return {**found, "relative": relative, "sharpness": found["sharpness"] / teacher["sharpness"]}


def table_rows(results: Mapping[str, Sequence[dict[str, Any]]]) -> list[tuple[str, ...]]:
    """A row for each name: means over its runs, with minimum and maximum in brackets."""
    shown = {column: style for column, style in COLUMNS.items() if any(column in runs[-1] for runs in results.values())}
    rows = [("", *(heading for heading, _ in shown.values()))]
    for name, runs in results.items():
        cells = ([run[column] for run in runs if column in run] for column in shown)
        forms = (form for _, form in shown.values())
        rows.append(
            (name, *(spread(values, form) if values else "" for values, form in zip(cells, forms, strict=True)))
        )
    return rows


if __name__ == "__main__":
    run_command(main, Config, prog="python -m minidistill.claims", description=__doc__)
