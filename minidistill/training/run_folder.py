"""The folder of one run, and how it survives a kill at any moment.

    config.json                    all settings, resolved
    metrics.jsonl                  one JSON line per logged step (log.py)
    curves.png                     drawn from metrics.jsonl (curves.py)
    samples/                       fixed-seed image grids
    checkpoints/step-000300/       state.safetensors   tensors
                                   state.json          step, meta, the size and the SHA-256 of all of it

A checkpoint is written into a hidden folder beside its place, flushed to the disk and then renamed: what
bears its name is whole. Older ones are deleted only after that. Reading checks the hash and takes the one
before if it differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from minidistill.errors import InputError
from minidistill.training.state import Part, pack, unpack
from minidistill.weights.files import read_json, read_safetensors, write_json, write_safetensors

# What may differ when a run goes on: how long, how often it reports, where it runs. Anything else changes the
# result. (With a cosine schedule, new `steps` bend the learning rate from there on; every change is printed.)
MAY_CHANGE = (
    "steps",
    "log_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "device",
    "data",  # where the examples are: which they are (`examples`, with split and column) is compared
    "split",
    "caption_column",
    "push_to_hub",
    "private",
)
NOT_COMPARED = ("out", "resume", "dry_run")
SIGNS_OF_A_RUN = ("config.json", "metrics.jsonl", "checkpoints", "samples", "curves.png", "model_index.json")


class Checkpoint(NamedTuple):
    """What `latest_checkpoint` found; state.unpack puts it back."""

    step: int  # optimizer steps done
    tensors: dict[str, Tensor]  # on the CPU, memory-mapped
    meta: dict[str, Any]


class RunFolder:
    """Paths and checkpoints of one run: `RunFolder.find(...)`, then `begin`. Only one process of a run should write."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.curves = self.path / "curves.png"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"

    @classmethod
    def find(
        cls,
        out: str | Path,
        config: Mapping[str, Any],
        resume: bool = False,
        may_change: Collection[str] = MAY_CHANGE,
    ) -> RunFolder:
        """Check that a run can start or go on in `out`; nothing is written.

        Without `resume`, `out` must not hold a run or a model. With it, `out` must hold a run whose
        config.json equals `config` but for the fields in `may_change`; if it was killed before its first
        checkpoint it starts at step 0, which is printed.

        Raises:
            InputError: otherwise. (A mistyped --out with --resume must not train for a week from nothing.)
        """
        run = cls(out)
        if run.path.exists() and not run.path.is_dir():
            raise InputError(f"{out} is a file, --out takes a folder")
        if resume:
            if not run.config.is_file():
                raise InputError(f"nothing to resume in {out}: check --out, or start without --resume")
            _check_same_run(out, read_json(run.config), _as_stored(config), may_change)
            done = max(map(_step_of, run._checkpoint_paths()), default=0)
            if done > config.get("steps", done):
                raise InputError(f"--steps {config['steps']}: the run in {out} has done {done} steps already")
            if not done:
                print(f"{out} holds no checkpoint yet: starting at step 0", flush=True)
        elif found := [name for name in SIGNS_OF_A_RUN if (run.path / name).exists()]:
            raise InputError(
                f"{out} is in use ({found[0]} exists): go on with that run by --resume, or take another --out"
            )
        return run

    def begin(self, config: Mapping[str, Any]) -> RunFolder:
        """Write config.json and make the folders; itself. InputError: the operating system refuses."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.config, _as_stored(config))  # first: what has it can be resumed, whatever else is missing
            self.samples.mkdir(exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write a run into {self.path}: {error.strerror}; take another --out") from error
        return self

    def image_grid(self, step: int) -> Path:
        """Where the image grid of a step is, or will be."""
        return self.samples / f"step-{step:06d}.png"

    def last_image_grid(self, step: int) -> Path:
        """The newest image grid up to a step; a run that went back and ended earlier may have left later ones."""
        return max((path for path in self.samples.glob("step-*.png") if _step_of(path) <= step), key=_step_of)

    def save_checkpoint(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int = 2) -> Path:
        """Write checkpoints/step-NNNNNN (contents: state.pack), then delete all but the last `keep`."""
        self._remove_leftovers()
        final = self.checkpoints / f"step-{step:06d}"
        temporary = self.checkpoints / f".writing-{final.name}"
        write_safetensors(temporary / "state.safetensors", tensors)
        state = {"step": step, "meta": meta, "bytes": (temporary / "state.safetensors").stat().st_size}
        write_json(temporary / "state.json", {**state, "sha256": _digest(temporary / "state.safetensors", state)})
        if final.exists():  # damaged, or saved again: out of the way, but not yet deleted
            final.rename(self.checkpoints / f".replaced-{final.name}")
        temporary.rename(final)
        _folder_to_disk(self.checkpoints)
        self._rotate(step, keep)
        return final

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None. Prints which damaged ones it passes over."""
        for path in reversed(self._checkpoint_paths()):
            try:
                return _read_checkpoint(path)
            except (InputError, OSError, ValueError, KeyError, TypeError) as error:
                print(f"{path} is damaged, trying the one before it ({error})", flush=True)
        return None

    def save(self, step: int, parts: Mapping[str, Part], keep: int = 2) -> Path:
        """`save_checkpoint` of the live parts of a run: networks, optimizer, EMA, scaler (state.pack)."""
        return self.save_checkpoint(step, *pack(parts), keep)

    def restore(self, parts: Mapping[str, Part]) -> int:
        """Put the newest whole checkpoint into freshly built parts. Returns its step; 0 if there is none."""
        checkpoint = self.latest_checkpoint()
        if checkpoint is None:
            return 0
        unpack(checkpoint.tensors, checkpoint.meta, parts)
        print(f"going on at step {checkpoint.step}", flush=True)
        return checkpoint.step

    def _checkpoint_paths(self) -> list[Path]:
        """Folders named step-NNNNNN, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [p for p in self.checkpoints.iterdir() if re.fullmatch(r"step-\d{6,}", p.name) and p.is_dir()]
        return sorted(found, key=_step_of)

    def _rotate(self, step: int, keep: int) -> None:
        """Keep the last `keep` up to `step`. Later ones are damaged: the run has gone back to before them."""
        paths = self._checkpoint_paths()
        kept = [path for path in paths if _step_of(path) <= step][-max(1, keep) :]
        for path in paths:
            if path not in kept:  # rename first: half a checkpoint must not bear the name of a whole one
                path.rename(self.checkpoints / f".deleting-{path.name}")
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Delete what is set aside, and what a killed run left half written."""
        for pattern in (".writing-*", ".replaced-*", ".deleting-*"):
            for path in self.checkpoints.glob(pattern):
                shutil.rmtree(path)


def _check_same_run(
    out: str | Path, stored: dict[str, Any], config: dict[str, Any], may_change: Collection[str]
) -> None:
    def describe(name: str) -> str:
        new, old = (json.dumps(c[name]) if name in c else "not set" for c in (config, stored))
        return f"{name} {new} (was {old})"

    missing = object()
    names = [name for name in dict.fromkeys([*config, *stored]) if name not in NOT_COMPARED]
    changed = [name for name in names if stored.get(name, missing) != config.get(name, missing)]
    if refused := [describe(name) for name in changed if name not in may_change]:
        raise InputError(
            f"cannot go on with {out} under other settings: {', '.join(refused)}; "
            "give it the same flags and images, or start anew in another --out"
        )
    for name in changed:
        print(f"going on with {describe(name)}", flush=True)


def _as_stored(config: Mapping[str, Any]) -> dict[str, Any]:
    """Tuples become lists, as in the stored file."""
    return json.loads(json.dumps(config))


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _read_checkpoint(path: Path) -> Checkpoint:
    state, file = read_json(path / "state.json"), path / "state.safetensors"
    if (size := file.stat().st_size) != state["bytes"]:
        raise ValueError(f"{file.name} has {size} bytes, not {state['bytes']}")
    if _digest(file, state) != state["sha256"]:
        raise ValueError("the SHA-256 differs")
    return Checkpoint(state["step"], read_safetensors(file), state["meta"])


def _digest(file: Path, state: dict[str, Any]) -> str:
    """SHA-256 over the tensor file, and over all that state.json says beside it."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    text = json.dumps([state["step"], state["bytes"], state["meta"]], sort_keys=True, allow_nan=False)
    digest.update(text.encode())
    return digest.hexdigest()


def _folder_to_disk(path: Path) -> None:
    """Wait until the new names in a folder are on the disk."""
    if os.name == "nt":  # Windows has no such call
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
