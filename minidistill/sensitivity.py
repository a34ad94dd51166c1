"""Which blocks of a U-Net matter least, and a removal list made from that: python -m minidistill.sensitivity

Every block is removed alone and scored by how far the output moves, without retraining (`distill/sensitivity.py`). Then
a list is chosen that saves as much as each recipe that fits this teacher, and compared with it. What is printed after
--remove is for `python -m minidistill.train_kd --remove`.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from huggingface_hub.utils import tqdm
from PIL import Image, ImageDraw, ImageFont

from minidistill.cli import option, run_command
from minidistill.data.listing import CAPTION_COLUMN_HELP, SPLIT_CHOICES, SPLIT_HELP
from minidistill.distill.block_removal import RECIPES, Removal, format_count, plan_removal
from minidistill.distill.probes import Probe, make_probes
from minidistill.distill.sensitivity import Score, choose, score, share_weights, smallest_removals
from minidistill.errors import InputError
from minidistill.metrics.cost import count_macs
from minidistill.miniature import judge as scene_judge
from minidistill.miniature.scenes import SIDE, Scenes, held_out_captions
from minidistill.models.unet import UNet, UNetConfig
from minidistill.pipeline import Pipeline, load_pipeline
from minidistill.report import milliseconds
from minidistill.training.batches import Batches
from minidistill.training.curves import COLORS, INK, PAPER, SCALE
from minidistill.training.inputs import check_weights, open_data, resolution_for
from minidistill.training.log import format_table
from minidistill.training.optim import PRECISIONS, get_device, get_dtype
from minidistill.weights.files import atomic_path, write_json


@dataclass(frozen=True)
class Config:
    teacher: str = option("miniature", "SOURCE of the teacher")
    data: str = option("scenes", "scenes (held-out ones), a folder of images with captions, or a cache of one")
    split: str | None = option(None, SPLIT_HELP, choices=SPLIT_CHOICES)
    caption_column: str | None = option(None, CAPTION_COLUMN_HELP)
    resolution: int | None = option(None, "pixels to measure at; none takes the teacher's own", minimum=8)
    samples: int = option(
        64, "images to measure on, each at a timestep of its own; rounded up to whole batches", minimum=1
    )
    batch_size: int = option(16, "samples at a time", minimum=1)
    budget: float | None = option(None, "choose for a student of this share of the teacher, too", minimum=0)
    by: str = option(
        "parameters", "what lists save; latency is measured, here and now", choices=("parameters", "macs", "latency")
    )
    judged: int = option(
        0, "held-out captions to judge every removal on (scenes only; slow)", minimum=0, maximum=len(Scenes("test"))
    )
    guidance: float = option(4.0, "scale of classifier-free guidance in the images that are judged")
    seed: int = option(0, "decides images and noise")
    device: str = option("cpu", "cpu, cuda or cuda:N")
    precision: str = option("fp32", "of the U-Net", choices=PRECISIONS)
    out: str = option("runs/sensitivity", "folder for sensitivity.json and sensitivity.png")


def main(config: Config) -> None:
    """Score every removal, choose lists, print tables, write a JSON file and a chart."""
    check_numbers(config)
    device = get_device(config.device)
    dtype = get_dtype(config.precision, device)
    pipe = load_pipeline(config.teacher, device)
    check_weights(pipe, config.teacher)
    teacher = pipe.unet.eval().requires_grad_(False)
    removals = smallest_removals(teacher.config)
    if not removals:
        raise InputError(f"{config.teacher}: nothing can be removed from this model alone; take a larger --teacher")
    side = resolution_for(pipe, config.resolution, config.teacher)
    scenes = Scenes("test", length=config.samples)
    data = open_data(config.data, side, scenes, config.split, config.caption_column)
    out = make_folder(config.out)

    batches = Batches(data, pipe, batch_size=config.batch_size, seed=config.seed, cache=False)
    teacher.to(dtype)  # and not the text encoders: a cache of text states knows them by their weights
    probes = make_probes(batches, range(math.ceil(config.samples / config.batch_size)))
    tokens = pipe.tokenizers[0].max_length

    def measure(removal: Removal) -> Score:
        found = score(removal, teacher, probes, tokens)
        if not math.isfinite(found.sensitivity):
            what = f"without {','.join(removal.removed)} the output is not finite in {config.precision}"
            raise InputError(f"{what}; use --precision fp32, or another --teacher")
        if config.by == "latency":
            found = replace(found, latency=saved_latency(teacher, share_weights(removal, teacher), probes[0]))
        return found

    scores, judged = [], {}
    with tqdm(removals, desc="removing", unit="", disable=None, leave=False) as bar:
        for removal in bar:
            scores.append(measure(removal))
            if config.judged:
                judged[removal.removed] = judge(config, pipe, removal)
    scores.sort(key=lambda s: s.sensitivity)
    print(format_table(score_rows(scores, judged)) + "\n", flush=True)

    macs = count_macs(teacher, *probes[0].x_t.shape[-2:], tokens)["conv_linear"]
    total = {"parameters": sum(p.numel() for p in teacher.parameters()), "macs": macs, "latency": 1.0}
    lists = {}
    for name, goal in savings(config, teacher.config, total, measure).items():
        if isinstance(goal, Score):
            lists[name] = goal
        saving = getattr(goal, config.by) if isinstance(goal, Score) else goal
        try:
            chosen = choose(teacher.config, scores, saving, config.by)
        except InputError as error:
            print(f"{name}: {error}")
            continue
        wholes = [measure(plan_removal(teacher.config, some)) for some in chosen]
        enough = [s for s in wholes if getattr(s, config.by) >= saving]
        if enough:
            lists[f"chosen for {name}"] = min(enough, key=lambda s: s.sensitivity)
            continue
        # Latencies do not add up exactly, nor do MACs where a removal moves the mid block to another size.
        most = lists[f"chosen for {name}"] = max(wholes, key=lambda s: getattr(s, config.by))
        asked, found = (value / total[config.by] for value in (saving, getattr(most, config.by)))
        what = "time" if config.by == "latency" else config.by
        print(f"{name}: saving {asked:.0%} of the {what} was asked for; the list found saves {found:.0%}")
    print(format_table(list_rows(lists, total)) + "\n")
    for name, s in lists.items():
        if name not in RECIPES:
            print(f"{name}: --remove {','.join(s.remove)}")

    content = {
        "settings": asdict(config),
        "teacher": total,
        "scores": [{**entry(s), "judge": judged.get(s.remove)} for s in scores],
        "lists": {name: entry(s) for name, s in lists.items()},
    }
    write_json(out / "sensitivity.json", content)
    draw_chart(scores, out / "sensitivity.png")
    print(f"\nnumbers  {out / 'sensitivity.json'}\nchart    {out / 'sensitivity.png'}")


def check_numbers(config: Config) -> None:
    """Refuse numbers that no flag's minimum can."""
    if config.budget is not None and config.budget >= 1:
        raise InputError(f"--budget is the share of the teacher that stays, 0 to 1, not {config.budget:g}")
    if config.judged and config.data != "scenes":
        raise InputError("--judged is for scenes only: no judge reads other images")


def make_folder(path: str) -> Path:
    """The folder for the results, made now: not after everything is measured."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {path}: {error.strerror}; take another --out") from error
    return Path(path)


def saved_latency(teacher: UNet, student: UNet, probe: Probe) -> float:
    """Share of the time of a call that the student saves, the median of some turns of the two."""
    turns = [milliseconds(student, probe, rounds=1) / milliseconds(teacher, probe, rounds=1) for _ in range(3)]
    return 1 - statistics.median(turns)


def savings(
    config: Config, teacher: UNetConfig, total: Mapping[str, float], measure: Callable[[Removal], Score]
) -> dict[str, Score | float]:
    """What is to be saved: by each recipe that fits this teacher (no list twice), and what --budget asks for."""
    found: dict[str, Score | float] = {}
    for name, recipe in RECIPES.items():
        try:
            removal = plan_removal(teacher, recipe.remove)
        except InputError:
            continue  # a recipe for another kind of teacher
        if removal.removed not in [s.remove for s in found.values()]:
            found[name] = measure(removal)
    if config.budget is not None:
        found[f"{100 * config.budget:g} %"] = (1 - config.budget) * total[config.by]
    return found


def judge(config: Config, pipe: Pipeline, removal: Removal) -> float:
    """Share of held-out captions all of whose attributes the cut-down model's images show."""
    student, captions = copy.copy(pipe), held_out_captions(config.judged)
    student.unet = share_weights(removal, pipe.unet)
    size = {"height": SIDE, "width": SIDE}
    images = student(captions, guidance=config.guidance, seed=config.seed, batch_size=config.batch_size, **size)
    return scene_judge.score(images, captions)["all"]


def score_rows(scores: Sequence[Score], judged: Mapping[tuple[str, ...], float]) -> list[tuple[str, ...]]:
    """A table, least sensitivity first."""
    title, *times = time_cells(scores)
    rows = [("removed", "MSE to teacher", "parameters", "MACs", *title, *(["all correct"] if judged else []))]
    for s, time in zip(scores, times, strict=True):
        saved = (format_count(-s.parameters), format_count(-s.macs))
        right = [f"{judged[s.remove]:.0%}"] if judged else []
        rows.append((",".join(s.remove), f"{s.sensitivity:.3g}", *saved, *time, *right))
    return rows


def list_rows(lists: Mapping[str, Score], total: Mapping[str, float]) -> list[tuple[str, ...]]:
    """A table of the students that whole lists leave."""
    title, *times = time_cells(lists.values())
    rows = [("student", "MSE to teacher", "parameters", "MACs", *title)]
    for (name, s), time in zip(lists.items(), times, strict=True):
        left = (format_count(total["parameters"] - s.parameters), format_count(total["macs"] - s.macs))
        rows.append((name, f"{s.sensitivity:.3g}", *left, *time))
    return rows


def time_cells(scores: Collection[Score]) -> list[tuple[str, ...]]:
    """The column of times in a table, title first; empty cells where they were not measured."""
    if not any(s.latency for s in scores):
        return [()] * (len(scores) + 1)
    return [("time of a call",), *((f"{-s.latency:+.0%}",) for s in scores)]


def entry(s: Score) -> dict:
    """A score as it is written to the JSON file."""
    return {name: getattr(s, name) for name in ("remove", "sensitivity", "parameters", "macs", "latency")}


def draw_chart(scores: Sequence[Score], path: Path) -> None:
    """A bar for each removal, least sensitivity on top; its length is the logarithm of the sensitivity."""
    row, left, width = 24 * SCALE, 200 * SCALE, 900 * SCALE
    canvas = Image.new("RGB", (width, (len(scores) + 3) * row), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13 * SCALE)
    pen.text((left, row), "MSE to teacher (log), and parameters saved", INK, font, anchor="lm")
    sensitivities = [max(s.sensitivity, 1e-12) for s in scores]
    low, high = min(sensitivities) / 2, max(sensitivities)
    for i, (s, sensitivity) in enumerate(zip(scores, sensitivities, strict=True)):
        y = (i + 2) * row
        length = (width - left - 220 * SCALE) * math.log(sensitivity / low) / math.log(high / low)
        pen.text((left - 8 * SCALE, y), ",".join(s.remove), INK, font, anchor="rm")
        pen.rectangle((left, y - row // 3, left + length, y + row // 3), fill=COLORS[0])
        text = f"{s.sensitivity:.2g}   -{format_count(s.parameters)}"
        pen.text((left + length + 8 * SCALE, y), text, INK, font, anchor="lm")
    with atomic_path(path) as temporary:
        canvas.resize((canvas.width // SCALE, canvas.height // SCALE), Image.Resampling.LANCZOS).save(temporary, "PNG")


if __name__ == "__main__":
    run_command(main, Config, prog="python -m minidistill.sensitivity", description=__doc__)
