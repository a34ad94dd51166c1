"""Distil the miniature under several settings, each with several seeds, and put what comes out into one table.

    python -m minidistill.study                                    everything: hours on a CPU
    python -m minidistill.study --only ablation --seeds 1 --steps 240

Every run is one of `train_kd`, in OUT/NAME-seedN, so it can be looked at, and a study that was stopped goes on where it
was when the command is given again. The table is printed and written to OUT/study.md, all numbers to OUT/study.json.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidistill import train_kd
from minidistill.data.scenes import Scenes
from minidistill.errors import InputError
from minidistill.metrics.comparison import milliseconds
from minidistill.pipeline import load_pipeline
from minidistill.training.batches import Batches
from minidistill.training.config import option, run_command
from minidistill.training.optim import PRECISIONS
from minidistill.weights.files import read_json, write_json

TASK, OUTPUT = (1.0, 0.0, 0.0), (1.0, 1.0, 0.0)  # loss weights
RUNS: dict[str, dict[str, Any]] = {  # what differs from `train_kd` without flags
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
STUDIES = {  # the rows of each table; bk-tiny is the plain recipe in all of them: copied weights, all three losses
    "students": ("bk-base", "bk-small", "bk-tiny"),
    "ablation": ("random-task", "random-all", "copied-task", "copied-task-output", "bk-tiny"),
    "options": ("bk-tiny", "no-caption-dropout", "feature-norm", "random-conditioning", "image-free"),
}


@dataclass(frozen=True)
class Config:
    only: str | None = option(None, "one of the studies; none: all", choices=STUDIES)
    seeds: int = option(3, "runs of each kind", minimum=1)
    steps: int = option(1000, "optimizer steps of each run", minimum=1)
    judged: int = option(200, "held-out captions that each model is judged on", minimum=1)
    precision: str = option("bf16", "of the forward passes", choices=PRECISIONS)
    device: str = option("cpu", "cpu, cuda or cuda:N")
    out: str = option("runs/study", "folder of the runs")


def main(config: Config) -> None:
    """Do the runs that are missing, then write the tables."""
    out = Path(config.out)
    chosen = {config.only: STUDIES[config.only]} if config.only else STUDIES
    names = list(dict.fromkeys(name for rows in chosen.values() for name in rows))
    results: dict[str, list[dict]] = {name: [] for name in names}
    for seed in range(config.seeds):  # all kinds of one seed first: a study cut short compares what it has
        for name in names:
            results[name].append(run(config, name, seed, out / f"{name}-seed{seed}"))
    times = time_students(names, out)
    tables = {title: to_markdown(table_rows(rows, results, times)) for title, rows in chosen.items()}
    text = "\n\n".join(f"{title}, {config.seeds} seeds, {config.steps} steps\n\n{t}" for title, t in tables.items())
    (out / "study.md").write_text(text + "\n")
    write_json(out / "study.json", {"settings": dataclasses.asdict(config), "results": results, "ms_per_call": times})
    print(f"\n{text}\n\ntables   {out / 'study.md'}\nnumbers  {out / 'study.json'}")


def run(config: Config, name: str, seed: int, folder: Path) -> dict:
    """The results of one run, from its folder if it is done: {"teacher", "student before", "student after"}."""
    settings = train_kd.Config(
        **RUNS[name],
        seed=seed,
        steps=config.steps,
        judged=config.judged,
        precision=config.precision,
        device=config.device,
        out=str(folder),
        log_every=50,
        sample_every=config.steps,
        checkpoint_every=250,
        keep_checkpoints=1,
        resume=(folder / "config.json").is_file(),
    )
    done = folder / "student" / "model_index.json"
    if done.is_file():
        stored = read_json(folder / "config.json")
        for key in ("steps", "judged", "precision"):
            if stored[key] != getattr(config, key):
                raise InputError(f"{folder} is of --{key} {stored[key]}: take another --out, or give that value again")
    else:
        print(f"\n=== {name}, seed {seed}", flush=True)
        train_kd.main(settings)
    return read_json(folder / "results.json")


def time_students(names: Sequence[str], out: Path) -> dict[str, float]:
    """Milliseconds of a U-Net call at batch 32, of the teacher and of each student, in turns within one go."""
    pipe = load_pipeline("miniature")
    batch = Batches(Scenes("test", length=32), pipe, batch_size=32, seed=0)[0]
    unets = {"teacher": pipe.unet}
    unets |= {name: load_pipeline(out / f"{name}-seed0" / "student").unet for name in names}
    rounds = [{name: milliseconds(unet, batch, rounds=3) for name, unet in unets.items()} for _ in range(5)]
    return {name: statistics.median(r[name] for r in rounds) for name in unets}


def table_rows(
    names: Sequence[str], results: Mapping[str, Sequence[dict]], times: Mapping[str, float]
) -> list[tuple[str, ...]]:
    """A row for each kind of run: mean over its seeds, and in brackets the smallest and the largest."""
    rows = [("run", "parameters", "MACs", "time of a call", "distance to the teacher", "all right", "of the teacher's")]
    for name in names:
        teacher, student = results[name][0]["teacher"], results[name][0]["student after"]
        changes = [f"{100 * (student[key] / teacher[key] - 1):+.0f} %" for key in ("parameters", "macs")]
        changes.append(f"{100 * (times[name] / times['teacher'] - 1):+.0f} %")
        after = [r["student after"] for r in results[name]]
        right = [r["judge"]["all"] for r in after]
        shares = [value / max(teacher["judge"]["all"], 1e-9) for value in right]
        distances = [r["distance_to_teacher"] for r in after]
        rows.append((name, *changes, spread(distances, ".4f"), spread(right, ".1%"), spread(shares, ".0%")))
    first = results[names[0]][0]["teacher"]
    rows.append(("teacher", "", "", "", "", f"{first['judge']['all']:.1%}", ""))
    return rows


def spread(values: Sequence[float], form: str) -> str:
    """0.5 (0.4 to 0.7): mean, smallest, largest."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def to_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table as README.md has it."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    run_command(main, Config, prog="python -m minidistill.study", description=__doc__)
