"""Faults: kills and signals at any moment, a full disk, a lost process, lost images. Nothing is damaged, and --resume
ends in the bits of the run that was left alone.

    python tests/test_faults.py --kills 50      kills at 50 random moments, of which it prints a table

A moment is the n-th time that the command opens, renames or removes a file of its run, and a random time more. The
commands run in forks of one process that has imported torch, which takes longer than a whole tiny run.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import CAPTIONS, TOKENS, save_images
from runs import exit_code, metrics, one_line, results

from minidistill import pipeline, report, train_kd, train_lightning
from minidistill.cli import run_command
from minidistill.diffusion.schedule import ScheduleConfig
from minidistill.distill import players
from minidistill.distill.lightning import PLANS, Phase, Stage
from minidistill.errors import INTERRUPTED, TERMINATED
from minidistill.models.clip import CLIPTextConfig, CLIPTextModel
from minidistill.models.tokenizer import train_bpe
from minidistill.models.unet import UNet
from minidistill.models.unet_config import UNetConfig
from minidistill.models.vae import AutoencoderKL, VAEConfig
from minidistill.pipeline import Pipeline
from minidistill.training import batches
from minidistill.training.log import MetricsLog
from minidistill.training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL, which Windows does not have")
USUAL = "--batch-size 2 --log-every 1 --checkpoint-every 1 --sample-every 2 --device cpu"
KD = "--remove mid --steps 4 --accumulate 2 --warmup 0 --learning-rate 1e-3 --precision bf16"
COMMANDS = {
    "train_kd": (train_kd, f"{KD} {USUAL}"),
    "train_lightning": (train_lightning, f"--plan faults --guidance 2 --lora-rank 2 --precision fp32 {USUAL}"),
}
GAN = {"adversarial": 1, "conditional": False, "r1": 1.0, "head_start": 1}
PLAN = (
    Stage(4, 8, (Phase(2, 1e-3, mse=1),)),
    Stage(2, 4, (Phase(2, 1e-3, lora=True, **GAN), Phase(2, 1e-3, mse=1, **GAN))),
)
WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
ROW = "{:15}  {:7}  {:57}  {:>10}  {}"
IN_A_ROW = 3  # interruptions of one run, at most
ENDS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: TERMINATED, signal.SIGINT: INTERRUPTED}


def quicken(replace: Callable[[object, str, object], object]) -> None:
    """Leave out what takes most of a tiny run: counting, timing, many images and sampling steps."""
    replace(pipeline, "STEPS", 2)
    replace(report, "SHOWN", 2)
    replace(report, "count_macs", lambda *_: {"conv_linear": 0})
    replace(report, "milliseconds", lambda *_: 0.0)
    replace(train_kd, "PROBES", 4)
    replace(train_kd.block_removal, "removal_rows", lambda *_: [("removed",), ("",)])
    for name, value in {"PAIRS": 4, "COMPARED": 1, "REFERENCE": 2}.items():
        replace(train_lightning, name, value)
    replace(players, "CHANCES", 1)
    PLANS["faults"] = PLAN


def save_teacher(folder: Path) -> None:
    """A pipeline of two small stages."""
    torch.manual_seed(0)
    tokenizer = train_bpe(CAPTIONS, vocab_size=600, max_length=TOKENS)
    text = CLIPTextConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=TOKENS, bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos,
    )  # fmt: skip
    unet = UNetConfig(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 8, 8), norm_num_groups=4, sample_size=32))
    Pipeline(UNet(unet), vae, [CLIPTextModel(text)], [tokenizer], ScheduleConfig()).save(folder)


# what a run leaves behind, compared with the run that was left alone


def differences(run: Path, whole: Path, finished: bool) -> list[str]:
    """Files under their final names that are not as in the whole run; of a finished one, what is missing or left."""
    wrong, found = [], {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
    last = max((whole / "checkpoints").iterdir()).name
    for name in sorted(found):
        unfinished = name.parts[0] in folders_of(whole) and not (run / name.parts[0] / "model_index.json").exists()
        if any(part.startswith(".") for part in name.parts):
            wrong += [f"{name} is left over"] * finished
        elif name.name == "config.json" and len(name.parts) == 1:
            json.loads((run / name).read_text())
        elif str(name) == "metrics.jsonl":
            lines = [json.loads(line) for line in (run / name).read_text().split("\n")[:-1]]
            lines = [{key: value for key, value in line.items() if key != "ms_per_step"} for line in lines]
            wrong += [str(name)] * (lines != metrics(whole)[: None if finished else len(lines)])
        elif str(name) == "results.json":
            ours, theirs = results(run), results(whole)
            wrong += [str(name)] * (ours != (theirs if finished else {key: theirs.get(key) for key in ours}))
        elif not (whole / name).is_file():
            wrong.append(f"{name}, of which the whole run has none")
        elif name == Path(f"samples/{last}.png") and not finished:
            continue  # train_lightning draws it twice: first the last student, then all of them
        elif not unfinished and content(run / name) != content(whole / name):
            wrong.append(str(name))
    every = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    needed = {name for name in every if name.parts[0] != "checkpoints" or name.parts[1] == last}
    return wrong + [f"{name} is missing" for name in sorted(needed - found) if finished]


def content(path: Path) -> object:
    """All bytes of a file; of a .safetensors file the header as JSON: its package writes metadata in a random order."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def folders_of(run: Path) -> list[str]:
    """The students in a run folder."""
    return [path.parent.name for path in run.glob("*/model_index.json")]


def newest(run: Path) -> int:
    """The step of the newest checkpoint; 0: there is none."""
    return max((int(path.name[5:]) for path in run.glob("checkpoints/step-*")), default=0)


def doing(run: Path) -> str:
    """What a command was doing when it ended, as its files show."""
    if not (run / "config.json").exists():
        return "starting"
    if saved := [path.name for path in run.glob("checkpoints/.writing-*")]:
        return f"saving {saved[0].removeprefix('.writing-')}"
    if torn := [path for path in run.rglob(".*") if re.match(r"\.\d+\.", path.name)]:
        return f"writing {torn[0].parent.relative_to(run) / torn[0].name.split('.', 2)[2]}"
    begun = [path.parent for path in run.glob("*/unet") if not (path.parent / "model_index.json").exists()]
    if begun:
        return f"writing {begun[0].name}"
    return f"after step {len(metrics(run)) if (run / 'metrics.jsonl').exists() else 0}"


# kills


class Killer:
    """Starts commands, in forks of this process, and kills them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.same, self.numbers = folder, [], count()
        save_teacher(folder / "teacher")
        save_images(folder / "images")

    def start(self, name: str, out: Path, *words: object, moment: int = 0, wait: float = 0.0, sign: int = 0):
        """Run a command until the moment, or to its end -> (exit code, file operations, what it printed)."""
        printed, (reads, writes) = out.with_suffix(".txt"), os.pipe()
        child = os.fork()
        if child == 0:
            self.command(name, out, words, moment, writes, printed)
        os.close(writes)
        with os.fdopen(reads, "rb", buffering=0) as told:
            operations = told.read(9)
            if operations == b"now":
                time.sleep(wait)
                os.kill(child, sign)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, 0 if operations in (b"now", b"") else int(operations), printed.read_text()

    def command(self, name: str, out: Path, words: tuple, moment: int, writes: int, printed: Path) -> None:
        """What `python -m minidistill.train_kd` and so on do."""
        file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        for stream in (1, 2):
            os.dup2(file, stream)
        seen = [0]

        def watch(event: str, args: tuple) -> None:
            if event in WATCHED and str(args[0]).startswith(f"{out}/"):
                seen[0] += 1
                if seen[0] == moment:
                    os.write(writes, b"now")

        sys.addaudithook(watch)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell turns off in the background
        module, flags = COMMANDS[name]
        given = ["--teacher", self.folder / "teacher", "--data", self.folder / "images", "--out", out]
        code = 1
        try:
            argv = [*map(str, [*given, *flags.split(), *words])]
            run_command(module.command, module.Config, module.PRESETS, prog=name, argv=argv)
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        if seen[0] < moment or not moment:
            os.write(writes, b"%d" % seen[0])
        os._exit(code)

    def run(self, signs: list[int], seed: int) -> bool:
        """Interrupt runs by these signals, and compare what they end in -> whether all is the same."""
        draw, wholes, left = random.Random(seed), {}, list(signs)
        for name in COMMANDS:
            began, out = time.perf_counter(), self.folder / f"{name}-whole"
            code, operations, printed = self.start(name, out, "--keep-checkpoints", 99)
            assert code == 0, printed
            wholes[name] = out, operations, (time.perf_counter() - began) / operations
            print(f"{name}: {operations} file operations, {time.perf_counter() - began:.1f} s", flush=True)
        print(ROW.format("command", "signal", "while", "resumed at", "same bits"), flush=True)
        for name in (list(COMMANDS)[number % len(COMMANDS)] for number in count()):
            if not left:
                break
            self.interrupt(name, *wholes[name], left, draw)
        return all(self.same)

    def interrupt(self, name: str, whole: Path, operations: int, pace: float, left: list[int], draw: random.Random):
        """One run: interrupted up to IN_A_ROW times, resumed each time, compared after each and at its end."""
        out, rows, code = self.folder / f"{name}-{next(self.numbers)}", [], 1
        while code:
            resume = ["--resume"] if (out / "config.json").exists() else []
            moment = {}
            if left and len(rows) < IN_A_ROW:
                wait = draw.choice([0, pace]) * draw.random()
                moment = {"moment": draw.randint(1, operations // 2), "wait": wait, "sign": left[0]}
            code, _, printed = self.start(name, out, *resume, **moment)
            told = re.search(r"(?:resuming|: starting) at step (\d+)", printed)
            if rows and told:
                rows[-1][3] = told[1]
                assert int(told[1]) == rows[-1][5], printed
            assert "damaged" not in printed and "Traceback" not in printed, printed
            if code:
                assert moment and code == ENDS[left[0]], printed
                wrong = differences(out, whole, finished=False) if out.exists() else []
                if code > 0 and (out / "config.json").exists():
                    assert f"To resume from the last checkpoint: {name} --out {out} --resume\n" in printed, printed
                when = "starting again, " * bool(resume and not told) + doing(out)
                rows.append([name, signal.Signals(left.pop(0)).name, when, "-", ", ".join(wrong), newest(out)])
        wrong = differences(out, whole, finished=True)
        for command, sign, when, step, changed, _ in rows:
            self.same.append(not changed and not wrong)
            print(ROW.format(command, sign, when, step, changed or ", ".join(wrong) or "yes"), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    torch.set_num_threads(1)
    quicken(setattr)
    others = [signal.SIGTERM, signal.SIGINT] * max(1, words.kills // 10)
    with tempfile.TemporaryDirectory() as folder:
        return 0 if Killer(Path(folder)).run([signal.SIGKILL] * words.kills + others, words.seed) else 1


@needs_fork
def test_runs_killed_at_random_moments_end_in_the_same_bits():
    words = [sys.executable, __file__, "--kills", "5"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=ENV)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("SIGKILL .* yes\n", done.stdout)) == 5 and "SIGTERM" in done.stdout, done.stdout


# what is told in one line


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    save_teacher(folder := tmp_path_factory.mktemp("faults") / "teacher")
    return folder


@pytest.fixture
def train(teacher, images, monkeypatch):
    """train(run folder, *words) -> exit code of train_kd, which reads each image when it needs it."""
    quicken(monkeypatch.setattr)
    monkeypatch.setattr(batches, "CACHE_LIMIT", 0)

    def run(out: Path, *words: object) -> int:
        given = ("--teacher", teacher, "--data", images, "--out", out, *f"{KD} {USUAL}".split(), *words)
        return exit_code(train_kd, *given, main="command")

    return run


@pytest.fixture
def whole(train, tmp_path):
    """A run that was left alone."""
    assert train(tmp_path / "whole", "--keep-checkpoints", 99) == 0
    return tmp_path / "whole"


@contextlib.contextmanager
def no_room():
    """Whatever writes to a file is refused by the system: a file may have no bytes."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def without_room(owner: object, name: str, call: int):
    """The function of this name, which finds no room when it is called for the `call`-th time."""
    original, calls = getattr(owner, name), count(1)

    def called(*args, **settings):
        with no_room() if next(calls) == call else contextlib.nullcontext():
            return original(*args, **settings)

    return called


def test_a_full_disk_ends_in_one_line_and_spoils_nothing(train, whole, tmp_path, monkeypatch, capsys):
    run, words = tmp_path / "run", []
    for owner, name, call, file, step in (
        (RunFolder, "begin", 1, "config.json", 0),
        (MetricsLog, "end_step", 2, "metrics.jsonl", 1),
        (report, "save_image_grid", 1, "samples/step-000002.png", 1),
        (RunFolder, "save", 2, "checkpoints/.writing-step-000003/state.safetensors", 2),
        (Pipeline, "save", 1, "student/unet/diffusion_pytorch_model.safetensors", 4),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, without_room(owner, name, call))
            assert train(run, *words) == 2
        words = ["--resume"] if step else []
        way = f"To resume from the last checkpoint: prog --out {run} --resume" if step else "run the same command again"
        assert f"error: cannot write {run}/{file}: File too large; make room. " in (told := one_line(capsys)), told
        assert way in told and newest(run) == step
        assert not differences(run, whole, finished=False) and not (run / "student/model_index.json").exists()
    assert train(run, "--resume") == 0
    assert not differences(run, whole, finished=True)


@pytest.mark.parametrize("change", ["deleted", "cut short"])
def test_an_image_lost_while_training_is_named_and_the_run_goes_on_when_it_is_back(
    train, whole, images, tmp_path, monkeypatch, capsys, change
):
    run, data = tmp_path / "run", shutil.copytree(images, tmp_path / "data")
    end_step = MetricsLog.end_step

    def lose(self, step: int, **about) -> None:
        end_step(self, step, **about)
        for file in [*data.glob("*.jpg"), *data.glob("*.png")] if step == 2 else []:
            file.unlink() if change == "deleted" else os.truncate(file, 100)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "end_step", lose)
        assert train(run, "--data", data) == 2
    what = "was deleted" if change == "deleted" else r"was changed, and cannot be read now \(.*\)"
    pattern = rf"error: {data}/\d\.(jpg|png) {what} since the command began: put it back, or an empty file for which "
    pattern += rf"another image stands in\. To resume from the last checkpoint: prog --out {run} --resume\n"
    assert re.fullmatch(pattern, one_line(capsys)) and newest(run) >= 2
    assert not differences(run, whole, finished=False)
    shutil.copytree(images, data, dirs_exist_ok=True)
    assert train(run, "--data", data, "--resume") == 0
    assert differences(run, whole, finished=True) == ["student/README.md"], "which names the folder of images"


WORKER = """
import os, signal, sys
sys.path.insert(0, "tests")
import test_faults as faults

def end_step(log, step, of=faults.MetricsLog.end_step, **about):
    of(log, step, **about)
    if (step, os.environ["RANK"]) == (2, "1"):
        os.kill(os.getpid(), signal.SIGKILL)

faults.quicken(setattr)
faults.MetricsLog.end_step = end_step
faults.run_command(faults.train_kd.command, faults.train_kd.Config, prog="train_kd")
"""


@needs_fork
def test_a_run_of_two_processes_ends_when_one_is_lost_and_is_resumed(train, teacher, images, tmp_path, capsys):
    (tmp_path / "worker.py").write_text(WORKER)
    run, words = tmp_path / "run", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words += [tmp_path / "worker.py", "--teacher", teacher, "--data", images, "--out", run, *f"{KD} {USUAL}".split()]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=ENV, timeout=300)
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr
    assert f"To resume from the last checkpoint: train_kd --out {run} --resume\n" in done.stderr, done.stderr
    assert train(run, "--resume") == 0
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4] and newest(run) == 4
    assert re.search(r"resuming at step [12]\n", capsys.readouterr().out)


if __name__ == "__main__":
    sys.exit(main())
