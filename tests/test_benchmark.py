"""The benchmark: what is timed and when, the numbers of its table, that diffusers does the same work, refusals."""

import time

import pytest
import torch
from PIL import Image
from runs import checkpoint, exit_code, one_line, read
from tiny import apart, assert_close

from minidistill import benchmark, pipeline, train_kd
from minidistill.benchmark import Case, Config, load_other, open_model, prepare_sampling
from minidistill.diffusion.sampling import Sampling
from minidistill.diffusion.schedule import add_noise, make_alpha_bar
from minidistill.metrics.cost import count_macs, in_turns, peak_memory
from minidistill.pipeline import load_pipeline

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_sampling(monkeypatch):
    """Image grids of a training are of 2 steps; the benchmark's own default stays."""
    monkeypatch.setattr(pipeline, "STEPS", 2)


@pytest.fixture(scope="module")
def few_steps(tiny_sd1, tmp_path_factory):
    """The tiny SD 1.x, saved as if it were distilled for 3 steps."""
    pipe = load_pipeline(tiny_sd1)
    pipe.set_sampling(Sampling(3))
    pipe.save(folder := tmp_path_factory.mktemp("few") / "model")
    return folder


def case(source, resolution=None, batch_size=1, steps=None):
    return Case(str(source), CPU, "fp32", resolution, batch_size, steps)


def test_every_round_does_every_work_and_the_first_does_not_count(monkeypatch):
    now, done = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work(name):
        done.append(name)
        now[0] += {"a": 1, "b": 10}[name] * len(done)

    times = in_turns([lambda: work("a"), lambda: work("b")], rounds=2)
    assert done == ["a", "b"] * 3
    assert times == [[3000.0, 5000.0], [40000.0, 60000.0]]


def test_memory_is_what_stays_and_the_most_that_is_made_beside_it():
    weights, made = [torch.ones(1000), torch.ones(500, device="meta")], []
    assert peak_memory(weights, lambda: made.append(weights[0][:10].exp() + weights[0][:10].view(10)), CPU) == 4080


def test_the_table_the_numbers_and_the_plot(tiny_sd1, few_steps, tmp_path, capsys):
    words = ("--model", f"{tiny_sd1},{few_steps}", "--steps", 3, "--guidance", 1, "--rounds", 2, "--device", "cpu")
    assert exit_code(benchmark, *words, "--precision", "fp32,bf16", "--out", tmp_path / "b.json") == 0
    printed, found = capsys.readouterr().out, read(tmp_path / "b.json")
    names = [(row["model"], row["precision"]) for row in found["rows"]]
    assert names == [(str(m), p) for m in (tiny_sd1, few_steps) for p in ("fp32", "bf16")]
    unet = load_pipeline(tiny_sd1).unet
    for row in found["rows"]:
        assert row["parameters"] == sum(p.numel() for p in unet.parameters())
        assert row["macs"] == count_macs(unet, 8, 8, 16)["conv_linear"] and row["steps"] == 3
        assert all(len(row[kind]) == 2 and min(row[kind]) > 0 for kind in ("load_ms", "call_ms", "batch_ms", "speed"))
        assert row["images_per_second"] == [1000 / ms for ms in row["batch_ms"]]
        assert min(row["batch_ms"]) > min(row["call_ms"])
        assert f"{row['library']}, cpu {row['precision']}" in printed
    assert found["rows"][0]["speed"] == [1, 1] and found["rows"][1]["peak_bytes"] < found["rows"][0]["peak_bytes"]
    assert "1 CPU threads" in printed and "2 rounds" in printed
    with Image.open(tmp_path / "b.png") as plot:
        assert plot.size == (1000, 60 + 50 * 4)


def test_time_and_memory_are_plotted_over_settings_of_several_values(tiny_sd1, tmp_path, capsys):
    words = ("--model", tiny_sd1, "--guidance", 1, "--rounds", 1, "--device", "cpu", "--against", "diffusers")
    several = ("--batch-size", "3,1", "--steps", "1,2", "--resolution", 16, "--out", tmp_path / "b.json")
    assert exit_code(benchmark, *words, *several) == 0
    rows = read(tmp_path / "b.json")["rows"]
    assert [(row["batch_size"], row["steps"]) for row in rows[::2]] == [(3, 1), (3, 2), (1, 1), (1, 2)]
    assert all(row["resolution"] == 16 and row["latents"] == [4, 4] for row in rows)
    assert rows[0]["peak_bytes"] > rows[4]["peak_bytes"]
    assert rows[2]["images_per_second"] == [3000 / rows[2]["batch_ms"][0]]
    table = capsys.readouterr().out.split("times as fast as diffusers")[1]
    assert "batch" in table and "steps" in table and "pixels" not in table
    with Image.open(tmp_path / "b.png") as plot:
        assert plot.size == (1200, 2 * 500)


def test_a_model_is_sampled_as_it_was_distilled(tiny_sd1, few_steps):
    job, facts = prepare_sampling(Config(), case(few_steps))
    assert (facts["steps"], job.settings) == (3, Sampling(3))
    assert prepare_sampling(Config(), case(tiny_sd1))[1]["steps"] == 25


@pytest.mark.parametrize(("of_vae", "expected"), [("fp32", "fp32"), ("same", "bf16")])
def test_the_vae_has_a_precision_of_its_own_in_both_libraries(tiny_sd1, of_vae, expected):
    job, facts = prepare_sampling(Config(vae_precision=of_vae), case(tiny_sd1)._replace(precision="bf16"))
    weights = [2 * p.numel() for n in load_pipeline(tiny_sd1).networks.values() for p in n.parameters()]
    weights += [{"fp32": 4, "bf16": 2}[expected] * p.numel() for p in load_pipeline(tiny_sd1).vae.parameters()]
    for opened in (open_model, load_other().open_model):
        assert sum(p.nbytes for p in opened(job)[0]) == sum(weights)
    assert facts["vae_precision"] == expected


@pytest.mark.parametrize("kind", ["sd2", "sdxl", "few"])
def test_diffusers_does_the_same_work(kind, sources, few_steps):
    source = {**sources, "few": few_steps}[kind]
    job, _ = prepare_sampling(Config(), case(source, batch_size=2, steps=None if kind == "few" else 2))
    (ours, work), (theirs, other) = open_model(job), load_other().open_model(job)
    assert sum(p.numel() for p in ours) == sum(p.numel() for p in theirs)
    assert_close(work["call_ms"](), other["call_ms"](), 1e-4)
    images = work["batch_ms"]()
    assert len(images) == 2 and max(apart(images, other["batch_ms"]())) <= 2 and max(apart(images[:1], images[1:])) > 9


def small_run(model, images, out, **settings):
    own = {"batch_size": 2, "judged": 0, "recipe": "bk-tiny", "precision": "fp32", "device": "cpu", "warmup": 1}
    return train_kd.Config(teacher=str(model), data=str(images), resolution=32, out=str(out), **own | settings)


def test_the_step_that_is_timed_is_that_of_train_kd(tiny_sd1, images, tmp_path):
    config = small_run(tiny_sd1, images, tmp_path / "run", steps=2, learning_rate=1e-3)
    run, other = train_kd.set_up(config), load_other()
    for number in range(2):
        other.our_step(run, make_alpha_bar(run.teacher.schedule), number)
    train_kd.main(config)
    after = checkpoint(tmp_path / "run", step=2, part="student")
    assert all(torch.equal(p, after[name]) for name, p in run.student.unet.named_parameters())
    averaged = checkpoint(tmp_path / "run", step=2, part="ema")
    assert all(any(torch.equal(p, q) for q in averaged.values()) for p in run.ema.shadow.values())


def test_the_originals_have_the_same_losses_from_hooks(tiny_sd1, images, tmp_path):
    run = train_kd.set_up(small_run(tiny_sd1, images, tmp_path / "run", steps=2))
    theirs, batch = load_other().Originals(run), run.batches[0]
    with torch.no_grad():
        for name, p in theirs.student.named_parameters():
            p.copy_(run.student.unet.get_parameter(name).mul_(1.1))  # so that no loss is nearly 0
    x_t = add_noise(batch.x0, batch.eps, batch.t, make_alpha_bar(run.teacher.schedule))
    inputs = x_t, batch.t, batch.context
    (out, features), (out_t, features_t) = (
        n(*inputs, return_features=True) for n in (run.student.unet, run.teacher.unet)
    )
    losses = theirs.losses(*inputs, batch.eps)
    kd = train_kd.kd
    ours = kd.task_loss(out, batch.eps), kd.output_loss(out, out_t), kd.feature_loss(features, features_t, run.pairs)
    for a, b in zip(losses, ours, strict=True):
        assert a.item() == pytest.approx(b.mean().item(), rel=1e-3) and a > 1e-6
    before = [p.clone() for p in theirs.student.parameters()]
    theirs.step()
    assert all(not torch.equal(p, q) for p, q in zip(theirs.student.parameters(), before, strict=True) if p.dim() > 1)


def test_training_steps_are_compared_and_no_images_are_made(tiny_sd1, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_kd, "Report", None)
    words = ("--model", tiny_sd1, "--recipe", "bk-tiny", "--against", "diffusers", "--data", images, "--rounds", 1)
    assert exit_code(benchmark, *words, "--batch-size", 2, "--device", "cpu", "--out", tmp_path / "b.json") == 0
    ours, theirs = read(tmp_path / "b.json")["rows"]
    assert (ours["library"], theirs["library"]) == ("minidistill", "diffusers")
    assert ours["parameters"] == theirs["parameters"] and ours["student"] == "bk-tiny"
    assert "times as fast as diffusers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--out", "."], "--out .: the name of a .json file is needed"),
        (["--recipe", "bk-tiny"], "give --against diffusers"),
        (["--recipe", "bk-tiny", "--steps", "4"], "--steps, --guidance and --vae-precision are of sampling"),
        (["--data", "photos"], "give --recipe too"),
        (["--precision", "fp32,fp8"], "fp8"),
        (["--precision", "fp16", "--device", "cpu"], "fp16 needs a CUDA device"),
        (["--vae-precision", "fp16", "--device", "cpu"], "--vae-precision fp16 needs a CUDA device"),
        (["--resolution", "30", "--device", "cpu"], "--resolution must be a multiple of 4"),
        (["--model", "nothing/here/at/all", "--device", "cpu"], "nothing/here/at/all"),
    ],
)
def test_refusals_are_one_line(words, expected, capsys):
    assert exit_code(benchmark, *words) == 2
    assert expected in one_line(capsys)


def test_without_the_repository_or_diffusers_the_comparison_says_how_to_get_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "OTHER_FILE", tmp_path / "against_diffusers.py")
    for text in (None, "import no_such_library\n"):
        if text:
            benchmark.OTHER_FILE.write_text(text)
        assert exit_code(benchmark, "--against", "diffusers") == 2
        assert 'pip install -e ".[test]"' in one_line(capsys)
