"""Distil the miniature with several settings and seeds, and tabulate the results: recipes, ablations, later options.

    python -m minidistill.study                                    all studies: hours on a CPU
    python -m minidistill.study --only ablation --seeds 1 --steps 240

Each run is one of `train_kd`, in OUT/NAME-STEPS-seedN; the same command resumes a study that was interrupted. Diverged
runs are counted and left out of the means. All models are evaluated on the same captions and the same noisy latents.
Tables are printed and written to OUT/study.md, all numbers to OUT/study.json.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minidistill import train_kd
from minidistill.cli import option, run_command
from minidistill.distill.probes import Probe, distance_to_teacher, make_probes
from minidistill.errors import NonFiniteLoss
from minidistill.metrics.cost import in_turns
from minidistill.miniature.judge import score
from minidistill.miniature.scenes import Scenes, held_out_captions
from minidistill.pipeline import STEPS, load_pipeline
from minidistill.report import SEED
from minidistill.settings import RunConfig
from minidistill.training.batches import Batches
from minidistill.training.device import PRECISIONS, best_precision, get_device
from minidistill.training.run_folder import RunFolder
from minidistill.weights.files import read_json, write_json

TASK, OUTPUT = (1.0, 0.0, 0.0), (1.0, 1.0, 0.0)  # loss weights
RUNS: dict[str, dict[str, Any]] = {  # settings that differ from the defaults of `train_kd`, except steps
    "bk-base": {"recipe": "bk-base"},
    "bk-small": {"recipe": "bk-small"},
    "bk-tiny": {},
    "random-task": {"copy_weights": False, "loss_weights": TASK},
    "random-all": {"copy_weights": False},
    "copied-task": {"loss_weights": TASK},
    "copied-task-output": {"loss_weights": OUTPUT},
    "no-caption-dropout": {"caption_dropout": 0.0},
    "feature-norm": {"feature_norm": True},
    "random-conditioning": {"random_conditioning": True},
    "image-free": {"image_free": 1024},
}
COMMON = {"judged": 0, "log_every": 50, "checkpoint_every": 250, "keep_checkpoints": 1}  # settings of all runs
PROBES = 256  # noisy latents on which the MSE to teacher is measured
ROUNDS = 15  # in which latencies are measured


class Study(NamedTuple):
    """One table: the names of its runs, and the optimizer steps of each."""

    rows: tuple[str, ...]
    steps: int


STUDIES = {  # "bk-tiny" has the defaults of train_kd: copied weights, all three losses
    "students": Study(("bk-base", "bk-small", "bk-tiny"), 2000),
    "ablation": Study(("random-task", "random-all", "copied-task", "copied-task-output", "bk-tiny"), 1000),
    "options": Study(("bk-tiny", "no-caption-dropout", "feature-norm", "random-conditioning", "image-free"), 320),
}


@dataclass(frozen=True)
class Config:
    only: str | None = option(None, "run one study (default: all)", choices=STUDIES)
    seeds: int = option(3, "runs with each setting", minimum=1)
    steps: int | None = option(
        None, f"steps per run (default: {', '.join(f'{name} {s.steps}' for name, s in STUDIES.items())})", minimum=1
    )
    judged: int = option(200, "held-out captions judged for each model", minimum=1, maximum=len(Scenes("test")))
    precision: str | None = option(
        None, "of the forward passes (default: bf16 if the device computes it, else fp32)", choices=PRECISIONS
    )
    device: str = option("auto", "cpu, cuda, cuda:N, mps, or auto: the first available of cuda, mps, cpu")
    out: str = option("runs/study", "folder for the runs, study.md and study.json")


def main(config: Config) -> None:
    """Train and evaluate what is not done yet, and write the tables."""
    device = get_device(config.device)
    config = replace(config, device=str(device), precision=config.precision or best_precision(device))
    out = Path(config.out)
    chosen = {config.only: STUDIES[config.only]} if config.only else STUDIES
    lengths = {title: config.steps or study.steps for title, study in chosen.items()}
    kinds = list(dict.fromkeys((name, lengths[title]) for title, study in chosen.items() for name in study.rows))
    results: dict[tuple[str, int], list[dict]] = {kind: [] for kind in kinds}
    pipe = load_pipeline("miniature", config.device)
    probes = make_probes(Batches(Scenes("test", length=PROBES), pipe, batch_size=32, seed=SEED), range(PROBES // 32))
    teacher = measured("miniature", out / "teacher.json", config, probes)
    students: dict[str, str] = {}
    for seed in range(config.seeds):  # all settings with one seed first: an interrupted study can be compared
        for name, steps in kinds:
            folder = out / f"{name}-{steps}-seed{seed}"
            result = run(config, name, steps, seed, folder)
            if result is None:
                continue
            students.setdefault(name, str(folder / "student"))
            result["student after"] |= measured(str(folder / "student"), folder / "measured.json", config, probes)
            results[name, steps].append({**result, "teacher": {**result["teacher"], **teacher}})
    times = time_students({"teacher": "miniature", **students}, probes[0], config)
    text = ""
    for title, study in chosen.items():
        rows = table_rows({name: results[name, lengths[title]] for name in study.rows}, times, teacher, config.seeds)
        text += f"{title}: {lengths[title]} steps per run, {config.seeds} seeds\n\n{to_markdown(rows)}\n\n"
    (out / "study.md").write_text(text.rstrip() + "\n")
    numbers = {f"{name}-{steps}": result for (name, steps), result in results.items()}
    write_json(out / "study.json", {"settings": dataclasses.asdict(config), "results": numbers, "ms_per_call": times})
    print(f"\n{text}tables   {out / 'study.md'}\nnumbers  {out / 'study.json'}")


def run(config: Config, name: str, steps: int, seed: int, folder: Path) -> dict | None:
    """Results of one run, read from its folder if it is complete: {"teacher": {...}, "student after": {...}, ...}.

    None if it diverged: `diverged.txt` in its folder has the reason, and it is not run again.
    """
    diverged = folder / "diverged.txt"
    own = {"seed": seed, "steps": steps, "precision": config.precision, "device": config.device, "out": str(folder)}
    is_begun = (folder / "config.json").is_file()
    settings = train_kd.Config(**COMMON, **RUNS[name], **own, sample_every=steps, resume=is_begun)
    if diverged.is_file() or (folder / "student/model_index.json").is_file():
        check_same_run(folder, settings)
    else:
        print(f"\n=== {name}, {steps} steps, seed {seed}", flush=True)
        try:
            train_kd.main(settings)
        except NonFiniteLoss as error:
            diverged.write_text(f"{error}\n")
    if diverged.is_file():
        print(f"{folder} is left out: {diverged.read_text().strip()}", flush=True)
        return None
    return read_json(folder / "results.json")


def check_same_run(folder: Path, settings: RunConfig) -> None:
    """InputError: the run in a folder has other settings than those given; None leaves one open."""
    given = {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
    RunFolder.find(folder, {**read_json(folder / "config.json"), **given}, resume=True)


def measured(source: str, file: Path, config: Config, probes: Sequence[Probe]) -> dict[str, Any]:
    """Scene judge scores of a model and its MSE to teacher, cached in `file`."""
    settings = {"steps": STEPS, "guidance": train_kd.Config().guidance, "seed": SEED}
    asked = {"captions": config.judged, "probes": PROBES, **settings}
    known = read_json(file) if file.is_file() else {}
    if not asked.items() <= known.items():
        pipe, captions = load_pipeline(source, config.device), held_out_captions(config.judged)
        judge = score(pipe(captions, **settings, batch_size=32), captions)
        known = {**asked, "judge": judge, "distance_to_teacher": distance_to_teacher(pipe.unet, probes)}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, known)
    return {name: known[name] for name in ("judge", "distance_to_teacher")}


@torch.no_grad()
def time_students(sources: Mapping[str, str], probe: Probe, config: Config) -> dict[str, float]:
    """Latency in milliseconds of a U-Net call at batch 32, for each model; measured in turns, so that they compare."""
    unets = {name: load_pipeline(source, config.device).unet for name, source in sources.items()}
    times = in_turns([partial(unet, *probe[:4]) for unet in unets.values()], ROUNDS)
    return dict(zip(unets, map(statistics.median, times), strict=True))


def table_rows(
    results: Mapping[str, Sequence[dict]], times: Mapping[str, float], teacher: Mapping[str, Any], seeds: int
) -> list[tuple[str, ...]]:
    """A row for each setting: mean over its seeds, with minimum and maximum in brackets.

    Runs that are missing from the `seeds` of a setting have diverged.
    """
    rows = [("run", "parameters", "MACs", "latency", "MSE to teacher", "all attributes correct", "relative to teacher")]
    for name, runs in results.items():
        label = name if len(runs) == seeds else f"{name} ({seeds - len(runs)} of {seeds} diverged)"
        if not runs:
            rows.append((label, *[""] * (len(rows[0]) - 1)))
            continue
        before, student = runs[0]["teacher"], runs[0]["student after"]
        changes = [f"{100 * (student[key] / before[key] - 1):+.0f} %" for key in ("parameters", "macs")]
        changes.append(f"{100 * (times[name] / times['teacher'] - 1):+.0f} %")
        after = [result["student after"] for result in runs]
        correct = [result["judge"]["all"] for result in after]
        relative = [value / max(teacher["judge"]["all"], 1e-9) for value in correct]
        errors = [result["distance_to_teacher"] for result in after]
        rows.append((label, *changes, spread(errors, ".4f"), spread(correct, ".1%"), spread(relative, ".0%")))
    rows.append(("teacher", "", "", "", "", f"{teacher['judge']['all']:.1%}", ""))
    return rows


def spread(values: Sequence[float], form: str) -> str:
    """0.5 (0.4 to 0.7): mean, minimum, maximum."""
    extremes = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{extremes}"


def to_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    run_command(main, Config, prog="python -m minidistill.study", description=__doc__)
