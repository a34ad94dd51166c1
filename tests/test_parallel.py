"""Two processes of torchrun do what one does: gradients, losses, batches, resuming with another number of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from runs import checkpoint, exit_code, metrics
from test_batches import Images

from minidistill import train_kd, train_lightning
from minidistill.errors import InputError
from minidistill.pipeline import load_pipeline
from minidistill.training import parallel
from minidistill.training.batches import Batches
from minidistill.training.optim import adamw, optimizer_step
from minidistill.training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
KD = (
    "--recipe bk-small --batch-size 4 --accumulate 2 --warmup 0 --learning-rate 1e-4 "
    "--precision fp32 --log-every 1 --checkpoint-every 1 --keep-checkpoints 9 --sample-every 9 --device cpu"
)
GAN = (
    "--plan demo --stages 4,2 --length 0.01 --guidance 2 --batch-size 4 "
    "--precision fp32 --log-every 1 --sample-every 99 --checkpoint-every 99 --device cpu"
)


def start(words: str, *more: object) -> subprocess.CompletedProcess:
    """Run a module, or a file, in two processes."""
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words.split()]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*call, *map(str, more)], capture_output=True, text=True, check=False, cwd=ROOT, env=env)


@pytest.fixture
def train(tiny_sd1, images, capsys):
    """train(number of processes, module, run folder, flags, *words) -> what it printed. One process is this one."""

    def run(count: int, module: ModuleType, out: Path, flags: str, *more: object) -> str:
        words = ("--teacher", tiny_sd1, "--data", images, "--out", out, *flags.split(), *more)
        if count == 1:
            main = "command" if hasattr(module, "command") else "main"
            assert exit_code(module, *words, main=main) == 0
            while RunFolder._locks:  # a process gives up the lock of a run when it ends, or finds another run
                os.close(RunFolder._locks.popitem()[1])
            return capsys.readouterr().out
        done = start(f"-m {module.__name__}", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def close(one: dict, other: dict, tolerance: float) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=1e-3, atol=tolerance) for name in one)


def test_two_processes_train_as_one_does_and_runs_change_their_number(train, tmp_path):
    runs = {count: tmp_path / str(count) for count in (1, 2)}
    for count, out in runs.items():
        printed = train(count, train_kd, out, KD, "--steps", 2)
        assert printed.count("step 0002/0002") == 1, "only the first process prints"
    one, two = (metrics(out) for out in runs.values())
    for a, b in zip(one, two, strict=True):
        assert a["loss_by_timestep"].keys() == b["loss_by_timestep"].keys()
        for name in ("loss", "task", "output", "feature", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    assert (runs[2] / "student/model_index.json").is_file() and (runs[2] / "samples/step-000002.png").is_file()
    student = [checkpoint(out, 2, "student") for out in runs.values()]
    assert close(*student, tolerance=2e-5)
    for count, out in runs.items():  # the run of two goes on in one, and the other way round
        assert "resuming at step 2" in train(3 - count, train_kd, out, KD, "--steps", 3, "--resume")
    assert close(*(checkpoint(out, 3, "student") for out in runs.values()), tolerance=3e-5)


def test_both_players_of_a_gan_are_averaged_and_stages_wait_for_each_other(train, tmp_path):
    runs = {count: tmp_path / str(count) for count in (1, 2)}
    for count, out in runs.items():
        train(count, train_lightning, out, GAN)
    one, two = (metrics(out) for out in runs.values())
    assert [line.keys() for line in one] == [line.keys() for line in two]
    assert any("d" in line for line in one) and any("fake net" in line for line in one)
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=2e-2, abs=1e-6
        )
    assert (runs[2] / "2-step/README.md").is_file()


WORKER = """
import json, sys, torch
from minidistill.training import parallel
sys.path.insert(0, "tests")
from test_parallel import gradients_and_weights

parallel.join(torch.device("cpu"))
found = gradients_and_weights(parallel.count(), parallel.rank())
assert parallel.gather(found) == [found, found]
print(json.dumps(found))
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


def test_averaged_gradients_are_those_of_the_whole_batch_and_equal_everywhere(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    done = start(str(tmp_path / "worker.py"))
    assert done.returncode == 0, done.stderr
    for one, two in zip(gradients_and_weights(1, 0), json.loads(done.stdout), strict=True):
        for name, whole in one.items():
            if whole is None:
                assert two[name] is None, "a weight without a gradient does not decay either"
            else:
                assert np.allclose(whole, two[name], rtol=0, atol=1e-12), name
    assert any(whole is None for whole in gradients_and_weights(1, 0)[0].values())


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


def test_what_one_process_refuses_ends_all(tiny_sd1, images, tmp_path):
    teacher = ("--teacher", tiny_sd1, "--data", images, "--out", tmp_path / "run")
    done = start("-m minidistill.train_kd", *teacher, "--batch-size", 3)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert "error: --batch-size 3 cannot be split over 2 processes" in done.stderr


def test_alone_nothing_is_averaged_and_nothing_waits():
    weight = torch.nn.Linear(2, 2)
    weight(torch.ones(1, 2)).sum().backward()
    before = weight.weight.grad.clone()
    parallel.average_gradients(weight.parameters())
    parallel.wait()
    assert torch.equal(weight.weight.grad, before) and parallel.gather(3) == [3] and parallel.is_first()
    optimizer_step(weight, adamw(weight.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=False), 0.1, None)
