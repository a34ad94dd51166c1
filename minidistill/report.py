"""What a training run shows of itself: image grids on the way, measured results and a table at the end."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from minidistill.distill.block_removal import format_count
from minidistill.distill.probes import Probe, distance_to_teacher, make_probes
from minidistill.errors import InputError, NonFiniteLoss
from minidistill.metrics.cost import count_macs, on_device
from minidistill.miniature.judge import score
from minidistill.miniature.scenes import held_out_captions
from minidistill.models.unet import UNet
from minidistill.pipeline import Pipeline
from minidistill.training.batches import Batches, at_once
from minidistill.training.log import format_table
from minidistill.training.run_folder import RunFolder
from minidistill.weights.files import atomic_path, read_json, write_json

CELL, GAP, LABEL = 128, 6, 92  # pixels: image, space, row label
INK, PAPER = (30, 30, 30), (255, 255, 255)
SHOWN = 8  # images in a image grid
STEPS, SEED = 25, 0  # of every image made here
PROBES = 64  # noisy latents, at least, on which outputs are compared


def draw(
    pipe: Pipeline,
    captions: Sequence[str],
    size: tuple[int, int],
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
    autocast: contextlib.AbstractContextManager | None = None,
) -> list[Image.Image]:
    """An image of each caption, few at a time where they are large.

    size: (width, height) in pixels. steps, guidance: None takes the model's own. autocast: the precision that latents
    are sampled in; the VAE keeps its own.
    """
    few, (width, height) = at_once(size), size
    settings = {"steps": steps, "guidance": guidance, "seed": seed, "height": height, "width": width}
    with autocast or contextlib.nullcontext():
        latents = pipe(captions, batch_size=2 * few, output="latents", **settings)
    return pipe.decode(latents, few)


def save_image_grid(
    path: str | Path,
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    labels: Sequence[str] = (),
) -> None:
    """Write a PNG: one row of images for each model (`labels` at its left), a caption under each column."""
    font = ImageFont.load_default(12)
    texts = [textwrap.wrap(caption, 20) for caption in captions]
    left = LABEL if labels else GAP
    height = len(rows) * (CELL + GAP) + GAP + 15 * max(map(len, texts), default=0) + GAP
    sheet = Image.new("RGB", (left + len(captions) * (CELL + GAP), height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        y = GAP + r * (CELL + GAP)
        if labels:
            pen.multiline_text((GAP, y + CELL / 2), "\n".join(textwrap.wrap(labels[r], 13)), INK, font, anchor="lm")
        for c, image in enumerate(row):
            # Small images keep their pixels; large ones are shrunk.
            kind = Image.Resampling.NEAREST if image.width <= CELL else Image.Resampling.LANCZOS
            sheet.paste(image.resize((CELL, CELL), kind), (left + c * (CELL + GAP), y))
    for c, lines in enumerate(texts):
        pen.multiline_text((left + c * (CELL + GAP), height - GAP), "\n".join(lines), INK, font, anchor="ld")
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")


@contextlib.contextmanager
def drawing(model: str) -> Iterator[None]:
    """Around the drawing of images: an InputError becomes one that says whose images failed, and why that may be."""
    try:
        yield
    except InputError as error:
        hint = "if it did before, start again with a lower --learning-rate"
        raise NonFiniteLoss(f"{model} makes no images: {error}; {hint}") from error


class Comparison:
    """What a distillation run shows of itself. Always the same captions and noise, so that images compare."""

    def __init__(
        self,
        run: RunFolder,
        teacher: Pipeline,
        student: UNet,
        batches: Batches,
        judged: int,
        guidance: float,
        autocast: AbstractContextManager,
    ) -> None:
        """judged: how many held-out captions of the scenes to judge; 0 if the data are not the scenes.

        autocast: the precision that latents are sampled in, as they are in training; the VAE keeps its own.
        """
        self.run, self.teacher, self.batches, self.judged = run, copy.copy(teacher), batches, judged
        self.guidance, self.autocast = guidance, autocast
        for network in batches.idle:  # from now on they are needed for images only, which fetch them
            network.to("cpu")
        self.student = copy.copy(teacher)
        self.student.unet = student
        self.captions = held_out_captions(SHOWN) if judged else batches.captions(SHOWN)
        self.probes: list[Probe] = []
        self.teacher_row: list[Image.Image] = []
        self.file = run.path / "results.json"
        self.results = read_json(self.file) if self.file.exists() else {}

    def look(self, step: int) -> None:
        """Write samples/step-NNNNNN.png, the teacher's images above the student's."""
        with drawing(f"the student of step {step}"):
            row = self._images(self.student, self.captions)
        self._save(step, row)

    def measure(self, name: str, step: int) -> None:
        """Measure the student under `name`, and the teacher if it is not yet, kept in results.json; and look."""
        if "teacher" not in self.results:
            self.results["teacher"], self.teacher_row = self._measure(self.teacher)
        with drawing(f"the student of step {step}"):
            self.results[name], row = self._measure(self.student)
        write_json(self.file, self.results)
        self._save(step, row)

    def table(self) -> str:
        """All that was measured, a row for each model."""
        rows = [("", "parameters", "MACs", "ms a call", "MSE to teacher", *(["all correct"] if self.judged else []))]
        for name, result in self.results.items():
            row = [
                name,
                format_count(result["parameters"]),
                format_count(result["macs"]),
                f"{result['ms_per_call']:.1f}",
                f"{result['distance_to_teacher']:.4f}",
            ]
            if self.judged:
                row.append(f"{result['judge']['all']:.0%}")
            rows.append(tuple(row))
        return format_table(rows)

    def _images(self, pipe: Pipeline, captions: list[str]) -> list[Image.Image]:
        with on_device(self.batches.idle, pipe.device):
            return draw(pipe, captions, self.batches.size, SEED, STEPS, self.guidance, self.autocast)

    def _save(self, step: int, row: list[Image.Image]) -> None:
        self.teacher_row = self.teacher_row or self._images(self.teacher, self.captions)
        save_image_grid(
            self.run.image_grid(step), [self.teacher_row, row], self.captions, ["teacher", f"student, step {step}"]
        )

    def _measure(self, pipe: Pipeline) -> tuple[dict, list[Image.Image]]:
        """What results.json says of a model, and its images for a image grid."""
        if not self.probes:  # of samples that no run trains on: negative numbers
            self.probes = make_probes(self.batches, range(-math.ceil(PROBES / self.batches.batch_size), 0))
        probe = self.probes[0]
        height, width = probe.x_t.shape[-2:]
        result = {
            "parameters": sum(p.numel() for p in pipe.unet.parameters()),
            "macs": count_macs(pipe.unet, height, width, probe.context.shape[1])["conv_linear"],
            "ms_per_call": milliseconds(pipe.unet, probe),
            "distance_to_teacher": distance_to_teacher(pipe.unet, self.probes),
        }
        captions = held_out_captions(max(SHOWN, self.judged)) if self.judged else self.captions
        images = self._images(pipe, captions)
        if self.judged:
            result["judge"] = score(images[: self.judged], captions[: self.judged])
        return result, images[:SHOWN]


@torch.no_grad()
def milliseconds(unet: UNet, probe: Probe, rounds: int = 7) -> float:
    """Median time of one U-Net call on a probe. Timings on a busy machine compare only within one run."""
    x, context = probe.x_t.to(unet.dtype), probe.context.to(unet.dtype)
    times = []
    for _ in range(rounds + 2):  # the first two warm up
        if x.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        unet(x, probe.t, context, probe.added_cond)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[2:])
