"""Sensitivity: what can be removed alone, how much the prediction changes, and the lists chosen from that.

Computed here once more: students built in the ordinary way and compared with the teacher sample by sample, savings as
differences of the counts of two networks, and a choice among made-up scores.
"""

import json

import pytest
import torch
from tiny import TINY, TINY_SDXL

from minidistill import cache
from minidistill import sensitivity as command
from minidistill.cli import run_command
from minidistill.data.folders import ImageFolder
from minidistill.diffusion.schedule import make_alpha_bar
from minidistill.distill.block_removal import RECIPES, build_student, plan_removal
from minidistill.distill.probes import distance_to_teacher, make_probes
from minidistill.distill.sensitivity import Score, choose, score, share_weights, smallest_removals
from minidistill.errors import InputError
from minidistill.metrics.cost import count_macs
from minidistill.pipeline import load_pipeline
from minidistill.training.batches import Batches

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe(tiny_sd1):
    """A pipeline whose prediction depends on every block; not to be changed."""
    pipe = load_pipeline(tiny_sd1)
    pipe.unet.requires_grad_(False)
    return pipe


def probes_of(pipe, images, batch_size=4, count=2):
    return make_probes(Batches(ImageFolder(images, 32), pipe, batch_size=batch_size, seed=0), range(count))


@pytest.fixture(scope="module")
def probes(pipe, images):
    return probes_of(pipe, images)


# what can be removed alone


def test_every_block_of_sd_is_among_the_smallest_removals():
    found = [removal.removed for removal in smallest_removals(TINY)]
    assert found == [
        ("mid",),
        ("stage.3",),
        ("mid@0",),
        ("down.0.0", "up.3.1"),  # the first stage is as wide as conv_in, so both layers fit
        ("down.0.0", "up.3.2"),
        ("down.0.1", "up.3.1"),
        ("down.0.1", "up.3.2"),
        ("down.1.1", "up.2.1"),
        ("down.2.1", "up.1.0"),
        ("down.2.1", "up.1.1"),
        *((f"down.3.{j}", f"up.0.{k}") for j in range(2) for k in range(3)),
    ]


def test_every_depth_of_every_transformer_of_sdxl_is_among_the_smallest_removals():
    found = [removal.removed for removal in smallest_removals(TINY_SDXL)]
    cuts = [(f"{layer}@1",) for layer in ("down.1.0", "down.1.1", "up.1.0", "up.1.1", "up.1.2")]
    cuts += [(f"{layer}@{n}",) for layer in ("down.2.1", "up.0.0", "up.0.1", "up.0.2") for n in (1, 2)]
    shared = [("down.2.0@1", "mid@1"), ("down.2.0@2", "mid@2")]
    assert {*cuts, *shared, ("mid",), ("mid@0",), ("down.2.1", "up.0.1")} <= set(found)
    assert not {("mid@1",), ("down.2.0@1",), ("stage.2",), ("down.1.1",)} & set(found)
    assert len(found) == len(set(found))


# the score


def test_timesteps_are_spread_evenly_and_the_noisy_latents_are_those_of_the_batches(pipe, images, probes):
    assert torch.cat([probe.t for probe in probes]).tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    batch, alpha_bar = Batches(ImageFolder(images, 32), pipe, batch_size=4, seed=0)[1], make_alpha_bar(pipe.schedule)
    signal, noise = (a.sqrt().view(-1, 1, 1, 1) for a in (alpha_bar[probes[1].t], 1 - alpha_bar[probes[1].t]))
    torch.testing.assert_close(probes[1].x_t, signal * batch.x0 + noise * batch.eps)


@pytest.mark.parametrize("remove", [("stage.3",), ("mid@0",), ("down.1.1", "up.2.1")])
def test_a_score_is_the_mse_of_a_built_student_and_the_differences_of_its_counts(pipe, probes, remove):
    removal = plan_removal(pipe.unet.config, remove)
    student = build_student(removal, pipe.unet)
    with torch.no_grad():
        ours, theirs = (
            torch.cat([unet(p.x_t[i : i + 1], p.t[i : i + 1], p.context[i : i + 1]) for p in probes for i in range(4)])
            for unet in (pipe.unet, student)
        )
    found = score(removal, pipe.unet, probes)
    expected = (ours - theirs).double().square().mean().item()
    assert found.sensitivity == pytest.approx(expected, rel=1e-4) and found.sensitivity > 1e-8
    counts = [sum(p.numel() for p in unet.parameters()) for unet in (pipe.unet, student)]
    macs = [count_macs(unet, 8, 8, 16)["conv_linear"] for unet in (pipe.unet, student)]
    assert (found.parameters, found.macs) == (counts[0] - counts[1], macs[0] - macs[1])
    assert sum(pipe.unet.state_dict()[name].numel() for name in found.weights) == found.parameters


def test_the_mse_of_the_teacher_itself_is_zero_and_the_batch_size_does_not_matter(pipe, images, probes):
    assert distance_to_teacher(pipe.unet, probes) == 0
    student = share_weights(plan_removal(pipe.unet.config, ("down.0.1", "up.3.1")), pipe.unet)
    other = distance_to_teacher(student, probes_of(pipe, images, 8, 1))
    assert distance_to_teacher(student, probes) == pytest.approx(other, rel=1e-4)


def test_nothing_is_copied_for_a_score(pipe):
    before = {name: w.clone() for name, w in pipe.unet.state_dict().items()}
    student = share_weights(plan_removal(pipe.unet.config, ("mid", "down.1.1", "up.2.1")), pipe.unet)
    own = {w.data_ptr() for w in pipe.unet.state_dict().values()}
    assert all(w.data_ptr() in own for w in student.state_dict().values())
    assert not any(p.requires_grad for p in student.parameters())
    assert all(torch.equal(w, before[name]) for name, w in pipe.unet.state_dict().items())


# the lists chosen


def made_up(*rows) -> list[Score]:
    """(sensitivity, parameters, MACs, entries...) -> scores, named by their entries; mid@0 is inside mid."""
    weights = {"mid": {"mid", "mid@0"}}
    return [
        Score(tuple(names), sensitivity, parameters, macs, frozenset().union(*(weights.get(n, {n}) for n in names)))
        for sensitivity, parameters, macs, *names in rows
    ]


SCORES = made_up(
    (1.0, 100, 1, "mid"),
    (0.1, 40, 1, "mid@0"),
    (2.0, 100, 50, "down.1.1", "up.2.1"),
    (9.0, 300, 9, "down.0.1", "up.3.1"),
    (0.5, 10, 90, "down.2.1", "up.1.1"),
)


@pytest.mark.parametrize(
    ("saving", "by", "expected"),
    [
        (0, "parameters", ()),
        (30, "parameters", ("mid@0",)),
        (90, "parameters", ("mid",)),  # in place of mid@0, which it contains
        (150, "parameters", ("mid", "down.1.1", "up.2.1")),
        (85, "macs", ("down.2.1", "up.1.1")),
        (140, "macs", ("down.2.1", "up.1.1", "down.1.1", "up.2.1")),
        (510, "parameters", ("mid", "down.1.1", "up.2.1", "down.0.1", "up.3.1", "down.2.1", "up.1.1")),
    ],
)
def test_the_least_sensitivity_for_what_is_saved_is_removed_first(saving, by, expected):
    found = choose(TINY, SCORES, saving, by)[0]
    assert set(found) == set(expected) and len(found) == len(expected)
    plan_removal(TINY, found)


def test_removals_that_do_not_fit_together_are_not_chosen_together_and_too_large_a_saving_is_refused():
    with pytest.raises(InputError, match=r"no list of removals saves so much \(parameters\)"):
        choose(TINY, SCORES, 511)
    scores = made_up((0.1, 10, 1, "down.1.1", "up.2.1"), (0.1, 10, 1, "down.1.0", "up.2.2"), (5.0, 10, 1, "mid"))
    assert choose(TINY, scores, 20) == [("down.1.1", "up.2.1", "mid")]


def test_beside_the_greedy_list_are_those_with_one_removal_exchanged_the_least_sums_first():
    found = [set(some) for some in choose(TINY, SCORES, 200)]
    pair, outer = {"down.1.1", "up.2.1"}, {"down.0.1", "up.3.1"}
    assert found == [{"mid", *pair}, {"mid", *outer}, {*pair, *outer}]  # the fourth entry would save too little
    assert len(choose(TINY, SCORES, 200, count=2)) == 2


# the command


@pytest.fixture
def quick(monkeypatch, pipe):
    """Few removals, one recipe that fits, and a loaded teacher, which is not to be changed."""
    few = [("mid",), ("mid@0",), ("stage.3",), ("down.1.1", "up.2.1"), ("down.2.1", "up.1.1"), ("down.0.1", "up.3.1")]
    monkeypatch.setattr(command, "smallest_removals", lambda config: [plan_removal(config, remove) for remove in few])
    monkeypatch.setattr(command, "RECIPES", {name: RECIPES[name] for name in ("bk-tiny", "koala-1b")})
    monkeypatch.setattr(command, "load_pipeline", lambda *_: pipe)


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as info:
        run_command(command.main, command.Config, prog="sensitivity", argv=list(map(str, words)))
    return info.value.code


def test_the_command_scores_sorts_and_chooses(quick, pipe, images, tmp_path, monkeypatch, capsys):
    recipes = ("bk-base", "segmind-small", "koala-1b", "bk-tiny")  # twice the same, and one of SDXL
    monkeypatch.setattr(command, "RECIPES", {name: RECIPES[name] for name in recipes})
    out = tmp_path / "out"
    assert run("--data", images, "--samples", 2, "--batch-size", 2, "--budget", 0.7, "--out", out) == 0
    printed, found = capsys.readouterr().out, json.loads((out / "sensitivity.json").read_text())
    sensitivities = [entry["sensitivity"] for entry in found["scores"]]
    assert len(sensitivities) == 6 and sensitivities == sorted(sensitivities) and sensitivities[0] > 0
    total, lists = found["teacher"]["parameters"], found["lists"]
    assert list(lists) == [n for x in ("bk-base", "bk-tiny") for n in (x, f"chosen for {x}")] + ["chosen for 70 %"]
    for name, entry in lists.items():
        assert entry["parameters"] > 0 and plan_removal(pipe.unet.config, entry["remove"])
        if name.startswith("chosen"):
            assert f"{name}: --remove {','.join(entry['remove'])}" in printed
            goal = lists.get(name.removeprefix("chosen for "), {"parameters": 0.3 * total})
            assert entry["parameters"] >= goal["parameters"]
    titles = [line.split()[:3] for line in printed.splitlines() if "MSE to teacher" in line]
    assert titles == [["removed", "MSE", "to"], ["student", "MSE", "to"]]


def test_the_command_takes_sdxl_and_counts_macs(sources, images, tmp_path):
    words = ("--teacher", sources["sdxl"], "--data", images, "--samples", 2, "--by", "macs", "--budget", 0.9)
    assert run(*words, "--batch-size", 2, "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out/sensitivity.json").read_text())
    assert ["down.2.0@1", "mid@1"] in [entry["remove"] for entry in found["scores"]]
    (chosen,) = found["lists"].values()
    assert chosen["macs"] >= 0.1 * found["teacher"]["macs"]


@pytest.mark.parametrize("free", [0, 15])
def test_lists_are_chosen_by_latency_measured_in_turns(quick, images, tmp_path, monkeypatch, capsys, free):
    """Where the last `free` resnets cost nothing, single savings do not add up: the command says what was found."""

    def by_depth(unet, *_, rounds):  # a resnet takes a millisecond, on a machine that gets slower with every call
        called.append(unet)
        return 1.001 ** len(called) * max(free, sum(name.endswith("conv1.weight") for name in unet.state_dict()))

    called = []
    monkeypatch.setattr(command, "milliseconds", by_depth)
    words = ("--data", images, "--samples", 2, "--by", "latency", "--budget", 0.5 if free else 0.8)
    assert run(*words, "--batch-size", 2, "--out", tmp_path / "out") == 0
    found, printed = json.loads((tmp_path / "out/sensitivity.json").read_text()), capsys.readouterr().out
    saved = {tuple(entry["remove"]): entry["latency"] for entry in found["scores"]}
    assert abs(saved["mid@0",] - 1 / 22) < 0.01 and abs(saved["mid",] - 2 / 22) < 0.01  # of 22 resnets
    lists = found["lists"]
    assert "latency" in printed and f"{-lists['bk-tiny']['latency']:+.0%}" in printed
    assert lists["chosen for bk-tiny"]["latency"] >= lists["bk-tiny"]["latency"] - 0.01
    if free:
        assert "50 %: asked to save 50% of latency; the list found saves 32%" in printed
    else:
        assert lists["chosen for 80 %"]["latency"] >= 0.2 and "asked to save" not in printed


def test_half_precision_takes_a_cache_of_text_states_too(quick, tiny_sd1, images, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_pipeline", load_pipeline)
    monkeypatch.setattr(command, "RECIPES", {})
    path = str(tmp_path / "cache")
    cache.main(cache.CacheConfig(model=str(tiny_sd1), data=str(images), out=path))
    sensitivities = []
    for precision in ("fp32", "bf16"):
        words = ("--teacher", tiny_sd1, "--data", path, "--samples", 4, "--batch-size", 4, "--precision", precision)
        assert run(*words, "--out", tmp_path / precision) == 0
        scores = json.loads((tmp_path / precision / "sensitivity.json").read_text())["scores"]
        sensitivities.append(next(entry["sensitivity"] for entry in scores if entry["remove"] == ["mid"]))
    assert 0 < sensitivities[0] != sensitivities[1] > 0


def test_a_model_without_removable_blocks_or_with_values_that_are_not_finite_is_refused(
    quick, tiny_sd1, images, tmp_path, monkeypatch, capsys
):
    def refused() -> str:
        assert run("--teacher", tiny_sd1, "--data", images, "--samples", 2, "--out", tmp_path / "out") == 2
        return capsys.readouterr().err

    pipe = load_pipeline(tiny_sd1)
    monkeypatch.setattr(command, "load_pipeline", lambda *_: pipe)
    with monkeypatch.context() as patch:
        patch.setattr(command, "smallest_removals", lambda config: [])
        assert "no block can be removed from this model; use a larger --teacher" in refused()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(pipe.unet.conv_out, "forward", lambda x: x[:, :4] / 0)
    assert "without mid the output is not finite in fp32" in refused()
    assert not json.loads((tmp_path / "out/sensitivity.json").read_text()).keys() - {"settings"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--budget", "1.5"), "--budget must be at most 1"),
        (("--data", "DATA", "--out", "FILE"), "is a file, not a folder"),
    ],
)
def test_bad_input_is_refused_in_one_line(quick, images, tmp_path, capsys, words, said):
    (tmp_path / "file").touch()
    words = [{"DATA": images, "FILE": tmp_path / "file"}.get(word, word) for word in words]
    assert run("--out", tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
