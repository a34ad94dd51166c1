"""Plots: the curves of metrics.jsonl, loss parts over the steps and the loss by timestep; and two plots in a row."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from minidistill.training.log import NOT_LOSSES, read_metrics
from minidistill.weights.files import atomic_path

WIDTH, HEIGHT, MIDDLE = 1200, 500, 700  # of an image; where the second of two plots begins
SCALE = 2  # drawn larger, then reduced: Pillow's lines are not anti-aliased
INK, GRID, PAPER = "#333333", "#e6e6e6", "#ffffff"
COLORS = ("#1f77b4", "#d95f02", "#1b9e77", "#7b4ea3", "#e7298a", "#8c6d31", "#666666", "#17a2b8")

Points = list[tuple[float, float]]
Box = tuple[float, float, float, float]  # left, top, right, bottom
Plot = tuple[str, Mapping[str, Points]]  # title, lines by their names


def draw_curves(metrics: str | Path, image: str | Path) -> None:
    """Draw what metrics.jsonl holds so far into a PNG of 1200 x 500 pixels.

    Left: every loss part, with its last value in the legend. Right: the loss by timestep, over the first and the last
    fifth of the run. The y axes are logarithmic unless a value is not positive.
    """
    lines = read_metrics(metrics)
    names = dict.fromkeys(name for line in lines for name in line if name not in NOT_LOSSES)
    losses = {name: [(x["step"], x[name]) for x in lines if x.get(name) is not None] for name in names}
    binned = [x["loss_by_timestep"] for x in lines if x.get("loss_by_timestep")]
    fifth = max(1, len(binned) // 5)
    by_timestep = {"first fifth of the run": _mean_by_bin(binned[:fifth]), "last fifth": _mean_by_bin(binned[-fifth:])}

    left = "loss over steps", {f"{n} {p[-1][1]:.3g}": p for n, p in losses.items() if p}
    draw_plots(image, [(left, ("loss by timestep (high: nearly pure noise)", by_timestep))])


def draw_plots(image: str | Path, rows: Sequence[tuple[Plot, Plot]], *, log_x: bool = False) -> None:
    """Draw rows of two plots into a PNG, 1200 pixels wide, each row 500 high.

    log_x: the x axis is logarithmic too, of positive values, and has a grid line at each of them.
    """
    height = HEIGHT * len(rows)
    canvas = Image.new("RGB", (WIDTH * SCALE, height * SCALE), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, (left, right) in enumerate(rows):
        top, bottom = HEIGHT * i, HEIGHT * (i + 1)
        _plot(draw, (0, top, MIDDLE, bottom), *left, log_x)
        _plot(draw, (MIDDLE, top, WIDTH, bottom), *right, log_x)
    with atomic_path(image) as temporary:
        canvas.resize((WIDTH, height), Image.Resampling.LANCZOS).save(temporary, format="png")


def _mean_by_bin(entries: Sequence[Mapping[str, float | None]]) -> Points:
    """[{"0-99": loss, ...}, ...] -> [(middle of the bin, mean loss), ...]"""
    values: dict[float, list[float]] = {}
    for key, value in (pair for entry in entries for pair in entry.items()):
        low, high = map(int, key.split("-"))
        if value is not None:
            values.setdefault((low + high + 1) / 2, []).append(value)
    return sorted((middle, sum(found) / len(found)) for middle, found in values.items())


def _plot(draw: ImageDraw.ImageDraw, box: Box, title: str, series: Mapping[str, Points], log_x: bool) -> None:
    """Title, legend, and the series as lines over labelled grid lines, five each way but for a logarithmic x axis."""
    left, right, bottom = box[0] + 66, box[2] - 22, box[3] - 44
    legend = _legend(draw, series, left, right, box[1] + 42)
    top = max([row for _, row in legend], default=box[1] + 42) + 24
    _text(draw, (left, box[1] + 14), f"{title}: nothing yet" if not any(series.values()) else title, "la", 16)
    points = [point for some in series.values() for point in some] or [(0.0, 0.0)]
    xs, ys = (sorted(set(values)) for values in zip(*points, strict=True))
    x0, x1, y0, y1 = xs[0], xs[-1], ys[0], ys[-1]
    is_log = y0 > 0
    x1 = x1 if log_x and x1 > x0 else max(x1, x0 + 4)  # the labels are whole numbers
    y1 = max(y1, 1.1 * y0) if is_log else max(y1, y0 + 1e-12)

    def pixel(x: float, y: float) -> tuple[float, float]:
        along = math.log(x / x0) / math.log(x1 / x0) if log_x else (x - x0) / (x1 - x0)
        up = math.log(y / y0) / math.log(y1 / y0) if is_log else (y - y0) / (y1 - y0)
        return left + along * (right - left), bottom - up * (bottom - top)

    for x in xs if log_x else [x0 + (x1 - x0) * i / 4 for i in range(5)]:
        column, _ = pixel(x, y0)
        _line(draw, [(column, top), (column, bottom)], GRID, 1)
        _text(draw, (column, bottom + 9), f"{x:.0f}", "ma")
    for y in (y0 * (y1 / y0) ** (i / 4) if is_log else y0 + (y1 - y0) * i / 4 for i in range(5)):
        _, row = pixel(x0, y)
        _line(draw, [(left, row), (right, row)], GRID, 1)
        _text(draw, (left - 8, row), f"{y:.0f}" if 100 <= y < 1e6 else f"{y:.2g}", "rm")
    for i, ((name, some), place) in enumerate(zip(series.items(), legend, strict=True)):
        color = COLORS[i % len(COLORS)]
        _line(draw, [pixel(x, y) for x, y in some], color, 2)
        _text(draw, place, name, "la", color=color)


def _legend(draw: ImageDraw.ImageDraw, names: Iterable[str], left: float, right: float, top: float) -> Points:
    """Where each name begins: side by side, in lines that end before `right`."""
    places, column, row = [], left, top
    for name in names:
        width = draw.textlength(name, font=ImageFont.load_default(13 * SCALE)) / SCALE
        if column > left and column + width > right:
            column, row = left, row + 18
        places.append((column, row))
        column += width + 18
    return places


def _line(draw: ImageDraw.ImageDraw, points: Points, color: str, width: int) -> None:
    pixels = [(x * SCALE, y * SCALE) for x, y in points]
    draw.line(pixels, color, width * SCALE)
    if len(pixels) == 1:
        draw.circle(pixels[0], 2 * width * SCALE, color)


def _text(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, anchor: str, size: int = 13, color: str = INK
) -> None:
    draw.text((place[0] * SCALE, place[1] * SCALE), text, color, ImageFont.load_default(size * SCALE), anchor)
