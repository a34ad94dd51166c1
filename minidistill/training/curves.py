"""metrics.jsonl -> curves.png: the loss parts over the steps; the loss by timestep, at first and of late."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from minidistill.training.log import NOT_LOSSES, read_metrics
from minidistill.weights.files import atomic_path

WIDTH, HEIGHT = 1200, 500
SCALE = 2  # drawn larger, then reduced: Pillow's lines are not anti-aliased
INK, GRID, PAPER = "#333333", "#e6e6e6", "#ffffff"
COLORS = ("#1f77b4", "#d95f02", "#1b9e77", "#7b4ea3", "#e7298a", "#8c6d31", "#666666", "#17a2b8")

Points = list[tuple[float, float]]
Box = tuple[int, int, int, int]  # left, top, right, bottom


def draw_curves(metrics: str | Path, image: str | Path) -> None:
    """Draw what metrics.jsonl holds so far into a PNG of 1200 x 500 pixels.

    Left: every loss part, thin as logged and bold smoothed, with its last smoothed value in the legend.
    Right: the loss by timestep, over the first and the last fifth of the run.
    The y axes are logarithmic unless a value is not positive.
    """
    lines = read_metrics(metrics)
    canvas = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), PAPER)
    draw = ImageDraw.Draw(canvas)
    _draw_losses(draw, (0, 0, 700, HEIGHT), lines)
    _draw_by_timestep(draw, (700, 0, WIDTH, HEIGHT), lines)
    with atomic_path(image) as temporary:
        canvas.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(temporary, format="png")


def _draw_losses(draw: ImageDraw.ImageDraw, box: Box, lines: list[dict[str, Any]]) -> None:
    names = dict.fromkeys(name for line in lines for name in line if name not in NOT_LOSSES)
    raw = {name: [(x["step"], x[name]) for x in lines if x.get(name) is not None] for name in names}
    raw = {name: points for name, points in raw.items() if points}
    smoothed = {name: smooth(points) for name, points in raw.items()}
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(raw)}
    legend = {f"{name} {points[-1][1]:.3g}": colors[name] for name, points in smoothed.items()}

    x_range = (0, max([1, *(x["step"] for x in lines)]))
    panel = _Panel(draw, box, x_range, raw, title="loss", x_label="step", legend=legend)
    for name, points in raw.items():
        panel.line(points, _faded(colors[name]), width=1)
    for name, points in smoothed.items():
        panel.line(points, colors[name], width=2)


def _draw_by_timestep(draw: ImageDraw.ImageDraw, box: Box, lines: list[dict[str, Any]]) -> None:
    binned = [x["loss_by_timestep"] for x in lines if x.get("loss_by_timestep")]
    fifth = max(1, len(binned) // 5)
    parts = {"first fifth of the run": binned[:fifth], "last fifth of the run": binned[-fifth:]}
    if len(binned) < 2:
        parts = {"so far": binned} if binned else {}
    series = {name: _mean_by_bin(part) for name, part in parts.items()}
    legend = {name: COLORS[0] if name == list(series)[-1] else _faded(COLORS[0]) for name in series}

    x_range = (0, max([int(key.split("-")[1]) + 1 for entry in binned for key in entry], default=1000))
    x_label = "timestep (high: nearly pure noise)"
    panel = _Panel(draw, box, x_range, series, title="loss by timestep", x_label=x_label, legend=legend)
    for name, points in series.items():
        panel.line(points, legend[name], width=2)
        panel.dots(points, legend[name])


def smooth(points: Points) -> Points:
    """Mean over a twentieth of all points, half of them on each side: a mean of the past would lag."""
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    result = []
    for i, (x, _) in enumerate(points):
        reach = min(i, len(points) // 40)  # at the start, where losses fall fast, as far back as ahead
        first, end = i - reach, min(len(points), i + reach + 1)
        result.append((x, (sums[end] - sums[first]) / (end - first)))
    return result


def _mean_by_bin(entries: Sequence[Mapping[str, float]]) -> Points:
    """[{"0-99": loss, ...}, ...] -> [(middle of the bin, mean loss), ...]"""
    points = []
    for key in {key for entry in entries for key in entry}:
        low, high = map(int, key.split("-"))
        values = [entry[key] for entry in entries if entry.get(key) is not None]
        if values:
            points.append(((low + high + 1) / 2, sum(values) / len(values)))
    return sorted(points)


def _faded(color: str) -> str:
    """The colour, two thirds of the way to white."""
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{255 - (255 - part) // 3:02x}" for part in parts)


# ------------------------------------------------------------------------------------------------------------
# one pair of axes


class _Panel:
    """Axes in a box: title and legend above, ticks and grid, data coordinates -> pixels."""

    def __init__(
        self,
        draw: ImageDraw.ImageDraw,
        box: Box,
        x_range: tuple[float, float],
        series: Mapping[str, Points],
        *,
        title: str,
        x_label: str,
        legend: Mapping[str, str],
    ) -> None:
        self.draw, self.x_range = draw, x_range
        top = self._title(box, title, legend)
        self.left, self.top, self.right, self.bottom = box[0] + 66, top, box[2] - 22, box[3] - 54
        values = [y for points in series.values() for _, y in points]
        self.log = bool(values) and min(values) > 0
        self.y_range = self._padded(min(values, default=0), max(values, default=1))
        self._axes(x_label)
        if not values:
            self._text((self.left + self.right) / 2, (self.top + self.bottom) / 2, "nothing logged yet", "mm")

    def line(self, points: Points, color: str, width: float) -> None:
        """Straight pieces between the points; a dot if there is one only."""
        pixels = [self._pixel(x, y) for x, y in points]
        if len(pixels) > 1:
            self.draw.line(pixels, fill=color, width=round(width * SCALE), joint="curve")
        else:
            self.dots(points, color)

    def dots(self, points: Points, color: str) -> None:
        for x, y in points:
            self.draw.circle(self._pixel(x, y), 3.5 * SCALE, fill=color)

    def _padded(self, low: float, high: float) -> tuple[float, float]:
        if self.log:
            factor = max(high / low, 1.1) ** 0.05
            return low / factor, high * factor
        margin = 0.05 * (high - low or 1)
        return low - margin, high + margin

    def _pixel(self, x: float, y: float) -> tuple[float, float]:
        low, high = self.y_range
        across = (x - self.x_range[0]) / (self.x_range[1] - self.x_range[0])
        up = math.log(y / low) / math.log(high / low) if self.log else (y - low) / (high - low)
        column = self.left + across * (self.right - self.left)
        return column * SCALE, (self.bottom - up * (self.bottom - self.top)) * SCALE

    def _axes(self, x_label: str) -> None:
        for y in log_ticks(*self.y_range) if self.log else linear_ticks(*self.y_range):
            row = self._pixel(0, y)[1]
            self.draw.line([(self.left * SCALE, row), (self.right * SCALE, row)], fill=GRID, width=SCALE)
            self._text(self.left - 8, row / SCALE, _label(y), "rm")
        for x in linear_ticks(*self.x_range):
            column = self._pixel(x, self.y_range[0])[0]
            self.draw.line([(column, self.bottom * SCALE), (column, (self.bottom + 5) * SCALE)], fill=INK, width=SCALE)
            self._text(column / SCALE, self.bottom + 9, _label(x), "ma")
        corners = [(self.left, self.top), (self.left, self.bottom), (self.right, self.bottom)]
        self.draw.line([(x * SCALE, y * SCALE) for x, y in corners], fill=INK, width=SCALE)
        self._text((self.left + self.right) / 2, self.bottom + 30, x_label, "ma")

    def _title(self, box: Box, title: str, legend: Mapping[str, str]) -> int:
        """Title, then the legend in rows; returns where the plot may begin."""
        left, row = box[0] + 66, box[1] + 14
        self._text(left, row, title, "la", size=16)
        row += 28
        column = left
        for name, color in legend.items():
            width = 30 + self.draw.textlength(name, font=_font(13)) / SCALE
            if column > left and column + width > box[2] - 22:
                column, row = left, row + 20
            swatch = [(column * SCALE, (row + 8) * SCALE), ((column + 18) * SCALE, (row + 8) * SCALE)]
            self.draw.line(swatch, fill=color, width=3 * SCALE)
            self._text(column + 24, row, name, "la")
            column += width + 14
        return row + 28

    def _text(self, x: float, y: float, text: str, anchor: str, size: int = 13) -> None:
        self.draw.text((x * SCALE, y * SCALE), text, fill=INK, font=_font(size), anchor=anchor)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SCALE)


def linear_ticks(low: float, high: float) -> list[float]:
    """About five round numbers (1, 2 or 5 times a power of ten apart) from low to high."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; with 2 and 5 times them if that is few; round numbers if that is still few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 2, 5)):
        ticks = [m * 10.0**k for k in exponents for m in multiples if low <= m * 10.0**k <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 10)]
    return linear_ticks(low, high)


def _label(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}" if value == 0 or abs(value) >= 0.001 else f"{value:.0e}"
