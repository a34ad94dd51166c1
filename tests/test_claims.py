"""The claims of SDXL-Lightning: what is compared is what the trials train; complete runs are not run again."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from minidistill import claims, train_lightning
from minidistill.diffusion.sampling import Sampling
from minidistill.distill.lightning import TRIALS, choose, legs, stage_rows
from minidistill.errors import InputError
from minidistill.miniature.judge import has_two_colours
from minidistill.miniature.scenes import Scenes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_trial_is_in_one_group_and_goes_on_from_the_student_of_8_steps():
    grouped = [name for names in claims.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(TRIALS) and set(claims.SETTINGS) <= set(TRIALS)
    for name, plan in TRIALS.items():
        (stage,) = choose(plan, None, distilled=None if name.startswith("8") else Sampling(8))
        assert str(stage.student) == name[0] and stage.teacher == 8, name
    for name, changes in claims.SETTINGS.items():
        train_lightning.Config(plan=name, **changes)


def test_a_trial_and_its_control_differ_in_one_thing():
    """Or where the control is `mse`, in what the second half trains with."""
    rows = {name: stage_rows(plan, 1.0)[1:] for name, plan in TRIALS.items()}
    assert TRIALS["2-mse"] == TRIALS["2-unfixed"] and claims.SETTINGS == {"2-unfixed": {"pure_noise": False}}
    for one, other, column in (("2-conditional", "2-unconditional", 1), ("1-noised", "1-clean", 4)):
        *_, a = rows[one]
        *_, b = rows[other]
        assert [i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]] == [column]
    adversarial = ("2-conditional", "2-unconditional", "2-both", "1-noised", "1-clean")
    assert {sum(leg.phase.steps for leg in legs(TRIALS[name])) for name in adversarial} == {135}
    assert [leg.phase.rollout for leg in legs(TRIALS["8-own-path"])] == [False, True]


def test_something_of_two_colours_is_seen_and_no_scene_has_it():
    pixels = np.full((64, 64, 3), 132, np.uint8)
    pixels[20:40, 20:40] = (214, 44, 48)
    assert not has_two_colours(pixels)
    pixels[20:40, 30:40] = (44, 84, 216)
    assert has_two_colours(pixels) and not has_two_colours(np.full((64, 64, 3), 132, np.uint8))
    scenes = (Scenes("test")[i] for i in range(60))
    assert not any(has_two_colours(image) for image, caption in scenes if " inside " not in caption)


def test_sharpness_falls_with_blur():
    flat = Image.new("RGB", (64, 64), (90, 90, 90))
    noise = torch.randint(256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sharp = Image.fromarray(noise.numpy())
    assert claims.sharpness([flat]) == 0 < claims.sharpness([sharp.resize((16, 16)).resize((64, 64))])
    assert claims.sharpness([sharp.resize((16, 16)).resize((64, 64))]) < claims.sharpness([sharp])


def test_a_real_trial_of_one_step(tmp_path, monkeypatch, capsys):
    for module, name, value in ((train_lightning, "REFERENCE", 2), (train_lightning, "COMPARED", 1)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(claims, "frechet_to_scenes", lambda images: len(images) / 100)
    monkeypatch.setattr(claims, "GROUPS", {"two-steps": ("2-mse",)})
    monkeypatch.setattr(claims, "COMMON", claims.COMMON | {"images": 16, "batch_size": 2})
    config = claims.Config(seeds=1, length=0.001, judged=4, precision="fp32", device="cpu", out=str(tmp_path))
    claims.main(config)
    assert "start, 8 steps" in capsys.readouterr().out
    heading, _, trial, teacher = (tmp_path / "claims.md").read_text().splitlines()[2:]
    assert heading.startswith("| trial | all attributes correct |") and trial.startswith("| 2-mse | ")
    assert teacher.startswith("| teacher, 32 steps | ") and teacher.count("|") == trial.count("|") == 8
    numbers = json.loads((tmp_path / "claims.json").read_text())
    (result,) = numbers["results"]["2-mse"]
    assert result["frechet"] == 0.04 and result["minutes"] > 0 and numbers["teacher"]["sharpness"] > 1

    monkeypatch.setattr(train_lightning, "main", lambda _: pytest.fail("it is there"))
    claims.main(config)
    with pytest.raises(InputError, match="length"):
        claims.main(claims.replace(config, length=0.002))
