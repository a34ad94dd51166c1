"""Model cards: the README.md and the image beside the weights of a model that was trained here.

Front matter (YAML) that the Hugging Face Hub reads, then text for people. Every setting and figure is from the run's
own config.json and results.json. Of a path on this machine only the last name is told.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from minidistill.weights.choice import SINGLE_FILES
from minidistill.weights.files import atomic_path
from minidistill.weights.folders import MINIATURE, SHIPPED
from minidistill.weights.hub import MOVED, PLACE

CARD, GRID = "README.md", "images.png"

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
NOT_TOLD = ("out", "resume", "device", "parallel", "log_every", "sample_every", "checkpoint_every", "keep_checkpoints")
NOT_TOLD += ("mixed", "judged", "push_to_hub", "private", "examples", "weights", "dry_run")
PATHS = ("teacher", "model", "data")
KEEP = ("keep", "keep-lora")  # plans that train a model of few steps further


# What the card of one kind of model says; the texts are filled from the run's settings.
KINDS: dict[str, dict[str, Any]] = {
    "student": {
        "base": "teacher",  # the setting that names the model it comes from
        "title": "{base} with fewer blocks ({recipe})",
        "summary": "A student of {base}: of its U-Net, {removed} were removed, and what is left was trained for "
        "{steps} steps of {samples} samples on the data, the teacher's predictions and its intermediate features, as "
        "in [BK-SDM](https://arxiv.org/abs/2305.15798).",
        "grid": "teacher above student",
        "tags": ("knowledge-distillation",),
    },
    "finetuned": {
        "base": "model",
        "title": "{base}, fine-tuned on {data}",
        "summary": "All weights of the {trained} of {base} were trained on {data}, {steps} steps of {samples} samples.",
        "grid": "before, above after",
        "relation": "finetune",  # to the base model, in the Hub's words
    },
    "lora": {
        "base": "model",
        "title": "LoRA for {base}, trained on {data}",
        "summary": "A LoRA of rank {lora_rank} and alpha {lora_alpha} for the {trained} of {base} (layers: "
        "{lora_targets}), trained on {data} for {steps} steps of {samples} samples. `lora.safetensors` is in kohya's "
        "form, which ComfyUI, A1111 and diffusers read; `lora_peft.safetensors` is the same in PEFT's.",
        "grid": "before, above after",
        "tags": ("lora",),
        "relation": "adapter",
    },
    "lightning": {
        "base": "teacher",
        "title": "{base} in {few} steps",
        "summary": "{base}, {made} as in [SDXL-Lightning](https://arxiv.org/abs/2402.13929).{pruned} Sample it by "
        "Euler with trailing timesteps, guidance off.",
        "grid": "teacher above students",
        "tags": ("sdxl-lightning",),
        "relation": "finetune",
    },
    "lightning-lora": {
        "base": "teacher",
        "title": "LoRA for {base} in {few} steps",
        "summary": "A LoRA of rank {lora_rank} and alpha {lora_alpha} with which {base} samples in {few} steps, "
        "{made} as in [SDXL-Lightning](https://arxiv.org/abs/2402.13929). Sample it by Euler with trailing "
        "timesteps, guidance off.",
        "grid": "teacher above students",
        "tags": ("sdxl-lightning", "lora"),
        "relation": "adapter",
    },
}
TRAILING = """
scheduler = diffusers.EulerDiscreteScheduler
pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")"""
TEMPLATE = Path(__file__).with_suffix(".md")
# Which file is for whom; of students only, whose blocks other programs do not expect.
COMFYUI = "\nIn a single file, for ComfyUI: `python -m minidistill.convert {here} comfyui.safetensors`\n"
CPP = (
    "\nFor stable-diffusion.cpp, which of the students of SD 1.x knows bk-tiny alone, and by other block numbers:\n"
    "`python -m minidistill.convert {here} cpp.safetensors --layout stable-diffusion.cpp`\n"
)
DEEPCACHE = "\nDeepCache needs a mid block, which {mid}.\n"


def write_card(
    folder: str | Path,
    kind: str,
    config: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    grid: str | Path,
    repo: str | None = None,
) -> None:
    """Write README.md and images.png into the folder of a model. InputError: it cannot be written to.

    Args:
        kind: one of KINDS.
        config, results: the run's config.json, all settings resolved, and its results.json, by model.
        grid: the image to show.
        repo: owner/name on the Hub if it is uploaded, for the lines on how to use it.
    """
    folder, about, here = Path(folder), KINDS[kind], repo or "path/to/this/folder"
    source = config[about["base"]]
    told = {name: public_name(value) if name in PATHS else value for name, value in config.items()}
    words = told | {"base": told[about["base"]], **_made(told)}
    left_out = NOT_TOLD if config["data"] == "scenes" else (*NOT_TOLD, "images")  # their number is the scenes'
    license = find_license(source)
    front = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=hub_id(source),
        base_model_relation=about.get("relation") if hub_id(source) else None,
        tags=["text-to-image", "stable-diffusion", "minidistill", *about.get("tags", ())],
    )
    load, model = f'pipe = diffusers.DiffusionPipeline.from_pretrained("{here}")', f"--model {here}"
    if about.get("relation") == "adapter":
        load, model = _with_lora(source, here)
    if kind == "lightning-lora":
        load += TRAILING
    text = TEMPLATE.read_text(encoding="utf-8").format(
        front=front.to_yaml(),
        title=about["title"].format(**words),
        summary=about["summary"].format(**words),
        grid=about["grid"],
        grid_file=GRID,
        results=_table(results),
        diffusers=load,
        call=", num_inference_steps={student}, guidance_scale=0".format(**words) if "student" in config else "",
        model=model,
        others=_for_other_programs(here, config["remove"]) if kind == "student" else "",
        settings="\n".join(f"{name:23} {json.dumps(value)}" for name, value in told.items() if name not in left_out),
        license=f"That of {words['base']}" + (": name it here." if license == "other" else f": {license}."),
    )
    with atomic_path(folder / GRID) as temporary:
        shutil.copyfile(grid, temporary)
    with atomic_path(folder / CARD) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _made(config: Mapping[str, Any]) -> dict[str, Any]:
    """What was done to make a model, in words for the texts of KINDS."""
    removed = ", ".join(config.get("remove") or ())
    return {
        "removed": removed,
        "pruned": f" Of its U-Net, {removed} were removed." * bool(removed),
        "samples": config["batch_size"] * config["accumulate"],
        "few": ", ".join(map(str, config.get("mixed") or [config.get("student")])),
        "made": f"trained further on {config['data']}" if config.get("plan") in KEEP else "distilled",
        "trained": "U-Net and text encoder" if config.get("train_text_encoder") else "U-Net",
    }


def _for_other_programs(here: str, removed: list[str]) -> str:
    """How to convert a student for ComfyUI and, if it can be for that, for stable-diffusion.cpp."""
    is_tiny = {"down.0.1", "mid", "stage.3"} <= set(removed)  # of the recipes bk-tiny alone
    mid = "bk-base has and this student has not" if "mid" in removed else "this student has"
    return (COMFYUI + CPP * is_tiny + DEEPCACHE).format(here=here, mid=mid)


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
    """The license of a SOURCE, as the Hub spells it: by the card in its folder; "other" if it is not known."""
    card = Path(os.path.expanduser(source)) / CARD
    if not card.is_file():
        return "apache-2.0" if source in SHIPPED else "other"
    front = card.read_text(encoding="utf-8", errors="replace").partition("\n---\n")[0]
    found = re.search(r"^license: *[\"']?([\w.+-]+)[\"']? *$", front, re.MULTILINE)
    return found[1] if found else "other"


def _with_lora(source: str, here: str) -> tuple[str, str]:
    """How to load a LoRA's base and the LoRA: lines for diffusers, and flags of minidistill.generate."""
    name, match, shipped = hub_id(source), PLACE.fullmatch(source), SHIPPED.get(source)
    last = shipped.relative_to(MINIATURE.parents[1]).as_posix() if shipped else public_name(source)
    folder = name or f"path/to/{last}"
    revision = f', revision="{match["revision"]}"' if name and match["revision"] else ""
    load = f'pipe = diffusers.DiffusionPipeline.from_pretrained("{folder}"{revision})'
    if source.endswith(SINGLE_FILES):
        place = f"https://huggingface.co/{name}/blob/main/{match['file']}" if name else folder
        load = f'pipe = diffusers.StableDiffusionPipeline.from_single_file("{place}"{revision})'
        load = f"# of an SDXL: StableDiffusionXLPipeline\n{load}"
    base = source if name or shipped else folder
    load += f'\npipe.load_lora_weights("{here}", weight_name="lora.safetensors")'
    return load, f"--model {base} --lora {here}/lora.safetensors"


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each measure, or each part of one, in words and figures; a column for each model."""
    rows: dict[str, dict[str, str]] = {}
    for model, measured in results.items():
        for name, value in measured.items():
            label = MEASURES.get(name, name)
            parts = {f"{label}: {part}": figure for part, figure in value.items()} if isinstance(value, Mapping) else {}
            for cell, figure in (parts or {label: value}).items():
                form = ",d" if isinstance(figure, int) else ".4g" if isinstance(figure, float) else ""
                rows.setdefault(cell, {})[model] = format(figure, form)
    lines = [["", *results], ["---"] * (1 + len(results))]
    lines += [[label, *(cells.get(model, "") for model in results)] for label, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
