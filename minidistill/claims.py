"""Test the claims of SDXL-Lightning on the miniature, each beside its control, with several seeds.

    python -m minidistill.claims                           hours on a CPU
    python -m minidistill.claims --only one-step --seeds 1

Each run is one of `train_lightning`, in OUT/NAME-seedN, with a plan of `lightning.TRIALS`: in about the same time, what
becomes of the miniature's student of 8 steps (of its teacher, where students of 8 steps are compared). The same command
resumes what was interrupted. All students are judged on the same captions, from the same noise. Tables are printed and
written to OUT/claims.md, all numbers to OUT/claims.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minidistill import train_lightning
from minidistill.cli import option, run_command
from minidistill.diffusion.sampling import Sampling
from minidistill.distill.lightning import TRIALS
from minidistill.miniature.judge import has_two_colours, score
from minidistill.miniature.scenes import Scenes, held_out_captions
from minidistill.pipeline import Pipeline, load_pipeline
from minidistill.report import MANY, SEED, draw, frechet_to_scenes
from minidistill.study import spread, to_markdown
from minidistill.training.device import PRECISIONS, best_precision, get_device, get_precision
from minidistill.training.run_folder import RunFolder
from minidistill.weights.files import read_json, write_json
from minidistill.weights.folders import find_student

GROUPS = {  # of trials that are compared
    "eight-steps": ("8-mse", "8-own-path"),
    "two-steps": ("2-mse", "2-unfixed", "2-conditional", "2-unconditional", "2-both", "2-matching"),
    "one-step": ("1-mse", "1-x0", "1-noised", "1-clean", "1-matching"),
}
SETTINGS: dict[str, dict[str, Any]] = {"2-unfixed": {"pure_noise": False}}  # of some trials
COMMON = {"judged": 0, "log_every": 5, "sample_every": 1000, "keep_checkpoints": 1}  # settings of all runs
COLUMNS: dict[str, tuple[str, Callable[[Mapping[str, Any]], float], str]] = {  # heading, value, format
    "all": ("all attributes correct", lambda found: found["judge"]["all"], ".1%"),
    "relative": ("relative to teacher", lambda found: found["relative"], ".2f"),
    "frechet": ("Frechet distance", lambda found: found["frechet"], ".4f"),
    "sharpness": ("sharpness, of teacher's", lambda found: found["sharpness"], ".2f"),
    "two_coloured": ("two colours in one", lambda found: found["two_coloured"], ".1%"),
    "minutes": ("minutes", lambda found: found["minutes"], ".1f"),
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
    teacher = measured("miniature", out / "teacher.json", config)
    chosen = {config.only: GROUPS[config.only]} if config.only else GROUPS
    results: dict[str, list[dict[str, Any]]] = {name: [] for names in chosen.values() for name in names}
    for seed in range(config.seeds):  # all trials with one seed first: an interrupted run can be compared
        for name, runs in results.items():
            folder = out / f"{name}-seed{seed}"
            student = run(config, name, seed, folder)
            found = measured(str(student), folder / "measured.json", config)
            found["relative"] = found["judge"]["all"] / max(teacher["judge"]["all"], 1e-9)
            found["sharpness"] /= teacher["sharpness"]
            runs.append({**found, "minutes": minutes(folder)})
    text = "".join(
        f"{title}: {config.seeds} seeds, {config.judged} captions\n\n"
        f"{to_markdown(table_rows({name: results[name] for name in names}, teacher))}\n\n"
        for title, names in chosen.items()
    )
    (out / "claims.md").write_text(text.rstrip() + "\n")
    write_json(out / "claims.json", {"settings": dataclasses.asdict(config), "teacher": teacher, "results": results})
    print(f"\n{text}tables   {out / 'claims.md'}\nnumbers  {out / 'claims.json'}")


def run(config: Config, name: str, seed: int, folder: Path) -> Path:
    """The student's folder of one run, which is trained unless it is there."""
    (stage,) = TRIALS[name]
    student, is_begun = folder / stage.name, (folder / "config.json").is_file()
    start = None if stage.student == 8 else str(find_student("miniature", 8))
    own = {"seed": seed, "length": config.length, "device": config.device, "precision": config.precision}
    settings = train_lightning.Config(
        **COMMON, **own, **SETTINGS.get(name, {}), plan=name, start_from=start, out=str(folder), resume=is_begun
    )
    if (student / "model_index.json").is_file():
        given = {key: value for key, value in dataclasses.asdict(settings).items() if value is not None}
        RunFolder.find(folder, {**read_json(folder / "config.json"), **given}, resume=True)  # InputError if they differ
    else:
        print(f"\n=== {name}, seed {seed}", flush=True)
        train_lightning.main(settings)
    return student


def measured(source: str, file: Path, config: Config) -> dict[str, Any]:
    """What the images of a model show: a student's in its own steps, the teacher's in 32; cached in `file`."""
    asked = {"captions": config.judged, "seed": SEED, "precision": config.precision}
    known = read_json(file) if file.is_file() else {}
    if not asked.items() <= known.items():
        pipe, captions = load_pipeline(source, config.device), held_out_captions(config.judged)
        if pipe.sampling is None:
            guidance, prediction = train_lightning.GUIDANCE, pipe.schedule.prediction_type
            pipe.set_sampling(Sampling(train_lightning.REFERENCE, guidance=guidance, prediction=prediction))
        images = draw_all(pipe, captions, config)
        plain = [image for image, caption in zip(images, captions, strict=True) if " inside " not in caption]
        known = {
            **asked,
            "judge": score(images, captions),
            "frechet": frechet_to_scenes(images),
            "sharpness": sharpness(images),
            "two_coloured": float(np.mean([has_two_colours(image) for image in plain])),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, known)
    return {name: value for name, value in known.items() if name not in asked}


def draw_all(pipe: Pipeline, captions: Sequence[str], config: Config) -> list[Image.Image]:
    """An image of each caption, in the precision of the runs."""
    autocast = get_precision(config.precision, pipe.device).autocast
    return draw(pipe, captions, pipe.trained_size(), SEED, autocast=autocast)


def sharpness(images: Sequence[Image.Image]) -> float:
    """Mean absolute Laplacian of the images in grey, in grey levels: the larger, the sharper, or the noisier."""
    grey = np.stack([np.asarray(image.convert("L"), np.float32) for image in images])
    centre, (up, down) = grey[:, 1:-1, 1:-1], (grey[:, :-2, 1:-1], grey[:, 2:, 1:-1])
    return float(np.abs(up + down + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * centre).mean())


def minutes(folder: Path) -> float:
    """How long the optimizer steps of a run took."""
    lines, before, total = (folder / "metrics.jsonl").read_text().splitlines(), 0, 0.0
    for line in map(json.loads, lines):
        total += (line["step"] - before) * line["ms_per_step"] / 60_000
        before = line["step"]
    return total


def table_rows(results: Mapping[str, Sequence[dict]], teacher: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each trial: means over its seeds, with minimum and maximum in brackets; and one of the teacher."""
    rows = [("trial", *(heading for heading, *_ in COLUMNS.values()))]
    for name, runs in results.items():
        rows.append((name, *(spread([value(run) for run in runs], form) for _, value, form in COLUMNS.values())))
    own = {**teacher, "relative": 1.0, "sharpness": 1.0, "minutes": 0.0}
    rows.append(("teacher, 32 steps", *(f"{value(own):{form}}" for _, value, form in COLUMNS.values())))
    return rows


if __name__ == "__main__":
    run_command(main, Config, prog="python -m minidistill.claims", description=__doc__)
