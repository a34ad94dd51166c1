"""Strips: rows of small pictures with their captions, the same noise every time, to watch a run by."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from minidistill.errors import InputError
from minidistill.pipeline import Pipeline
from minidistill.training.batches import at_once
from minidistill.training.optim import NonFiniteLoss
from minidistill.weights.files import atomic_path

CELL, GAP, LABEL = 128, 6, 92  # pixels: picture, space, row label
INK, PAPER = (30, 30, 30), (255, 255, 255)


def draw(
    pipe: Pipeline,
    captions: Sequence[str],
    size: tuple[int, int],
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
    autocast: contextlib.AbstractContextManager | None = None,
) -> list[Image.Image]:
    """A picture of each caption, few at a time where they are large.

    size: (width, height) in pixels. steps, guidance: None takes the model's own. autocast: the precision that latents
    are sampled in; the VAE keeps its own.
    """
    few, (width, height) = at_once(size), size
    settings = {"steps": steps, "guidance": guidance, "seed": seed, "height": height, "width": width}
    with autocast or contextlib.nullcontext():
        latents = pipe(captions, batch_size=2 * few, output="latents", **settings)
    return pipe.decode(latents, few)


def save_strip(
    path: str | Path,
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    labels: Sequence[str] = (),
) -> None:
    """Write a PNG: one row of pictures for each model (`labels` at its left), a caption under each column."""
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
        for c, picture in enumerate(row):
            # Small pictures keep their pixels; large ones are shrunk.
            kind = Image.Resampling.NEAREST if picture.width <= CELL else Image.Resampling.LANCZOS
            sheet.paste(picture.resize((CELL, CELL), kind), (left + c * (CELL + GAP), y))
    for c, lines in enumerate(texts):
        pen.multiline_text((left + c * (CELL + GAP), height - GAP), "\n".join(lines), INK, font, anchor="ld")
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")


@contextlib.contextmanager
def drawing(model: str) -> Iterator[None]:
    """Around the drawing of a strip: an InputError becomes one that says whose pictures failed, and why that may be."""
    try:
        yield
    except InputError as error:
        hint = "if it did before, start again with a lower --learning-rate"
        raise NonFiniteLoss(f"{model} makes no pictures: {error}; {hint}") from error
