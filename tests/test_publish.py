"""Model cards (read by huggingface_hub's ModelCard) say what a run says; uploads arrive whole, or end in one line."""
# ruff: noqa: F811 (`server` is a fixture)

import dataclasses
import json
from inspect import signature
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import torch
from conftest import CAPTIONS
from hub_server import TOKEN, HubServer, files_of
from huggingface_hub import constants
from PIL import Image
from test_files import refused
from test_hub import disconnect, server  # noqa: F401

from minidistill import finetune, pipeline, train_kd
from minidistill.cli import run_command
from minidistill.distill.block_removal import RECIPES
from minidistill.interop.model_card import find_license, hub_id, public_name, write_card
from minidistill.interop.publish import open_repo, push
from minidistill.interop.replace import merge_loras
from minidistill.pipeline import load_pipeline
from minidistill.weights.hub import find_source

RESULTS = {
    "teacher": {"parameters": 5659044, "distance_to_teacher": 0.0, "judge": {"all": 0.5, "shape": 0.75}},
    "student after": {"parameters": 2321028, "distance_to_teacher": 0.0170349, "judge": {"all": 0.25}},
}
RECIPE = RECIPES["bk-tiny"]
DECIDED = {name: getattr(RECIPE, name) for name in ("remove", "pairing", "loss_weights")}
DECIDED |= {"resolution": 64, "learning_rate": 1e-3, "precision": "bf16"}
LORA = {"lora_rank": 4, "lora_alpha": 8.0, "lora_targets": "all", "resolution": 64, "ema_decay": 0.0}


@pytest.fixture
def grid(tmp_path):
    Image.new("RGB", (8, 8), (200, 30, 40)).save(tmp_path / "step-000240.png")
    return tmp_path / "step-000240.png"


def student_settings(**changes) -> dict:
    """The settings of a finished train_kd, as its config.json has them."""
    config = train_kd.Config(**{**DECIDED, "out": "/home/someone/runs/secret", **changes})
    return json.loads(json.dumps(dataclasses.asdict(config)))


def tuned_settings(**changes) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(finetune.Config(**changes))))


def card_of(folder: Path) -> huggingface_hub.ModelCard:
    return huggingface_hub.ModelCard.load(folder / "README.md")


def test_a_students_card_has_its_teacher_recipe_settings_results_and_grid(tmp_path, grid):
    config = student_settings(teacher="runwayml/stable-diffusion-v1-5", steps=240, batch_size=32, accumulate=2)
    write_card(tmp_path / "student", "student", config, RESULTS, grid, "me/bk-tiny")
    card = card_of(tmp_path / "student")
    assert card.content.startswith("---\n") and find_license(str(tmp_path / "student")) == "other"
    assert card.data.to_dict() == {
        "license": "other",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "tags": ["text-to-image", "stable-diffusion", "minidistill", "knowledge-distillation"],
    }
    for words in ("bk-tiny", "240 steps of 64 samples", *RECIPE.remove, "](images.png)"):
        assert words in card.text, words
    assert "| U-Net parameters | 5,659,044 | 2,321,028 |" in card.text
    assert "| MSE to teacher | 0 | 0.01703 |" in card.text
    assert "| correct in images of unseen scenes: shape | 0.75 |  |" in card.text
    assert 'DiffusionPipeline.from_pretrained("me/bk-tiny")' in card.text
    assert "minidistill.generate --model me/bk-tiny " in card.text
    for words in ("convert me/bk-tiny cpp.safetensors --layout stable-diffusion.cpp", "this student has not"):
        assert words in card.text, words
    for remove in (RECIPES["bk-base"].remove, ("mid", "stage.3")):  # stable-diffusion.cpp cannot open these
        write_card(tmp_path, "student", student_settings(remove=remove), RESULTS, grid)
        text = card_of(tmp_path).text
        assert "ComfyUI" in text and "DeepCache" in text
        assert "stable-diffusion.cpp" not in text and "dry_run" not in text
    assert "\nlearning_rate           0.001\n" in card.text
    assert "\nloss_weights            [1.0, 1.0, 1.0]\n" in card.text
    assert (tmp_path / "student/images.png").read_bytes() == grid.read_bytes()


def test_cards_of_few_steps_say_how_many_and_what_else_was_done(tmp_path, grid):
    config = {"teacher": "miniature", "data": "scenes", "batch_size": 16, "accumulate": 1, "student": 4, "plan": "demo"}
    results = {"teacher": {"distance_to_teacher": 0.0}}
    for more, words in (
        ({}, ["# miniature in 4 steps", "miniature, distilled as in", "num_inference_steps=4"]),
        ({"remove": ["mid", "stage.3"]}, ["Of its U-Net, mid, stage.3 were removed."]),
        ({"mixed": (1, 2, 4)}, ["# miniature in 1, 2, 4 steps"]),
        ({"plan": "keep", "data": "me/paintings"}, ["miniature, trained further on me/paintings as in"]),
    ):
        write_card(tmp_path / "x", "lightning", config | more, results, grid)
        text = card_of(tmp_path / "x").text
        assert all(word in text for word in words), text
        assert ("were removed" in text) == ("remove" in more)


def test_cards_of_what_was_trained_further_name_their_relation_to_the_base(tmp_path, grid):
    lora = ["LoRA of rank 4 and alpha 8.0 for the U-Net of", "layers: all", "kohya"]
    for kind, settings, relation, words in (
        ("finetuned", {"train_text_encoder": True}, "finetune", ["of the U-Net and text encoder", "on scenes"]),
        ("lora", LORA, "adapter", lora),
    ):
        config = tuned_settings(model="segmind/tiny-sd", **settings)
        write_card(tmp_path / "x", kind, config, {"before": {"loss": 0.5}, "after": {"loss": 0.25}}, grid, "me/x")
        card = card_of(tmp_path / "x")
        assert (card.data.base_model, card.data.base_model_relation) == ("segmind/tiny-sd", relation)
        assert card.data.license == "other" and ("lora" in card.data.tags) == (kind == "lora")
        assert "| denoising loss on one fixed batch | 0.5 | 0.25 |" in card.text
        assert all(word in card.text for word in words)


def test_a_loras_card_loads_the_very_base_it_was_trained_for(tmp_path, grid):
    url = "https://huggingface.co/me/x/blob/main/b/a.ckpt"
    for source, loads in (
        ("me/x", 'DiffusionPipeline.from_pretrained("me/x")'),
        ("me/x@half", 'DiffusionPipeline.from_pretrained("me/x", revision="half")'),
        ("me/x@v2/b/a.ckpt", f'StableDiffusionPipeline.from_single_file("{url}", revision="v2")'),
        ("/gone/a.safetensors", 'StableDiffusionPipeline.from_single_file("path/to/a.safetensors")'),
        ("miniature", 'DiffusionPipeline.from_pretrained("path/to/minidistill/miniature")'),
        ("miniature-tiny", 'DiffusionPipeline.from_pretrained("path/to/minidistill/miniature/tiny")'),
    ):
        write_card(tmp_path, "lora", tuned_settings(model=source, **LORA), {"after": {"loss": 0.25}}, grid, "me/lora")
        text = card_of(tmp_path).text
        assert f"\npipe = diffusers.{loads}\n" in text
        base = "path/to/a.safetensors" if source.startswith("/") else source
        assert f"generate --model {base} --lora me/lora/lora.safetensors " in text
        assert 'load_lora_weights("me/lora", weight_name="lora.safetensors")' in text


def test_of_paths_on_this_machine_only_the_last_name_is_told(tmp_path, grid):
    (tmp_path / "private/model").mkdir(parents=True)
    config = student_settings(teacher=str(tmp_path / "private/model"), data=str(tmp_path / "private/images"))
    write_card(tmp_path / "student", "student", config, RESULTS, grid)
    card = card_of(tmp_path / "student")
    # the last is the number of scenes, on which it was not trained
    assert not [word for word in ("private", "secret", str(tmp_path), "/home", "4096") if word in card.content]
    assert card.data.base_model is None and card.data.license == "other"
    assert "A student of model" in card.text and '\ndata                    "images"\n' in card.text


def test_names_and_licenses_of_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/base").mkdir(parents=True)
    names = {"mine/base": "base", "/gone/base": "base", "me/x": "me/x", "miniature": "miniature"}
    assert {source: public_name(source) for source in names} == names
    ids = {"mine/base": None, "/gone/base": None, "miniature": None, "me/x@fp16": "me/x", "me/x/a.ckpt": "me/x"}
    assert {source: hub_id(source) for source in ids} == ids
    licenses = {"miniature": "apache-2.0", "miniature-tiny": "apache-2.0", "me/x": "other", "mine/base": "other"}
    assert {source: find_license(source) for source in licenses} == licenses
    for front, license in (('license: "mit"\ntags:\n- x', "mit"), ("tags:\n- x", "other"), ("license:\n- x", "other")):
        (tmp_path / "mine/base/README.md").write_text(f"---\n{front}\n---\n\nlicense: wrong\n")
        assert find_license("mine/base") == license


@pytest.fixture
def folder(tmp_path):
    """Something to upload."""
    return HubServer(tmp_path).add(
        "made", {"README.md": "---\nlicense: mit\n---\n", "unet/config.json": "{}", "x": "x"}
    )


def test_a_folder_arrives_whole_or_in_the_files_asked_for(server, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push(folder, "me/student") == f"{server.url}/me/student"
    sent = files_of(server.folder("me/student", "main"))
    assert [(name, path.read_bytes()) for name, path in sent.items()] == [
        (name, path.read_bytes()) for name, path in files_of(folder).items()
    ]
    (folder / "x").write_text("new")
    push(folder, "me/student")
    assert sent["x"].read_text() == "new"
    push(folder, "me/lora", files=["README.md", "x"])
    assert sorted(files_of(server.folder("me/lora", "main"))) == ["README.md", "x"]


def test_what_is_no_repository_is_refused_without_a_look_at_the_hub(server, folder, monkeypatch):
    for call in (lambda: open_repo("me/x"), lambda: push(folder, "me/x")):
        message = refused(call)
        assert "a token" in message and "hf auth login" in message and "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for repo in ("name", "a/b/c", "me/a b", "me/", "/x", "me/a--b", ""):
        assert "owner/name" in refused(open_repo, repo) and "owner/name" in refused(push, folder, repo)
    assert server.requests == []


def test_every_refusal_of_the_hub_is_one_line_with_the_way_out_and_without_the_token(server, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret")
    message = refused(open_repo, "me/x")
    assert "refuses your token (HTTP 401)" in message and "hf auth login" in message and "hf_a_secret" not in message
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.add("you/x", ["README.md"])
    for trouble in ("denied", "read only"):
        server.trouble["you/x"] = trouble
        for call in (lambda: open_repo("you/x"), lambda: push(folder, "you/x")):  # the first before a training
            message = refused(call)
            assert "to you/x: the Hub refuses your token (HTTP 403)" in message and "settings/tokens" in message
            assert TOKEN not in message
    server.trouble["you/x"] = "down"
    monkeypatch.setattr("time.sleep", lambda _: None)  # it tries again a few times
    assert "(HTTP 503); try again later" in refused(push, folder, "you/x")
    assert "no folder" in refused(push, folder / "none", "me/x")
    disconnect(monkeypatch)
    message = refused(push, folder, "me/x")
    assert "no connection to the Hub" in message and TOKEN not in message
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in refused(push, folder, "me/x")
    error = RuntimeError("Error while uploading 'x' to the Hub.")  # what huggingface_hub makes of any, of a large file
    error.__cause__ = ConnectionError("gone")
    for name, effect in (("create_repo", None), ("auth_check", None), ("upload_folder", error)):
        monkeypatch.setattr(huggingface_hub.HfApi, name, mock.Mock(side_effect=effect, __signature__=signature(print)))
    assert "no connection to the Hub" in refused(push, folder, "me/x")


def finetune_to(repo: str, out: Path, model: Path, data: Path, *flags: str) -> int:
    words = ["--model", model, "--data", data, "--out", out, "--push-to-hub", repo, *flags]
    words += ["--steps", 1, "--batch-size", 2, "--learning-rate", 1e-2, "--warmup", 0]
    with pytest.raises(SystemExit) as info:
        run_command(finetune.main, finetune.Config, prog="finetune", argv=list(map(str, words)))
    return info.value.code


def test_a_lora_can_be_had_from_the_hub(server, tmp_path, tiny_sd1, images, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "STEPS", 2)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert finetune_to("me/tuned", tmp_path / "run", tiny_sd1, images, "--lora-rank", "2") == 0
    printed = capsys.readouterr()
    assert f"{server.url}/me/tuned" in printed.out and TOKEN not in printed.out + printed.err
    sent = files_of(server.folder("me/tuned", "main"))
    assert sent.keys() == {"README.md", "images.png", "lora.safetensors", "lora_peft.safetensors"}
    assert "me/tuned" in sent["README.md"].read_text()
    pipe, here = load_pipeline(tiny_sd1), load_pipeline(tiny_sd1)
    merge_loras(pipe, [("me/tuned/lora.safetensors", 1.0)])
    merge_loras(here, [(tmp_path / "run/lora.safetensors", 1.0)])
    assert_latents_differ_from(tiny_sd1, pipe, here)
    message = refused(load_pipeline, tmp_path / "run")
    assert f"give {tmp_path / 'run/lora.safetensors'}, {tmp_path / 'run/lora_peft.safetensors'}" in message


def assert_latents_differ_from(base, *pipes) -> None:
    """The pipelines draw one thing, and the base another."""
    one, other, before = (p(CAPTIONS[:1], steps=2, output="latents") for p in (*pipes, load_pipeline(base)))
    assert torch.equal(one, other) and not torch.equal(one, before)


def test_a_run_that_could_not_be_uploaded_does_not_start_and_one_that_is_done_can_be_sent(
    server, tmp_path, tiny_sd1, images, monkeypatch, capsys
):
    monkeypatch.setattr(pipeline, "STEPS", 2)
    assert finetune_to("me/tuned", tmp_path / "run", tiny_sd1, images) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "HF_TOKEN" in error
    assert not (tmp_path / "run").exists() and server.requests == []
    assert finetune_to("none", tmp_path / "run", tiny_sd1, images) == 0
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert finetune_to("me/tuned", tmp_path / "run", tiny_sd1, images, "--resume", "--private") == 0
    assert server.trouble == {"me/tuned": "private"}
    sent = files_of(server.root / "me/tuned")
    assert {"README.md", "images.png", "unet/config.json"} < sent.keys() and not any("checkpoint" in n for n in sent)
    assert find_source("me/tuned").is_relative_to(tmp_path / "cache")
    assert_latents_differ_from(tiny_sd1, load_pipeline("me/tuned"), load_pipeline(tmp_path / "run/model"))
