"""What models cost, side by side: parameters, MACs, memory, and the time of loading, of a U-Net call and of images.

    python -m minidistill.benchmark --model miniature,runs/kd/student
    python -m minidistill.benchmark --against diffusers --recipe bk-tiny --batch-size 16
    python -m minidistill.benchmark --resolution 64,128,256 --batch-size 1,4,16 --out growth.json

Times are taken in turns: a round does the work of every row once, one row after the other, so that whatever else the
machine does meets all of them alike. The table has the median over the rounds and the range; a first round warms up
and does not count. Ratios are of two times of the same round.

    load     from the files, which the operating system has read before, to the end of the first U-Net call
    images   from text to images, with the model's own steps and guidance
    memory   peak: all weights (in training also what AdamW and EMA keep), and what is computed with them
    speed    images/s, relative to the first row

Of --resolution, --batch-size and --steps several may be given. Then the plot shows how time and memory grow with each,
where the others are the first that was given; else it is bars of images/s.

--against diffusers does the same there, with the same files, noise and settings. With --recipe the work is a training
step: train_kd's, from latents and text states in memory, and that of BK-SDM's code, rebuilt from diffusers' parts.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minidistill.cli import option, run_command
from minidistill.diffusion.sampling import Sampling, choose_settings
from minidistill.distill.block_removal import RECIPES
from minidistill.errors import InputError
from minidistill.metrics.cost import count_macs, format_bytes, format_count, in_turns, peak_memory
from minidistill.models.unet import UNet, random_inputs
from minidistill.pipeline import GUIDANCE, STEPS, load_pipeline
from minidistill.training.curves import COLORS, INK, PAPER, draw_plots
from minidistill.training.device import PRECISIONS, get_device, get_dtype
from minidistill.training.log import format_table
from minidistill.weights.files import atomic_path, write_json

PROMPT = "a large red circle left of a small blue square"
OTHER = "diffusers"
# What is done there: nothing in minidistill/ imports diffusers, and tests are what it is installed for.
OTHER_FILE = Path(__file__).parents[1] / "tests" / "against_diffusers.py"
GROWING = {  # settings that may have several values: the name of an axis, of one value
    "resolution": ("pixels a side", "{} px"),
    "batch_size": ("images in a batch", "batch of {}"),
    "steps": ("steps", "{} steps"),
}
COLUMNS = {  # measures of a row in the printed table: heading, format
    "resolution": ("pixels", str),
    "batch_size": ("batch", str),
    "steps": ("steps", str),
    "parameters": ("parameters", format_count),
    "macs": ("MACs", format_count),
    "load_ms": ("load ms", lambda times: spread(times, ".0f")),
    "call_ms": ("ms per call", lambda times: spread(times, ".1f")),
    "images_per_second": ("images/s", lambda rates: spread(rates, ".2f")),
    "peak_bytes": ("memory", format_bytes),
    "speed": ("speed", lambda ratios: spread(ratios, ".2f")),
}
TIMES = {"load_ms": "load", "call_ms": "U-Net call", "batch_ms": "batch"}
Row = dict[str, Any]  # a model in a library, on a device, in a precision: its names, settings and measures
Works = dict[str, Callable[[], object]]  # what is timed, by its name in a row; the last is of a whole batch


@dataclass(frozen=True)
class Config:
    model: tuple[str, ...] = option(("miniature",), "SOURCES with commas between them, the teacher first")
    against: str | None = option(None, "also measure the same work in this library, in turns", choices=(OTHER,))
    recipe: str | None = option(None, "with --against: time a training step of this student instead", choices=RECIPES)
    data: str = option("scenes", "what --recipe trains on: scenes, a folder of images with captions, or its cache")
    resolution: tuple[int, ...] | None = option(
        None, "width and height in pixels (default: the model's); or several", minimum=8
    )
    batch_size: tuple[int, ...] = option((1,), "images at a time; or several numbers", minimum=1)
    steps: tuple[int, ...] | None = option(
        None, f"sampling steps (default: the model's own, else {STEPS}); or several numbers", minimum=1
    )
    guidance: float | None = option(None, f"guidance; 1 or less: off (default: the model's own, else {GUIDANCE:g})")
    rounds: int = option(5, "rounds that count", minimum=1)
    device: tuple[str, ...] = option(("auto",), "cpu, cuda, cuda:N, mps or auto; several with commas between them")
    precision: tuple[str, ...] = option(("fp32",), "precision of U-Net and text encoders; or several", PRECISIONS)
    vae_precision: str = option("fp32", "precision of the VAE; same: as --precision", (*PRECISIONS, "same"))
    out: str | None = option(None, "write all numbers to this .json file, and a plot to the .png beside it")


class Case(NamedTuple):
    """The settings of a row."""

    model: str
    device: torch.device
    precision: str
    resolution: int | None
    batch_size: int
    steps: int | None


class Job(NamedTuple):
    """What is done with a model, in every library alike."""

    source: str
    device: torch.device
    dtype: torch.dtype  # of U-Net and text encoders
    vae_dtype: torch.dtype
    inputs: tuple[Tensor, Tensor, Tensor, dict[str, Tensor] | None]  # of a U-Net call; x is the initial noise too
    size: tuple[int, int]  # height and width in pixels
    settings: Sampling


def main(config: Config) -> None:
    """Measure every row, print the tables, write the numbers and the plot."""
    check_flags(config)
    other = load_other() if config.against else None
    devices = [get_device(name, report=False) for name in config.device]
    machine = describe_machine(devices)
    print(f"{machine}; {config.rounds} rounds: median (range)\n", flush=True)

    prepare, libraries = prepare_sampling, {"minidistill": open_model} | (other.MODELS if other else {})
    if config.recipe:
        prepare, libraries = other.prepare_training, other.TRAININGS
    rows, openers = [], []
    settings = config.resolution or (None,), config.batch_size, config.steps or (None,)
    for values in dict.fromkeys(itertools.product(config.model, devices, config.precision, *settings)):
        case = Case(*values)
        job, facts = prepare(config, case)
        for library, open_it in libraries.items():
            rows.append({**case._asdict(), "library": library, "device": str(case.device), **facts})
            openers.append(partial(open_it, job))
    measure(rows, openers, config)

    growing = [name for name in GROWING if len(set(getattr(config, name) or ())) > 1]
    print(format_rows(rows))
    if other:
        print(f"\n{format_ratios(rows, growing)}")
    if config.out:
        plot = Path(config.out).with_suffix(".png")
        write_json(config.out, {"settings": asdict(config), "machine": machine, "rows": rows})
        draw_growth(plot, rows, growing) if growing else draw_bars(plot, rows, machine)
        print(f"\nnumbers  {config.out}\nplot     {plot}")


def check_flags(config: Config) -> None:
    """InputError: flags that lack another, or the name of a file."""
    if config.out and (not config.out.endswith(".json") or Path(config.out).is_dir()):
        raise InputError(f"--out {config.out}: the name of a .json file is needed")
    if config.recipe and (config.steps or config.guidance is not None or config.vae_precision != "fp32"):
        raise InputError("--steps, --guidance and --vae-precision are of sampling: leave them out, or --recipe")
    if config.recipe and not config.against:
        raise InputError(f"--recipe compares with {OTHER}: give --against {OTHER}; train_kd alone prints its ms/step")
    if config.data != "scenes" and not config.recipe:
        raise InputError("--data is what --recipe trains on: give --recipe too")


def load_other() -> ModuleType:
    """tests/against_diffusers.py. InputError: it, or what it imports, is not there."""
    spec = importlib.util.spec_from_file_location(OTHER_FILE.stem, OTHER_FILE)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        way = f'--against {OTHER} needs a copy of the repository, and in it pip install -e ".[test]"'
        raise InputError(f"{way} ({error})") from error
    return module


def describe_machine(devices: Sequence[torch.device]) -> str:
    """What the numbers depend on: the version of torch, the devices, the CPU's threads and instructions."""
    names = [torch.cuda.get_device_name(d) if d.type == "cuda" else d.type for d in dict.fromkeys(devices)]
    cpu = f"{torch.get_num_threads()} CPU threads, {torch.backends.cpu.get_cpu_capability()}"
    return f"torch {torch.__version__}, {', '.join(names)}, {cpu}"


# the work


def prepare_sampling(config: Config, case: Case) -> tuple[Job, Row]:
    """What is done with a model, and the measures that need no clock."""
    source, device, dtype = case.model, case.device, get_dtype(case.precision, case.device)
    of_vae = case.precision if config.vae_precision == "same" else config.vae_precision
    vae_dtype = get_dtype(of_vae, device, "--vae-precision")
    pipe = load_pipeline(source, device, dtype)
    size = (case.resolution, case.resolution) if case.resolution else pipe.trained_size()
    if any(side % pipe.vae.config.downscale for side in size):
        raise InputError(f"--resolution must be a multiple of {pipe.vae.config.downscale} for {source}, not {size[0]}")
    asked = {"steps": case.steps, "guidance": config.guidance, "sampler": None, "spacing": None}
    settings = choose_settings(pipe.schedule, pipe.sampling, asked, STEPS, GUIDANCE)
    settings = replace(settings, prediction=pipe.schedule.prediction_type)
    h, w, tokens = *(side // pipe.vae.config.downscale for side in size), pipe.tokenizers[0].max_length
    x, t, context, added = random_inputs(pipe.unet.config, case.batch_size, h, w, tokens)
    added = added and {name: value.to(device, dtype) for name, value in added.items()}
    inputs = x.to(device, dtype), t.to(device), context.to(device, dtype), added
    facts = {"vae_precision": of_vae, "resolution": size[0], "steps": settings.steps, "sampling": str(settings)}
    facts |= unet_facts(pipe.unet, h, w, tokens)
    return Job(source, device, dtype, vae_dtype, inputs, size, settings), facts


def unet_facts(unet: UNet, h: int, w: int, tokens: int) -> Row:
    """Parameters, and MACs of one call on one latent of (h, w)."""
    macs = count_macs(unet, h, w, tokens)["conv_linear"]
    return {"latents": [h, w], "parameters": sum(p.numel() for p in unet.parameters()), "macs": macs}


def open_model(job: Job) -> tuple[list[Tensor], Works]:
    """Load a model: its weights, and the works: a U-Net call, and a batch of images, from text to PIL images."""
    pipe, noise = load_pipeline(job.source, job.device, job.dtype, job.vae_dtype), job.inputs[0]
    asked = {name: getattr(job.settings, name) for name in ("steps", "guidance", "sampler", "spacing")}
    call = torch.no_grad()(lambda: pipe.unet(*job.inputs))
    images = partial(pipe, [PROMPT] * len(noise), latents=noise, batch_size=len(noise), **asked)
    networks = [*pipe.networks.values(), pipe.vae]
    return [p for network in networks for p in network.parameters()], {"call_ms": call, "batch_ms": images}


# the measurement


def measure(rows: list[Row], openers: Sequence[Callable[[], tuple[list[Tensor], Works]]], config: Config) -> None:
    """Add times, memory and speed to the rows, whose models are all in memory meanwhile."""
    loaded: list[Any] = [None] * len(rows)

    def load(i: int) -> None:
        loaded[i] = None  # before the next one, for the sake of memory
        loaded[i] = openers[i]()
        next(iter(loaded[i][1].values()))()

    loads = [partial(load, i) for i in range(len(rows))]
    times = {"load_ms": in_turns(loads, 0 if config.recipe else config.rounds)}  # a training is set up once
    for row, (tensors, works) in zip(rows, loaded, strict=True):
        row["peak_bytes"] = peak_memory(tensors, [*works.values()][-1], torch.device(row["device"]))
    for kind in loaded[0][1]:
        times[kind] = in_turns([works[kind] for _, works in loaded], config.rounds)
    for i, row in enumerate(rows):
        row |= {kind: found[i] for kind, found in times.items()}
        row["images_per_second"] = [1000 * row["batch_size"] / ms for ms in times[kind][i]]
        row["speed"] = ratios(row["images_per_second"], rows[0]["images_per_second"])


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """a / b in every round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


# the tables and the plot


def spread(values: Sequence[float], form: str) -> str:
    """0.5 (0.4-0.7): median, smallest, largest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def names_of(row: Row) -> tuple[str, str]:
    """What was measured, and where."""
    student = f" to {row['student']}" if "student" in row else ""
    return row["model"] + student, f"{row['library']}, {row['device']} {row['precision']}"


def format_rows(rows: Sequence[Row]) -> str:
    """The table of all measures."""
    shown = [name for name in COLUMNS if rows[0].get(name)]
    heading = ("model", "with", *(COLUMNS[name][0] for name in shown))
    return format_table([heading, *((*names_of(row), *(COLUMNS[c][1](row[c]) for c in shown)) for row in rows)])


def format_ratios(rows: Sequence[Row], growing: Sequence[str]) -> str:
    """How many times as fast as the other library ours is, and the share of its memory; their rows alternate.

    growing: settings that tell the rows of a model apart.
    """
    kinds = [kind for kind in TIMES if rows[0].get(kind)]
    headings = [*(COLUMNS[name][0] for name in growing), *(TIMES[kind] for kind in kinds)]
    table = [(f"times as fast as {OTHER}", "with", *headings, "share of its memory")]
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        cells = [str(ours[name]) for name in growing]
        cells += [spread(ratios(theirs[kind], ours[kind]), ".2f") for kind in kinds]
        table.append((*names_of(ours), *cells, f"{ours['peak_bytes'] / theirs['peak_bytes']:.2f}"))
    return format_table(table)


def draw_growth(path: Path, rows: Sequence[Row], growing: Sequence[str]) -> None:
    """Write a PNG: for each of the `growing` settings, the time of a batch and the peak memory over its values."""
    plots = []
    for name in growing:
        others = [other for other in growing if other != name]
        times, memory = defaultdict(list), defaultdict(list)
        for row in sorted(rows, key=itemgetter(name)):
            if all(row[other] == rows[0][other] for other in others):
                line = ", ".join(names_of(row))
                times[line].append((row[name], statistics.median(row["batch_ms"])))
                memory[line].append((row[name], row["peak_bytes"] / 2**20))
        over = ", ".join([f"over {GROWING[name][0]}", *(GROWING[other][1].format(rows[0][other]) for other in others)])
        plots.append(((f"ms per batch {over}", times), (f"peak memory in MiB {over}", memory)))
    draw_plots(path, plots, log_x=True)


def draw_bars(path: Path, rows: Sequence[Row], title: str) -> None:
    """Write a PNG: a bar of images/s for each row, in the colour of its library, with a line for the range."""
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    left, scale = 370, 540 / max(max(row["images_per_second"]) for row in rows)  # of the bars, in pixels
    sheet, font = Image.new("RGB", (1000, 60 + 50 * len(rows)), PAPER), ImageFont.load_default(14)
    pen = ImageDraw.Draw(sheet)
    pen.text((20, 14), f"images/s ({title})", INK, font)
    for i, row in enumerate(rows):
        y, rates = 85 + 50 * i, row["images_per_second"]
        middle, low, high = (left + scale * value for value in (statistics.median(rates), min(rates), max(rates)))
        (what, where), color = names_of(row), COLORS[libraries.index(row["library"])]
        pen.multiline_text((left - 10, y), f"{what[-45:]}\n{where}", INK, font, anchor="rm", align="right")
        pen.rectangle((left, y - 15, middle, y + 15), color)
        pen.line((low, y, high, y), INK, 2)
        pen.text((high + 10, y), f"{statistics.median(rates):.2f}", INK, font, anchor="lm")
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")


if __name__ == "__main__":
    run_command(main, Config, prog="python -m minidistill.benchmark", description=__doc__)
