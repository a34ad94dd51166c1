"""`convert` of U-Nets alone and LoRA files, and the flags that replace parts (whole models: test_sources.py)."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pipeline import change_json
from test_sources import UNET, altered, edited, run_convert

from minidistill.diffusion.sampling import Sampling, find_sampling, sampling_metadata
from minidistill.interop.lora_files import write_lora
from minidistill.models.lora import ATTENTION, TEXT_ATTENTION, LoRAWeights, find_targets
from minidistill.pipeline import load_pipeline
from minidistill.weights.files import read_metadata

WEIGHTS, PREFIX = "diffusion_pytorch_model.safetensors", "model.diffusion_model."
AVERAGE = 0.25  # how far the averaged weights are from the others


@pytest.fixture(scope="module")
def parts(sources, tmp_path_factory):
    """Replacements for parts of an SD 1.x: {"both": whole and average, "style", "pose": LoRAs, "taesd"}."""
    folder = tmp_path_factory.mktemp("parts")
    both = folder / "both.safetensors"
    assert run_convert(sources["sd1"], both) == 0
    tensors, header = load_file(both), read_metadata(both)
    average = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + AVERAGE
        for name, tensor in tensors.items()
        if name.startswith(PREFIX)
    }
    save_file(tensors | average, both, header)
    pipe = load_pipeline(sources["sd1"])
    for seed, name in enumerate(("style", "pose")):
        write_lora(folder / f"{name}.safetensors", {part: made_lora(net, seed) for part, net in pipe.networks.items()})
    torch.manual_seed(0)
    diffusers.AutoencoderTiny().save_pretrained(folder / "taesd")
    found = {name: folder / f"{name}.safetensors" for name in ("both", "style", "pose")}
    return {**found, "taesd": folder / "taesd"}


def made_lora(network, seed: int) -> dict[str, LoRAWeights]:
    g = torch.Generator().manual_seed(seed)
    targets = ATTENTION if hasattr(network.config, "cross_attention_dim") else TEXT_ATTENTION
    shapes = {name: network.get_submodule(name).weight.shape for name in find_targets(network, targets)}
    return {
        name: LoRAWeights(torch.randn(2, shape[1], generator=g), torch.randn(shape[0], 2, generator=g), 0.5)
        for name, shape in shapes.items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Names, types and bits."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def refused(capsys, *words) -> str:
    """The one line with which `convert` ends, with exit code 2."""
    capsys.readouterr()
    assert run_convert(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_every_part_that_is_replaced_is_in_what_is_written(sources, parts, tmp_path):
    other = altered(sources["sd1"], tmp_path / "other")
    loras = f"{parts['style']},{parts['pose']}"
    words = ("--unet", other, "--vae", parts["taesd"], "--lora", loras, "--lora-scale", "0.5,-1")
    assert run_convert(sources["sd1"], tmp_path / "made", *words) == 0
    expected = edited(
        sources["sd1"], unet=other, vae=parts["taesd"], loras=[(parts["style"], 0.5), (parts["pose"], -1.0)]
    )
    found = load_pipeline(tmp_path / "made")
    assert same(found.vae.state_dict(), expected.vae.state_dict())
    for part, network in expected.networks.items():
        assert same(found.networks[part].state_dict(), network.state_dict())
    oracle = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "made")
    assert isinstance(oracle.vae, diffusers.AutoencoderTiny)
    # One scale is for all; and each of the flags has its effect.
    assert run_convert(sources["sd1"], tmp_path / "alike", "--lora", loras, "--lora-scale", "0.5") == 0
    alike = edited(sources["sd1"], loras=[(parts["style"], 0.5), (parts["pose"], 0.5)])
    assert same(load_file(tmp_path / "alike" / UNET), alike.unet.state_dict())
    assert not same(alike.unet.state_dict(), load_pipeline(sources["sd1"]).unet.state_dict())


@pytest.mark.parametrize("flag", ["source", "--unet"])
def test_the_average_is_taken_of_the_file_that_has_the_unet(sources, parts, tmp_path, flag):
    source = (parts["both"],) if flag == "source" else (sources["sd1"], "--unet", parts["both"])
    for words, away in (((), 0), (("--ema",), AVERAGE)):
        dest = tmp_path / f"away {away}"
        assert run_convert(source[0], dest, *source[1:], *words) == 0
        expected = {name: tensor + away for name, tensor in load_file(sources["sd1"] / UNET).items()}
        assert same(load_file(dest / UNET), expected)


def test_flags_that_have_no_meaning_or_do_not_fit_are_refused(sources, parts, tmp_path, capsys):
    new = tmp_path / "new"
    for name in ("new.ckpt", "new.gguf", "new.SAFETENSORS"):
        assert ".safetensors" in refused(capsys, "miniature", tmp_path / name), "no file of that name is written"
        assert not (tmp_path / name).exists()
    two = ("--lora", parts["style"], "--lora-scale", "1,2")
    assert "2 scales for 1 LoRAs" in refused(capsys, sources["sd1"], new, *two)
    assert "only single files may hold both" in refused(capsys, sources["sd1"], new, "--ema")
    assert "only single files" in refused(capsys, parts["both"], new, "--unet", sources["sd1"], "--ema")
    assert "no EMA weights of" in refused(capsys, parts["both"], new, "--unet", single_unet(sources, tmp_path), "--ema")
    assert "is a LoRA for another model" in refused(capsys, sources["sdxl"], new, "--lora", parts["style"])
    assert not new.exists()


@pytest.mark.parametrize("kind", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.filterwarnings("ignore:.*consistency sampling")
def test_a_model_of_consistency_sampling_keeps_its_scheduler(sources, parts, tmp_path, kind):
    source = shutil.copytree(sources["sd1"], tmp_path / "source")
    path = "scheduler/scheduler_config.json"
    getattr(diffusers, kind).from_config(json_of(source / path)).save_pretrained(source / "scheduler")
    change_json(source / "model_index.json", scheduler=["diffusers", kind])
    assert run_convert(source, tmp_path / "new", "--dtype", "fp16") == 0
    assert json_of(tmp_path / "new" / path) == json_of(source / path)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "new")
    assert type(theirs.scheduler).__name__ == kind
    assert run_convert(source, tmp_path / "other", "--unet", sources["sd1"]) == 0
    assert json_of(tmp_path / "other/model_index.json")["scheduler"] == ["diffusers", "DDIMScheduler"]


def single_unet(sources, folder):
    """The U-Net of the SD 1.x as a file with diffusers' names."""
    config = (sources["sd1"] / "unet/config.json").read_text()
    save_file(load_file(sources["sd1"] / UNET), folder / "unet.safetensors", {"minidistill.unet_config": config})
    return folder / "unet.safetensors"


@pytest.mark.parametrize("form", ["folder", "diffusers names"])
def test_a_unet_alone_becomes_a_folder_and_a_file_and_stays_the_same(sources, tmp_path, form):
    source = sources["sd1"] / "unet" if form == "folder" else single_unet(sources, tmp_path)
    expected = load_file(sources["sd1"] / UNET)
    assert run_convert(source, tmp_path / "one.safetensors") == 0
    theirs = diffusers.UNet2DConditionModel.from_single_file(
        str(tmp_path / "one.safetensors"), config=str(sources["sd1"]), subfolder="unet", local_files_only=True
    )
    assert same(theirs.state_dict(), expected)
    for start, dest in ((source, "direct"), (tmp_path / "one.safetensors", "around")):
        assert run_convert(start, tmp_path / dest) == 0
        assert sorted(path.name for path in (tmp_path / dest).iterdir()) == ["config.json", WEIGHTS]
        assert same(load_file(tmp_path / dest / WEIGHTS), expected)
        theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / dest)
        assert same(theirs.state_dict(), expected)
        assert theirs.config.cross_attention_dim == 24
        assert run_convert(sources["sd1"], tmp_path / f"{dest}-model", "--unet", tmp_path / dest) == 0


def test_a_unet_alone_takes_a_precision_an_average_loras_and_keeps_its_settings(sources, parts, tmp_path):
    one = tmp_path / "sdxl_lightning_2step_unet.safetensors"  # a name that says how it is sampled
    tensors = {n: t for n, t in load_file(parts["both"]).items() if n.startswith((PREFIX, "model_ema."))}
    save_file(tensors, one, {"minidistill.unet_config": json.dumps(json_of(sources["sd1"] / "unet/config.json"))})
    pipe = load_pipeline(sources["sd1"])
    write_lora(tmp_path / "lora.safetensors", {"unet": made_lora(pipe.unet, 5)})
    words = ("--ema", "--dtype", "bf16", "--lora", tmp_path / "lora.safetensors", "--lora-scale", "2")
    assert run_convert(one, tmp_path / "a", *words) == 0
    merged = edited(
        parts["both"], unet=parts["both"], dtype=torch.bfloat16, ema=True, loras=[(tmp_path / "lora.safetensors", 2.0)]
    )
    assert same(load_file(tmp_path / "a" / WEIGHTS), merged.unet.state_dict())
    assert run_convert(tmp_path / "a", tmp_path / "b.safetensors") == 0
    for path in (tmp_path / "a" / WEIGHTS, tmp_path / "b.safetensors"):
        assert find_sampling(path, read_metadata(path)) == Sampling(2)


def json_of(path) -> dict:
    return json.loads(path.read_text())


def test_what_a_unet_alone_cannot_have_is_refused(sources, parts, tmp_path, capsys):
    alone, new = sources["sd1"] / "unet", tmp_path / "new"
    assert "--vae is for whole models" in refused(capsys, alone, new, "--vae", parts["taesd"])
    assert "--unet is for whole models" in refused(capsys, alone, new, "--unet", alone)
    assert "only single files may hold both" in refused(capsys, alone, new, "--ema")
    assert "config.json" in refused(capsys, sources["sd1"] / "vae", new)
    assert "config.json" in refused(capsys, sources["sd1"] / "text_encoder", new)
    assert "do not exist in this model" in refused(capsys, alone, new, "--lora", parts["style"])
    copy = tmp_path / "copy"
    assert run_convert(alone, copy) == 0
    change_json(copy / "config.json", cross_attention_dim=20)
    assert "does not fit its configuration" in refused(capsys, copy, new)
    assert not new.exists()


def test_a_lora_goes_from_form_to_form(sources, parts, tmp_path, capsys):
    in_peft, again = tmp_path / "deep/peft.safetensors", tmp_path / "again.safetensors"
    assert run_convert(parts["style"], in_peft, "--layout", "peft") == 0
    assert run_convert(in_peft, again, "--layout", "kohya") == 0
    assert capsys.readouterr().out.split() == [str(in_peft), str(again)]
    assert any(name.endswith(".lora_A.weight") for name in load_file(in_peft))
    assert same(load_file(again), load_file(parts["style"]))
    assert read_metadata(again) == read_metadata(parts["style"])
    one, other = (edited(sources["sd1"], loras=[(file, 1.0)]) for file in (parts["style"], in_peft))
    for part, network in one.networks.items():
        assert same(other.networks[part].state_dict(), network.state_dict())
    assert run_convert(parts["style"], tmp_path / "half.safetensors", "--layout", "peft", "--dtype", "fp16") == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}
    named = tmp_path / "sdxl_lightning_4step_lora.safetensors"  # its name says how it is sampled, then its header
    save_file(load_file(parts["style"]), named)
    assert run_convert(named, tmp_path / "new.safetensors", "--layout", "peft") == 0
    assert sampling_metadata(Sampling(4)).items() <= read_metadata(tmp_path / "new.safetensors").items()


def test_what_is_no_lora_file_and_flags_of_models_are_refused(sources, parts, tmp_path, capsys):
    new, form = tmp_path / "new.safetensors", ("--layout", "peft")
    for flag, value in (("--unet", sources["sd1"]), ("--vae", sources["sd1"]), ("--lora", parts["pose"])):
        assert f"{flag} is for whole models" in refused(capsys, parts["style"], new, *form, flag, value)
    assert "is not a LoRA" in refused(capsys, parts["both"], new, *form)
    assert "is a folder; a file is needed" in refused(capsys, sources["sd1"], new, *form)
    assert "no such file" in refused(capsys, tmp_path / "none.safetensors", new, *form)
    assert ".safetensors" in refused(capsys, parts["style"], tmp_path / "folder", *form)
    assert "exists" in refused(capsys, parts["style"], parts["pose"], *form)
    assert "a LoRA" in refused(capsys, parts["style"], tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_what_a_model_changes_becomes_a_lora_for_the_other(sources, parts, tmp_path, capsys):
    base, tuned, found = sources["sd1"], tmp_path / "tuned", tmp_path / "found.safetensors"
    pipe = edited(base, loras=[(parts["style"], 1.0)])
    pipe.set_sampling(Sampling(4))
    pipe.save(tuned)
    assert run_convert(tuned, found, "--lora-of", base, "--lora-rank", "2", "--dtype", "fp32") == 0
    assert "rank 2: 100 % of the change" in capsys.readouterr().err  # of the U-Net: that LoRA has rank 2
    assert find_sampling(found, read_metadata(found)) == Sampling(4)
    again = edited(base, loras=[(found, 1.0)])
    for name, weight in pipe.unet.state_dict().items():
        assert torch.allclose(again.unet.state_dict()[name], weight, atol=1e-4), name
    assert run_convert(tuned, tmp_path / "less.safetensors", "--lora-of", base, "--lora-rank", "1") == 0
    assert "100 %" not in capsys.readouterr().err
    unet = diffusers.StableDiffusionPipeline.from_pretrained(base)
    unet.load_lora_weights(tmp_path, weight_name=found.name)
    unet.fuse_lora()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    expected = pipe.unet.get_submodule(name).weight
    layer = unet.unet.get_submodule(name)
    assert torch.allclose(getattr(layer, "base_layer", layer).weight, expected, atol=1e-4)


def test_what_cannot_be_a_lora_of_a_model_is_refused(sources, parts, tmp_path, capsys):
    new, base = tmp_path / "new.safetensors", ("--lora-of", sources["sd1"])
    assert "is no version of" in refused(capsys, sources["sdxl"], new, *base)
    assert "--layout is kohya or peft" in refused(capsys, sources["sd1"], new, *base, "--layout", "folder")
    assert "--vae is for whole models, and a LoRA" in refused(
        capsys, sources["sd1"], new, *base, "--vae", parts["taesd"]
    )
    assert "end its name so" in refused(capsys, sources["sd1"], tmp_path / "new", *base)
    assert "--lora-rank is for --lora-of" in refused(capsys, sources["sd1"], new, "--lora-rank", "4")
    pipe = load_pipeline(sources["sd1"])
    pipe.set_sampling(Sampling(1, prediction="sample"))
    pipe.save(tmp_path / "x0")
    assert "predicts sample" in refused(capsys, tmp_path / "x0", new, *base)
    assert not new.exists()
