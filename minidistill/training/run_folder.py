"""The folder of one run, and how it survives a kill at any moment.

    config.json                    all settings, resolved
    metrics.jsonl                  one JSON line per logged step (log.py)
    curves.png                     drawn from metrics.jsonl (curves.py)
    samples/                       fixed-seed image grids
    checkpoints/step-000300/       state.safetensors   tensors
                                   state.json          step, meta

A checkpoint is written into a hidden folder beside its place, flushed to the disk and then renamed: a folder with its
name is complete. Older ones are deleted only after that. Of a damaged one reading takes the one before.

A run that was resumed ends with the same bits as one that was not on a CPU. On a GPU it does with --deterministic only:
some CUDA kernels add in no fixed order.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from minidistill.errors import InputError
from minidistill.training import parallel
from minidistill.training.log import read_metrics
from minidistill.training.state import Part, pack, unpack
from minidistill.weights import files
from minidistill.weights.files import read_json, read_safetensors, some, to_disk, write_json, write_safetensors
from minidistill.weights.folders import SHIPPED

if sys.platform != "win32":  # where folders cannot be locked
    import fcntl

# What may differ when a run is resumed: how long, how often it reports, where it runs, in which precision its result is
# written, where its model and its images are (`weights` and `examples` say which they are). Anything else changes the
# result. (With a cosine schedule, new `steps` bend the learning rate from there on; every change is printed.)
REPORTING = ("log_every", "sample_every", "checkpoint_every", "keep_checkpoints")
PLACES = ("device", "teacher", "model", "data", "split", "caption_column", "push_to_hub", "private")
MAY_CHANGE = ("steps", "dtype", "parallel", "compile", *REPORTING, *PLACES)
SOURCES = ("teacher", "start_from", "model", "data")
NOT_COMPARED = ("out", "resume", "dry_run")
SIGNS_OF_A_RUN = ("config.json", "metrics.jsonl", "checkpoints", "samples", "curves.png", "model_index.json")


class Checkpoint(NamedTuple):
    """What `latest_checkpoint` found; state.unpack puts it back."""

    step: int  # optimizer steps done
    tensors: dict[str, Tensor]  # on the CPU, memory-mapped
    meta: dict[str, Any]


class RunFolder:
    """Paths and checkpoints of one run: `RunFolder.find(...)`, then `begin`.

    The folder is locked from `find` on, until the process ends or finds another run.
    """

    _locks: ClassVar[dict[Path, int]] = {}  # of this process: folder -> file descriptor

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.curves = self.path / "curves.png"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"

    @classmethod
    def find(cls, out: str | Path, config: Mapping[str, Any], resume: bool = False) -> RunFolder:
        """Check that a run can start or be resumed in `out`; nothing is written.

        Without `resume`, `out` must not hold a run or a model. With it, `out` must hold a run whose config.json equals
        `config` but for the fields in MAY_CHANGE; if it was killed before its first checkpoint it starts at step 0,
        which is printed.

        Raises:
            InputError: otherwise. (A mistyped --out with --resume must not train for a week from nothing.)
        """
        run = cls(out)
        if run.path.exists() and not run.path.is_dir():
            raise InputError(f"{out} is a file, --out takes a folder")
        data = config.get("data") or "scenes"
        if data != "scenes" and Path(data).expanduser().resolve() == run.path.resolve():
            raise InputError(f"--out {out} is the folder of --data: take another --out")
        if resume:
            if not run.config.is_file():
                raise InputError(f"nothing to resume in {out}: check --out, or start without --resume")
            run.lock()
            stored = read_json(run.config)
            _check_same_run(out, stored, _as_stored(config))
            done = max(map(_step_of, run._checkpoint_paths()), default=0)
            if done > config.get("steps", done):
                raise InputError(f"--steps {config['steps']}: the run in {out} has done {done} steps already")
            logged = max((line["step"] for line in read_metrics(run.metrics)), default=0)
            steps, every = (stored.get(name, -1) for name in ("steps", "checkpoint_every"))
            if not type(steps) is type(every) is int:
                raise InputError(f"{run.config}: steps and checkpoint_every must be whole numbers")
            is_finished = run.image_grid(steps).is_file()  # drawn after the last checkpoint
            if not done and (logged > every >= 0 or is_finished):
                lost = f"the run in {out} has logged {logged} steps, and its checkpoints are lost"
                raise InputError(f"{lost}: put one back into {run.checkpoints}, or take another --out")
            if not done:
                print(f"{out} holds no checkpoint yet: starting at step 0", flush=True)
        elif found := [name for name in SIGNS_OF_A_RUN if (run.path / name).exists()]:
            raise InputError(f"{out} is in use ({found[0]} exists): add --resume to continue it, or take another --out")
        return run

    def begin(self, config: Mapping[str, Any]) -> RunFolder:
        """Write config.json and make the folders; itself. InputError: the operating system refuses."""
        parallel.wait()  # until all have seen what was there before
        if not parallel.is_first():
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            self._remove_leftovers()  # first: they may be what fills the disk
            for path in files.torn_files(self.path):
                path.unlink()
            if not self._checkpoint_paths():  # starting at step 0: nothing of what is logged is kept
                self.metrics.unlink(missing_ok=True)
            write_json(self.config, _as_stored(config))  # then: what has it can be resumed, whatever else is missing
            self.samples.mkdir(exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write a run into {self.path}: {error.strerror}; take another --out") from error
        return self

    def image_grid(self, step: int) -> Path:
        """Where the image grid of a step is, or will be."""
        return self.samples / f"step-{step:06d}.png"

    def save(self, step: int, parts: Mapping[str, Part], keep: int = 2) -> None:
        """Write checkpoints/step-NNNNNN, the parts of a run (state.pack), then delete all but the last `keep`."""
        found, meta = pack(parts)
        tensors = {}
        for name, tensor in found.items():
            whole = parallel.full(tensor)  # one at a time, and all processes take part
            if parallel.is_first():
                tensors[name] = whole.cpu()
        if not parallel.is_first():
            return
        final = self.checkpoints / f"step-{step:06d}"
        with files.writing(final):
            self._replace(final, {"step": step, "meta": meta}, tensors, keep)

    def _replace(self, final: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor], keep: int) -> None:
        """What `save` does, where the system may refuse."""
        self._remove_leftovers()
        temporary = self.checkpoints / f".writing-{final.name}"
        write_safetensors(temporary / "state.safetensors", tensors)
        write_json(temporary / "state.json", state)
        if final.exists():  # damaged, or saved again: set aside, but not yet deleted
            final.rename(self.checkpoints / f".old-{final.name}")
        temporary.rename(final)
        to_disk(self.checkpoints)
        paths = self._checkpoint_paths()
        kept = [path for path in paths if _step_of(path) <= _step_of(final)][-max(1, keep) :]
        for path in paths:  # those after `step` are damaged: the run was resumed before them
            if path not in kept:  # renamed first: half a checkpoint must not have the name of a complete one
                path.rename(self.checkpoints / f".old-{path.name}")
        self._remove_leftovers()

    def restore(self, parts: Mapping[str, Part]) -> int:
        """Put the newest undamaged checkpoint into freshly built parts. Returns its step; 0 if there is none."""
        checkpoint = self.latest_checkpoint()
        if checkpoint is None:
            return 0
        unpack(checkpoint.tensors, checkpoint.meta, parts)
        print(f"resuming at step {checkpoint.step}", flush=True)
        return checkpoint.step

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that is undamaged; None if there are none. Prints which damaged ones it skips.

        InputError: all are damaged. (Starting at step 0 would replace what the run has made.)
        """
        for path in reversed(self._checkpoint_paths()):
            try:
                state = read_json(path / "state.json")
                if type(state.get("step")) is not int or not isinstance(state.get("meta"), dict):
                    raise InputError("its state.json has no step, or no meta")
                return Checkpoint(state["step"], read_safetensors(path / "state.safetensors"), state["meta"])
            except InputError as error:
                print(f"{path} is damaged, trying the one before it ({error})", flush=True)
        if self._checkpoint_paths():
            raise InputError(f"all of {self.checkpoints} is damaged: copy a whole one there, or take another --out")
        return None

    def lock(self) -> None:
        """Keep other processes out of the folder; the system unlocks it when this one ends, however it ends.

        InputError: another process has it. OSError: there is no such folder.
        """
        path = self.path.resolve()
        if sys.platform == "win32" or path in RunFolder._locks or not parallel.is_first():
            return
        while RunFolder._locks:
            os.close(RunFolder._locks.popitem()[1])
        RunFolder._locks[path] = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(RunFolder._locks[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(RunFolder._locks.pop(path))
            raise InputError(f"another process is writing {self.path}: wait for it, or take another --out") from error
        except OSError as error:  # NFS, say
            warnings.warn(f"{self.path} cannot be locked ({error}): let no other process write into it", stacklevel=2)

    def _checkpoint_paths(self) -> list[Path]:
        """Folders named step-NNNNNN, oldest first."""
        found = [p for p in self.checkpoints.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name) and p.is_dir()]
        return sorted(found, key=_step_of)

    def _remove_leftovers(self) -> None:
        """Delete what is set aside, and what a killed run left half written."""
        for path in (*self.checkpoints.glob(".writing-*"), *self.checkpoints.glob(".old-*")):
            shutil.rmtree(path)


def _check_same_run(out: str | Path, stored: dict[str, Any], config: dict[str, Any]) -> None:
    def describe(name: str) -> str:
        new, old = (json.dumps(c[name]) if name in c else "not set" for c in (config, stored))
        return f"{name} {new} (was {old})"

    if other := (stored.keys() ^ config.keys()) - {*MAY_CHANGE, *NOT_COMPARED}:
        raise InputError(f"cannot resume {out}: it is a run of another command or version, by {some(other, 3)}")
    missing = object()
    names = [name for name in dict.fromkeys([*config, *stored]) if name not in NOT_COMPARED]
    changed = [name for name in names if stored.get(name, missing) != config.get(name, missing)]
    if refused := [describe(name) for name in changed if name not in MAY_CHANGE]:
        raise InputError(
            f"cannot resume {out} under other settings: {', '.join(refused)}; "
            "give it the same flags, model and images, or start anew in another --out"
        )
    for name in changed:
        print(f"resuming with {describe(name)}", flush=True)


def _as_stored(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as config.json has them: tuples are lists, paths of this machine do not depend on the current folder."""
    stored = json.loads(json.dumps(config))
    for name in SOURCES:
        path = os.path.expanduser(stored.get(name) or "")
        if path not in ("scenes", *SHIPPED) and os.path.exists(path):
            stored[name] = os.path.abspath(path)
    return stored


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
