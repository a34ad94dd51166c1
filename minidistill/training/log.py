"""What a run says: metrics.jsonl for plots, one line for people, the loss by timestep for understanding.

    with MetricsLog(run.metrics, total=config.steps, every=config.log_every, start=step) as log:
        for step in range(start, config.steps):
            ...
            log.add({"loss": loss, "task": task, "out": out}, per_sample_loss, t)  # each micro-batch
            ...
            log.end_step(step + 1, lr=lr, grad_norm=norm)                          # each optimizer step
            with log.untimed():
                ...                                                                # samples, checkpoints

Steps in the log are optimizer steps done: the first is 1, the last is `total`.
"""

import contextlib
import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from minidistill.errors import InputError
from minidistill.weights.files import atomic_path

# The entries of a metrics line that are not loss parts.
NOT_LOSSES = ("step", "lr", "grad_norm", "ms_per_step", "loss_by_timestep")


def bin_by_timestep(
    per_sample_loss: Tensor, t: Tensor, num_train_timesteps: int = 1000, bins: int = 10
) -> dict[str, float]:
    """Mean loss in equal bins of the timestep: {"0-99": 0.8, "100-199": 0.4, ...}; empty bins are absent.

    The mean over all timesteps hides the one that goes wrong: high t is structure, low t is texture.

    Args:
        per_sample_loss: (B,)
        t: (B,), integers in 0 .. num_train_timesteps - 1; ValueError otherwise.
    """
    if per_sample_loss.shape != t.shape or t.ndim != 1:
        raise ValueError(f"expected two (B,), got {tuple(per_sample_loss.shape)} and {tuple(t.shape)}")
    if t.numel() and not (int(t.min()) >= 0 and int(t.max()) < num_train_timesteps):
        raise ValueError(f"timesteps must be in 0..{num_train_timesteps - 1}, got {int(t.min())}..{int(t.max())}")
    index = t.long() * bins // num_train_timesteps
    means = {}
    for i in index.unique().tolist():
        low, high = (-(-k * num_train_timesteps // bins) for k in (i, i + 1))  # rounded up
        means[f"{low}-{high - 1}"] = per_sample_loss[index == i].double().mean().item()
    return means


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line torn by a kill is left out. InputError names a broken one."""
    if not Path(path).exists():
        return []
    entries = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path} is damaged in line {number}: delete that line") from error
    return entries


class MetricsLog:
    """Means since the last log, every `every` optimizer steps and at the last one.

    On a terminal a progress bar shows the losses; elsewhere (a file, the log of a job) a line is printed.
    When a run goes on at `start`, lines past `start` are dropped: those steps are done again. The first mean
    after that covers the steps since `start` only.
    """

    def __init__(
        self, path: str | Path, total: int, every: int = 10, start: int = 0, num_train_timesteps: int = 1000
    ) -> None:
        self.path, self.total, self.every = Path(path), total, max(1, every)
        self.num_train_timesteps = num_train_timesteps
        _drop_lines_after(self.path, start)
        self._file = self.path.open("a", encoding="utf-8")
        # tqdm itself shows nothing on a terminal that claims to be 0 columns wide, as some containers' do.
        columns = shutil.get_terminal_size().columns
        self._bar = tqdm(total=total, initial=start, disable=None, unit="step", ncols=columns)
        self._first = self._last = start
        self._began = time.perf_counter()
        self._clear()

    def add(
        self,
        losses: Mapping[str, Tensor | float],
        per_sample_loss: Tensor | None = None,
        t: Tensor | None = None,
    ) -> None:
        """Take in one micro-batch: each loss part by its name, their total as "loss".

        Tensors stay where they are and are read only when a line is written, so that a GPU need not wait.

        Args:
            per_sample_loss: (B,), with its timesteps t (B,): for the loss by timestep.
        """
        if clash := set(losses) & set(NOT_LOSSES):
            raise ValueError(f"a loss part cannot be named {sorted(clash)[0]}")
        for name, value in losses.items():
            self._sums[name] += value.detach().double() if isinstance(value, Tensor) else value
            self._counts[name] += 1
        if per_sample_loss is not None:
            self._by_sample.append((per_sample_loss.detach(), t.detach()))

    def end_step(self, step: int, *, lr: float, grad_norm: Tensor | float) -> None:
        """Optimizer step number `step` is done, with this learning rate and gradient norm."""
        self._bar.update(1)
        if step % self.every and step != self.total:
            return
        losses = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        line: dict[str, Any] = {"step": step, **losses, "lr": lr, "grad_norm": float(grad_norm)}
        line["ms_per_step"] = 1000 * (time.perf_counter() - self._clock) / max(1, step - self._last)
        if self._by_sample:
            loss, t = (torch.cat(tensors) for tensors in zip(*self._by_sample, strict=True))
            line["loss_by_timestep"] = bin_by_timestep(loss, t, self.num_train_timesteps)
        self._file.write(json.dumps(_finite_or_null(line)) + "\n")
        self._file.flush()
        self._tell(step, losses, line["ms_per_step"])
        self._last = step
        self._clear()

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """What happens inside does not count as time per step (it does count for the eta)."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._clock += time.perf_counter() - before

    def close(self) -> None:
        self._bar.close()
        self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _clear(self) -> None:
        self._sums: dict[str, Any] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._by_sample: list[tuple[Tensor, Tensor]] = []
        self._clock = time.perf_counter()

    def _tell(self, step: int, losses: dict[str, float], ms: float) -> None:
        if self._bar.disable:
            per_step = (time.perf_counter() - self._began) / max(1, step - self._first)
            print(format_line(step, self.total, losses, ms, per_step * (self.total - step)), flush=True)
        else:
            self._bar.set_postfix_str(format_losses(losses))


def format_line(step: int, total: int, losses: Mapping[str, float], ms: float, seconds_left: float) -> str:
    """step 0120/0300 | loss 0.412 (task .081 out .019 feat .312) | 371 ms/step | eta 1.1m"""
    width = max(4, len(str(total)))
    speed = f"{ms:.0f} ms/step" if ms >= 10 else f"{ms:.1f} ms/step"
    progress = f"step {step:0{width}}/{total:0{width}}"
    return f"{progress} | {format_losses(losses)} | {speed} | eta {format_time(seconds_left)}"


def format_losses(losses: Mapping[str, float]) -> str:
    """loss 0.412 (task .081 out .019); without a total, the parts alone."""
    parts = " ".join(f"{name} {_short(value).removeprefix('0')}" for name, value in losses.items() if name != "loss")
    if "loss" not in losses:
        return parts
    return f"loss {_short(losses['loss'])}" + (f" ({parts})" if parts else "")


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length, the first the heading -> a text table: names on the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        figures = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:{widths[0]}}", *figures]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def format_time(seconds: float) -> str:
    """42s, 1.1m, 3.4h, 2.0d"""
    for limit, size, unit in ((60, 1, "s"), (3600, 60, "m"), (86400, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.{0 if unit == 's' else 1}f}{unit}"
    return f"{seconds / 86400:.1f}d"


def _short(value: float) -> str:
    size = abs(value)
    return f"{value:.3f}" if 0.0005 <= size < 10 or size == 0 else f"{value:.3g}"


def _finite_or_null(value: Any) -> Any:
    """JSON has no nan or inf (fp16 gradient norms have, on the steps that the loss scaler skips)."""
    if isinstance(value, dict):
        return {key: _finite_or_null(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
