"""What a training run shows of itself: image grids on the way, measured results and a table at the end."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from minidistill.distill.block_removal import format_count
from minidistill.distill.probes import Probe, distance_to_teacher
from minidistill.errors import InputError, NonFiniteLoss
from minidistill.interop.model_card import write_card
from minidistill.interop.publish import push
from minidistill.metrics.cost import count_macs, milliseconds, on_device
from minidistill.metrics.frechet import frechet_distance, image_features
from minidistill.miniature.judge import score
from minidistill.miniature.scenes import Scenes, held_out_captions
from minidistill.models.unet import UNet
from minidistill.pipeline import Pipeline
from minidistill.training import parallel
from minidistill.training.batches import Batches, at_once
from minidistill.training.curves import draw_curves
from minidistill.training.log import format_table
from minidistill.training.run_folder import RunFolder
from minidistill.weights.files import atomic_path, read_json, write_json
from minidistill.weights.folders import MINIATURE, load_clip

CELL, GAP, LABEL = 128, 6, 132  # pixels: image, space, row label
INK, PAPER = (30, 30, 30), (255, 255, 255)
SHOWN, SEED = 8, 0  # images in a grid, and the seed of their noise
MANY = 256  # images from which on a Frechet distance is measured: twice its dimensions
COLUMNS = {  # measures of results.json in the printed table: heading, format
    "parameters": ("parameters", format_count),
    "macs": ("MACs", format_count),
    "ms_per_call": ("ms per call", "{:.1f}".format),
    "distance_to_teacher": ("MSE to teacher", "{:.4f}".format),
    "loss": ("loss", "{:.4f}".format),
    "judge": ("all attributes correct", lambda shares: f"{shares['all']:.0%}"),
    "frechet": ("Frechet distance", "{:.4f}".format),
}


def draw(
    pipe: Pipeline,
    captions: Sequence[str],
    size: tuple[int, int],
    seed: int,
    guidance: float | None = None,
    autocast: AbstractContextManager | None = None,
) -> list[Image.Image]:
    """An image of each caption, few at a time where they are large.

    size: (width, height) in pixels. guidance: None takes the model's own. autocast: the precision that latents are
    sampled in; the VAE keeps its own.
    """
    few, (width, height) = at_once(size, pipe.device), size
    settings = {"guidance": guidance, "seed": seed, "height": height, "width": width}
    with autocast or contextlib.nullcontext():
        latents = pipe(captions, batch_size=2 * few, output="latents", **settings)
    return pipe.decode(latents, few)


def save_image_grid(
    path: str | Path, rows: Sequence[Sequence[Image.Image]], captions: Sequence[str], labels: Sequence[str] = ()
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
            pen.multiline_text((GAP, y + CELL / 2), "\n".join(textwrap.wrap(labels[r], 21)), INK, font, anchor="lm")
        for c, image in enumerate(row):
            # Small images keep their pixels; large ones are shrunk.
            kind = Image.Resampling.NEAREST if image.width <= CELL else Image.Resampling.LANCZOS
            sheet.paste(image.resize((CELL, CELL), kind), (left + c * (CELL + GAP), y))
    for c, lines in enumerate(texts):
        pen.multiline_text((left + c * (CELL + GAP), len(rows) * (CELL + GAP) + GAP), "\n".join(lines), INK, font)
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


def frechet_to_scenes(
    images: Sequence[Image.Image], style: Callable[[Image.Image], Image.Image] | None = None
) -> float:
    """Frechet distance of images of the first held-out captions to their scenes, in the miniature's CLIP.

    style: of the scenes; None: as they are.
    """
    return frechet_distance(image_features(load_clip(MINIATURE), images), scene_features(len(images), style))


@cache
def scene_features(count: int, style: Callable[[Image.Image], Image.Image] | None) -> torch.Tensor:
    """Features (N, D) of the first held-out scenes in the miniature's CLIP, the same for all models of a run."""
    scenes = (Scenes("test")[i][0] for i in range(count))
    return image_features(load_clip(MINIATURE), [style(scene) if style else scene for scene in scenes])


def unet_numbers(unet: UNet, probes: Sequence[Probe]) -> dict[str, Any]:
    """Size and cost of a U-Net and, on the probes, its distance to the teacher."""
    height, width = probes[0].x_t.shape[-2:]
    return {
        "parameters": sum(p.numel() for p in unet.parameters()),
        "macs": count_macs(unet, height, width, probes[0].context.shape[1])["conv_linear"],
        "ms_per_call": milliseconds(unet, probes[0][:4]),
        "distance_to_teacher": distance_to_teacher(unet, probes),
    }


class Report:
    """Image grids, results.json and the final table of one run. Always the same captions and noise: images compare.

    The reference, which is the teacher or the model before training, is measured once; its images are the upper row of
    every grid, above those of the model that is trained.
    """

    def __init__(
        self,
        run: RunFolder,
        batches: Batches,
        numbers: Callable[[Pipeline], dict[str, Any]],
        reference: tuple[str, Pipeline],
        *,
        trained: str,
        judged: int = 0,
        idle: Sequence[nn.Module] = (),
        guidance: float | None = None,
        autocast: AbstractContextManager | None = None,
    ) -> None:
        """Measures the reference, which writes no file yet; of a resumed run its images are drawn, no more.

        Args:
            numbers: what to measure of a model besides its images.
            reference: name and model.
            trained: what it is called that trains: student, model, LoRA.
            judged: how many held-out scenes to evaluate on; 0 if the data are not the scenes.
            idle: networks that only images need. They wait on the CPU.
            guidance, autocast: as in `draw`.
        """
        self.run, self.numbers, self.trained, self.judged, self.idle = run, numbers, trained, judged, idle
        self.size, self.guidance, self.autocast = batches.size, guidance, autocast
        self.captions = held_out_captions(SHOWN) if judged else batches.captions(SHOWN)
        for network in idle:
            network.to("cpu")
        self.file = run.path / "results.json"
        self.results: dict[str, dict[str, Any]] = read_json(self.file) if self.file.exists() else {}
        self.reference, pipe = reference
        if not parallel.is_first():
            return
        is_known = self.reference in self.results
        self.upper_row = self._images(pipe, self.captions) if is_known else self._measure(self.reference, pipe)

    def look(self, pipe: Pipeline, step: int) -> None:
        """Write samples/step-NNNNNN.png. NonFiniteLoss: the model makes no images."""
        if not parallel.is_first():
            return
        with drawing(f"the {self.trained} of step {step}"):
            images = self._images(pipe, self.captions)
        self._write(step, images)

    def measure(self, name: str, pipe: Pipeline, step: int) -> None:
        """Measure the trained model, keep the result in results.json under `name`, and write the image grid."""
        if not parallel.is_first():
            return
        with drawing(f"the {self.trained} of step {step}"):
            images = self._measure(name, pipe)
        self._write(step, images)

    def table(self) -> str:
        """All that was measured, a row for each model."""
        shown = [name for name in COLUMNS if any(name in result for result in self.results.values())]
        rows = [(name, *(COLUMNS[c][1](result[c]) for c in shown)) for name, result in self.results.items()]
        return format_table([("", *(COLUMNS[c][0] for c in shown)), *rows])

    def finish(self, folder: Path, kind: str, files: Sequence[str] | None, settings: Mapping[str, Any]) -> None:
        """Draw the curves, write the model card, print the table and where everything is; upload, if asked to.

        Called by the first process alone. folder: of the trained model. kind: of model card. files: those of the folder
        to upload, None: all. settings: of the run.
        """
        draw_curves(self.run.metrics, self.run.curves)
        grid, repo = self.run.image_grid(settings["steps"]), settings["push_to_hub"]  # which `measure` has written
        write_card(folder, kind, settings, self.results, grid, repo)
        result = folder / files[0] if files else folder
        print(f"\n{self.table()}\n\n{self.trained:9} {result}\nimages    {grid}\ncurves    {self.run.curves}")
        if repo:
            print(f"online    {push(folder, repo, settings['private'], files)}")

    def _images(self, pipe: Pipeline, captions: Sequence[str]) -> list[Image.Image]:
        with on_device(self.idle, pipe.device):
            return draw(pipe, captions, self.size, SEED, self.guidance, self.autocast)

    @torch.no_grad()
    def _measure(self, name: str, pipe: Pipeline) -> list[Image.Image]:
        """Put a model's measures into the results -> its images for the grid."""
        result = self.numbers(pipe)
        captions = held_out_captions(max(SHOWN, self.judged)) if self.judged else self.captions
        images = self._images(pipe, captions)
        if self.judged:
            result["judge"] = score(images[: self.judged], captions[: self.judged])
            if self.judged >= MANY:
                result["frechet"] = frechet_to_scenes(images[: self.judged])
        self.results[name] = result
        return images[:SHOWN]

    def _write(self, step: int, images: Sequence[Image.Image]) -> None:
        write_json(self.file, self.results)
        labels = [self.reference, f"{self.trained}, step {step}"]
        save_image_grid(self.run.image_grid(step), [self.upper_row, images], self.captions, labels)
