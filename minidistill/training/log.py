"""What a run reports: metrics.jsonl for plots, one line for people, and the loss by timestep.

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

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from minidistill.errors import InputError
from minidistill.training import parallel
from minidistill.weights.files import atomic_path, cannot_write

# The entries of a metrics line that are not loss parts.
NOT_LOSSES = ("step", "lr", "grad_norm", "ms_per_step", "loss_by_timestep")


def bin_by_timestep(
    per_sample_loss: Tensor, t: Tensor, num_train_timesteps: int = 1000, bins: int = 10
) -> dict[str, float]:
    """Mean loss (B,) in equal bins of the timestep t (B,): {"0-99": 0.8, "100-199": 0.4, ...}; empty bins are absent.

    The mean over all timesteps hides the one whose loss is high: high t is structure, low t is texture.
    """
    index = t.long() * bins // num_train_timesteps
    means = {}
    for i in index.unique().tolist():
        low, high = (-(-k * num_train_timesteps // bins) for k in (i, i + 1))  # rounded up
        means[f"{low}-{high - 1}"] = per_sample_loss[index == i].double().mean().item()
    return means


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line torn by a kill is left out. InputError names a damaged one."""
    if not Path(path).exists():
        return []
    entries = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], start=1):
        try:
            entries.append(_checked(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is damaged in line {number}: delete that line") from error
    return entries


def _checked(entry: Any) -> dict[str, Any]:
    """A line of metrics.jsonl. ValueError: it is not one."""
    values = [entry.get("loss_by_timestep") or {}, entry] if isinstance(entry, dict) else []
    numbers = [v for part in values if isinstance(part, dict) for k, v in part.items() if k != "loss_by_timestep"]
    is_number = [v is None or (type(v) in (int, float) and math.isfinite(v)) for v in numbers]
    if not (values and isinstance(values[0], dict) and type(entry.get("step")) is int and all(is_number)):
        raise ValueError("not an object of numbers with a step")
    return entry


class MetricsLog:
    """Means since the last line, written and printed every `every` optimizer steps and at the last one.

    When a run is resumed at `start`, lines past `start` are dropped: those steps are done again. The first mean after
    that covers the steps since `start` only.
    """

    def __init__(
        self, path: str | Path, total: int, every: int = 10, start: int = 0, num_train_timesteps: int = 1000
    ) -> None:
        self.path, self.total, self.every, self.num_train_timesteps = Path(path), total, every, num_train_timesteps
        if parallel.is_first():
            kept = [line for line in read_metrics(path) if line["step"] <= start]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = (self.path if parallel.is_first() else Path(os.devnull)).open("a", encoding="utf-8")
        self._last = start
        self._clear()

    def add(
        self, losses: Mapping[str, Tensor | float], per_sample_loss: Tensor | None = None, t: Tensor | None = None
    ) -> None:
        """Add one micro-batch: each loss part by its name, their total as "loss"; (B,) losses with their timesteps.

        Tensors stay where they are and are read only when a line is written, so that a GPU need not wait.
        """
        if clash := set(losses) & set(NOT_LOSSES):
            raise ValueError(f"a loss part cannot be named {sorted(clash)[0]}")
        for name, value in losses.items():
            self._sums[name] += _double(value) if isinstance(value, Tensor) else value
            self._counts[name] += 1
        if per_sample_loss is not None and t is not None:
            self._by_sample.append((per_sample_loss.detach(), t.detach()))

    def end_step(self, step: int, *, lr: float, grad_norm: Tensor | float) -> None:
        """Optimizer step number `step` is done, with this learning rate and gradient norm. InputError: a full disk."""
        if step % self.every and step != self.total:
            return
        losses, by_sample = self._means()
        ms = 1000 * (time.perf_counter() - self._clock) / max(1, step - self._last)
        line: dict[str, Any] = {"step": step, **losses, "lr": lr, "grad_norm": float(grad_norm), "ms_per_step": ms}
        if by_sample:
            loss, t = (torch.cat(tensors) for tensors in zip(*by_sample, strict=True))
            line["loss_by_timestep"] = bin_by_timestep(loss, t, self.num_train_timesteps)
        try:
            self._file.write(json.dumps(_finite_or_null(line)) + "\n")
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.close()  # which tries once more to write
            raise cannot_write(self.path, error) from error
        print(format_line(step, self.total, losses, ms), flush=True)
        self._last = step
        self._clear()

    def _means(self) -> tuple[dict[str, float], list[tuple[Tensor, Tensor]]]:
        """The mean of each loss part over all processes, and the losses of their samples with the timesteps."""
        own = {name: (float(total), self._counts[name]) for name, total in self._sums.items()}
        samples = [(loss.cpu(), t.cpu()) for loss, t in self._by_sample]
        found = parallel.gather((own, samples))
        names = dict.fromkeys(name for parts, _ in found for name in parts)
        pairs = {name: [parts[name] for parts, _ in found if name in parts] for name in names}
        means = {name: sum(total for total, _ in of) / sum(count for _, count in of) for name, of in pairs.items()}
        return means, [pair for _, some in found for pair in some]

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """What happens inside does not count as time per step."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._clock += time.perf_counter() - before

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _clear(self) -> None:
        self._sums: dict[str, Any] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._by_sample: list[tuple[Tensor, Tensor]] = []
        self._clock = time.perf_counter()


def format_line(step: int, total: int, losses: Mapping[str, float], ms: float) -> str:
    """step 0120/0300 | loss 0.412 (task 0.081 out 0.019 feat 0.312) | 371.2 ms/step | eta 01:06"""
    width = max(4, len(str(total)))
    parts = " ".join(f"{name} {value:.3g}" for name, value in losses.items() if name != "loss")
    if "loss" in losses:
        parts = f"loss {losses['loss']:.3g}" + (f" ({parts})" if parts else "")
    eta = tqdm.format_interval((total - step) * ms / 1000)
    return f"step {step:0{width}}/{total:0{width}} | {parts} | {ms:.1f} ms/step | eta {eta}"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length, the first the heading -> a text table: names on the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        figures = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:{widths[0]}}", *figures]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _double(value: Tensor) -> Tensor:
    """float64, without the graph; on the CPU where mps is the device, which has no float64."""
    return (value.detach().cpu() if value.device.type == "mps" else value.detach()).double()


def _finite_or_null(value: Any) -> Any:
    """JSON has no nan or inf (fp16 gradient norms have, on the steps that the loss scaler skips)."""
    if isinstance(value, dict):
        return {key: _finite_or_null(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
