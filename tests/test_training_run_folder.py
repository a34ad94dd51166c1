"""Protects what is on disk: whose folder it is, checkpoints complete at any moment, what if one is damaged."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

from minidistill import finetune, train_kd, train_lightning
from minidistill.errors import InputError
from minidistill.training.ema import EMA
from minidistill.training.run_folder import MAY_CHANGE, NOT_COMPARED, RunFolder

CONFIG = {"steps": 300, "learning_rate": 1e-4, "stages": (8, 4), "device": "cpu", "out": "x", "resume": False}


def parts_at(step):
    """The parts of a run whose every number is `step`."""
    net = nn.Linear(64, 64)
    nn.init.constant_(net.weight, step)
    ema = EMA(net)
    ema.updates = step
    return {"student": net, "ema": ema}


def open_run(path, resume=False, **changes):
    settings = {**CONFIG, "resume": resume, **changes}
    return RunFolder.find(path, settings, resume=resume).begin(settings)


def saved(run):
    return sorted(os.listdir(run.checkpoints))


def test_a_folder_in_use_is_refused_without_resume(tmp_path):
    open_run(tmp_path / "run")
    with pytest.raises(InputError, match="--resume"):
        open_run(tmp_path / "run")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match=r"model_index\.json exists"):
        open_run(tmp_path / "model")
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match="is the folder of --data"):
        RunFolder.find(tmp_path / "images", {"data": str(tmp_path / "images")})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        open_run(tmp_path / "file")


def test_resume_where_there_is_no_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "mistyped"):
        with pytest.raises(InputError, match="nothing to resume"):
            open_run(path, resume=True)
    assert not (tmp_path / "mistyped").exists()


def test_resume_refuses_other_settings_and_names_each_but_allows_longer_and_elsewhere_and_says_so(tmp_path, capsys):
    open_run(tmp_path)
    with pytest.raises(InputError) as error:
        open_run(tmp_path, resume=True, learning_rate=1e-5, stages=(8, 2), steps=400)
    message = str(error.value)
    assert "learning_rate 1e-05 (was 0.0001)" in message and "stages [8, 2] (was [8, 4])" in message
    assert "steps" not in message and "\n" not in message
    with pytest.raises(InputError, match=r"it is a run of another command or version, by more, rank$"):
        open_run(tmp_path, resume=True, learning_rate=1e-5, more=1, rank=None)
    run = open_run(tmp_path, resume=True, steps=600, out="moved")
    printed = capsys.readouterr().out
    assert "steps 600 (was 300)" in printed and "moved" not in printed
    assert "no checkpoint yet: starting at step 0" in printed
    assert json.loads(run.config.read_text())["steps"] == 600


HOLDER = """
import sys, time
from minidistill.training.run_folder import RunFolder
RunFolder.find(sys.argv[1], {}).begin({})
print("begun", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked on Windows")
def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path):
    words = [sys.executable, "-c", HOLDER, tmp_path / "run"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as first:
        try:
            assert first.stdout.readline() == "begun\n"
            with pytest.raises(InputError, match=r"another process is writing .*run: wait for it, or take another"):
                RunFolder.find(tmp_path / "run", {}, resume=True)
        finally:
            first.kill()
            first.wait()
        RunFolder.find(tmp_path / "run", {}, resume=True).begin({})
        RunFolder.find(tmp_path / "run", {}, resume=True)  # the same process may, again


def test_a_source_may_move_and_be_spelt_otherwise_its_content_may_not(tmp_path, monkeypatch, capsys):
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    run = open_run(tmp_path / "run", teacher="model", start_from="model/", data="scenes", weights="abc")
    (tmp_path / "here" / "scenes").mkdir()  # is not what the word means
    stored = json.loads(run.config.read_text())
    assert (stored["teacher"], stored["data"]) == (str(tmp_path / "here" / "model"), "scenes")
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    for spelt in ("here/model", "here/model/", str(tmp_path / "here" / "model")):
        open_run(tmp_path / "run", True, teacher=spelt, start_from=spelt, data="scenes", weights="abc")
    assert "teacher" not in capsys.readouterr().out
    open_run(tmp_path / "run", True, teacher="me/moved", start_from="here/model", data="moved", weights="abc")
    assert 'resuming with teacher "me/moved" (was ' in capsys.readouterr().out
    with pytest.raises(InputError, match=r'weights "abd" \(was "abc"\)'):
        open_run(tmp_path / "run", True, teacher="here/model", start_from="here/model", data="scenes", weights="abd")


def test_what_may_change_are_settings_there_are():
    names = {field.name for command in (train_kd, train_lightning, finetune) for field in fields(command.Config)}
    assert {*MAY_CHANGE, *NOT_COMPARED} <= names


def test_a_new_run_writes_its_settings(tmp_path):
    (tmp_path / "log.txt").write_text("nohup writes here")  # which is no sign of a run
    run = open_run(tmp_path)
    assert json.loads(run.config.read_text())["stages"] == [8, 4] and run.latest_checkpoint() is None


def test_a_checkpoint_comes_back_exactly(tmp_path):
    run = open_run(tmp_path)
    tensors = {
        "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).half(),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }
    run.save(7, {**parts_at(7), "more": tensors})
    assert sorted(os.listdir(run.checkpoints / "step-000007")) == ["state.json", "state.safetensors"]
    step, found, meta = run.latest_checkpoint()
    assert step == 7 and meta == {"ema": {"updates": 7}}
    for name, tensor in tensors.items():
        stored = found.pop(f"more/{name}")
        assert stored.dtype == tensor.dtype and torch.equal(stored, tensor), name
    assert set(found) == {"student/weight", "student/bias", "ema/weight", "ema/bias"}


def test_rotation_keeps_the_last_k_replaces_a_step_saved_again_and_sweeps_leftovers(tmp_path):
    run = open_run(tmp_path)
    for step in (1, 2, 10, 9_999_999):
        run.save(step, parts_at(step), keep=2)
    for name in (".writing-step-000009", ".old-step-000000", "step-abc", "step-000011.bak"):
        (run.checkpoints / name).mkdir()
    (run.checkpoints / "step-99999999").write_text("a file")
    assert run.latest_checkpoint().step == 9_999_999
    run.save(9_999_999, parts_at(5), keep=1)
    assert run.latest_checkpoint().meta == {"ema": {"updates": 5}}
    assert saved(run) == ["step-000011.bak", "step-9999999", "step-99999999", "step-abc"]


def rewrite(name, change):
    """Damage to a file of a checkpoint."""

    def damage(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


DAMAGE = {
    "cut short": rewrite("state.safetensors", lambda data: data[:-100]),
    "no json": rewrite("state.json", lambda data: b"{"),
    "a step that is none": rewrite("state.json", lambda data: b'{"step": "2", "meta": {}}'),
    "a list of meta": rewrite("state.json", lambda data: b'{"step": 2, "meta": []}'),
    "a key missing": rewrite("state.json", lambda data: b'{"step": 2}'),
    "no tensors": lambda folder: (folder / "state.safetensors").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, capsys, damage):
    run = open_run(tmp_path)
    for step in (1, 4):
        run.save(step, parts_at(step))
    damage(run.checkpoints / "step-000004")
    run.save(2, parts_at(2))  # going back before a damaged step, which must not crowd out a good one
    assert saved(run) == ["step-000001", "step-000002"]
    damage(run.checkpoints / "step-000002")
    checkpoint = run.latest_checkpoint()
    assert checkpoint.step == 1 and (checkpoint.tensors["student/weight"] == 1).all()
    assert "step-000002 is damaged" in capsys.readouterr().out
    run.save(2, parts_at(2), keep=2)
    assert run.latest_checkpoint().step == 2 and saved(run) == ["step-000001", "step-000002"]
    for name in saved(run):
        damage(run.checkpoints / name)
    with pytest.raises(InputError, match=r"all of .*checkpoints is damaged"):  # no run starts over by itself
        run.restore(parts_at(0))


def test_a_run_whose_checkpoints_are_lost_does_not_start_over(tmp_path):
    run = open_run(tmp_path, checkpoint_every=10)
    run.metrics.write_text('{"step": 10}\n')  # it may have been killed while it saved the first
    open_run(tmp_path, resume=True, checkpoint_every=5)  # and again before it logged anything
    open_run(tmp_path, resume=True, checkpoint_every=10)
    run.metrics.write_text('{"step": 10}\n')
    run.image_grid(300).touch()  # of the last step, where fewer than `checkpoint_every` were to be done
    with pytest.raises(InputError, match=r"has logged 10 steps, and its checkpoints are lost: put one back"):
        open_run(tmp_path, resume=True, checkpoint_every=10)
    run.image_grid(300).unlink()
    run.metrics.write_text('{"step": 20}\n')
    with pytest.raises(InputError, match=r"has logged 20 steps, and its checkpoints are lost: put one back"):
        open_run(tmp_path, resume=True, checkpoint_every=30)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", '{"steps": "all"}'),
        ("config.json", '{"steps": 3, "checkpoint_every": [1]}'),
        *[("metrics.jsonl", line + "\n") for line in ("5", "{}", '{"step": "1"}', '{"step": 1, "loss": "x"}')],
        *[
            ("metrics.jsonl", line + "\n")
            for line in ('{"step": 1, "loss": NaN}', '{"step": 1, "loss_by_timestep": 1}')
        ],
        ("metrics.jsonl", b'{"step": 1, "\xff": 1}\n'),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, file, content):
    RunFolder.find(tmp_path, {"steps": 3}).begin({"steps": 3})
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"must be whole numbers|is damaged in line 1"):
        RunFolder.find(tmp_path, {"steps": 3}, resume=True)


class Crash(BaseException):
    """Not an Exception: nothing may catch it."""


def test_a_crash_at_any_call_to_the_system_leaves_a_complete_checkpoint(tmp_path, monkeypatch):
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
        run.save(2, parts_at(2))
        with monkeypatch.context() as patch:
            left[0] = crashes
            calls = ((Path, "rename"), (Path, "replace"), (os, "unlink"), (os, "rmdir"), (os, "fsync"))
            for owner, name in calls:
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                run.save(3, parts_at(3), keep=2)
                run.save(3, parts_at(3), keep=1)
            except Crash:
                crashes += 1
            else:
                break
        for path in run.checkpoints.glob("step-*"):  # what has the name is complete
            assert sorted(os.listdir(path)) == ["state.json", "state.safetensors"]
        step, tensors, _ = run.latest_checkpoint()
        assert step in (2, 3) and (tensors["student/weight"] == step).all()
        run.save(4, parts_at(4), keep=1)  # and the next save cleans up
        assert saved(run) == ["step-000004"]
    assert crashes > 15
