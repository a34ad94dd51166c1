"""Sensitivity of every block of a U-Net, and removal lists chosen from it.

    python -m minidistill.sensitivity --teacher DIR --data DIR --budget 0.5

Each block is removed alone, without retraining, and scored by the MSE between the predictions of the remaining network
and of the teacher (`distill/sensitivity.py`). For each recipe that fits the teacher, a list is chosen that saves as
much, and compared with the recipe. Lists are printed as flags of `python -m minidistill.train_kd`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from huggingface_hub.utils import tqdm

from minidistill.cli import option, run_command
from minidistill.data.listing import CAPTION_COLUMN_HELP, SPLIT_CHOICES, SPLIT_HELP
from minidistill.distill.block_removal import RECIPES, Removal, format_count, plan_removal
from minidistill.distill.probes import Probe, make_probes
from minidistill.distill.sensitivity import Score, choose, score, share_weights, smallest_removals
from minidistill.errors import InputError
from minidistill.metrics.cost import count_macs, milliseconds
from minidistill.miniature.scenes import Scenes
from minidistill.models.unet import UNet, UNetConfig
from minidistill.pipeline import load_pipeline
from minidistill.training import inputs
from minidistill.training.batches import Batches
from minidistill.training.device import PRECISIONS, get_device, get_dtype
from minidistill.training.log import format_table
from minidistill.weights.files import write_json

SAVINGS = ("parameters", "macs", "latency")


@dataclass(frozen=True)
class Config:
    teacher: str = option("miniature", "SOURCE of the teacher")
    data: str = option("scenes", "scenes (held-out ones), a folder of images with captions, or its latent cache")
    split: str | None = option(None, SPLIT_HELP, choices=SPLIT_CHOICES)
    caption_column: str | None = option(None, CAPTION_COLUMN_HELP)
    resolution: int | None = option(None, "image size in pixels (default: the teacher's)", minimum=8)
    samples: int = option(64, "noisy latents to measure on, one timestep each; rounded up to full batches", minimum=1)
    batch_size: int = option(16, "samples per batch", minimum=1)
    budget: float | None = option(
        None, "also choose a list for a student of this share of the teacher, 0 to 1", minimum=0, maximum=1
    )
    by: str = option("parameters", "what the lists save; latency is measured on --device", choices=SAVINGS)
    seed: int = option(0, "seed of images and noise")
    device: str = option("auto", "cpu, cuda, cuda:N, mps, or auto: the first available of cuda, mps, cpu")
    precision: str = option("fp32", "precision of the U-Net", choices=PRECISIONS)
    out: str = option("runs/sensitivity", "folder for sensitivity.json")


def main(config: Config) -> None:
    """Score every removal, choose lists, print tables, write a JSON file."""
    teacher, probes = prepare(config)
    out = Path(config.out)
    write_json(out / "sensitivity.json", {"settings": asdict(config)})  # an error now, not after all measurements

    def measure(removal: Removal) -> Score:
        return measured(removal, teacher, probes, config)

    with tqdm(smallest_removals(teacher.config), desc="removing", unit="", disable=None, leave=False) as bar:
        scores = sorted(map(measure, bar), key=lambda s: s.sensitivity)
    print(format_table(table_rows("removed", {",".join(s.remove): s for s in scores})) + "\n", flush=True)

    height, width, tokens = *probes[0].x_t.shape[-2:], probes[0].context.shape[1]
    macs = count_macs(teacher, height, width, tokens)["conv_linear"]
    total = {"parameters": sum(p.numel() for p in teacher.parameters()), "macs": macs, "latency": 1.0}
    lists = choose_lists(config, teacher.config, scores, total, measure)
    print(format_table(table_rows("student", lists, total)) + "\n")
    for name, s in lists.items():
        if name not in RECIPES:
            print(f"{name}: --remove {','.join(s.remove)}")

    content = {
        "settings": asdict(config),
        "teacher": total,
        "scores": [entry(s) for s in scores],
        "lists": {name: entry(s) for name, s in lists.items()},
    }
    write_json(out / "sensitivity.json", content)
    print(f"\nnumbers  {out / 'sensitivity.json'}")


def prepare(config: Config) -> tuple[UNet, list[Probe]]:
    """The teacher's U-Net, frozen, and the probes to measure on."""
    device = get_device(config.device)
    dtype = get_dtype(config.precision, device)
    pipe = load_pipeline(config.teacher, device)
    inputs.check_weights(pipe, config.teacher)
    if not smallest_removals(pipe.unet.config):
        raise InputError(f"{config.teacher}: no block can be removed from this model; use a larger --teacher")
    side = inputs.resolution_for(pipe, config.resolution, config.teacher)
    scenes = Scenes("test", length=config.samples)
    data = inputs.open_data(config.data, side, scenes, config.split, config.caption_column)
    inputs.print_summary(data)
    batches = Batches(data, pipe, batch_size=config.batch_size, seed=config.seed, cache=False)
    # Not the text encoders: caches of their outputs are identified by their weights.
    teacher = pipe.unet.eval().requires_grad_(False).to(dtype)
    return teacher, make_probes(batches, range(math.ceil(config.samples / config.batch_size)))


def measured(removal: Removal, teacher: UNet, probes: Sequence[Probe], config: Config) -> Score:
    """The score of a removal, with its latency if lists are chosen by that."""
    result = score(removal, teacher, probes)
    if not math.isfinite(result.sensitivity):
        what = f"without {','.join(removal.removed)} the output is not finite in {config.precision}"
        raise InputError(f"{what}; use --precision fp32, or another --teacher")
    if config.by != "latency":
        return result
    student = share_weights(removal, teacher)
    ratios = [
        milliseconds(student, probes[0][:4], rounds=1) / milliseconds(teacher, probes[0][:4], rounds=1)
        for _ in range(3)
    ]
    return replace(result, latency=1 - statistics.median(ratios))


def choose_lists(
    config: Config,
    teacher: UNetConfig,
    scores: Sequence[Score],
    total: Mapping[str, float],
    measure: Callable[[Removal], Score],
) -> dict[str, Score]:
    """Scores of the recipes that fit this teacher, each with the list chosen to save as much; the list of --budget."""
    recipes: dict[str, Score] = {}
    for name, recipe in RECIPES.items():
        try:
            removal = plan_removal(teacher, recipe.remove)
        except InputError:
            continue  # a recipe for another architecture
        if removal.removed not in [s.remove for s in recipes.values()]:
            recipes[name] = measure(removal)
    savings = {name: getattr(s, config.by) for name, s in recipes.items()}
    if config.budget is not None:
        savings[f"{100 * config.budget:g} %"] = (1 - config.budget) * total[config.by]

    lists: dict[str, Score] = {}
    for name, saving in savings.items():
        if name in recipes:
            lists[name] = recipes[name]
        try:
            chosen = choose(teacher, scores, saving, config.by)
        except InputError as error:
            print(f"{name}: {error}")
            continue
        candidates = [measure(plan_removal(teacher, entries)) for entries in chosen]
        # Latencies do not add up exactly, nor do MACs where a removal moves the mid block to another size.
        best = min(candidates, key=lambda s: (max(saving - getattr(s, config.by), 0), s.sensitivity))
        lists[f"chosen for {name}"] = best
        if getattr(best, config.by) < saving:
            asked, found = (value / total[config.by] for value in (saving, getattr(best, config.by)))
            print(f"{name}: asked to save {asked:.0%} of {config.by}; the list found saves {found:.0%}")
    return lists


def table_rows(title: str, scores: Mapping[str, Score], total: Mapping[str, float] | None = None) -> list[tuple]:
    """A table of scores: what each removal saves, or what it leaves of a teacher of this `total`."""
    timed = any(s.latency for s in scores.values())
    rows = [(title, "MSE to teacher", "parameters", "MACs", *(["latency"] if timed else []))]
    for name, s in scores.items():
        counts = [total[key] - getattr(s, key) if total else -getattr(s, key) for key in ("parameters", "macs")]
        latency = [f"{-s.latency:+.0%}"] if timed else []
        rows.append((name, f"{s.sensitivity:.3g}", *map(format_count, counts), *latency))
    return rows


def entry(s: Score) -> dict:
    """A score as it is written to the JSON file."""
    return {name: getattr(s, name) for name in ("remove", "sensitivity", *SAVINGS)}


if __name__ == "__main__":
    run_command(main, Config, prog="python -m minidistill.sensitivity", description=__doc__)
