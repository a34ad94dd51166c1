"""The command train_lightning: whole ladders of tiny models, resuming in every kind of phase, students in diffusers.

A v-prediction model and an SDXL-shaped one go through every phase of the paper in a few optimizer steps, and through
those of our own; a LoRA is trained throughout on an eps-prediction model. A run that is interrupted in every phase must
end in the very bits of the run that was left alone.
"""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import CAPTIONS
from runs import UNET, assert_same_files, checkpoint, exit_code, largest_difference, metrics, one_line, read, results
from safetensors.torch import load_file

from minidistill import report, train_lightning
from minidistill.cli import parse
from minidistill.diffusion.sampling import Sampling
from minidistill.distill import lightning, players
from minidistill.distill.adversarial import discriminator_loss, generator_loss
from minidistill.distill.block_removal import RECIPES, build_student, plan_removal
from minidistill.distill.kd import mean_square
from minidistill.distill.lightning import LEVELS, PLANS, Phase, Stage, choose, legs, stage_rows
from minidistill.distill.memory import kind_of, phase_memory
from minidistill.errors import InputError
from minidistill.interop.replace import merge_loras
from minidistill.metrics.cost import MemoryCount
from minidistill.models.lora import ALL, find_targets
from minidistill.pipeline import load_pipeline
from minidistill.weights.folders import read_sampling

pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = "--batch-size 2 --precision fp32 --lora-rank 2 --log-every 1 --sample-every 100 --checkpoint-every 1"
LORA = Phase(2, 1e-3, lora=True, adversarial=1, head_start=1)
FULL = Phase(2, 1e-3, adversarial=1, mse=1, conditional=False, relativistic=True, r1=1.0, taps=("down.0", "mid"))
BOTH = Phase(2, 1e-3, adversarial=1, matching=1, rollout=True, backbone_rate=0)
CONVERT = Phase(2, 1e-3, convert=1, timesteps=4)
TINY = {
    "every": (
        Stage(4, 8, (Phase(2, 1e-3, mse=1),)),
        Stage(2, 4, (*lightning.adversarial_phases(replace(LORA, timesteps=4), FULL), BOTH)),
        Stage(1, 2, (CONVERT, replace(FULL, noise_levels=LEVELS, teacher=4)), predicts_x0=True),
    ),
    "loras": (
        Stage(4, 8, (Phase(2, 1e-2, lora=True, mse=1),)),
        Stage(2, 4, (replace(LORA, backbone_rate=0, head_rate=5.0, timesteps=4),)),
    ),
    "keep": (Stage(0, 0, (replace(lightning.KEEP, steps=2, head_start=1, r1=1.0),)),),
    "keep-lora": (Stage(0, 0, (replace(lightning.KEEP_LORA, steps=2, head_start=1),)),),
    "short": (Stage(4, 8, (Phase(1, 1e-3, mse=1),)), Stage(2, 4, (replace(FULL, steps=1),))),
}
FIRST = {"LoRA": 2, "matching": 8, "convert": 10, "one step": 12}  # optimizer steps before some phases of "every"
TOTAL = 14


@pytest.fixture(scope="module", autouse=True)
def quick(one_thread):
    """Fewer images and pairs, and the tiny plans."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PAIRS": 4, "COMPARED": 1, "REFERENCE": 2}.items():
            patch.setattr(train_lightning, name, value)
        patch.setattr(players, "SOLVED", 8)
        patch.setattr(report, "SHOWN", 2)
        for name, plan in TINY.items():
            patch.setitem(PLANS, name, plan)
        yield


@pytest.fixture(scope="module")
def train(sources, images):
    """train(run folder, kind of model, plan, *words) -> exit code."""

    def run(folder: Path, kind: str, plan: str, *words: object) -> int:
        given = (
            "--teacher",
            sources.get(kind, kind),
            "--data",
            images,
            "--plan",
            plan,
            "--out",
            folder,
            *FLAGS.split(),
            *words,
        )
        return exit_code(train_lightning, *given)

    return run


@pytest.fixture(scope="module")
def ladder(train, tmp_path_factory):
    """The run folder of the v-prediction model; not to be changed."""
    folder = tmp_path_factory.mktemp("ladder") / "run"
    with pytest.warns(UserWarning, match="the discriminator (is blind|wins)"):  # of four pairs nothing else can be said
        assert train(folder, "sd2", "every") == 0
    return folder


@pytest.fixture(scope="module")
def loras(train, tmp_path_factory):
    """The run folder of the eps-prediction model with a LoRA; not to be changed."""
    folder = tmp_path_factory.mktemp("loras") / "run"
    assert train(folder, "sd1", "loras") == 0
    return folder


# the table


def test_the_papers_procedure():
    (first, *others), every = PLANS["paper"], list(legs(PLANS["paper"]))
    assert [stage.teacher for stage in (first, *others)] == [128, 32, 8, 4, 2]
    assert [stage.student for stage in (first, *others)] == [32, 8, 4, 2, 1]
    assert first.phases[0].mse and first.phases[0].betas == (0.9, 0.999) and first.phases[0].learning_rate == 1e-5
    for stage in others:
        *rest, a, b, c = stage.phases  # LoRA with D, LoRA with D', merged with D'
        assert [(x.lora, x.conditional, x.learning_rate) for x in (a, b, c)] == [
            (True, True, 1e-6), (True, False, 1e-6), (False, False, 5e-7),
        ]  # fmt: skip
        assert all(x.betas == (0.0, 0.99) and x.taps == ("mid",) and x.backbone_rate == 1 for x in (a, b, c))
        assert (b.teacher, c.teacher) == {2: (8, 8), 1: (4, 4)}.get(stage.student, (None, None))
        assert [x.timesteps for x in (a, b, c)] == [4 if stage.student <= 2 else None] * 3
        assert [x.convert for x in rest] == ([1] if stage.predicts_x0 else [])
        assert bool(a.noise_levels) == (stage.student == 1)
    assert c.noise_levels == LEVELS and a.noise_weights == () and c.noise_weights == (5, 1, 1, 1)
    assert [leg.first for leg in every[1:]] == [leg.last for leg in every[:-1]] and every[0].first == 0


def test_the_table_prints_it():
    rows = stage_rows(PLANS["paper"], guidance=6)
    assert rows[1] == ("128 -> 32", "MSE", "128 steps, guidance 6", "32", "-", "1e-05", "10000")
    assert rows[2][:3] == ("32 -> 8", "D, LoRA", "32 steps") and rows[3][1] == "D', LoRA"
    assert rows[-1][:5] == ("2 -> 1 (x0)", "D'", "4 steps", "4", "10 250 500 750 at 5:1:1:1")
    assert all(len(row) == len(rows[0]) for row in rows)


def test_stages_are_chosen_by_their_students():
    assert [stage.student for stage in choose(PLANS["paper"], (8, 32))] == [32, 8]
    (stage,) = choose(PLANS["paper"], (8,), length=0.5)
    assert [phase.steps for phase in stage.phases] == [2000, 2000, 2000]
    for wrong, words in (
        ((3,), "32, 8, 4, 2, 1"),
        ((32, 4), "4-step needs the student of 8"),
        ((1,), "converted"),
        ((), "no stage"),
    ):
        with pytest.raises(InputError, match=words):
            choose(PLANS["paper"], wrong)
    for name in ("paper", "one-gpu", "demo"):
        assert choose(PLANS[name], None) == PLANS[name]


def test_a_ladder_goes_on_from_a_distilled_teacher():
    (stage,) = choose(PLANS["keep"], None, distilled=Sampling(4))
    assert (stage.name, stage.teacher) == ("4-step", 4) and stage_rows([stage], 1.0)[1][2] == "data"
    assert choose(PLANS["keep"], None, distilled=Sampling(1, prediction="sample"))[0].name == "1-step-x0"
    stages = (Stage(2, 4, (FULL,)), Stage(1, 2, (FULL, replace(FULL, teacher=4))))
    assert choose(stages, None, distilled=Sampling(4)) == stages
    with pytest.raises(InputError, match=r"needs the student of 4 steps before it; .* starts from one of 8"):
        choose(stages, None, distilled=Sampling(8))
    with pytest.raises(InputError, match="fine-tunes a distilled model"):
        choose(PLANS["keep"], None)


# a run, and what it leaves behind


def test_the_run_folder_holds_what_it_should(ladder):
    names = "1-step-x0 2-step 4-step checkpoints config.json curves.png metrics.jsonl results.json samples"
    assert sorted(path.name for path in ladder.iterdir()) == names.split()
    config = read(ladder / "config.json")
    assert config["steps"] == TOTAL and config["resolution"] == 32 and len(config["phases"]) == 3
    assert list(results(ladder)) == ["teacher, 2 steps", "4-step", "2-step", "1-step-x0"]
    grids = {path.stem: diffusers.utils.load_image(str(path)).size for path in (ladder / "samples").iterdir()}
    assert set(grids) == {f"step-{step:06d}" for step in range(2, TOTAL + 1, 2)}
    assert grids[f"step-{TOTAL:06d}"][1] - grids["step-000002"][1] == 2 * (report.CELL + report.GAP), "teacher, 4, 2, 1"
    card = (ladder / "4-step" / "README.md").read_text()
    assert 'pipe("what it shows", num_inference_steps=4, guidance_scale=0)' in card and "2402.13929" in card


def test_metrics_of_each_phase(ladder):
    lines = metrics(ladder)
    assert [line["step"] for line in lines] == list(range(1, TOTAL + 1))
    assert set(lines[0]) == {"step", "loss", "mse", "lr", "grad_norm", "loss_by_timestep"}
    head_start, both = lines[FIRST["LoRA"] :][:2]
    assert head_start["grad_norm"] == 0 == head_start["pull"] and head_start["d"] == pytest.approx(2 * np.log(2))
    assert head_start["adversarial"] == pytest.approx(np.log(2))
    assert both["grad_norm"] > 0 < both["pull"] and 0 <= both["rank"] <= 1 and {"real", "fake"} <= set(both)
    matching, convert, noised = (lines[FIRST[name]] for name in ("matching", "convert", "one step"))
    assert matching["matching"] > 0 < matching["fake net"] and convert["convert"] > 0 and "mse" not in convert
    assert any(name.startswith("d t*=") for name in noised)


def test_each_student_starts_from_the_one_before(ladder):
    weights = [load_file(ladder / name / UNET) for name in ("4-step", "2-step", "1-step-x0")]
    for before, after in pairwise(weights):
        assert before.keys() == after.keys()
        moved = {name: (before[name] - after[name]).abs().max().item() for name in before}
        assert 0 < max(moved[name] for name in moved if not name.startswith("conv_out")) < 0.1
    assert moved["conv_out.weight"] > 0.1, "which least squares had solved anew"


# resuming


class Killed(Exception):
    pass


def interrupted_at(steps):
    """A `MetricsLog.end_step` that raises Killed after these optimizer steps, once each."""
    original, waiting = train_lightning.MetricsLog.end_step, set(steps)

    def end_step(self, step, **figures):
        original(self, step, **figures)
        if step in waiting:
            waiting.remove(step)
            raise Killed

    return end_step


@pytest.mark.parametrize(("fixture", "kind", "plan"), [("ladder", "sd2", "every"), ("loras", "sd1", "loras")])
def test_a_run_killed_in_every_phase_ends_in_the_same_bits(request, train, tmp_path, monkeypatch, fixture, kind, plan):
    whole, run = request.getfixturevalue(fixture), tmp_path / "run"
    every = list(legs(TINY[plan]))
    seconds = [leg.first + 2 for leg in every]  # in the middle of each phase: its first step is in a checkpoint
    monkeypatch.setattr(train_lightning.MetricsLog, "end_step", interrupted_at([*seconds[:-1], every[-1].first + 1]))
    words: list[str] = []
    for _ in every:
        with pytest.raises(Killed):
            train(run, kind, plan, *words)
        words = ["--resume"]
    assert train(run, kind, plan, *words) == 0
    assert metrics(run) == metrics(whole) and results(run) == results(whole)
    for leg in every:
        file = UNET if plan == "every" else "lora.safetensors"
        ours, theirs = (load_file(folder / leg.stage.name / file) for folder in (run, whole))
        assert largest_difference(ours, theirs) == 0
    last = every[-1].last
    assert largest_difference(checkpoint(run, last), checkpoint(whole, last)) == 0
    assert_same_files(run, whole, [f"samples/step-{last:06d}.png"])


# students, here and in diffusers


def images_of(pipe, **settings):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return [np.asarray(image, dtype=int) for image in pipe(CAPTIONS[:2], latents=noise, **settings)]


def oracle_images(oracle, steps):
    oracle.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    found = oracle(CAPTIONS[:2], latents=noise, num_inference_steps=steps, guidance_scale=0, height=32, width=32)
    return [np.asarray(image, dtype=int) for image in found.images]


def assert_same_images(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b).max() <= 2 and b.std() > 1


@pytest.mark.parametrize(("name", "steps", "prediction"), [("4-step", 4, "v_prediction"), ("1-step-x0", 1, "sample")])
def test_students_sample_the_same_images_in_diffusers(ladder, name, steps, prediction):
    oracle = diffusers.DiffusionPipeline.from_pretrained(ladder / name)
    assert isinstance(oracle.scheduler, diffusers.EulerDiscreteScheduler)
    assert (oracle.scheduler.config.timestep_spacing, oracle.scheduler.config.prediction_type) == (
        "trailing",
        prediction,
    )
    ours = load_pipeline(ladder / name)
    assert (ours.sampling.steps, ours.sampling.guidance) == (steps, 1)
    assert_same_images(images_of(ours), oracle_images(oracle, steps))


def test_loras_sample_the_same_images_in_diffusers(loras, sources):
    ours = load_pipeline(sources["sd1"])
    before = images_of(ours, steps=2, sampler="euler", spacing="trailing", guidance=0)
    merge_loras(ours, [(loras / "2-step" / "lora.safetensors", 1.0)])
    assert len(load_file(loras / "2-step" / "lora.safetensors")) == 3 * len(find_targets(ours.unet, ALL))
    oracle = diffusers.DiffusionPipeline.from_pretrained(sources["sd1"])
    oracle.load_lora_weights(loras / "2-step", weight_name="lora.safetensors")
    oracle.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        oracle.scheduler.config, timestep_spacing="trailing"
    )
    found = images_of(ours)
    assert_same_images(found, oracle_images(oracle, 2))
    assert any((a != b).any() for a, b in zip(found, before, strict=True)), "the LoRA does something"


def test_an_sdxl_goes_through_the_whole_ladder(train, tmp_path):
    assert train(tmp_path / "run", "sdxl", "every", "--judged", 0, "--length", 0.5) == 0
    lines = metrics(tmp_path / "run")
    assert len(lines) == TOTAL // 2 and all(np.isfinite(line["loss"]) for line in lines)
    assert load_pipeline(tmp_path / "run" / "2-step").is_sdxl


# fewer blocks and fewer steps at once


def test_students_have_fewer_blocks_and_sample_the_same_images_in_diffusers(tiny_sd1, images, tmp_path):
    given = (
        "--teacher",
        tiny_sd1,
        "--data",
        images,
        "--plan",
        "short",
        "--recipe",
        "bk-tiny",
        "--out",
        tmp_path / "run",
    )
    assert exit_code(train_lightning, *given, *FLAGS.split()) == 0
    teacher, first, last = (
        load_pipeline(path) for path in (tiny_sd1, *(tmp_path / "run" / f"{n}-step" for n in (4, 2)))
    )
    removal = plan_removal(teacher.unet.config, RECIPES["bk-tiny"].remove)
    left = build_student(removal, teacher.unet).state_dict()
    assert first.unet.config == last.unet.config == removal.student
    assert 0 < largest_difference(first.unet.state_dict(), left) < 0.01, "one step from the teacher's own weights"
    sizes = [row["parameters"] for row in results(tmp_path / "run").values()]
    assert sizes[0] > sizes[1] == sizes[2] == sum(weight.numel() for weight in left.values())
    assert "d" in metrics(tmp_path / "run")[1]
    assert_same_images(
        images_of(last), oracle_images(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run" / "2-step"), 2)
    )


# a few-step student learns from new images


@pytest.mark.parametrize("plan", ["keep", "keep-lora"])
def test_a_student_is_fine_tuned_in_its_own_few_steps(request, train, sources, tmp_path, monkeypatch, plan):
    if plan == "keep":
        before, kind, file, words = request.getfixturevalue("ladder") / "4-step", None, UNET, []
    else:
        before, kind, file = request.getfixturevalue("loras") / "4-step", "sd1", "lora.safetensors"
        words = ["--start-from", before / file]
    runs = tmp_path / "whole", tmp_path / "killed"
    assert train(runs[0], kind or before, plan, *words) == 0
    monkeypatch.setattr(train_lightning.MetricsLog, "end_step", interrupted_at([2]))
    with pytest.raises(Killed):
        train(runs[1], kind or before, plan, *words)
    assert train(runs[1], kind or before, plan, *words, "--resume") == 0
    whole, killed, old = (load_file(folder / file) for folder in (runs[0] / "4-step", runs[1] / "4-step", before))
    assert largest_difference(whole, killed) == 0 and metrics(runs[0]) == metrics(runs[1])
    assert 0 < largest_difference(whole, old) < 0.01 and whole.keys() == old.keys()
    assert read_sampling(runs[0] / "4-step" / file) == read_sampling(before / file)
    first, second = metrics(runs[0])
    assert first["grad_norm"] == 0 < second["grad_norm"] and set(first) >= {"d", "rank"}
    assert list(results(runs[0])) == (
        ["teacher, 4 steps", "4-step"] if plan == "keep" else ["teacher, 2 steps", "start, 4 steps", "4-step"]
    )


@pytest.mark.parametrize("kind", ["sd2", "sd1"])
def test_a_ladder_goes_on_from_a_student(ladder, loras, train, sources, tmp_path, capsys, kind):
    """Which teaches its first stage, without guidance. Where all weights train, a LoRA is merged at first."""
    before = {"sd2": ladder, "sd1": loras}[kind] / "4-step"
    assert train(tmp_path / "run", kind, "short", "--stages", 2, "--start-from", before) == 0
    assert re.search(r"4 -> 2 +MSE \+ D' +4 steps  ", capsys.readouterr().out)
    start = teacher = load_pipeline(sources[kind])
    if kind == "sd1":
        start = load_pipeline(sources[kind])
        merge_loras(start, [(before / "lora.safetensors", 1.0)])
    else:
        start = load_pipeline(before)
    student = load_pipeline(tmp_path / "run" / "2-step").unet.state_dict()
    near, far = (largest_difference(pipe.unet.state_dict(), student) for pipe in (start, teacher))
    assert 0 < near < 0.002 < far, "one step of 1e-3"
    assert list(results(tmp_path / "run")) == ["teacher, 2 steps", "start, 4 steps", "2-step"]


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("sd2", "--plan loras --stages 2", "is a U-Net, and this plan trains a LoRA alone"),
        ("sd2", "--plan every --stages 1", "needs the student of 2 steps before it; the ladder starts from one of 4"),
        ("sd2", "--plan every --stages 2 --remove mid", "leave out --recipe and --remove"),
        ("sd1", "--plan every --length 1", "does not say for how many steps it was distilled"),
        ("sd1", "--plan every --stages 2", "predict epsilon on the usual schedule, and it does not; see --zero-snr"),
    ],
)
def test_a_student_of_another_kind_is_refused(ladder, train, sources, tmp_path, capsys, kind, words, said):
    source = sources["sd1"] if "length" in words else ladder / "4-step"
    assert train(tmp_path / "run", kind, "every", *words.split(), "--start-from", source) == 2
    assert said in one_line(capsys) and not (tmp_path / "run").exists()


def test_what_is_real_may_be_the_data(opened):
    ladder, made = opened("fp32", 3, from_data=True, timesteps=None)
    batch = ladder.batches[0]
    jump = players.endpoints(ladder, made, batch, trains=True)
    assert made.teacher is None and set(zip(jump.t.tolist(), jump.t_next.tolist(), strict=True)) <= {
        (999, 499),
        (499, -1),
    }
    for i, t in enumerate(jump.t_next.tolist()):
        a = ladder.alpha_bar[t] if t >= 0 else torch.tensor(1.0)
        assert torch.allclose(jump.x_real[i], a.sqrt() * batch.x0[i] + (1 - a).sqrt() * batch.eps[i])


# one update


@pytest.fixture(scope="module")
def opened(sources, images, tmp_path_factory):
    """opened(precision, k, *words, changes) -> ladder of "every" and players of phase k, as if it were first."""

    def make(precision, number, *more, **changes):
        out = tmp_path_factory.mktemp("opened") / "run"
        words = ["--teacher", sources["sd1"], "--data", images, "--plan", "every", "--out", out, *FLAGS.split()]
        words = [*map(str, words), "--precision", precision, *more]
        ladder, _ = train_lightning.set_up(parse(train_lightning.Config, None, words, "prog", None))
        leg = list(legs(ladder.stages))[number]
        leg = leg._replace(index=0, phase=replace(leg.phase, **changes))  # the teacher is the first one
        return ladder, players.assemble(ladder, leg, None)

    return make


def test_each_player_gets_the_gradient_of_its_own_loss(opened):
    """One pass of D serves both, and equals two passes in which the other player is frozen."""
    ladder, made = opened("fp32", 3, r1=0.0)
    judge, student, batch = made.discriminator, list(made.student.parameters()), ladder.batches[0]
    for head in judge.heads.values():
        torch.nn.init.normal_(head.out.weight)
    jump = players.endpoints(ladder, made, batch, trains=True)
    loss_g, pull, _ = players.contest(ladder, made, batch, jump, 0, trains=True)
    assert all(weight.grad is None for weight in student) and not loss_g.requires_grad
    found_d = [weight.grad.clone() for weight in judge.parameters()]
    (jump.x_fake * pull).sum().backward()
    assert all(torch.equal(weight.grad, before) for weight, before in zip(judge.parameters(), found_d, strict=True))

    def losses(x_fake):
        parts, condition, _ = players.features(ladder, made, batch, jump, 0, jump.x_real, x_fake)
        real, fake = (judge.compare(part, condition) for part in parts)
        return generator_loss(real, fake, True), discriminator_loss(real, fake, True)

    expected_d = torch.autograd.grad(losses(jump.x_fake.detach())[1].mean(), list(judge.parameters()))
    judge.requires_grad_(False)
    jump = players.endpoints(ladder, made, batch, trains=True)
    expected_g = torch.autograd.grad(losses(jump.x_fake)[0].sum(), student)
    for found, expected in ((found_d, expected_d), ([weight.grad for weight in student], expected_g)):
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6
        assert max(b.abs().max().item() for b in expected) > 1e-3


def test_half_precision_loses_no_gradient(opened):
    """Autocast keeps weights that it has cast: those of the rollout have no gradient, the student's must have one."""
    ladder, made = opened("bf16", 4)
    assert made.leg.phase.rollout
    players.endpoints(ladder, made, ladder.batches[0], trains=True).x_fake.sum().backward()
    assert all(weight.grad is not None for weight in made.student.parameters())


def test_in_bf16_teachers_are_rounded_and_what_trains_is_copied_exactly(opened, sources):
    exact = load_pipeline(sources["sd1"]).unet.state_dict()
    for number in (3, 4):  # D trains whole; D is heads on the teacher, and a copy of the teacher follows the student
        ladder, made = opened("bf16", number)
        teacher = ladder.pipe.unet
        assert made.teacher.unet is teacher and {weight.dtype for weight in teacher.parameters()} == {torch.bfloat16}
        trained = [made.student, made.discriminator.backbone if number == 3 else made.fake]
        for network in trained:
            assert all(torch.equal(weight, exact[name]) for name, weight in network.named_parameters())
    assert made.discriminator.backbone.conv_in.weight is teacher.conv_in.weight


def test_in_bf16_a_lora_trains_in_float32_on_the_rounded_teacher(train, tmp_path):
    assert train(tmp_path / "run", "sd1", "loras", "--precision", "bf16") == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "run/2-step/lora.safetensors").values()} == {torch.float32}


# a schedule that ends in pure noise


def test_students_of_zero_snr_say_so_and_sample_the_same_images_in_diffusers(train, tmp_path):
    assert train(tmp_path / "run", "sd1", "short", "--zero-snr", "--precision", "bf16") == 0
    scheduler = read(tmp_path / "run/2-step/scheduler/scheduler_config.json")
    assert scheduler["rescale_betas_zero_snr"] and scheduler["prediction_type"] == "v_prediction"
    oracle = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run/2-step")
    assert oracle.scheduler.sigmas[0] > 4000
    assert_same_images(images_of(load_pipeline(tmp_path / "run/2-step")), oracle_images(oracle, 2))


def test_the_student_of_another_prediction_starts_near_the_teacher(opened):
    ladder, made = opened("fp32", 0, "--zero-snr", "--guidance", "1")
    assert made.prediction == "v_prediction" and ladder.alpha_bar[-1] == 0 < ladder.own_alpha_bar[-1]

    def distance() -> float:  # on what conv_out was solved for: random networks have nothing in common elsewhere
        far = []
        for k in range(-4, 0):
            jump = players.endpoints(ladder, made, ladder.batches[k], trains=False)
            model, prediction = players.ask(ladder, made.teacher, ladder.batches[k])
            far.append(mean_square(jump.out, model(jump.x_t, jump.t)).mean().item())
        assert prediction == made.prediction
        return sum(far)

    solved = distance()
    made.student.conv_out.load_state_dict(ladder.pipe.unet.conv_out.state_dict())
    assert solved < 0.5 * distance()


def test_distribution_matching_is_of_the_predicted_x0_wherever_a_jump_ends(opened):
    ladder, made = opened("fp32", 4)
    batch = ladder.batches[0]
    jump = players.endpoints(ladder, made, batch, trains=True)
    jump = jump._replace(x_t=batch.eps, t=torch.tensor([999, 499]), t_next=torch.tensor([499, -1]))
    loss, _ = players.match(ladder, made, batch, jump, 0)
    (gradient,) = torch.autograd.grad(loss.sum(), jump.out)
    assert loss.shape == (2,) and (gradient.flatten(1).norm(dim=1) > 0).all()


# what a run would take


@pytest.mark.parametrize("number", [1, 3, 4])
def test_a_micro_batch_takes_the_memory_that_a_dry_run_says(opened, number):
    ladder, made = opened("fp32", number, rollout=False)
    phase, batch = made.leg.phase, ladder.batches[0]
    networks = ladder.pipe.unet, made.student, made.discriminator, made.fake
    with MemoryCount(weight for network in networks if network for weight in network.parameters()) as count:
        jump = players.endpoints(ladder, made, batch, trains=True)
        target = mean_square(jump.x_fake, jump.x_real).sum()
        if phase.matching:
            target = target + players.match(ladder, made, batch, jump, 0)[0].sum()
        _, pull, _ = players.contest(ladder, made, batch, jump, 0, trains=True)
        (target + (jump.x_fake * pull).sum()).backward()
    unet = ladder.pipe.unet.config
    about = {"first": True, "guided": True, "rank": 2, "shared": False, "half": False, "checkpointing": False}
    weights, averages, peak = phase_memory(unet, unet, kind_of(phase), (2, 8, 8, 32), **about)
    assert count.peak <= 1.05 * peak and peak <= 1.15 * count.peak, (count.peak, peak)
    trained = [weight for player in made.trained.values() for weight in player.network.parameters()]
    assert averages == sum(2 * weight.nbytes for weight in trained if weight.requires_grad)
    every = {id(weight): weight for network in networks if network for weight in network.parameters()}
    assert weights == sum(weight.nbytes for weight in every.values())


def test_a_dry_run_prints_the_stages_and_their_memory_and_writes_nothing(sources, images, tmp_path, capsys):
    words = ["--teacher", sources["sd1"], "--data", images, "--plan", "loras", "--dry-run", "--out", tmp_path / "run"]
    assert exit_code(train_lightning, *words, "--device", "cuda", "--batch-size", 2, main="command") == 0
    printed = capsys.readouterr().out
    for told in (
        "MSE, LoRA",
        "activations, gradients",
        "4 steps of 1 x 2 samples: each of 10 images is seen 0.8",
    ):
        assert told in printed
    assert not list(tmp_path.iterdir())


# what is said, and what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--stages 3", "students of 4, 2, 1 steps"),
        ("--stages 4,1", "needs the student of 2 steps"),
        ("--plan keep", "give one, or its LoRA, as --start-from"),
        ("--start-from miniature", "--start-from miniature: the parts of this pipeline do not fit"),
        ("--length 0", "above 0"),
        ("--plan papier", "did you mean paper?"),
        ("--plan loras --remove mid", "plan loras trains nothing but a LoRA"),
        ("--plan loras --zero-snr", "which a LoRA, as of plan loras, cannot"),
        ("--recipe bk-tiny", "--recipe bk-tiny does not fit"),
        ("--resume", "nothing to resume"),
    ],
)
def test_bad_input_is_refused_with_one_line_and_nothing_is_written(train, tmp_path, capsys, words, said):
    assert train(tmp_path / "run", "sd1", "every", *words.split()) == 2
    assert said in one_line(capsys) and not (tmp_path / "run").exists()
