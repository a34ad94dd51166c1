"""Protects what is on disk: whose folder it is, checkpoints whole at any moment, what if one is damaged."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from minidistill import finetune, train_kd
from minidistill.errors import InputError
from minidistill.training.run_folder import MAY_CHANGE, NOT_COMPARED, RunFolder

CONFIG = {"steps": 300, "learning_rate": 1e-4, "stages": (8, 4), "device": "cpu", "out": "x", "resume": False}
META = {"optimizer": {"lr": 0.1 + 0.2, "betas": [0.9, 0.999]}}


def tensors_at(step):
    return {"student/weight": torch.full((64, 64), float(step)), "student/count": torch.tensor(step)}


def open_run(path, resume=False, **changes):
    settings = {**CONFIG, "resume": resume, **changes}
    return RunFolder.find(path, settings, resume=resume).begin(settings)


def test_a_new_run_writes_its_settings_and_folders(tmp_path):
    run = open_run(tmp_path / "deep" / "run")
    assert json.loads(run.config.read_text())["stages"] == [8, 4]
    assert run.samples.is_dir() and run.checkpoints.is_dir() and run.latest_checkpoint() is None


def test_a_folder_in_use_is_refused_without_resume(tmp_path):
    open_run(tmp_path / "run")
    with pytest.raises(InputError, match="--resume"):
        open_run(tmp_path / "run")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match=r"model_index\.json exists"):
        open_run(tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        open_run(tmp_path / "file")


def test_a_folder_with_other_things_is_fine(tmp_path):
    (tmp_path / "log.txt").write_text("nohup writes here")
    open_run(tmp_path)


def test_resume_where_there_is_no_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "mistyped"):
        with pytest.raises(InputError, match="nothing to resume"):
            open_run(path, resume=True)
    assert not (tmp_path / "mistyped").exists()


def test_resume_refuses_other_settings_and_names_each(tmp_path):
    open_run(tmp_path)
    with pytest.raises(InputError) as error:
        open_run(tmp_path, resume=True, learning_rate=1e-5, stages=(8, 2), steps=400)
    message = str(error.value)
    assert "learning_rate 1e-05 (was 0.0001)" in message and "stages [8, 2] (was [8, 4])" in message
    assert "steps" not in message and "\n" not in message
    with pytest.raises(InputError, match="not set"):
        open_run(tmp_path, resume=True, new_field=1)


def test_resume_allows_longer_and_elsewhere_and_says_so(tmp_path, capsys):
    open_run(tmp_path)
    run = open_run(tmp_path, resume=True, steps=600, out="moved")
    printed = capsys.readouterr().out
    assert "steps 600 (was 300)" in printed and "moved" not in printed
    assert "no checkpoint yet: starting at step 0" in printed
    assert json.loads(run.config.read_text())["steps"] == 600


def test_what_may_change_are_settings_there_are():
    for command in (train_kd, finetune):
        names = {field.name for field in fields(command.Config)} | {"dry_run"}
        assert {*MAY_CHANGE, *NOT_COMPARED} <= names


def test_the_last_strip_is_none_that_a_run_has_gone_back_before(tmp_path):
    run = open_run(tmp_path)
    for step in (0, 6, 9):
        run.image_grid(step).touch()
    assert [run.last_image_grid(step) for step in (6, 8, 10)] == [run.image_grid(step) for step in (6, 6, 9)]


def test_a_checkpoint_comes_back_exactly(tmp_path):
    run = open_run(tmp_path)
    tensors = {
        "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).half(),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }
    path = run.save_checkpoint(7, tensors, META)
    assert path.name == "step-000007" and sorted(p.name for p in path.iterdir()) == [
        "state.json",
        "state.safetensors",
    ]
    step, found, meta = run.latest_checkpoint()
    assert step == 7 and meta == META and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_rotation_keeps_the_last_k(tmp_path):
    run = open_run(tmp_path)
    for step in (1, 2, 10, 9_999_999):
        run.save_checkpoint(step, tensors_at(step), META, keep=2)
    assert sorted(os.listdir(run.checkpoints)) == ["step-000010", "step-9999999"]


def test_saving_a_step_again_replaces_it(tmp_path):
    run = open_run(tmp_path)
    run.save_checkpoint(5, tensors_at(1), META, keep=1)
    run.save_checkpoint(5, tensors_at(5), META, keep=1)
    assert run.latest_checkpoint().tensors["student/count"] == 5
    assert os.listdir(run.checkpoints) == ["step-000005"]


def truncate(folder):
    file = folder / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(folder):
    data = bytearray((folder / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "state.safetensors").write_bytes(data)


def change_the_meta(folder):
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace("0.999", "0.99"))


def break_the_json(folder):
    (folder / "state.json").write_text("{")


def forget_a_key(folder):
    (folder / "state.json").write_text('{"step": 2}')


def lose_the_tensors(folder):
    (folder / "state.safetensors").unlink()


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_bit, change_the_meta, break_the_json, forget_a_key, lose_the_tensors]
)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, capsys, damage):
    run = open_run(tmp_path)
    run.save_checkpoint(1, tensors_at(1), META)
    damage(run.save_checkpoint(2, tensors_at(2), META))
    checkpoint = run.latest_checkpoint()
    assert checkpoint.step == 1 and torch.equal(checkpoint.tensors["student/weight"], tensors_at(1)["student/weight"])
    assert "step-000002 is damaged" in capsys.readouterr().out
    # Going on from step 1, the damaged step 2 must not crowd out a good one.
    run.save_checkpoint(2, tensors_at(2), META, keep=2)
    assert run.latest_checkpoint().step == 2
    assert sorted(os.listdir(run.checkpoints)) == ["step-000001", "step-000002"]


def test_a_damaged_later_checkpoint_does_not_crowd_out_good_ones(tmp_path):
    run = open_run(tmp_path)
    for step in (1, 4):
        run.save_checkpoint(step, tensors_at(step), META)
    truncate(run.checkpoints / "step-000004")
    for step in (2, 3):
        run.save_checkpoint(step, tensors_at(step), META, keep=2)
    assert sorted(os.listdir(run.checkpoints)) == ["step-000002", "step-000003"]


def test_garbage_in_the_folder_is_ignored_and_leftovers_are_swept(tmp_path):
    run = open_run(tmp_path)
    run.save_checkpoint(1, tensors_at(1), META)
    for name in (".writing-step-000009", ".deleting-step-000000", "step-abc", "step-000002.bak"):
        (run.checkpoints / name).mkdir()
    (run.checkpoints / "step-000003").write_text("a file")
    assert run.latest_checkpoint().step == 1
    run.save_checkpoint(4, tensors_at(4), META)
    assert not list(run.checkpoints.glob(".*"))


class Crash(BaseException):
    """Not an Exception: nothing may catch it."""


def test_a_crash_at_any_call_to_the_system_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Every rename, deletion and flush of saving steps 3 and 3 again (keep=1) is the last one in turn."""
    left = [0]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Crash
            return function(*args, **kwargs)

        return call

    crashes = 0
    while True:
        run = open_run(tmp_path / str(crashes))
        run.save_checkpoint(2, tensors_at(2), META)
        with monkeypatch.context() as patch:
            left[0] = crashes
            for owner, name in (
                (Path, "rename"),
                (Path, "replace"),
                (os, "unlink"),
                (os, "rmdir"),
                (os, "fsync"),
            ):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                run.save_checkpoint(3, tensors_at(3), META, keep=2)
                run.save_checkpoint(3, tensors_at(3), META, keep=1)
            except Crash:
                crashes += 1
            else:
                break
        for path in run.checkpoints.glob("step-*"):  # what bears the name is whole
            assert sorted(os.listdir(path)) == ["state.json", "state.safetensors"]
        step, tensors, _ = run.latest_checkpoint()
        assert step in (2, 3) and torch.equal(tensors["student/weight"], tensors_at(step)["student/weight"])
        run.save_checkpoint(4, tensors_at(4), META, keep=1)  # and the next save cleans up
        assert os.listdir(run.checkpoints) == ["step-000004"]
    assert crashes > 15


WRITER = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
from minidistill.training.run_folder import RunFolder

for kill in range(12):
    run = RunFolder.find(f"{sys.argv[1]}/{kill}", {}).begin({})
    child = os.fork()
    if child == 0:
        for step in range(1, 100_000):
            run.save_checkpoint(step, {"x": torch.full((200, 200), float(step))}, {"step": step}, keep=1)
    wanted = f"step-{1 + kill % 4:06d}"  # a kill at some moment after this one, on fast and slow machines
    while max([name for name in os.listdir(run.checkpoints) if name[0] != "."], default="") < wanted:
        time.sleep(0.001)
    time.sleep(0.0037 * kill)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL, which Windows does not have")
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, capsys):
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", WRITER, tmp_path], check=True, cwd=root, timeout=120)
    steps = []
    for kill in range(12):
        checkpoint = RunFolder(tmp_path / str(kill)).latest_checkpoint()
        steps.append(checkpoint.step)
        assert checkpoint.meta == {"step": checkpoint.step}
        assert torch.equal(checkpoint.tensors["x"], torch.full((200, 200), float(checkpoint.step)))
    assert len(set(steps)) > 2, steps
    assert "damaged" not in capsys.readouterr().out
