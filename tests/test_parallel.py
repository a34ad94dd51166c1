"""Two processes of torchrun do what one does, in every mode: gradients, losses, batches, resuming in another way."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from runs import checkpoint, exit_code, largest_difference, metrics
from test_batches import Images
from torch import Tensor
from torch.distributed.run import get_args_parser

from minidistill import finetune, train_kd, train_lightning, train_miniature
from minidistill.distill.lightning import PLANS
from minidistill.distill.memory import make_cast, memory_rows
from minidistill.errors import InputError
from minidistill.metrics.cost import format_bytes
from minidistill.models.unet import SDXL, UNet, UNetConfig, random_inputs
from minidistill.pipeline import load_pipeline
from minidistill.training import parallel
from minidistill.training.batches import Batches, Latents, encode_all
from minidistill.training.optim import adamw, clip_grad_norm, optimizer_step
from minidistill.training.run_folder import RunFolder
from minidistill.training.state import pack

ROOT = Path(__file__).parents[1]
KD = (
    "--recipe bk-small --batch-size 4 --accumulate 2 --warmup 0 --learning-rate 1e-4 "
    "--precision fp32 --log-every 1 --checkpoint-every 1 --keep-checkpoints 9 --sample-every 9 --device cpu"
)
GAN = (
    "--plan demo --stages 8,4,2 --length 0.01 --guidance 2 --batch-size 4 "
    "--precision fp32 --log-every 1 --sample-every 99 --checkpoint-every 99 --device cpu"
)
FINETUNE = (
    "--lora-rank 2 --train-text-encoder --batch-size 2 --steps 2 --warmup 0 --learning-rate 1e-3 "
    "--log-every 1 --device cpu --gradient-checkpointing"
)
SMALL = UNetConfig(
    sample_size=8, cross_attention_dim=16, block_out_channels=(32, 64), attention_head_dim=(2, 2),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip


RUNNER = """
import importlib, json, sys
from minidistill import train_lightning
from minidistill.cli import parse

train_lightning.PAIRS = 8
for name, *words in json.load(open(sys.argv[1])):
    module = importlib.import_module(name)
    config = parse(module.Config, getattr(module, "PRESETS", None), words, "prog", None)
    getattr(module, "command", module.main)(config)
"""


def start(script: str, folder: Path, *words: object) -> subprocess.CompletedProcess:
    """Run a script in two processes."""
    file = folder / "worker.py"
    file.write_text(script)
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", file, *words]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.run([*map(str, call)], capture_output=True, text=True, check=False, cwd=ROOT, env=env)


@pytest.fixture
def train(tiny_sd1, images, capsys, tmp_path):
    """train(number of processes, runs) -> what they printed. A run: (module, run folder, flags). One is this process.

    Several runs one after the other: starting processes takes longer than these runs.
    """

    def train(count: int, *runs: tuple[ModuleType, Path, str]) -> str:
        calls = []
        for module, out, flags in runs:
            source = "--model" if module is finetune else "--teacher"
            words = (module.__name__, source, tiny_sd1, "--data", images, "--out", out, *flags.split())
            calls.append([*map(str, words)])
        if count == 2:
            (tmp_path / "calls.json").write_text(json.dumps(calls))
            done = start(RUNNER, tmp_path, tmp_path / "calls.json")
            assert done.returncode == 0, done.stderr
            return done.stdout
        for (module, *_), (_, *words) in zip(runs, calls, strict=True):
            assert exit_code(module, *words, main="command" if hasattr(module, "command") else "main") == 0
            while RunFolder._locks:  # a process gives up the lock of a run when it ends, or finds another run
                os.close(RunFolder._locks.popitem()[1])
        return capsys.readouterr().out

    return train


def close(one: dict, other: dict, tolerance: float) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=1e-3, atol=tolerance) for name in one)


def test_runs_of_two_processes_are_those_of_one_and_go_on_in_any_other_way(train, tmp_path):
    one, out = tmp_path / "one", {mode: tmp_path / mode for mode in parallel.MODES}
    train(1, (train_kd, one, f"{KD} --steps 2"))
    dry = [(train_kd, tmp_path / "dry", f"{KD} --dry-run --parallel {mode}") for mode in out]
    printed = train(2, *((train_kd, out[mode], f"{KD} --steps 2 --parallel {mode}") for mode in out), *dry)
    assert printed.count("step 0002/0002") == len(out), "only the first process prints"
    assert printed.count("in all, about") == len(dry)
    for mode, folder in out.items():
        for a, b in zip(metrics(one), metrics(folder), strict=True):
            assert a["loss_by_timestep"].keys() == b["loss_by_timestep"].keys()
            for name in ("loss", "task", "output", "feature", "grad_norm"):
                assert a[name] == pytest.approx(b[name], rel=1e-4), (mode, name)
        assert (folder / "samples/step-000002.png").is_file()
        assert checkpoint(one, 2).keys() == checkpoint(folder, 2).keys()
        assert close(*(checkpoint(run, 2, "student") for run in (one, folder)), tolerance=2e-5), mode
        student = load_pipeline(folder / "student").unet.state_dict()  # has the averaged weights
        assert close(load_pipeline(one / "student").unet.state_dict(), student, tolerance=2e-5), mode

    assert "resuming at step 2" in train(1, (train_kd, out["fsdp"], f"{KD} --steps 3 --resume --parallel ddp"))
    printed = train(
        2,
        (train_kd, out["fsdp"], f"{KD} --steps 4 --resume --parallel zero1"),
        (train_kd, one, f"{KD} --steps 4 --resume --parallel fsdp"),
    )
    assert "resuming at step 3" in printed and "resuming at step 2" in printed
    train(1, (train_kd, out["ddp"], f"{KD} --steps 4 --resume"))
    for folder in (out["fsdp"], one):
        assert close(checkpoint(out["ddp"], 4, "student"), checkpoint(folder, 4, "student"), tolerance=4e-5)
        assert close(checkpoint(out["ddp"], 4, "ema"), checkpoint(folder, 4, "ema"), tolerance=4e-5)


def test_all_players_of_a_gan_and_text_encoders_are_shared_out_and_stages_wait_for_each_other(
    train, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_lightning, "PAIRS", 8)  # to rank
    alone = {train_lightning: tmp_path / "gan", finetune: tmp_path / "lora"}
    train(1, (train_lightning, alone[train_lightning], GAN), (finetune, alone[finetune], FINETUNE))
    chosen = (train_lightning, GAN, "fsdp"), (train_lightning, GAN, "ddp"), (finetune, FINETUNE, "fsdp")
    runs = [(module, tmp_path / f"{module.__name__}-{m}", f"{flags} --parallel {m}") for module, flags, m in chosen]
    train(2, *runs)
    assert any("d" in line for line in metrics(alone[train_lightning]))
    assert any("fake net" in line for line in metrics(alone[train_lightning]))
    for module, out, _ in runs:
        for a, b in zip(metrics(alone[module]), metrics(out), strict=True):
            assert a.keys() == b.keys()
            for name in ("loss", "grad_norm"):
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (out.name, name)
    assert (runs[0][1] / "2-step/README.md").is_file()


WORKER = """
import sys, torch
from minidistill.training import parallel
from test_parallel import gradients_and_weights, gradients_of_a_unet

parallel.join(torch.device("cpu"))
found = gradients_and_weights(parallel.count(), parallel.rank())
assert parallel.gather(found) == [found, found]
for mode in parallel.MODES:
    found += [gradients_of_a_unet(parallel.count(), parallel.rank(), mode, checkpointing) for checkpointing in (0, 1)]
if parallel.is_first():
    torch.save(found, sys.argv[1])
"""


def gradients_and_weights(count: int, rank: int) -> list[dict[str, list | None]]:
    """Of a small network after a step on this process's half; only the second half's loss reaches one of its layers."""
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({name: torch.nn.Linear(3, 2, dtype=torch.float64) for name in ("both", "second", "none")})
    x = torch.arange(12.0, dtype=torch.float64).view(4, 3) + 1
    loss = net["both"](x.chunk(count)[rank]).square().mean()
    if rank == count - 1:
        loss = loss + count * net["second"](x[2:]).square().mean()
    loss.backward()
    parallel.average_gradients(net.parameters())
    gradients = {name: None if p.grad is None else p.grad.tolist() for name, p in net.named_parameters()}
    optimizer = adamw(net.parameters(), 0.1, weight_decay=0.5)
    optimizer_step(net, optimizer, torch.amp.GradScaler("cpu", enabled=False), 0.1, 1.0)
    return [gradients, {name: p.tolist() for name, p in net.named_parameters()}]


def gradients_of_a_unet(count: int, rank: int, mode: str = "ddp", checkpointing: bool = False) -> dict[str, Tensor]:
    """Of the loss of its prediction and of its features on this process's half, in float64, and their joint norm."""
    torch.manual_seed(0)
    unet = UNet(SMALL).double()
    x, t, context, _ = (part if part is None else part.chunk(count)[rank] for part in random_inputs(SMALL, 4, 8, 8, 7))
    unet.gradient_checkpointing = checkpointing
    parallel.shard(unet, mode)
    for _ in range(2):  # micro-batches
        out, features = unet(x, t, context, return_features=True)
        (out.square().mean() + sum(feature.square().mean() for feature in features.values())).backward()
    parallel.average_gradients(unet.parameters())
    norm = clip_grad_norm(unet.parameters(), None)
    found = {name: parallel.full(weight.grad) for name, weight in unet.named_parameters()} | {"norm": norm}
    optimizer = adamw(unet.parameters(), 0.1)
    with torch.no_grad():
        unet(x, t, context)  # zero1 keeps what that gathers
    assert pack({"unet": unet, "optimizer": optimizer})[1]["optimizer"]["groups"][0][0] == "unet.conv_in.weight"
    return found


def test_gradients_of_two_processes_are_those_of_the_whole_batch_in_every_mode(tmp_path):
    done = start(WORKER, tmp_path, tmp_path / "found.pt")
    assert done.returncode == 0, done.stderr
    gradients, weights = gradients_and_weights(1, 0)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for one, two in zip((gradients, weights), found[:2], strict=True):
        for name, whole in one.items():
            if whole is None:
                assert two[name] is None, "a weight without a gradient does not decay either"
            else:
                assert np.allclose(whole, two[name], rtol=0, atol=1e-12), name
    assert any(whole is None for whole in gradients.values())
    whole = gradients_of_a_unet(1, 0)
    assert len(found[2:]) == 2 * len(parallel.MODES)
    for two in found[2:]:
        assert largest_difference(whole, two) < 1e-12


def test_shares_are_the_samples_of_the_whole_batch_each_once(monkeypatch, tiny_sd1):
    pipe = load_pipeline(tiny_sd1)
    whole = Batches(Images(), pipe, batch_size=6, seed=0, cache=True)
    monkeypatch.setattr(parallel, "count", lambda: 3)
    for k in (0, 4, -1):
        parts = []
        for rank in range(3):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            parts.append(whole.share())
        assert [n for part in parts for n in part.numbers(k)] == list(whole.numbers(k))
        assert all(part.whole is whole and part.batch_size == 2 for part in parts)
        assert torch.equal(torch.cat([part[k].eps for part in parts]), whole[k].eps)
        assert [caption for part in parts for caption in part[k].captions] == whole[k].captions
    monkeypatch.setattr(parallel, "count", lambda: 4)
    with pytest.raises(InputError, match="--batch-size 6 cannot be split over 4 processes"):
        whole.share()


FAILING = """
import sys
from minidistill import train_kd
from minidistill.cli import run_command
from minidistill.errors import NonFiniteLoss
from minidistill.training import optim, parallel

def check_finite(loss, step, *_):
    if step == 2 and not parallel.is_first():
        raise NonFiniteLoss("the second process fails")

optim.check_finite = check_finite
run_command(train_kd.main, train_kd.Config, train_kd.PRESETS, prog="prog")
"""


def test_a_process_that_fails_ends_the_run_with_its_message(tiny_sd1, images, tmp_path):
    words = ("--teacher", tiny_sd1, "--data", images, "--out", tmp_path / "run", *KD.split(), "--parallel", "fsdp")
    done = start(FAILING, tmp_path, *words)
    assert done.returncode != 0 and "error: the second process fails\n" in done.stderr
    assert "exitcode  : 3" in done.stderr, done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1]


@pytest.mark.parametrize("module", [finetune, train_kd, train_lightning, train_miniature])
def test_torchrun_passes_on_every_flag(module):
    """It refuses one with which several of its own begin, as --start."""
    flags = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(module.Config)]
    assert get_args_parser().parse_args(["-m", module.__name__, *flags]).training_script_args == flags


def test_one_process_shares_out_nothing_and_says_so():
    with pytest.warns(UserWarning, match="--parallel fsdp: one process has all the work"):
        parallel.join(torch.device("cpu"), "fsdp")
    network = torch.nn.Linear(2, 2)
    parallel.shard(network, "fsdp")
    assert parallel.whole(network) is network and not parallel.is_part(network.weight)


def test_modes_that_do_not_fit_are_refused_in_one_line(tmp_path, capsys):
    assert exit_code(train_lightning, "--plan", "one-gpu", "--parallel", "fsdp", "--out", tmp_path / "run") == 2
    assert "--parallel fsdp: plan one-gpu trains a LoRA" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_each_process_encodes_its_part_of_the_data(monkeypatch, tiny_sd1):
    data, vae = Images(), load_pipeline(tiny_sd1).vae
    whole, parts = encode_all(data, vae), []
    monkeypatch.setattr(parallel, "count", lambda: 3)
    monkeypatch.setattr(parallel, "gather", lambda found: [found])
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        parts.append(encode_all(data, vae))
    assert [len(part) for part in parts] != [len(data)] * 3
    joined = Latents.join(parts)
    assert torch.allclose(joined.mean, whole.mean, atol=1e-5) and joined.all_captions == whole.all_captions
    assert joined.origins == whole.origins and joined.size == whole.size


def test_alone_nothing_is_averaged_and_nothing_waits():
    weight = torch.nn.Linear(2, 2)
    weight(torch.ones(1, 2)).sum().backward()
    before = weight.weight.grad.clone()
    parallel.average_gradients(weight.parameters())
    parallel.wait()
    assert torch.equal(weight.weight.grad, before) and parallel.gather(3) == [3] and parallel.is_first()
    optimizer_step(weight, adamw(weight.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=False), 0.1, None)


def test_the_figures_of_the_readme_are_those_of_a_dry_run_shared_out(monkeypatch):
    readme, gib = (ROOT / "README.md").read_text(encoding="utf-8"), 2**30
    monkeypatch.setattr(parallel, "count", lambda: 64)
    alone = dict(memory_rows(SimpleNamespace(teacher=SDXL, student=SDXL), [], 0, 0, averaged=True, half=True))
    phase = PLANS["paper"][1].phases[-1]
    with torch.device("meta"):
        cast = make_cast(SDXL, SDXL, phase, side=128, further=1, rank=64, shared=False, half=True)
    unet, everything = 2 * sum(p.nbytes for p in cast.base.parameters()), sum(p.nbytes for p in cast.weights())
    assert alone["teacher's weights"] == format_bytes(unet // 2)
    assert alone["student's weights"] == format_bytes(unet) and alone["AdamW's two averages"] == format_bytes(2 * unet)
    learned = sum(p.nbytes for p in cast.weights() if p.requires_grad)
    for T, F, averages, calls in ((unet, unet // 2, 1, 1), (learned, everything - learned, 0, 4)):
        for mode in parallel.MODES:
            of_frozen, of_trained, of_states = parallel.held(mode)
            part = T * of_states
            parts = [T * of_trained, part, 2 * part, averages * part, F * of_frozen]
            sent = 3 * T + calls * unet // 2 if mode == "fsdp" else 2 * T
            figures = [f"{size / gib:.1f}" if size else "-" for size in (*parts, sum(parts))] + [f"{sent / 1e9:.1f}"]
            assert f" | {' | '.join(figures)} |" in readme, (mode, figures)
