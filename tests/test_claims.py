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
from minidistill.miniature.judge import has_two_colours, score
from minidistill.miniature.scenes import Scenes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_trial_is_in_one_group_and_begins_where_the_others_do():
    grouped = [name for group in claims.GROUPS.values() for name in group.trials]
    assert sorted(grouped) == sorted(TRIALS) and set(claims.SETTINGS) <= set(TRIALS)
    for group in claims.GROUPS.values():
        for name in group.trials:
            (stage,) = choose(TRIALS[name], None, distilled=group.start and Sampling(group.start))
            assert str(stage.student) == name[0]
            assert {phase.from_data for phase in stage.phases} == {group.mosaics}
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
    assert {sum(leg.phase.steps for leg in legs(TRIALS[name])) for name in adversarial} == {150}
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


def test_a_mosaic_keeps_all_attributes_and_has_steps_between_its_tiles_alone():
    scenes = [Scenes("test")[i] for i in range(40)]
    mosaics = [claims.mosaic(image) for image, _ in scenes]
    assert score(mosaics, [caption for _, caption in scenes])["all"] > 0.95
    assert claims.tiled(mosaics) == 0
    assert claims.tiled([image for image, _ in scenes]) > 0.5


def test_a_real_trial_of_one_step(tmp_path, monkeypatch, capsys):
    for module, name, value in ((train_lightning, "REFERENCE", 2), (train_lightning, "COMPARED", 1)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(claims, "frechet_to_scenes", lambda images, style: len(images) / 100)
    monkeypatch.setattr(claims, "MOSAICS", 16)
    groups = {
        name: claims.GROUPS[name]._replace(trials=(trial,))
        for name, trial in (("two-steps", "2-mse"), ("new-style", "4-finetune"))
    }
    monkeypatch.setattr(claims, "GROUPS", groups)
    monkeypatch.setattr(claims, "COMMON", claims.COMMON | {"images": 16, "batch_size": 2})
    config = claims.Config(seeds=1, length=0.001, judged=4, precision="fp32", device="cpu", out=str(tmp_path))
    claims.main(config)
    assert "start, 8 steps" in capsys.readouterr().out
    heading, _, teacher, trial, *others = (tmp_path / "claims.md").read_text().splitlines()[2:]
    assert heading.startswith("|  | all attributes correct |") and trial.startswith("| 2-mse | ")
    assert teacher.startswith("| teacher, 32 steps | ") and heading.count("|") == trial.count("|") == 8
    heading, _, before, trial = others[3:]
    assert "steps within tiles" in heading and before.startswith("| 4 steps, before | ") and "4-finetune" in trial
    numbers = json.loads((tmp_path / "claims.json").read_text())
    (result,) = numbers["results"]["2-mse"]
    assert result["frechet"] == 0.04 and result["minutes"] > 0 and numbers["teacher"]["sharpness"] > 1

    monkeypatch.setattr(train_lightning, "main", lambda _: pytest.fail("it is there"))
    claims.main(config)
    with pytest.raises(InputError, match="length"):
        claims.main(claims.replace(config, length=0.002))
