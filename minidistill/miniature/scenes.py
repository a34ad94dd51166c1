"""Scenes: captioned 64x64 images, rendered on the fly. The data of the embedded miniature Stable Diffusion.

One to three flat things on a plain or textured ground, with a caption that often omits attributes, so that many images
match one caption. Scene number `index` is always the same; their number is unlimited.

    a large red circle left of a small blue square on a striped grey background

`draw_scene` samples the scene, `render` makes the image, `describe` the caption; `parse` inverts `describe`, for the
judge in `minidistill.miniature.judge`.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64  # pixels
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")
COLOURS = {
    "red": (214, 44, 48),
    "orange": (242, 138, 28),
    "yellow": (246, 216, 52),
    "green": (44, 160, 68),
    "cyan": (40, 196, 206),
    "blue": (44, 84, 216),
    "purple": (140, 58, 180),
    "pink": (242, 122, 182),
}
SIZES = {"small": (9.0, 10.5), "large": (14.0, 15.5)}  # half the width, in pixels
SIZE_BORDER = 12.25  # half width between small and large
GROUNDS = {"white": (234, 230, 222), "grey": (132, 134, 140), "black": (40, 40, 46)}
TEXTURES = ("plain", "striped", "checked", "dotted", "gradient", "grainy")
RELATIONS = ("left of", "right of", "above", "below", "inside")
NUMBERS = ("a", "two", "three")
HOLDERS = ("circle", "square", "heart")  # shapes that can contain another one

# Relative frequencies of the kinds of scenes.
SHARES = {"one": 32, "related": 26, "two": 8, "inside": 10, "counted": 10, "three": 14}

# (shape, colour, texture of the ground): one in eight, one colour per shape and texture, is held out from training, so
# that its images test composition, not memory. Size is not held out: a shape and colour seen in one size only would
# determine the size without the caption.
HELD_OUT = frozenset(
    (shape, list(COLOURS)[(3 * i + k) % 8], texture)
    for i, shape in enumerate(SHAPES)
    for k, texture in enumerate(TEXTURES)
)

RING_HOLE = 0.46  # radius of the hole / radius of the ring
STRIPE_PERIOD, CHECK_PERIOD, DOT_PERIOD, DOT_RADIUS, GRAIN_SIDE = 12, 16, 12, 3.2, 4  # pixels
# In grey levels: half the step between two tones, half the range of a gradient, standard deviation of grain.
CONTRAST, SLOPE, GRAIN = 20.0, 30.0, 15.0


@dataclass(frozen=True)
class Thing:
    """The attributes of a thing in a caption; None is not stated."""

    shape: str | None
    colour: str | None
    size: str | None


@dataclass(frozen=True)
class Place:
    """Position of a thing: centre and half width, in pixels; `shade` is added to its colour."""

    x: float
    y: float
    r: float
    shade: float = 0.0


@dataclass(frozen=True)
class Statement:
    """The content of a caption. `relation` is between things 0 and 1; None is not stated."""

    things: tuple[Thing, ...]
    relation: str | None = None
    texture: str | None = None
    ground: str | None = None


@dataclass(frozen=True)
class Scene:
    """A scene: `full` has all attributes, `stated` those of its caption, `places` the positions of the things."""

    full: Statement
    stated: Statement
    places: tuple[Place, ...]
    grain_seed: int  # also of the phases of the texture


class Scenes:
    """The embedded dataset: `scenes[i]` is (PIL image 64x64, caption), always the same.

    Split "train" has no HELD_OUT combination of shape, colour and texture; in split "test" the first thing always is
    one, and its caption states all three. length: of one epoch. shares: relative frequencies of the kinds of scenes.
    """

    def __init__(self, split: str = "train", length: int = 100_000, shares: Mapping[str, int] = SHARES) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"scenes have the splits train and test, not {split!r}")
        self.split, self.length, self.shares = split, length, shares

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        scene = self.scene(index)
        return Image.fromarray(render(scene)), describe(scene.stated)

    def fingerprint(self) -> str:
        """A short description that identifies the dataset."""
        return f"{self.length} images, split {self.split}"

    def scene(self, index: int) -> Scene:
        """Scene number `index`. IndexError: outside 0 .. length - 1."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        return draw_scene(index, self.split, self.shares)

    def caption(self, index: int) -> str:
        """The caption alone, without rendering."""
        return describe(self.scene(index).stated)


def held_out_captions(count: int) -> list[str]:
    """The first captions of split "test", on which models are evaluated."""
    scenes = Scenes("test")
    return [scenes.caption(i) for i in range(count)]


def draw_scene(index: int, split: str = "train", shares: Mapping[str, int] = SHARES) -> Scene:
    """Scene number `index` of a split, the same on all machines and Python versions."""
    rng = random.Random(f"minidistill scenes {split} {index}")
    kind = rng.choices(tuple(shares), weights=tuple(shares.values()))[0]
    count = {"one": 1, "related": 2, "two": 2, "inside": 2, "counted": rng.choice((2, 3)), "three": 3}[kind]
    relation = None
    if kind == "inside":
        relation = "inside"
    elif kind == "related" or (kind == "three" and rng.random() < 0.5):
        relation = rng.choice(RELATIONS[:4])
    while True:
        things = _pick_things(rng, kind, count)
        texture = rng.choice(TEXTURES) if rng.random() < 0.7 else "plain"
        held_out = [(thing.shape, thing.colour, texture) in HELD_OUT for thing in things]
        if held_out[0] if split == "test" else not any(held_out):
            break
    full = Statement(things, relation, texture, rng.choice(tuple(GROUNDS)))
    full, places = _place(rng, full)  # may reduce sizes
    return Scene(full, _leave_out(rng, full, split), places, rng.getrandbits(32))


def _pick_things(rng: random.Random, kind: str, count: int) -> tuple[Thing, ...]:
    """Shapes, colours and sizes; things of a scene differ in shape or colour, unless they are counted."""
    things: list[Thing] = []
    while len(things) < count:
        first = not things
        shape, colour, size = rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(tuple(SIZES))
        if any((shape, colour) == (t.shape, t.colour) for t in things):
            continue
        if kind == "inside" and not first and (shape not in HOLDERS or colour == things[0].colour):
            continue
        if kind == "inside":
            size = "small" if first else "large"
        elif count == 3 and (kind == "counted" or any(t.size == "large" for t in things)):
            size = "small"  # of three, at most one fits large
        thing = Thing(shape, colour, size)
        if kind == "counted":
            return (thing,) * count
        things.append(thing)
    return tuple(things)


def _place(rng: random.Random, full: Statement) -> tuple[Statement, tuple[Place, ...]]:
    """Places by rejection sampling: no contact with each other or the border, and consistent with the relation."""
    for attempt in range(20_000):
        if attempt and attempt % 200 == 0:  # too crowded: make all small
            full = replace(full, things=tuple(replace(t, size="small") for t in full.things))
        places = []
        for thing in full.things:
            r = rng.uniform(*SIZES[thing.size])
            x, y = (rng.uniform(r + 1.5, SIDE - r - 1.5) for _ in "xy")
            places.append(Place(x, y, r, rng.uniform(-10, 10)))
        if full.relation == "inside":
            inner, outer = places[0], replace(places[1], r=rng.uniform(22.5, 24.0))
            x, y = (rng.uniform(outer.r + 1.5, SIDE - outer.r - 1.5) for _ in "xy")
            places[1] = replace(outer, x=x, y=y)
            places[0] = replace(inner, x=x + rng.uniform(-1, 1), y=y + rng.uniform(-1.5, 0.5), r=rng.uniform(9.8, 10.4))
            return full, tuple(places)
        clear = all(
            max(abs(a.x - b.x), abs(a.y - b.y)) > a.r + b.r + 3 for i, a in enumerate(places) for b in places[:i]
        )
        if clear and (full.relation is None or relation_holds(full.relation, places[0], places[1], 0.6)):
            return full, tuple(places)
    raise RuntimeError(f"no room for {describe(full)!r}")


def relation_holds(relation: str, a: Place, b: Place, slack: float = 1.0) -> bool:
    """Whether `a relation b`: the offset across its direction is at most slack times the offset along it."""
    dx, dy = b.x - a.x, b.y - a.y
    if relation == "inside":
        return a.r < b.r and max(abs(dx), abs(dy)) < b.r
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > 0 and abs(across) <= slack * along


def _leave_out(rng: random.Random, full: Statement, split: str) -> Statement:
    """Omit attributes, never both shape and colour; split "test" keeps the texture and all of the first thing."""
    things = []
    for i, thing in enumerate(full.things):
        said = thing
        dropped, without_size = rng.random(), rng.random() < 0.5
        if not (split == "test" and i == 0):
            if dropped < 0.10:
                said = replace(said, colour=None)
            elif dropped < 0.18:
                said = replace(said, shape=None)
            if without_size:
                said = replace(said, size=None)
        things.append(said)
    if len(set(full.things)) < len(full.things):  # counted things have one phrase
        things = [things[0]] * len(things)
    said = rng.random()
    texture = full.texture if said < 0.5 or split == "test" else None
    ground = full.ground if said < 0.35 or 0.5 <= said < 0.65 else None
    return Statement(tuple(things), full.relation, texture, ground)


def describe(statement: Statement) -> str:
    """The caption of a statement; attributes that are None are omitted."""
    things = statement.things
    if len(things) > 1 and len(set(things)) == 1 and not statement.relation:
        text = _phrase(things[0], len(things))
    elif statement.relation:
        text = f"{_phrase(things[0])} {statement.relation} {_phrase(things[1])}"
        text += "".join(f" and {_phrase(t)}" for t in things[2:])
    else:
        text = ", ".join(_phrase(t) for t in things[:-1])
        text = f"{text} and {_phrase(things[-1])}" if text else _phrase(things[-1])
    return text + _on_ground(statement)


def _on_ground(statement: Statement) -> str:
    ground = " ".join(word for word in (statement.texture, statement.ground) if word)
    return f" on a {ground} background" if ground else ""


def _phrase(thing: Thing, count: int = 1) -> str:
    noun = thing.shape or "shape"
    if count > 1:
        noun += "es" if noun.endswith("s") else "s"
    words = [word for word in (thing.size, thing.colour, noun) if word]
    article = "an" if count == 1 and words[0][0] in "aeiou" else NUMBERS[count - 1]
    return " ".join([article, *words])


_PHRASE = re.compile(
    rf"(an?|two|three) (?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)}|shape)(?:e?s)?"
)
_GROUND = re.compile(rf"(.*?) on a (?:({'|'.join(TEXTURES)}) ?)?({'|'.join(GROUNDS)})? ?background")


def parse(caption: str) -> Statement:
    """The statement of a caption: the inverse of `describe`. ValueError: it is not in the scenes' grammar."""
    text, texture, ground = caption.strip().lower(), None, None
    if match := _GROUND.fullmatch(text):
        text, texture, ground = match.groups()
    relation = next((r for r in RELATIONS if f" {r} " in text), None)
    phrases = re.split(rf", | and | {relation} " if relation else ", | and ", text)
    things = []
    for phrase in phrases:
        match = _PHRASE.fullmatch(phrase)
        if not match:
            raise ValueError(f"not in the scenes' grammar: {phrase!r} in {caption!r}")
        number, size, colour, shape = match.groups()
        count = {"two": 2, "three": 3}.get(number, 1)
        things += [Thing(None if shape == "shape" else shape, colour, size)] * count
    return Statement(tuple(things), relation, texture, ground)


@cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The outline of a shape as a polygon that fills [-1, 1] x [-1, 1], y downwards; of a ring its outer circle."""
    turn = [2 * math.pi * k / 60 for k in range(60)]
    if shape in ("circle", "ring"):
        points = [(math.cos(a), math.sin(a)) for a in turn]
    elif shape == "square":
        points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    elif shape == "triangle":
        points = [(0, -1), (1, 1), (-1, 1)]
    elif shape == "diamond":
        points = [(0, -1), (1, 0), (0, 1), (-1, 0)]
    elif shape == "star":
        radius = (1.0, 0.42)
        spikes = [(math.pi * k / 5, radius[k % 2]) for k in range(10)]
        points = [(r * math.sin(a), -r * math.cos(a)) for a, r in spikes]
    elif shape == "heart":
        x = [16 * math.sin(a) ** 3 for a in turn]
        y = [-(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) for a in turn]
        points = list(zip(x, y, strict=True))
    elif shape == "cross":
        w = 0.34  # half width of the arms
        points = [
            (-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w),
        ]  # fmt: skip
    else:
        raise ValueError(f"unknown shape {shape!r}")
    columns = []
    for values in zip(*points, strict=True):
        low, high = min(values), max(values)
        columns.append([2 * (v - low) / (high - low) - 1 for v in values])
    return tuple(zip(*columns, strict=True))


def shape_mask(shape: str, side: int, x: float, y: float, r: float, scale: int = 4) -> np.ndarray:
    """Coverage of a shape centred at (x, y), half width r, on a (side, side) grid: float32 in [0, 1]."""
    canvas = Image.new("L", (side * scale, side * scale))
    pen = ImageDraw.Draw(canvas)
    for part, fill in ((1.0, 255), (RING_HOLE, 0))[: 1 + (shape == "ring")]:
        corners = [((x + px * r * part) * scale - 0.5, (y + py * r * part) * scale - 0.5) for px, py in outline(shape)]
        pen.polygon(corners, fill=fill)
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX), np.float32) / 255


def pattern(texture: str, rng: np.random.Generator) -> np.ndarray:
    """The brightness of a texture, (64, 64) float32 around 0, in grey levels; phases and directions from `rng`."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    if texture == "plain":
        return np.zeros((SIDE, SIDE), np.float32)
    if texture == "striped":
        across = (x, y, (x + y) * 0.7071)[rng.integers(3)]
        return CONTRAST * _two_tone(np.sin(2 * np.pi * (across / STRIPE_PERIOD + rng.random())))
    if texture == "checked":
        waves = [np.sin(2 * np.pi * (axis / CHECK_PERIOD + rng.random())) for axis in (x, y)]
        return CONTRAST * _two_tone(waves[0] * waves[1])
    if texture == "dotted":
        u, v = ((axis + rng.random() * DOT_PERIOD) % DOT_PERIOD - DOT_PERIOD / 2 for axis in (x, y))
        return CONTRAST * (2 * np.clip(DOT_RADIUS + 0.5 - np.hypot(u, v), 0, 1) - 0.5)
    if texture == "gradient":
        angle = 2 * np.pi * rng.random()
        along = np.cos(angle) * (x - 31.5) + np.sin(angle) * (y - 31.5)
        return SLOPE * along / np.abs(along).max()
    if texture == "grainy":
        grains = rng.normal(0, GRAIN, (SIDE // GRAIN_SIDE, SIDE // GRAIN_SIDE)).astype(np.float32)
        return np.repeat(np.repeat(grains, GRAIN_SIDE, 0), GRAIN_SIDE, 1)
    raise ValueError(f"unknown texture {texture!r}")


def _two_tone(wave: np.ndarray) -> np.ndarray:
    return np.clip(wave * 4, -1, 1)


def render(scene: Scene) -> np.ndarray:
    """The image of a scene: (64, 64, 3) uint8."""
    rng = np.random.default_rng(scene.grain_seed)
    image = np.asarray(GROUNDS[scene.full.ground], np.float32) + pattern(scene.full.texture, rng)[..., None]
    order = range(len(scene.places))
    for i in reversed(order):  # the first thing last: it may be inside the second
        thing, place = scene.full.things[i], scene.places[i]
        left, top = (max(0, int(c - place.r) - 1) for c in (place.x, place.y))
        side = int(2 * place.r) + 4
        mask = shape_mask(thing.shape, side, place.x - left, place.y - top, place.r)[: SIDE - top, : SIDE - left, None]
        patch = image[top : top + side, left : left + side]
        patch += mask * (np.asarray(COLOURS[thing.colour], np.float32) + place.shade - patch)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)
