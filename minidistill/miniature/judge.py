"""The scene judge: does an image show what its caption states? Classical image analysis, no network.

It is to the miniature what GenEval is to Stable Diffusion. `judge(image, caption)` detects the things in the image
(`find_things`, `find_ground`), matches them with those of the caption and checks each stated attribute: shape, colour,
size, relation, count, background. Attributes that the caption does not state are not checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image

from minidistill.miniature.scenes import (
    CHECK_PERIOD,
    COLOURS,
    DOT_PERIOD,
    DOT_RADIUS,
    GROUNDS,
    SHAPES,
    SIDE,
    SIZE_BORDER,
    STRIPE_PERIOD,
    Place,
    Statement,
    Thing,
    parse,
    relation_holds,
    shape_mask,
)

KINDS = ("shape", "colour", "size", "relation", "count", "background")
CHROMA = 56  # pixels with a larger max - min over RGB belong to things; grounds are below 35
MIN_AREA = 16  # pixels of the smallest thing
MIN_SEEDS = 4  # pixels of pure colour that a thing inside another has at least
GRID = 24  # side of the grid on which shapes are compared, scaled to unit area
PATTERN_MATCH = 0.62  # minimum correlation of a ground with a pattern
PLAIN_NOISE = 4.5  # maximum standard deviation of a plain ground, in grey levels
GRADIENT_MATCH = 0.60  # minimum share of a gradient's variance that a linear fit explains


@dataclass(frozen=True)
class Found:
    """A thing detected in an image."""

    thing: Thing
    place: Place


@dataclass(frozen=True)
class Answer:
    """Whether the image has one stated attribute."""

    kind: str
    stated: str
    holds: bool


@dataclass(frozen=True)
class Verdict:
    """All answers for one image."""

    answers: tuple[Answer, ...]

    @property
    def all_correct(self) -> bool:
        """Whether the image has all stated attributes."""
        return all(answer.holds for answer in self.answers)

    def wrong(self) -> str:
        """The attributes that the image lacks, as text: 'shape star, count 2'; '' if all are correct."""
        return ", ".join(f"{a.kind} {a.stated}" for a in self.answers if not a.holds)


def judge(image: Image.Image | np.ndarray, caption: str) -> Verdict:
    """Compare a 64x64 RGB image (PIL, or uint8 (64, 64, 3)) with a caption of the scenes' grammar.

    ValueError: the caption is not in the grammar, or the image has another size.
    """
    pixels = np.asarray(image)
    if pixels.shape != (SIDE, SIDE, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"the judge reads (64, 64, 3) uint8 images, not {pixels.shape} {pixels.dtype}")
    stated = parse(caption)
    found = find_things(pixels)
    answers = [Answer("count", str(len(stated.things)), len(found) == len(stated.things))]
    answers += max(_matchings(stated, found), key=lambda answers: sum(a.holds for a in answers))
    if stated.texture or stated.ground:
        texture, ground = find_ground(pixels)
        holds = stated.texture in (None, texture) and stated.ground in (None, ground)
        answers.append(Answer("background", " ".join(filter(None, (stated.texture, stated.ground))), holds))
    return Verdict(tuple(answers))


def has_two_colours(image: Image.Image | np.ndarray) -> bool:
    """Whether something in a 64x64 RGB image has a second colour, or two things touch, as in no scene but "inside"."""
    labels = label_pixels(np.asarray(image))
    solid = _solid(labels)
    counts = [np.bincount(labels[region & solid]) for region in _components(labels >= 0)]
    return any((count >= MIN_SEEDS).sum() > 1 for count in counts)


def score(images: Sequence[Image.Image | np.ndarray], captions: Sequence[str]) -> dict[str, float]:
    """Share of images with all attributes correct ("all"), and share of correct answers of each kind asked."""
    return score_verdicts([judge(p, c) for p, c in zip(images, captions, strict=True)])


def score_verdicts(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """`score` from existing verdicts."""
    verdicts = list(verdicts)
    result = {"all": float(np.mean([v.all_correct for v in verdicts]))}
    for kind in KINDS:
        holds = [a.holds for v in verdicts for a in v.answers if a.kind == kind]
        if holds:
            result[kind] = float(np.mean(holds))
    return result


def _matchings(stated: Statement, found: list[Found]) -> Iterable[list[Answer]]:
    """The answers for each matching of stated things with detected ones (None if too few are detected)."""
    pool = [*found, *[None] * (len(stated.things) - len(found))]
    for match in permutations(pool, len(stated.things)):
        answers = []
        for thing, hit in zip(stated.things, match, strict=True):
            for kind in ("shape", "colour", "size"):
                if (value := getattr(thing, kind)) is not None:
                    answers.append(Answer(kind, value, hit is not None and getattr(hit.thing, kind) == value))
        if stated.relation:
            a, b = match[:2]
            holds = a is not None and b is not None and relation_holds(stated.relation, a.place, b.place)
            answers.append(Answer("relation", stated.relation, holds))
        yield answers


def label_pixels(pixels: np.ndarray) -> np.ndarray:
    """Index of the nearest thing colour for each pixel, -1 for the ground: (64, 64) int."""
    rgb = pixels.astype(np.float32)
    names = np.asarray(list(COLOURS.values()), np.float32)
    labels = np.square(rgb[:, :, None] - names).sum(-1).argmin(-1)
    return np.where(rgb.max(-1) - rgb.min(-1) > CHROMA, labels, -1)


def find_things(pixels: np.ndarray) -> list[Found]:
    """The things in a (64, 64, 3) uint8 image: connected regions, and parts inside them of another colour."""
    labels, rgb = label_pixels(pixels), pixels.astype(np.float32)
    solid, ground = _solid(labels), labels < 0
    things = []
    for region in _components(~ground):
        if region.sum() < MIN_AREA:
            continue
        outside = ~region
        rim = region & _grow(_grow(_grow(outside)))  # three pixels wide: has the colour of the outer thing
        seen = labels[rim & solid] if (rim & solid).any() else labels[region]
        outer = int(np.bincount(seen).argmax())
        pure = region & (labels == outer)
        around = _grow(_grow(region)) & (region | ground)
        near = _grow(_grow(_grow(around))) & ground & ~around
        if not near.any():
            near = outside
        inner_seeds = [region & solid & (labels == c) for c in np.unique(labels[region & solid]) if c != outer]
        inner_seeds = [seeds for seeds in inner_seeds if seeds.sum() >= MIN_SEEDS]
        # The outer thing continues behind the inner ones.
        behind = _grow(_grow(np.logical_or.reduce([np.zeros_like(region), *inner_seeds]))) & region & ~_grow(outside)
        things.append(_thing(np.maximum(_coverage(rgb, pure, near) * around, behind), outer))
        for seeds in inner_seeds:
            cover = _coverage(rgb, seeds, pure) * (region & ~_grow(outside))
            for part in _components(cover > 0.5):
                if (part & seeds).any() and part.sum() >= MIN_AREA:
                    things.append(_thing(cover * _grow(part), int(labels[seeds][0])))
    return things


def _coverage(rgb: np.ndarray, mine: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Share of each pixel that has the colour of mask `mine` rather than that of mask `other`: 0 to 1."""
    start, end = rgb[other].mean(0), np.median(rgb[mine], axis=0)
    along = (rgb - start) @ (end - start) / max(1.0, float(np.square(end - start).sum()))
    return np.clip(along, 0, 1)


def _thing(cover: np.ndarray, colour: int) -> Found:
    """Classify a thing by its coverage (64, 64): position from centre and area, shape from the nearest template."""
    grid, x, y, area = _normalise(cover)
    templates, areas = _shape_templates()
    best = int(np.square(templates - grid).sum((1, 2)).argmin())
    r = float(np.sqrt(area / areas[best]))
    size = "small" if r < SIZE_BORDER else "large"
    return Found(Thing(SHAPES[best], list(COLOURS)[colour], size), Place(x, y, r))


def _normalise(cover: np.ndarray) -> tuple[np.ndarray, float, float, float]:
    """Coverage, centred and scaled to unit area: ((GRID, GRID), centre x, centre y, area in pixels)."""
    area = max(1.0, float(cover.sum()))
    x, y = (float((cover.sum(axis) * np.arange(cover.shape[1 - axis])).sum()) / area for axis in (0, 1))
    steps = np.linspace(-1.05, 1.05, GRID) * np.sqrt(area)
    return _sample(cover, y + steps[:, None], x + steps[None, :]), x + 0.5, y + 0.5, area


def _sample(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear interpolation of `image`, 0 outside."""
    padded = np.pad(image, 1)
    y, x = (np.clip(c + 1, 0, n - 1.001) for c, n in zip((y, x), padded.shape, strict=True))
    y0, x0 = y.astype(int), x.astype(int)
    v, u = y - y0, x - x0
    top = padded[y0, x0] * (1 - u) + padded[y0, x0 + 1] * u
    bottom = padded[y0 + 1, x0] * (1 - u) + padded[y0 + 1, x0 + 1] * u
    return top * (1 - v) + bottom * v


@lru_cache(maxsize=1)
def _shape_templates() -> tuple[np.ndarray, np.ndarray]:
    """All shapes, normalised: (8, GRID, GRID); and their areas at half width 1: (8,)."""
    found = [_normalise(shape_mask(shape, 96, 48, 48, 40)) for shape in SHAPES]
    return np.stack([grid for grid, *_ in found]), np.asarray([area / 40**2 for *_, area in found])


def _solid(labels: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours have the same label: excludes mixed colours at edges."""
    padded = np.pad(labels, 1, constant_values=-1)
    around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    return np.logical_and.reduce([side == labels for side in around]) & (labels >= 0)


def _grow(mask: np.ndarray) -> np.ndarray:
    """The mask dilated by one pixel in all eight directions."""
    padded = np.pad(mask, 1)
    return np.logical_or.reduce([padded[dy : dy + SIDE, dx : dx + SIDE] for dy in range(3) for dx in range(3)])


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected components of a mask, as masks."""
    parts = []
    rest = mask.copy()
    while rest.any():
        part = np.zeros_like(rest)
        stack = [np.unravel_index(int(rest.argmax()), rest.shape)]
        rest[stack[0]] = False
        while stack:
            y, x = stack.pop()
            part[y, x] = True
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= v < mask.shape[0] and 0 <= u < mask.shape[1] and rest[v, u]:
                    rest[v, u] = False
                    stack.append((v, u))
        parts.append(part)
    return parts


def find_ground(pixels: np.ndarray) -> tuple[str, str]:
    """Texture and colour of the ground of a (64, 64, 3) uint8 image: (one of TEXTURES, one of GROUNDS or "none")."""
    labels = label_pixels(pixels)
    clear = ~_grow(_grow(labels >= 0))  # without the blended edges of things
    if clear.sum() < 200:
        clear = labels < 0
    rgb = pixels.astype(np.float32)
    grounds = np.asarray(list(GROUNDS.values()), np.float32)
    if not clear.any():
        return "plain", "none"
    ground = list(GROUNDS)[int(np.square(rgb[clear].mean(0) - grounds).sum(-1).argmin())]

    light = rgb.mean(-1)
    weight = clear.astype(np.float32)
    residual = (light - light[clear].mean()) * weight
    power = float(np.square(residual).sum())
    if np.sqrt(power / weight.sum()) < PLAIN_NOISE:
        return "plain", ground
    y, x = np.mgrid[:SIDE, :SIDE]
    slopes = np.stack([np.ones(clear.sum()), x[clear], y[clear]], 1)
    fit = slopes @ np.linalg.lstsq(slopes, residual[clear], rcond=None)[0]
    if np.square(fit).sum() > GRADIENT_MATCH * power:
        return "gradient", ground
    names, waves = _pattern_templates()
    flat = weight.reshape(-1)
    norms = (waves * waves) @ flat - np.square(waves @ flat) / flat.sum()  # variance under the mask
    match = np.abs(waves @ residual.reshape(-1)) / np.sqrt(np.maximum(norms, 1e-6) * power)
    best = int(match.argmax())
    return (names[best] if match[best] > PATTERN_MATCH else "grainy"), ground


@lru_cache(maxsize=1)
def _pattern_templates() -> tuple[list[str], np.ndarray]:
    """All periodic patterns at all phases: their names, and (N, 4096) float32."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    rows: list[tuple[str, np.ndarray]] = []
    for across in (x, y, (x + y) * 0.7071):
        for phase in np.arange(0, 1, 1 / 16):
            rows.append(("striped", np.clip(4 * np.sin(2 * np.pi * (across / STRIPE_PERIOD + phase)), -1, 1)))
    steps = range(CHECK_PERIOD)
    for a in steps:
        for b in steps:
            wave = np.sin(2 * np.pi * (x + a) / CHECK_PERIOD) * np.sin(2 * np.pi * (y + b) / CHECK_PERIOD)
            rows.append(("checked", np.clip(4 * wave, -1, 1)))
    for a in range(DOT_PERIOD):
        for b in range(DOT_PERIOD):
            u, v = (x + a) % DOT_PERIOD - DOT_PERIOD / 2, (y + b) % DOT_PERIOD - DOT_PERIOD / 2
            rows.append(("dotted", np.clip(DOT_RADIUS + 0.5 - np.hypot(u, v), 0, 1)))
    return [name for name, _ in rows], np.stack([wave.reshape(-1) for _, wave in rows]).astype(np.float32)
