"""What several test files need: tiny Stable Diffusions, and a folder of captioned images."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

CAPTIONS = [
    "a red circle on a blue ground",
    "two green squares above a ring",
    "a ring",
    "a small blue square",
    "three red rings",
    "a circle below a green square",
    "a blue ground",
    "two red squares",
    "a green ring on a red ground",
    "a red ring above two circles",
]
TOKENS = 16
torch.set_num_threads(1)  # in each worker of pytest-xdist; tiny networks wait for threads most of the time
os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # and what tests start: on the CPU, one thread


def save_images(folder, captions_in: str = "jsonl") -> None:
    """Ten images of several sizes and formats, captions in metadata.jsonl, metadata.csv or .txt files ("txt")."""
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(0)
    names = [f"{i}.{'jpg' if i % 2 else 'png'}" for i in range(len(CAPTIONS))]
    for i, (name, caption) in enumerate(zip(names, CAPTIONS, strict=True)):
        pixels = numbers.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40 + i, 36), Image.Resampling.NEAREST).save(folder / name)
        if captions_in == "txt":
            (folder / f"{i}.txt").write_text(caption + "\n")
    rows = zip(names, CAPTIONS, strict=True)
    if captions_in == "jsonl":
        lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in rows]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    if captions_in == "csv":
        (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{n},{c}\n" for n, c in rows))


def counting_pipe():
    """A pipeline that draws nothing, and the list of how many latents it was asked to decode at a time."""

    def pipe(captions, batch_size, **_):
        return torch.zeros(len(captions), 4, 8, 8)

    found, pipe.device = [], torch.device("cpu")
    pipe.decode = lambda latents, batch_size: found.append(batch_size)
    return pipe, found


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory):
    """A pipeline folder, as diffusers saves it; not to be changed."""
    from tiny import save_tiny_sd1  # here, for the sake of files that do not need diffusers: it takes seconds to import

    folder = tmp_path_factory.mktemp("tiny-sd1")
    save_tiny_sd1(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A data folder; not to be changed."""
    folder = tmp_path_factory.mktemp("data") / "images"
    save_images(folder)
    return folder


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """{"sd1", "sd2", "sdxl"}: pipeline folders with other shapes than `tiny_sd1`'s; not to be changed."""
    from tiny import save_oracle, save_sdxl

    found = {kind: tmp_path_factory.mktemp(kind) / "model" for kind in ("sd1", "sd2", "sdxl")}
    save_oracle(found["sd1"], "sd1")
    save_oracle(found["sd2"], "sd2")
    save_sdxl(found["sdxl"])
    return found


@pytest.fixture(scope="module")
def one_thread():
    """With more than one, tiny networks wait for threads most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
