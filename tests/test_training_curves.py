"""Protects curves.png: it is drawn from any log a run can leave, and what is drawn is where it should be."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from minidistill.training import curves
from minidistill.training.curves import draw_curves, linear_ticks, log_ticks, smooth


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def entry(step, **losses):
    return {
        "step": step,
        **losses,
        "lr": 1e-4,
        "grad_norm": 1.0,
        "ms_per_step": 3.0,
        "loss_by_timestep": {"0-99": 0.5, "900-999": 0.1},
    }


def color(index):
    return tuple(int(curves.COLORS[index][i : i + 2], 16) for i in (1, 3, 5))


def rows_of(image, rgb, left, right):
    """Rows in which a pixel of (nearly) this colour is, below title and legend."""
    area = image.crop((left, 75, right, image.height)).convert("RGB")
    distance = np.abs(np.asarray(area, dtype=int) - rgb).max(axis=-1)
    return np.nonzero(distance.min(axis=1) < 24)[0]


def test_falling_loss_is_drawn_falling_on_a_log_axis(tmp_path):
    log = write(tmp_path / "m", [entry(s, loss=math.exp(-s / 100), task=0.01) for s in range(1, 501, 5)])
    draw_curves(log, tmp_path / "curves.png")
    image = Image.open(tmp_path / "curves.png")
    assert image.size == (1200, 500) and image.format == "PNG"
    early, middle, late = (min(rows_of(image, color(0), left, left + 12)) for left in (70, 366, 662))
    assert early < middle < late
    # exponential decay is a straight line in log
    assert middle == pytest.approx((early + late) / 2, abs=12)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [entry(10, loss=1.0)],
        [entry(10, loss=1.0), entry(20, loss=1.0)],
        [entry(10, loss=0.0, task=-3.0), entry(20, loss=2.0, task=5.0)],
        [entry(10, loss=None), entry(20, loss=2.0)],
        [entry(10, loss=1e-9), entry(1_000_000, loss=1e9)],
        [{"step": 3, "lr": 1.0}],
        [entry(s, **{f"a_rather_long_part_name_{i}": 1.0 + i for i in range(11)}) for s in (1, 2)],
    ],
)
def test_every_log_a_run_can_leave_is_drawn(tmp_path, entries):
    draw_curves(write(tmp_path / "m", entries), tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").getextrema() != ((255, 255),) * 3
    assert not [p for p in tmp_path.iterdir() if p.name not in ("m", "c.png")]


def test_a_missing_log_is_drawn_as_nothing_yet(tmp_path):
    draw_curves(tmp_path / "absent", tmp_path / "c.png")
    assert (tmp_path / "c.png").exists()


def test_smoothing_keeps_a_line_a_line_and_does_not_lag():
    line = [(float(x), 3.0 * x) for x in range(200)]
    smoothed = smooth(line)
    assert all(a == pytest.approx(b) for a, b in zip(smoothed[:190], line[:190], strict=True))
    assert smooth([(1.0, 5.0)]) == [(1.0, 5.0)]
    noisy = [(float(x), float(x % 2)) for x in range(400)]
    assert all(abs(y - 0.5) < 0.1 for _, y in smooth(noisy)[20:])


def test_ticks_are_round_and_inside():
    assert linear_ticks(0, 300) == [0, 50, 100, 150, 200, 250, 300]
    assert linear_ticks(-0.05, 1.05) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert log_ticks(0.005, 20) == pytest.approx([0.01, 0.1, 1, 10])
    assert log_ticks(0.04, 0.6) == pytest.approx([0.05, 0.1, 0.2, 0.5])
    assert log_ticks(1.0, 1.1) == pytest.approx([1, 1.02, 1.04, 1.06, 1.08, 1.1])
    assert len(log_ticks(1e-20, 1e20)) <= 12
