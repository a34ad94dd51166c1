"""The command train_kd from folders to folders: what a run leaves behind, resuming, what is refused.

A tiny teacher saved by diffusers, with all four stages, is distilled on a folder of ten images. The student must load
in diffusers; bad input must end in one line and exit code 2, with nothing written. (Kills are in test_faults.py.)
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import CAPTIONS, TOKENS, counting_pipe
from PIL import Image, ImageFont
from runs import (
    TEXT,
    UNET,
    assert_same_files,
    checkpoint,
    contents,
    exit_code,
    largest_difference,
    metrics,
    one_line,
    read,
    results,
)
from safetensors.torch import load_file, save_file
from tiny import save_tiny_sd1

from minidistill import pipeline, report, train_kd
from minidistill.cli import parse
from minidistill.diffusion.noise import generator_for
from minidistill.distill.block_removal import RECIPES, build_student, feature_pairs, plan_removal
from minidistill.distill.memory import step_peak
from minidistill.errors import InputError
from minidistill.metrics.cost import MemoryCount
from minidistill.models.unet import SD15, UNet
from minidistill.pipeline import load_pipeline
from minidistill.training import inputs
from minidistill.training.device import check_compiler
from minidistill.training.log import MetricsLog

ROOT = Path(__file__).parents[1]
RUN = (
    "--recipe bk-small --steps 4 --batch-size 4 --warmup 0 --learning-rate 1e-3 --loss-weights 1,0.5,0.25 "
    "--precision fp32 --log-every 1 --checkpoint-every 2 --sample-every 3"
)
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def quick(one_thread):
    """Leave out what takes most of a tiny run and is tested elsewhere: counting, timing, many sampling steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "STEPS", 2)
        patch.setattr(train_kd, "PROBES", 4)
        patch.setattr(report, "count_macs", lambda *_: {"conv_linear": 0})
        patch.setattr(report, "milliseconds", lambda *_: 0.0)
        patch.setattr(train_kd.block_removal, "removal_rows", lambda *_: [("removed",), ("",)])
        yield


@pytest.fixture(scope="module")
def train(tiny_sd1, images):
    """train(run folder, flags, *words) -> exit code."""

    def run(folder: Path, flags: str = "", *words: object) -> int:
        given = ("--teacher", tiny_sd1, "--data", images, "--out", folder, *RUN.split(), *flags.split(), *words)
        return exit_code(train_kd, *given, main="command")

    return run


# a run, and what it leaves behind


@pytest.fixture(scope="module")
def finished(tiny_sd1, images, tmp_path_factory):
    """(run folder, printed) of a run from the command line with the flags in RUN; not to be changed."""
    run = tmp_path_factory.mktemp("runs") / "deep" / "run"
    words = ["--teacher", tiny_sd1, "--data", images, "--out", run, *RUN.split(), "--device", "cpu"]
    call = [sys.executable, "-m", "minidistill.train_kd", *map(str, words)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=ROOT, env=ONE_THREAD)
    assert (done.returncode, done.stderr) == (0, "")
    return run, done.stdout


@pytest.fixture(scope="module")
def plain(finished):
    return finished[0]


def test_the_student_loads_in_diffusers_and_samples_the_same_images(finished, tiny_sd1):
    student = finished[0] / "student"
    oracle = diffusers.StableDiffusionPipeline.from_pretrained(student)
    oracle.set_progress_bar_config(disable=True)
    assert oracle.unet.config.layers_per_block in (1, [1, 1, 1, 1]) and oracle.unet.config.mid_block_type is None
    assert oracle.unet.config.block_out_channels == [8, 16, 24, 24]
    teacher = diffusers.UNet2DConditionModel.from_pretrained(tiny_sd1 / "unet")
    assert oracle.unet.num_parameters() < 0.6 * teacher.num_parameters()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = oracle(CAPTIONS[:2], latents=noise, num_inference_steps=4).images
    found = load_pipeline(student)(CAPTIONS[:2], latents=noise, steps=4)
    pairs = [[np.asarray(image, dtype=int) for image in pair] for pair in zip(found, expected, strict=True)]
    assert all(np.abs(a - b).max() <= 2 and b.std() > 1 for a, b in pairs)


def test_the_run_folder_holds_what_it_should(finished):
    run, printed = finished
    names = "checkpoints config.json curves.png metrics.jsonl results.json samples student"
    assert sorted(p.name for p in run.iterdir()) == names.split()
    assert sorted(p.name for p in (run / "samples").iterdir()) == [f"step-00000{i}.png" for i in (0, 3, 4)]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    for path in (run / "student", run / "samples/step-000004.png", run / "curves.png"):
        assert str(path) in printed
    for words in ("10 captioned images", "up.2.1", "student before", "step 0004/0004"):
        assert words in printed
    Image.open(run / "curves.png").verify()


def test_config_json_has_every_setting_and_nothing_left_open(finished):
    config = read(finished[0] / "config.json")
    assert config.keys() == {field.name for field in fields(train_kd.Config)} | {"examples", "weights"}
    assert (config["steps"], config["batch_size"], config["loss_weights"]) == (4, 4, [1, 0.5, 0.25])
    assert (config["resolution"], config["pairing"]) == (32, "nota")
    assert config["remove"] == list(RECIPES["bk-small"].remove)


def test_metrics_name_every_loss_and_add_up(finished):
    lines = metrics(finished[0])
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["loss"] == pytest.approx(line["task"] + 0.5 * line["output"] + 0.25 * line["feature"])
        assert line["lr"] > 0 and line["grad_norm"] > 0
        bins = line["loss_by_timestep"]
        assert set(bins) <= {f"{100 * i}-{100 * i + 99}" for i in range(10)}
        assert 1 <= len(bins) <= 4 and min(bins.values()) <= line["loss"] <= max(bins.values())


def test_results_measure_the_teacher_and_the_student_before_and_after(finished):
    found = results(finished[0])
    assert list(found) == ["teacher", "student before", "student after"]
    teacher, before, after = found.values()
    assert teacher["distance_to_teacher"] == 0 < after["distance_to_teacher"] < before["distance_to_teacher"]
    assert 0 < after["parameters"] < teacher["parameters"] and 0 < after["macs"] < teacher["macs"]
    assert before["parameters"] == sum(t.numel() for t in load_file(finished[0] / "student" / UNET).values())


def test_in_bf16_the_teacher_is_rounded_once_and_nothing_that_is_saved(tiny_sd1, images, tmp_path):
    words = ["--teacher", tiny_sd1, "--data", images, "--out", tmp_path / "run", *RUN.split(), "--precision", "bf16"]
    run = train_kd.set_up(parse(train_kd.Config, None, [*map(str, words)], "prog", None))
    exact, batch = load_pipeline(tiny_sd1), run.batches[0]
    assert {weight.dtype for weight in run.teacher.unet.parameters()} == {torch.bfloat16}
    student = build_student(plan_removal(exact.unet.config, RECIPES["bk-small"].remove), exact.unet)
    for saved, loaded in ((run.student.unet, student), (run.student.text_encoders[0], exact.text_encoders[0])):
        assert all(torch.equal(*pair) for pair in zip(saved.parameters(), loaded.parameters(), strict=True))
    inputs, outs = (batch.x0, batch.t, batch.context), []
    for unet, half in ((exact.unet, False), (exact.unet, True), (run.teacher.unet, True)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            outs.append(unet(*inputs).float())
    usual, found = ((out - outs[0]).square().mean() for out in outs[1:])
    assert 0 < found < 1.5 * usual


def test_a_finished_student_is_written_again_in_half_precision(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "run")
    assert exit_code(train_kd, "--out", tmp_path / "run", "--resume", "--dtype", "fp16", main="command") == 0
    for name in (UNET, TEXT, "vae/diffusion_pytorch_model.safetensors"):
        whole, half = (load_file(run / "student" / name) for run in (plain, tmp_path / "run"))
        assert all(torch.equal(half[key], tensor.half()) for key, tensor in whole.items()), name
    pipe = load_pipeline(plain / "student")
    with torch.no_grad():
        pipe.unet.conv_in.weight[0] = 1e5
    with pytest.raises(InputError, match=r"conv_in.weight is too large for torch.float16: use --dtype bf16 or fp32"):
        pipe.save(tmp_path / "large", torch.float16)


def test_image_grids_show_the_same_teacher_above_a_student_that_changes(finished):
    grids = [np.asarray(Image.open(path)) for path in sorted((finished[0] / "samples").iterdir())]
    left, width, height = report.LABEL, report.SHOWN * 134, 6 + 128  # see report.py: the columns, a row
    assert all(grid.shape[1] == left + width for grid in grids)
    teachers, students = (
        [grid[rows, left:] for grid in grids] for rows in (slice(6, height), slice(height + 6, 2 * height))
    )
    assert (teachers[0] == teachers[1]).all() and (teachers[0] == teachers[2]).all()
    assert (students[0] != students[1]).any() and (students[1] != students[2]).any()
    label = grids[2][height + 6 : 2 * height, :left].min(axis=(1, 2)) < 200  # rows with ink: "student, step 4"
    assert 5 < label.sum() < 15 and ImageFont.load_default(12).getlength("student, step 1000000") < report.LABEL


def test_scenes_are_judged(train, tmp_path):
    assert train(tmp_path / "run", "--data scenes --resolution 64 --images 6 --judged 2 --steps 1") == 0
    judged = [row["judge"] for row in results(tmp_path / "run").values()]
    assert len(judged) == 3 and all(0 <= judge["all"] <= 1 for judge in judged)


# settings that must not change the result, or must


def test_two_micro_batches_are_one_larger_batch_and_checkpointing_changes_nothing(train, tmp_path, plain):
    assert train(tmp_path / "whole", "--batch-size 8") == 0
    assert train(tmp_path / "split", "--batch-size 4 --accumulate 2 --gradient-checkpointing") == 0
    whole, split = (checkpoint(tmp_path / name, part="student") for name in ("whole", "split"))
    assert largest_difference(whole, split) < 1e-5
    assert largest_difference(whole, checkpoint(plain, part="student")) > 1e-3, "a larger batch does change the result"
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "split"), strict=True):
        assert a.pop("loss_by_timestep") == pytest.approx(b.pop("loss_by_timestep"), rel=1e-4)
        assert a == pytest.approx(b, rel=1e-3)


def test_the_student_saved_is_the_average_and_averaging_does_not_touch_training(train, tmp_path, plain):
    raw = tmp_path / "raw"
    assert train(raw, "--ema-decay 0") == 0
    for run, part in ((plain, "ema"), (raw, "student")):
        saved = load_file(run / "student" / UNET)
        assert largest_difference(saved, checkpoint(run, part=part)) == 0, f"{run.name}: {part}"
    assert not checkpoint(raw, part="ema")
    averaged, own = (checkpoint(plain, part=part) for part in ("ema", "student"))
    assert largest_difference(averaged, own) > 1e-5
    assert largest_difference(own, checkpoint(raw, part="student")) == 0


def test_compiled_u_nets_learn_the_same(train, tmp_path, plain, monkeypatch, capsys):
    compile_it, asked = torch.compile, []

    def traced(network, **options):  # as inductor gets it; itself it takes minutes
        asked.append(network)
        return compile_it(network, **options, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    assert train(tmp_path / "run", "--compile") == 0 and len(asked) == 2
    own, expected = checkpoint(tmp_path / "run", part="student"), checkpoint(plain, part="student")
    assert own.keys() == expected.keys() and largest_difference(own, expected) < 1e-5
    capsys.readouterr()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert train(tmp_path / "other", "--compile --device cpu") == 2 and "no-such-compiler" in one_line(capsys)
    with pytest.raises(InputError, match="--parallel ddp, not fsdp"):
        check_compiler(torch.device("cpu"), "fsdp")


# resuming


def test_a_finished_run_goes_on_for_more_steps_but_not_for_fewer(train, plain, tmp_path, capsys):
    run = shutil.copytree(plain, tmp_path / "run")
    assert train(run, "--resume --steps 6") == 0
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert largest_difference(load_file(run / "student" / UNET), checkpoint(run, 6, "ema")) == 0
    assert "at step 4" in capsys.readouterr().out
    assert train(run, "--resume --steps 2") == 2
    assert "has done 6 steps already" in capsys.readouterr().err


def test_a_run_is_not_resumed_under_other_settings_nor_written_over(train, plain, capsys):
    before = contents(plain)
    for flags, reason in (
        ("--resume --recipe bk-base", 'recipe "bk-base" (was "bk-small")'),
        ("--resume --learning-rate 0.5", "learning_rate 0.5 (was 0.001)"),
        ("", "is in use (config.json exists)"),
    ):
        assert train(plain, flags) == 2
        out, err = capsys.readouterr()
        assert reason in err and out.removeprefix("device: cpu\n") == "", "refused before anything is printed"
    assert contents(plain) == before


def test_a_run_resumes_on_the_same_images_only(plain, images, tmp_path, capsys):
    run, data = shutil.copytree(plain, tmp_path / "run"), shutil.copytree(images, tmp_path / "data")
    (run / "config.json").write_text(json.dumps({**read(run / "config.json"), "data": str(data)}))
    shutil.rmtree(run / "checkpoints/step-000004")
    shutil.rmtree(run / "student")
    assert exit_code(train_kd, "--out", run, "--resume") == 0  # no other flag is needed
    assert_same_files(run / "student", plain / "student", [UNET])
    captions = data / "metadata.jsonl"
    old = captions.read_text()
    shutil.copyfile(data / "0.png", data / "new.png")
    changes = {10: old.replace(CAPTIONS[0], "another"), 11: old + '{"file_name": "new.png", "text": "one more"}\n'}
    for count, changed in changes.items():
        captions.write_text(changed)
        assert exit_code(train_kd, "--out", run, "--resume") == 2
        told = capsys.readouterr().err
        assert f'examples "{count} images, ' in told and '(was "10 images, ' in told


# refusals


def test_a_loss_that_is_not_finite_stops_the_run_and_its_last_checkpoint_is_good(
    train, plain, tmp_path, monkeypatch, capsys
):
    run, lr_at = tmp_path / "run", train_kd.optim.lr_at
    with monkeypatch.context() as patch:
        patch.setattr(train_kd.optim, "lr_at", lambda step, *rest: 1e30 if step == 2 else lr_at(step, *rest))
        assert train(run, "--sample-every 100") == 3
    error = one_line(capsys)
    assert "at step 4 (timesteps " in error and "--learning-rate" in error
    named = {int(t) for t in error.split("timesteps ")[1].split(")")[0].split(", ")}
    drawn = {int(torch.randint(1000, (), generator=generator_for(0, "sample", n))) for n in range(12, 16)}
    assert named and named <= drawn
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert not (run / "student").exists()

    assert train(run, "--resume") == 0
    assert largest_difference(checkpoint(run), checkpoint(plain)) == 0


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_a_checkpoint(
    train, tmp_path, monkeypatch, capsys
):
    def with_a_bad_gradient(student, *rest):
        student.conv_in.weight.grad[0] = torch.nan
        return optimizer_step(student, *rest)

    optimizer_step = train_kd.optim.optimizer_step
    monkeypatch.setattr(train_kd.optim, "optimizer_step", with_a_bad_gradient)
    assert train(tmp_path / "run", "--checkpoint-every 1") == 3
    assert "the gradient norm is nan at step 1 (timesteps " in one_line(capsys)
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_student_that_makes_no_images_is_named_by_its_step(train, tmp_path, capsys):
    assert train(tmp_path / "run", "--learning-rate 1e30 --sample-every 1 --checkpoint-every 1") == 3
    error = one_line(capsys)
    assert "the student of step 1 makes no images" in error and "--learning-rate" in error
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_teacher_that_cannot_be_drawn_is_refused_before_a_file_is_written(train, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise InputError("no sampler can do this")

    monkeypatch.setattr(report, "draw", refuse)
    assert train(tmp_path / "run") == 2
    assert "no sampler can do this" in one_line(capsys) and not (tmp_path / "run").exists()


REFUSED = {  # flags: words of the message
    "--teacher none": ["no such file or folder", "none"],
    "--remove down.1.7": ["--remove down.1.7 does not fit", "'down.1.7'"],
    "--remove down.1.0": ["--remove down.1.0", "up.2 mirrors down.1"],
    "--remove ,": ["--remove is empty"],
    "--data none": ["data folder", "does not exist"],
    "--data scenes": ["scenes are 64x64", "32x32", "--resolution 64"],
    "--resolution 30": ["--resolution", "multiple of 4"],
    "--loss-weights 1,1": ["--loss-weights takes three numbers"],
    "--loss-weights 0,0,0": ["--loss-weights", "not all of them zero"],
    "--loss-weights 1,-1,1": ["--loss-weights must be at least 0"],
    "--ema-decay 1": ["--ema-decay must be below 1"],
    "--caption-dropout 10": ["--caption-dropout", "0 to 1"],
    "--max-grad-norm 0": ["--max-grad-norm must be above 0", "none leaves"],
    "--data scenes --flip": ["--flip", "left and right", "--no-flip"],
    "--flip --image-free 4": ["--flip needs images"],
    "--judged 100001": ["--judged must be at most 100000"],
    "--precision fp16 --device cpu": ["--precision fp16", "bf16"],
    "--push-to-hub name": ["'name' cannot be a repository", "owner/name"],
    "--resume": ["nothing to resume in", "check --out"],
}


@pytest.mark.parametrize("flags", REFUSED)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(train, tmp_path, capsys, flags):
    assert train(tmp_path / "new/run", flags) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and out.removeprefix("device: cpu\n") == ""
    assert all(reason in error for reason in REFUSED[flags]), error
    assert not (tmp_path / "new").exists()


def with_infinity(folder: Path) -> None:
    tensors = load_file(folder / UNET)
    save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"] / 0}, folder / UNET)


BROKEN = {  # name: (writes a teacher, words of the message)
    "infinite weight": (with_infinity, ["unet/ conv_in.bias is not finite"]),
    "three stages": (
        lambda folder: save_tiny_sd1(folder, stages=3),
        ["--recipe bk-small does not fit", "teacher", "'down.3.1'", "stage.0, stage.1, stage.2, down.0.0", "--remove"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_teacher_that_will_not_do_is_refused(train, tiny_sd1, tmp_path, capsys, case):
    make, reasons = BROKEN[case]
    teacher = shutil.copytree(tiny_sd1, tmp_path / "teacher")
    make(teacher)
    capsys.readouterr()
    assert train(tmp_path / "run", "", "--teacher", teacher) == 2
    error = one_line(capsys)
    assert all(reason in error for reason in reasons), error
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_memory_and_samples_takes_a_gpu_for_one_with_bf16_and_makes_nothing(
    train, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train_kd, "step_peak", lambda *_, half, **__: halves.append(half) or 5 * 2**30)
    monkeypatch.setattr(train_kd, "best_precision", lambda device: "fp32")  # of this machine
    monkeypatch.setattr(inputs, "open_repo", lambda *_: pytest.fail("a repository was made"))
    halves, out, flags = [], tmp_path / "run", "--dry-run --precision none --push-to-hub me/x"
    assert train(out, f"{flags} --device cuda --accumulate 5 --image-free 16") == 0
    shown = capsys.readouterr().out
    assert "activations, gradients 5.0 GiB in all, about 5.0 GiB" in " ".join(shown.split())
    assert "4 steps of 5 x 4 samples: each of 16 images is seen 5.0 times" in shown
    assert train(out, flags) == 0
    assert "each of 10 images is seen 1.6 times" in capsys.readouterr().out
    assert halves == [True, False] and not out.exists()


@pytest.mark.parametrize("flags", ["", "--accumulate 2", "--gradient-checkpointing"])
def test_no_step_takes_more_memory_than_a_dry_run_says(train, tiny_sd1, tmp_path, monkeypatch, flags):
    class CountedLog(MetricsLog):
        """Notes the peak of the micro-batches of every step beyond weights, their average and those of AdamW."""

        def __enter__(self):
            (run,) = runs
            weights = *run.teacher.unet.parameters(), *run.student.unet.parameters(), *run.ema.shadow.values()
            self.count, self.averages = stack.enter_context(MemoryCount(weights)), 0
            return super().__enter__()

        def add(self, *losses):
            self.after_backward = self.count.peak
            super().add(*losses)

        def end_step(self, step, **about):
            peaks.append(self.after_backward - self.averages)
            super().end_step(step, **about)
            self.averages = sum(2 * state["exp_avg"].nbytes for state in runs[0].optimizer.state.values())
            self.count.peak = self.count.now

    set_up, runs, peaks = train_kd.set_up, [], []
    monkeypatch.setattr(train_kd, "set_up", lambda config: runs.append(set_up(config)) or runs[0])
    monkeypatch.setattr(train_kd, "MetricsLog", CountedLog)
    rare = "--batch-size 16 --checkpoint-every 100 --sample-every 100 --steps 3"
    with ExitStack() as stack:
        assert train(tmp_path / "run", f"{rare} {flags}") == 0
    teacher = load_pipeline(tiny_sd1)
    removal = plan_removal(teacher.unet.config, RECIPES["bk-small"].remove)
    checkpointing, accumulate = "checkpointing" in flags, "accumulate" in flags
    settings = {"half": False, "checkpointing": checkpointing, "accumulate": accumulate}
    promise = step_peak(removal, feature_pairs(removal), (16, 8, 8, TOKENS), **settings)
    assert len(peaks) == 3 and max(peaks) <= 1.05 * promise and promise <= 1.1 * max(peaks), (peaks, promise)


def test_large_images_are_drawn_one_by_one():
    pipe, found = counting_pipe()
    for side in (64, 512):
        report.draw(pipe, CAPTIONS, (side, side), seed=0)
    assert found == [8, 1]


def test_presets_are_as_published():
    def preset(name):
        return parse(train_kd.Config, train_kd.PRESETS, ["--preset", name, "--data", "images"], "", None)

    assert parse(train_kd.Config, train_kd.PRESETS, ["--preset", "quick"], "", None) == train_kd.Config()
    published = [name for name in train_kd.PRESETS if name.startswith(("nota", "segmind"))]
    samples = {name: (p := preset(name)).steps * p.batch_size * p.accumulate for name in published}
    assert samples == {
        "nota-sd15": 12_800_000,
        "nota-sd21": 6_400_000,
        "segmind-small": 12_800_000,
        "segmind-tiny": 16_000_000,
    }
    assert all(preset(name).caption_dropout == 0 and preset(name).flip for name in samples)


def test_defaults_depend_on_the_size_of_the_teacher_not_on_its_name(tiny_sd1, recwarn):
    with torch.device("meta"):
        unet = UNet(SD15)
    large = SimpleNamespace(unet=unet, vae=load_pipeline(tiny_sd1).vae, trained_size=lambda: (512, 512))
    small = load_pipeline("miniature")
    for name, pipe, rate in (
        ("miniature", small, 4e-3),
        ("a/folder/of/it", small, 4e-3),
        ("someone/sd15", large, 5e-5),
    ):
        config = train_kd.resolve(train_kd.Config(teacher=name), pipe)
        assert (config.recipe, config.remove, config.learning_rate) == ("bk-tiny", RECIPES["bk-tiny"].remove, rate)
        chosen = train_kd.resolve(replace(config, recipe="bk-base", remove=None), pipe)
        assert chosen.recipe == "bk-base" and chosen.remove == RECIPES["bk-base"].remove
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == 2 and "8,000 samples" in told[0] and "too few for a teacher of 860 M" in told[0]
    train_kd.resolve(train_kd.Config(teacher="someone/sd15", steps=50_000, batch_size=256), large)
    assert len(recwarn) == 2, "a run of the published length"


def test_a_teacher_that_does_not_name_its_size_needs_a_resolution(train, tiny_sd1, tmp_path, capsys):
    teacher = shutil.copytree(tiny_sd1, tmp_path / "sd1")
    config = read(teacher / "unet/config.json")
    (teacher / "unet/config.json").write_text(json.dumps({**config, "sample_size": None}))
    assert train(tmp_path / "run", "", "--teacher", teacher) == 2
    assert "sample_size: give --resolution" in one_line(capsys) and not (tmp_path / "run").exists()
    assert train(tmp_path / "run", "--resolution 16 --steps 1", "--teacher", teacher) == 0
    assert read(tmp_path / "run/config.json")["resolution"] == 16
