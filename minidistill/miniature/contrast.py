"""What a caption changes: the miniature's U-Net learns it from a teacher, beside the teacher's predictions.

A word is worth little to an eps loss: another shape changes the teacher's prediction by a mean square of 0.004 at
t = 800, a fraction of the error of a U-Net in training. Learned from the predictions alone, shapes came after 8,000
steps and more. So each noisy latent is predicted under two captions, often one word apart, and the difference of the
two predictions is learned too, relative to its size in the teacher: shapes are there after 2,000 steps. What words are
seldom exchanged in comes late: textures in 5 % of the pairs were not begun after 4,000 steps, and in 30 % came at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from minidistill.miniature.scenes import COLOURS, GROUNDS, SHAPES, SIZES, TEXTURES, Scenes, Statement, describe, parse

# How often each is what the second caption differs in; "all": it is that of another scene, "text": there is none.
DIFFERENCES = {
    "shape": 20, "colour": 8, "size": 10, "texture": 27, "ground": 5, "count": 10, "text": 8, "all": 12,
}  # fmt: skip
VALUES = {
    "shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "texture": TEXTURES, "ground": tuple(GROUNDS),
}  # fmt: skip
FLOOR = 0.004  # about the mean square by which one word changes a prediction: smaller differences count less


def second_captions(
    captions: Sequence[str | None], numbers: Iterable[int], scenes: Scenes, seed: int
) -> list[str | None]:
    """For each caption another one, drawn by the number of its sample; of none it is that of any scene."""
    found: list[str | None] = []
    for caption, number in zip(captions, numbers, strict=True):
        rng = random.Random(f"{seed} second caption {number}")
        what = rng.choices(tuple(DIFFERENCES), weights=tuple(DIFFERENCES.values()))[0]
        if caption is not None and what == "text":
            found.append(None)
            continue
        changed = None if caption is None or what == "all" else change(caption, what, rng)
        found.append(changed or scenes.caption(rng.randrange(len(scenes))))
    return found


def change(caption: str, what: str, rng: random.Random) -> str | None:
    """The caption with another shape, colour, size, texture, ground or number of things; None if there is no other."""
    statement = parse(caption)
    if what == "count":
        return _recount(statement, rng)
    if what in ("texture", "ground"):
        old = getattr(statement, what)
        return old and describe(replace(statement, **{what: _another(old, VALUES[what], rng)}))
    stating = [thing for thing in statement.things if getattr(thing, what)]
    if not stating:
        return None
    chosen = rng.choice(stating)
    new = replace(chosen, **{what: _another(getattr(chosen, what), VALUES[what], rng)})
    return describe(replace(statement, things=tuple(new if t == chosen else t for t in statement.things)))


def _recount(statement: Statement, rng: random.Random) -> str | None:
    """The caption without its last thing, or with two or three of its only one; None if both are in a relation."""
    things = statement.things
    if len(things) > (2 if statement.relation else 1):
        return describe(replace(statement, things=things[:-1]))
    return None if statement.relation else describe(replace(statement, things=things * rng.choice((2, 3))))


def _another(old: str, values: Sequence[str], rng: random.Random) -> str:
    return rng.choice([value for value in values if value != old])


def contrast_loss(out: Tensor, target: Tensor) -> Tensor:
    """Relative error of the differences between a batch's halves, predictions (2B, C, h, w) against targets -> (B,).

    Sample i and sample B + i are the same noisy latent under two captions.
    """
    (one, two), (wanted_one, wanted_two) = out.float().chunk(2), target.float().chunk(2)
    wanted = wanted_one - wanted_two
    error = (one - two - wanted).square().flatten(1).mean(1)
    return error / (wanted.square().flatten(1).mean(1) + FLOOR)
