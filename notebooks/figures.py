"""Figures of the notebooks, and their `show` and `check`.

Functions that take `ax` draw into one panel of a matplotlib figure; the others make a figure of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display
from matplotlib.axes import Axes
from PIL import Image

from minidistill.miniature.judge import judge

CORRECT = "all attributes correct"
GREEN, RED, GREY = "#2a7a2a", "#a03030", "#c8c8c8"
plt.rcParams["figure.dpi"] = 80


def show(*things: Any) -> None:
    """Display the package's own source of functions or classes."""
    display(Markdown("\n\n".join(f"```python\n{inspect.getsource(thing)}```" for thing in things)))


def check(test: Callable[[], None]) -> None:
    """Run the test of an exercise now. A wrong solution raises AssertionError with the reason."""
    try:
        test()
        print("correct")
    except NotImplementedError:
        print("not solved yet")


def verdicts(images: Sequence[Image.Image], captions: Sequence[str]) -> list[str]:
    """What the scene judge finds wrong in each image, at most two attributes, as notes for `draw_images`."""
    notes = []
    for image, caption in zip(images, captions, strict=True):
        wrong = [f"{a.kind} {a.stated}" for a in judge(image, caption).answers if not a.holds]
        more = ", ..." if len(wrong) > 2 else ""
        notes.append("wrong: " + ",\n".join(wrong[:2]) + more if wrong else CORRECT)
    return notes


def draw_images(
    rows: Mapping[str, Sequence[Any]],
    columns: Sequence[str] = (),
    notes: Mapping[str, Sequence[str]] | None = None,
    size: float = 1.5,
) -> None:
    """A grid with one labelled row of images for each entry of `rows`.

    Args:
        rows: PIL images, or arrays (h, w) of latents, which are shown in colours from -3 (blue) to 3 (red).
        columns: titles of the columns.
        notes: a line under each image, by row; verdicts are coloured.
        size: of an image, in inches.
    """
    count = max(map(len, rows.values()))
    height = size * (1.25 if notes else 1.05)
    fig, axes = plt.subplots(len(rows), count, figsize=(size * count, height * len(rows)), squeeze=False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for ax in line:
            ax.set(xticks=[], yticks=[])
        for ax in line[len(images) :]:
            ax.axis("off")
        for ax, image in zip(line, images, strict=False):
            ax.imshow(image, cmap="coolwarm", vmin=-3, vmax=3, interpolation="nearest")
        line[0].set_ylabel(label, fontsize=9)
        for ax, note in zip(line, (notes or {}).get(label, ()), strict=False):
            color = GREEN if note == CORRECT else RED if note.startswith("wrong") else "black"
            ax.set_xlabel(note, fontsize=6.5, color=color)
    for ax, title in zip(axes[0], columns, strict=False):
        ax.set_title(title, fontsize=8)
    fig.tight_layout(pad=0.4)
    plt.show()


def curves(ax: Axes, lines: Mapping[str, tuple[Sequence[float], Any]], **axes: Any) -> None:
    """Lines {label: (x, y)}; several runs, y (runs, points), are drawn as their mean and a band from least to largest.

    axes: as of `Axes.set`: title, xlabel, yscale, ...
    """
    for label, (x, y) in lines.items():
        runs = np.atleast_2d(np.asarray(y, dtype=float))
        (line,) = ax.plot(x, runs.mean(0), marker="." if len(x) < 30 else None, label=label)
        if len(runs) > 1:
            ax.fill_between(x, runs.min(0), runs.max(0), color=line.get_color(), alpha=0.2, lw=0)
    ax.set(**axes)
    ax.grid(alpha=0.3)


def bars(ax: Axes, values: Mapping[str, float], notes: Sequence[str] | None = None, **axes: Any) -> None:
    """Horizontal bars, the first on top, with `notes` beside them (default: the values). axes: as of `Axes.set`."""
    color = axes.pop("color", "C0")
    drawn = ax.barh(list(values), list(values.values()), color=color)
    ax.bar_label(drawn, notes or [f"{value:.3g}" for value in values.values()], padding=3, fontsize=8)
    ax.set(**axes)
    if ax.get_xscale() == "log":
        ax.set_xlim(right=8 * max(values.values()))
    else:
        ax.margins(x=0.25)
    if not ax.yaxis_inverted():
        ax.invert_yaxis()


def shaded_table(ax: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], **axes: Any) -> None:
    """Numbers (rows, columns) >= 0 as a table, the darker the larger (logarithmic); zeros as "-"."""
    floor = values[values > 0].min() / 3
    ax.imshow(np.log10(np.maximum(values, floor)), cmap="Blues", aspect="auto", alpha=0.6)
    ax.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    ax.set_yticks(range(len(rows)), rows)
    for (i, j), value in np.ndenumerate(values):
        ax.text(j, i, f"{value:.3g}" if value else "-", ha="center", va="center", fontsize=7)
    ax.set(**axes)


def _place(name: str) -> tuple[float, float]:
    """Position of a block: down path on the left, up path on the right, levels from top to bottom."""
    kind, *numbers = name.split(".")
    if not numbers:
        return (-1, 0) if kind == "conv_in" else (3.5, -3.8)  # or mid
    i = int(numbers[0])
    if kind == "downsampler":
        return 2, -i - 0.42
    return (int(numbers[1]), -i) if kind == "down" else (5 + int(numbers[1]), i - 3)


def wiring(ax: Axes, skips: Sequence[tuple[str, str]], kept: set[str], blocks: set[str], **axes: Any) -> None:
    """The skip connections of a U-Net of four levels: arrows from their sources to the layers that read them.

    kept: the blocks that the U-Net has; all other `blocks` are drawn dashed.
    """
    for source, reader in skips:
        bend = -0.22 if source.startswith("down.") or source == "conv_in" else -0.12
        style = {"color": "C1" if source.startswith("down.") else "C2", "connectionstyle": f"arc3,rad={bend}"}
        ax.annotate("", _place(reader), _place(source), arrowprops={"arrowstyle": "->", "shrinkB": 9, **style})
    for name in sorted(blocks):
        text = {"conv_in": "in", "mid": "mid"}.get(name, "/2" if name.startswith("downs") else name[-1])
        ink, box = "black", {"fc": "#bcd7ee", "ec": "#1f5f99"}
        if name not in kept:
            ink, box = "#b0b0b0", {"fc": "white", "ec": GREY, "ls": "--"}
        ax.text(*_place(name), text, ha="center", va="center", color=ink, bbox=box)
    for i in range(4):
        ax.text(-2.2, -i, f"level {i}", va="center", ha="right", fontsize=8)
    ax.set(xlim=(-3.5, 7.6), ylim=(-4.3, 0.9), **axes)
    ax.axis("off")


def scatter(ax: Axes, points: Any, noise: Any = None, modes: Any = None, limit: float = 2.3, **axes: Any) -> None:
    """Points (N, 2), coloured by the direction of the noise (N, 2) they come from; modes as crosses."""
    points = np.asarray(points)
    colors = {"c": "C0"} if noise is None else {"c": np.arctan2(*np.asarray(noise).T[::-1]), "cmap": "hsv"}
    ax.scatter(*points.T, **colors, s=3, alpha=0.6, lw=0)
    if modes is not None:
        ax.scatter(*np.asarray(modes).T, marker="+", color="black", s=50, lw=0.8)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
    ax.set_title(axes.pop("title", ""), fontsize=9)
    ax.set(**axes)
