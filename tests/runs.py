"""What the tests of training commands share: a command run in this process, and what it leaves behind."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minidistill.cli import run_command

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def exit_code(module, *words: object, main: str = "main") -> int:
    """Run a command, such as the module train_kd, in this process."""
    with pytest.raises(SystemExit) as info:
        run_command(
            getattr(module, main),
            module.Config,
            getattr(module, "PRESETS", None),
            prog="prog",
            argv=list(map(str, words)),
        )
    return info.value.code


def one_line(capsys) -> str:
    """The error that was printed, which must be one line."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def checkpoint(run: Path, step: int = 4, part: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, or those of one part ("student", "ema", "optimizer"), by their own names."""
    tensors = load_file(run / f"checkpoints/step-{step:06d}/state.safetensors")
    return {name.removeprefix(f"{part}/"): tensor for name, tensor in tensors.items() if name.startswith(part)}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max((a[name] - b[name]).abs().max().item() for name in a)


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "ms_per_step"} for line in lines]


def results(run: Path) -> dict[str, dict]:
    """results.json without what the clock decides."""
    return {
        name: {k: v for k, v in row.items() if k != "ms_per_call"} for name, row in read(run / "results.json").items()
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_files(one: Path, other: Path, names) -> None:
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
