"""Protects curves.png: it is drawn from any log a run can leave, and what is drawn is where it should be."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from minidistill.training import curves
from minidistill.training.curves import draw_curves


def draw(folder, entries):
    """The image of a log with these entries; it is the only file that is added."""
    (folder / "m").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    draw_curves(folder / "m", folder / "c.png")
    assert {path.name for path in folder.iterdir()} == {"m", "c.png"}
    return Image.open(folder / "c.png")


def entry(step, **losses):
    binned = {"0-99": 0.5, "900-999": 0.1}
    return {"step": step, **losses, "lr": 1e-4, "grad_norm": 1.0, "ms_per_step": 3.0, "loss_by_timestep": binned}


def top_row(image, left, right):
    """The first row in which there is the colour of the first series, below title and legend."""
    rgb = tuple(int(curves.COLORS[0][i : i + 2], 16) for i in (1, 3, 5))
    distance = np.abs(np.asarray(image.crop((left, 66, right, image.height)), dtype=int) - rgb).max(axis=-1)
    return np.nonzero(distance.min(axis=1) < 24)[0].min()


def test_an_exponential_decay_is_a_falling_straight_line(tmp_path):
    image = draw(tmp_path, [entry(s, loss=math.exp(-s / 100), task=0.005) for s in range(1, 501, 5)])
    assert image.size == (1200, 500) and image.format == "PNG"
    early, middle, late = (top_row(image, left, left + 12) for left in (70, 366, 660))
    assert early < middle < late and middle == pytest.approx((early + late) / 2, abs=12)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [entry(10, loss=1.0), entry(20, loss=1.0)],
        [entry(10, loss=0.0, task=-3.0), entry(20, loss=2.0, task=5.0)],
        [entry(10, loss=0.0), entry(20, loss=0.0)],
        [entry(10, loss=None), entry(20, loss=2.0)],
        [entry(10, loss=1e-9), entry(1_000_000, loss=1e9)],
        [{"step": 3, "lr": 1.0}],
        [entry(s, **{f"a_rather_long_part_name_{i}": 1.0 + i for i in range(11)}) for s in (1, 2)],
    ],
)
def test_every_log_a_run_can_leave_is_drawn(tmp_path, entries):
    assert draw(tmp_path, entries).getextrema() != ((255, 255),) * 3


def test_a_long_legend_goes_on_in_another_line_and_not_into_the_other_plot(tmp_path):
    image = draw(tmp_path, [entry(s, **{f"loss of part number {i}": 1.0 + i for i in range(7)}) for s in (1, 2)])
    assert image.crop((682, 0, 734, 100)).getextrema() == ((255, 255),) * 3


def test_a_single_point_is_a_dot_that_can_be_seen_and_a_missing_log_is_drawn_as_nothing_yet(tmp_path):
    rgb = np.asarray(draw(tmp_path, [entry(6, loss=1.0)]).crop((0, 66, 700, 500)), dtype=int)
    color = [int(curves.COLORS[0][i : i + 2], 16) for i in (1, 3, 5)]
    assert (np.abs(rgb - color).max(axis=-1) < 24).sum() >= 30
    draw_curves(tmp_path / "absent", tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()
