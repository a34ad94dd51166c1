"""Teacher and student side by side: strips of pictures on the way, and a table of measured results at the end."""

from __future__ import annotations

import copy
import math
import statistics
import time
from contextlib import AbstractContextManager

import torch
from PIL import Image

from minidistill.data.scenes import held_out_captions
from minidistill.distill.block_removal import format_count
from minidistill.distill.probes import Probe, distance_to_teacher, make_probes
from minidistill.metrics.scene_judge import score
from minidistill.models.unet import UNet, count_macs
from minidistill.pipeline import Pipeline
from minidistill.training.batches import Batches
from minidistill.training.log import format_table
from minidistill.training.memory import on_device
from minidistill.training.run_folder import RunFolder
from minidistill.training.strips import draw, drawing, save_strip
from minidistill.weights.files import read_json, write_json

SHOWN = 8  # pictures in a strip
STEPS, SEED = 25, 0  # of every picture made here
PROBES = 64  # noisy latents, at least, on which outputs are compared


class Comparison:
    """What a distillation run shows of itself. Always the same captions and noise, so that pictures compare."""

    def __init__(
        self,
        run: RunFolder,
        teacher: Pipeline,
        student: UNet,
        batches: Batches,
        judged: int,
        guidance: float,
        autocast: AbstractContextManager,
    ) -> None:
        """judged: how many held-out captions of the scenes to judge; 0 if the data are not the scenes.

        autocast: the precision that latents are sampled in, as they are in training; the VAE keeps its own.
        """
        self.run, self.teacher, self.batches, self.judged = run, copy.copy(teacher), batches, judged
        self.guidance, self.autocast = guidance, autocast
        for network in batches.resting:  # from now on they are needed for pictures only, which fetch them
            network.to("cpu")
        self.student = copy.copy(teacher)
        self.student.unet = student
        self.captions = held_out_captions(SHOWN) if judged else batches.captions(SHOWN)
        self.probes: list[Probe] = []
        self.teacher_row: list[Image.Image] = []
        self.file = run.path / "results.json"
        self.results = read_json(self.file) if self.file.exists() else {}

    def look(self, step: int) -> None:
        """Write samples/step-NNNNNN.png, the teacher's pictures above the student's."""
        with drawing(f"the student of step {step}"):
            row = self._pictures(self.student, self.captions)
        self._save(step, row)

    def measure(self, name: str, step: int) -> None:
        """Measure the student under `name`, and the teacher if it is not yet, kept in results.json; and look."""
        if "teacher" not in self.results:
            self.results["teacher"], self.teacher_row = self._measure(self.teacher)
        with drawing(f"the student of step {step}"):
            self.results[name], row = self._measure(self.student)
        write_json(self.file, self.results)
        self._save(step, row)

    def table(self) -> str:
        """All that was measured, a row for each model."""
        rows = [("", "parameters", "MACs", "ms a call", "off the teacher", *(["all right"] if self.judged else []))]
        for name, result in self.results.items():
            row = [
                name,
                format_count(result["parameters"]),
                format_count(result["macs"]),
                f"{result['ms_per_call']:.1f}",
                f"{result['distance_to_teacher']:.4f}",
            ]
            if self.judged:
                row.append(f"{result['judge']['all']:.0%}")
            rows.append(tuple(row))
        return format_table(rows)

    def _pictures(self, pipe: Pipeline, captions: list[str]) -> list[Image.Image]:
        with on_device(self.batches.resting, pipe.device):
            return draw(pipe, captions, self.batches.size, SEED, STEPS, self.guidance, self.autocast)

    def _save(self, step: int, row: list[Image.Image]) -> None:
        self.teacher_row = self.teacher_row or self._pictures(self.teacher, self.captions)
        save_strip(self.run.strip(step), [self.teacher_row, row], self.captions, ["teacher", f"student, step {step}"])

    def _measure(self, pipe: Pipeline) -> tuple[dict, list[Image.Image]]:
        """What results.json says of a model, and its pictures for a strip."""
        if not self.probes:  # of samples that no run trains on: negative numbers
            self.probes = make_probes(self.batches, range(-math.ceil(PROBES / self.batches.batch_size), 0))
        probe = self.probes[0]
        height, width = probe.x_t.shape[-2:]
        result = {
            "parameters": sum(p.numel() for p in pipe.unet.parameters()),
            "macs": count_macs(pipe.unet, height, width, probe.context.shape[1])["conv_linear"],
            "ms_per_call": milliseconds(pipe.unet, probe),
            "distance_to_teacher": distance_to_teacher(pipe.unet, self.probes),
        }
        captions = held_out_captions(max(SHOWN, self.judged)) if self.judged else self.captions
        pictures = self._pictures(pipe, captions)
        if self.judged:
            result["judge"] = score(pictures[: self.judged], captions[: self.judged])
        return result, pictures[:SHOWN]


@torch.no_grad()
def milliseconds(unet: UNet, probe: Probe, rounds: int = 7) -> float:
    """Median time of one U-Net call on a probe. Timings on a busy machine compare only within one run."""
    x, context = probe.x_t.to(unet.dtype), probe.context.to(unet.dtype)
    times = []
    for _ in range(rounds + 2):  # the first two warm up
        if x.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        unet(x, probe.t, context, probe.added_cond)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[2:])
