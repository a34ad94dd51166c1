"""Single files: LDM's names against diffusers' converters, whole checkpoints there and back, foreign files refused.

Full-size architectures are compared by name, on `meta`; numbers are compared on tiny ones with seeded weights.
"""

import shutil
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils as oracle
from safetensors.torch import load_file, save_file
from test_pipeline import refused

from minidistill import convert
from minidistill.diffusion.schedule import ScheduleConfig
from minidistill.distill.block_removal import RECIPES, build_student, plan_removal
from minidistill.interop import ldm, single_file
from minidistill.interop.header import CLIP_IDS
from minidistill.interop.infer import infer_prediction, infer_text_config, infer_unet_config, infer_vae_config
from minidistill.interop.single_file import BK_TINY, read_single_file, write_single_file
from minidistill.interop.vae_file import read_vae_file
from minidistill.models.clip import SD1_TEXT, SD2_TEXT, SDXL_TEXT_2, CLIPTextConfig, CLIPTextModel
from minidistill.models.taesd import AutoencoderTiny
from minidistill.models.tokenizer import CLIPTokenizer, byte_characters, train_bpe
from minidistill.models.unet import SD15, SD21, SDXL, UNet, UNetConfig
from minidistill.models.vae import SD_VAE, SDXL_VAE, AutoencoderKL, VAEConfig
from minidistill.pipeline import load_pipeline
from minidistill.weights import folders
from minidistill.weights.files import load_into, on_meta, read_metadata

UNET, VAE = "model.diffusion_model.", "first_stage_model."
STUDENTS = {f"{name}-{teacher}": (config, name) for name in ("bk-base", "bk-small", "bk-tiny") for teacher, config in
            (("v1", SD15), ("v2", SD21))}  # fmt: skip
SSD_1B = replace(
    SDXL,
    mid_block_type="UNetMidBlock2D",
    transformer_layers_per_block=(1, 2, 4),
    reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), 1),
)
FULL_SIZE = {
    "sd1": SD15,
    "sd2": SD21,
    "sdxl": SDXL,
    "ssd-1b": SSD_1B,
    "inpainting": replace(SD15, in_channels=9),
    "deep middle": replace(
        SDXL,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
    ),
    **{name: plan_removal(teacher, RECIPES[recipe].remove).student for name, (teacher, recipe) in STUDENTS.items()},
    **{name: plan_removal(SDXL, RECIPES[name].remove).student for name in ("koala-1b", "koala-700m", "segmind-vega")},
}


def empty(model, *args) -> dict[str, torch.Tensor]:
    """The state dict of a model on `meta`."""
    with on_meta():
        return model(*args).state_dict()


def loaded(kind, config, tensors) -> dict[str, torch.Tensor]:
    """The state dict of a model after the strict loader has filled it, in the dtypes of the file."""
    with on_meta():
        model = kind(config)
    return load_into(model, tensors, "x", dtype=None).state_dict()


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def assert_same(found, expected) -> None:
    """The same names, and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# names, against diffusers' converters


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_unets_names_are_those_diffusers_converts_and_tell_its_config(name):
    config = FULL_SIZE[name]
    ours = empty(UNet, config)
    written = ldm.to_ldm_unet(ours, config)
    assert len(written) == len(ours)
    theirs = oracle.convert_ldm_unet_checkpoint(prefixed(UNET, written), config.to_dict())
    back = ldm.from_ldm_unet(written)
    assert theirs.keys() == back.keys() == ours.keys()
    assert all(theirs[n] is ours[n] and back[n] is ours[n] for n in ours)
    assert infer_unet_config(back) == config


def test_official_files_have_the_known_numbers_of_tensors():
    names = ("sd1", "sd2", "sdxl", "bk-base-v1", "bk-small-v1", "bk-tiny-v2")
    counts = [len(ldm.to_ldm_unet(empty(UNet, FULL_SIZE[name]), FULL_SIZE[name])) for name in names]
    assert counts == [686, 686, 1680, 442, 396, 358]
    assert len(ldm.to_ldm_vae(empty(AutoencoderKL, SD_VAE))) == 248
    assert len(empty(CLIPTextModel, SD1_TEXT)) == 196
    assert len(ldm.to_open_clip(empty(CLIPTextModel, SDXL_TEXT_2, True))) == 389  # and logit_scale


@pytest.mark.parametrize(
    ("name", "ours", "official"),
    [
        ("sd1", "down_blocks.0.attentions.0.proj_in", "input_blocks.1.1.proj_in"),
        ("sd1", "down_blocks.2.downsamplers.0.conv", "input_blocks.9.0.op"),
        ("sd1", "down_blocks.3.resnets.1.conv2", "input_blocks.11.0.out_layers.3"),
        ("sd1", "mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        ("sd1", "up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        ("sd1", "up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("sd1", "up_blocks.3.resnets.2.conv_shortcut", "output_blocks.11.0.skip_connection"),
        ("sd1", "conv_out", "out.2"),
        ("sdxl", "up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("sdxl", "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
         "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj"),
        ("sdxl", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
         "middle_block.1.transformer_blocks.0.attn1.to_out.0"),
        ("sdxl", "add_embedding.linear_2", "label_emb.0.2"),
        ("sdxl", "time_embedding.linear_1", "time_embed.0"),
        ("bk-base-v1", "up_blocks.3.resnets.1.conv_shortcut", "output_blocks.7.0.skip_connection"),
    ],
)  # fmt: skip
def test_names_are_those_of_official_files(name, ours, official):
    """Where a reader would accept more than one spelling."""
    assert ldm.swap(ours, ldm.unet_pairs(FULL_SIZE[name])) == official


def gapped(config: UNetConfig) -> dict[str, str]:
    """{our name: name}, numbered as if there were two layers a stage: diffusers' script writes students so."""
    names, pairs = {}, ldm.unet_pairs(config)
    for name in empty(UNet, config):
        dense, parts = ldm.swap(name, pairs), name.split(".")
        i, j = (int(parts[1]), int(parts[3])) if parts[0] in ("down_blocks", "up_blocks") else (0, 0)
        rest = ".".join(dense.split(".")[3:])
        names[name] = {
            ("down_blocks", "resnets"): f"input_blocks.{3 * i + j + 1}.0.{rest}",
            ("down_blocks", "attentions"): f"input_blocks.{3 * i + j + 1}.1.{rest}",
            ("down_blocks", "downsamplers"): f"input_blocks.{3 * (i + 1)}.0.{rest}",
            ("up_blocks", "resnets"): f"output_blocks.{3 * i + j}.0.{rest}",
            ("up_blocks", "attentions"): f"output_blocks.{3 * i + j}.1.{rest}",
            ("up_blocks", "upsamplers"): f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}.{rest}",
        }.get((parts[0], parts[2] if len(parts) > 2 else ""), dense)
    return names


@pytest.mark.parametrize("name", STUDENTS)
def test_students_numbered_with_gaps_are_written_and_read(name):
    """diffusers' script leaves the attentions of up_blocks.0, which SD 1.x does not have, in its own names."""
    config, names = FULL_SIZE[name], gapped(FULL_SIZE[name])
    ours = empty(UNet, config)
    file = ldm.to_ldm_unet(ours, config, gaps=True)
    assert file.keys() == set(names.values()) != ldm.to_ldm_unet(ours, config).keys()
    left = {n if "up_blocks.0.attentions" in n else names[n]: tensor for n, tensor in ours.items()}
    for back in (ldm.from_ldm_unet(file), ldm.from_ldm_unet(left)):
        assert back.keys() == ours.keys() and all(back[n] is ours[n] for n in ours)


def test_stable_diffusion_cpp_knows_bk_tiny_by_the_numbers_of_its_teacher():
    """The tensors its source asks for: input and output blocks 0, 1, 3, 4, 6, 7, upsamplers apart."""
    config = FULL_SIZE["bk-tiny-v1"]
    names = ldm.to_ldm_unet(empty(UNet, config), config, gaps=True)
    blocks = {side: {int(n.split(".")[1]) for n in names if n.startswith(side)} for side in ("input_", "output_")}
    assert blocks == {"input_": {0, 1, 3, 4, 6, 7}, "output_": {0, 1, 2, 3, 4, 5, 6, 7}}
    upsamplers = {n for n in names if n.startswith(("output_blocks.2.", "output_blocks.5."))}
    assert upsamplers == {f"output_blocks.{p}.conv.{end}" for p in ("2.1", "5.2") for end in ("weight", "bias")}
    assert not any(n.startswith("middle_block.1") for n in names) and any("output_blocks.7.1." in n for n in names)
    assert config == BK_TINY


def test_the_vaes_names_and_shapes_are_those_diffusers_converts():
    config = VAEConfig(block_out_channels=(8, 16, 16, 24), layers_per_block=2, norm_num_groups=4)
    torch.manual_seed(0)
    ours = AutoencoderKL(config).state_dict()
    written = ldm.to_ldm_vae(ours)
    assert written["decoder.mid.attn_1.q.weight"].shape == (24, 24, 1, 1)
    assert written["decoder.up.3.block.0.conv1.weight"] is ours["decoder.up_blocks.0.resnets.0.conv1.weight"]
    assert_same(oracle.convert_ldm_vae_checkpoint(prefixed(VAE, written), config.to_dict()), ours)
    full = empty(AutoencoderKL, SD_VAE)
    file = ldm.to_ldm_vae(full)
    assert oracle.convert_ldm_vae_checkpoint(prefixed(VAE, file), SD_VAE.to_dict()).keys() == full.keys()
    assert ldm.from_ldm_vae(file).keys() == full.keys()


@pytest.mark.parametrize("projection", [False, True])
def test_open_clips_names_and_stacks_are_those_diffusers_converts(projection):
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=9, hidden_act="gelu", projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = CLIPTextModel(config, projection).state_dict()
    written = ldm.to_open_clip(ours)
    prefix = "conditioner.embedders.1.model."
    text = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config.to_dict()))
    assert_same(oracle.convert_open_clip_checkpoint(text, prefixed(prefix, written), prefix), ours)
    assert_same(ldm.from_open_clip(written), ours)


def test_a_stack_that_is_not_three_matrices_is_refused():
    name = "transformer.resblocks.0.attn.in_proj_weight"
    assert name in refused(ldm.from_open_clip, {name: torch.zeros(8, 4)})


# configs from shapes


def test_small_widths_have_the_heads_of_their_family():
    small = {"block_out_channels": (64, 128), "layers_per_block": 1, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    small["down_block_types"] = ("CrossAttnDownBlock2D",) * 2
    one = UNetConfig(**small, cross_attention_dim=768, sample_size=64)
    two = UNetConfig(**small, cross_attention_dim=1024, attention_head_dim=(1, 2), use_linear_projection=True)
    assert infer_unet_config(empty(UNet, one)) == one
    assert infer_unet_config(empty(UNet, two)).attention_head_dim == (1, 2)
    other = empty(UNet, replace(one, cross_attention_dim=96))
    assert "text states of width 96" in refused(infer_unet_config, other)


def test_vaes_and_text_encoders_are_told_from_their_tensors():
    for config in (SD1_TEXT, SD2_TEXT):
        assert infer_text_config(empty(CLIPTextModel, config), config.hidden_act) == config
    assert infer_text_config(empty(CLIPTextModel, SDXL_TEXT_2, True), "gelu") == SDXL_TEXT_2
    for config in (SD_VAE, SDXL_VAE, VAEConfig(block_out_channels=(32, 64), use_quant_conv=False)):
        assert infer_vae_config(empty(AutoencoderKL, config), config) == config


def test_incomplete_and_unknown_unets_are_refused():
    tensors = empty(UNet, replace(SD15, block_out_channels=(32,) * 4))
    no_middle = {n: t for n, t in tensors.items() if not n.startswith("down_blocks.1.")}
    assert "not complete" in refused(infer_unet_config, no_middle)
    assert "conv_in.weight" in refused(infer_unet_config, {n: t for n, t in tensors.items() if "conv_in" not in n})
    no_text = {n: t for n, t in tensors.items() if "attentions" not in n}
    assert "reads no text" in refused(infer_unet_config, no_text)
    class_embedding = tensors | {"add_embedding.linear_1.weight": torch.empty(128, 1280, device="meta")}
    assert "not supported" in refused(infer_unet_config, class_embedding)


# whole checkpoints


def load(folder) -> dict:
    """The parts of a folder, as `write_single_file` takes them."""
    parts = ("",) if not (folder / "text_encoder_2").exists() else ("", "_2")
    return {
        "unet": folders.load_unet(folder),
        "vae": folders.load_vae(folder),
        "text_encoders": [folders.load_text_encoder(folder, part=f"text_encoder{part}") for part in parts],
        "schedule": folders.load_schedule(folder),
        "tokenizers": [folders.load_tokenizer(folder, f"tokenizer{part}") for part in parts],
    }


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_diffusers_reads_the_file_and_finds_what_was_in_the_folder(sources, tmp_path, kind):
    write_single_file(tmp_path / "x.safetensors", **load(sources[kind]))
    loader = diffusers.StableDiffusionXLPipeline if kind == "sdxl" else diffusers.StableDiffusionPipeline
    options = {"add_watermarker": False} if kind == "sdxl" else {}
    expected = loader.from_pretrained(sources[kind], **options)
    found = loader.from_single_file(
        str(tmp_path / "x.safetensors"), config=str(sources[kind]), local_files_only=True, **options
    )
    for part in ("unet", "vae", "text_encoder", *["text_encoder_2"] * (kind == "sdxl")):
        assert_same(getattr(found, part).state_dict(), getattr(expected, part).state_dict())


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_round_trip_is_exact(sources, tmp_path, kind):
    parts = load(sources[kind])
    parts["unet"].half()  # every tensor keeps its own dtype
    path = tmp_path / "x.safetensors"
    write_single_file(path, **parts, metadata={"minidistill.sampling": "{}", "who": "me"})
    file = read_single_file(path)
    models = [(parts["unet"], file.unet), (parts["vae"], file.vae)]
    models += zip(parts["text_encoders"], file.text_encoders, strict=True)
    for model, (config, tensors) in models:
        assert config == model.config and tensors.keys() == model.state_dict().keys()
    assert_same(file.unet[1], parts["unet"].state_dict())
    assert_same(loaded(AutoencoderKL, *file.vae), parts["vae"].state_dict())
    for encoder, (_, tensors) in zip(parts["text_encoders"], file.text_encoders, strict=True):
        assert_same(tensors, encoder.state_dict())
    assert (file.family, file.schedule) == (kind, parts["schedule"])
    assert [vars_of(t) for t in file.tokenizers] == [vars_of(t) for t in parts["tokenizers"]]
    assert file.metadata == {"minidistill.sampling": "{}", "who": "me"}
    assert read_metadata(path)["format"] == "pt"


def vars_of(tokenizer: CLIPTokenizer) -> tuple:
    return tokenizer.vocab, tokenizer.merges, tokenizer.max_length, tokenizer.pad_token


@pytest.fixture(params=["bk-base", "bk-small", "bk-tiny"])
def student(request, tiny_sd1, tmp_path):
    """A student's folder, and its single file, student.safetensors, beside it."""
    pipe = load_pipeline(tiny_sd1)
    removal = plan_removal(pipe.unet.config, RECIPES[request.param].remove)
    pipe.unet = build_student(removal, pipe.unet)
    pipe.save(tmp_path / "student")
    write_single_file(tmp_path / "student.safetensors", **load(tmp_path / "student"))
    return tmp_path / "student"


def test_diffusers_opens_a_students_file_with_the_configs_of_its_folder_and_no_others(student, tiny_sd1, tmp_path):
    """From the file alone diffusers takes every student for SD 1.5, its teacher: it needs to be told."""
    expected = diffusers.StableDiffusionPipeline.from_pretrained(student)
    unet, file = folders.load_unet(student), read_single_file(student.with_suffix(".safetensors"))
    assert file.unet[0] == unet.config
    assert_same(file.unet[1], unet.state_dict())
    configs = shutil.copytree(student, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))

    def opened(config):
        return diffusers.StableDiffusionPipeline.from_single_file(
            str(student.with_suffix(".safetensors")), config=str(config), local_files_only=True
        )

    found = opened(configs)
    for part in ("unet", "vae", "text_encoder"):
        assert_same(getattr(found, part).state_dict(), getattr(expected, part).state_dict())
    with pytest.raises(ValueError, match=r"expected shape"):
        opened(tiny_sd1)


def test_an_sdxl_file_in_the_names_of_diffusers_script_is_read(sources, tmp_path):
    """It is as ours but for the text projection, which it leaves as the linear layer it is."""
    parts = load(sources["sdxl"])
    write_single_file(tmp_path / "x.safetensors", **parts)
    tensors, prefix = load_file(tmp_path / "x.safetensors"), "conditioner.embedders.1.model."
    tensors[f"{prefix}text_projection.weight"] = tensors.pop(f"{prefix}text_projection").T.contiguous()
    save_file(tensors, tmp_path / "y.safetensors", read_metadata(tmp_path / "x.safetensors"))
    file = read_single_file(tmp_path / "y.safetensors")
    assert_same(file.unet[1], parts["unet"].state_dict())
    for (_, found), encoder in zip(file.text_encoders, parts["text_encoders"], strict=True):
        assert_same(found, encoder.state_dict())


def test_a_file_for_stable_diffusion_cpp_has_the_same_weights_and_other_students_are_refused(
    student, tmp_path, monkeypatch
):
    dest = tmp_path / "x.safetensors"
    config = convert.Config(source=str(student), dest=str(dest), layout="stable-diffusion.cpp")
    assert "bk-tiny of SD 1.x" in refused(convert.main, config) and not dest.exists()
    unet = folders.load_unet(student)
    monkeypatch.setattr(single_file, "BK_TINY", replace(unet.config, sample_size=SD15.sample_size))
    convert.main(config)
    assert_same(read_single_file(dest).unet[1], unet.state_dict())
    assert any("output_blocks.2.1.conv" in name for name in load_file(dest))


def test_reading_copies_nothing(sources, tmp_path):
    """Tensors point into the mapped file: the three pieces of a stack are one after the other in it."""
    write_single_file(tmp_path / "x.safetensors", **load(sources["sd2"]))
    _, tensors = read_single_file(tmp_path / "x.safetensors").text_encoders[0]
    layer = "text_model.encoder.layers.0.self_attn"
    q, k = tensors[f"{layer}.q_proj.weight"], tensors[f"{layer}.k_proj.weight"]
    assert k.data_ptr() == q.data_ptr() + q.nbytes


def test_clips_own_vocabulary_is_not_carried(sources, tmp_path):
    parts = load(sources["sd1"])
    alphabet = [c + end for end in ("", "</w>") for c in byte_characters().values()]
    vocab = dict(CLIP_IDS) | {"filler": 49405}
    for token in alphabet:
        vocab.setdefault(token, 10_000 + len(vocab))
    clip = CLIPTokenizer(vocab, [])
    write_single_file(tmp_path / "x.safetensors", **parts | {"tokenizers": [clip]})
    assert read_single_file(tmp_path / "x.safetensors").tokenizers == ()
    other = train_bpe(["a cat"], 600)
    write_single_file(tmp_path / "x.safetensors", **parts | {"tokenizers": [other]})
    assert read_single_file(tmp_path / "x.safetensors").tokenizers[0].vocab == other.vocab


def test_what_has_no_place_in_the_layout_is_refused_and_nothing_is_written(sources, tmp_path):
    parts = load(sources["sd1"])
    assert ".safetensors" in refused(lambda: write_single_file(tmp_path / "x.ckpt", **parts))
    tiny = parts | {"vae": AutoencoderTiny()}
    assert "TAESD" in refused(lambda: write_single_file(tmp_path / "x.safetensors", **tiny))
    two = parts | {"text_encoders": parts["text_encoders"] * 2}
    assert "text encoders" in refused(lambda: write_single_file(tmp_path / "x.safetensors", **two))
    assert list(tmp_path.iterdir()) == []


# files of others: no configs in the header


@pytest.fixture(scope="module")
def foreign():
    """An SD 1.x as others save it, small but with CLIP's width: {name: tensor}, and our models' state dicts."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(
        sample_size=64, block_out_channels=(32, 64), layers_per_block=2, cross_attention_dim=768,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ))  # fmt: skip
    vae = AutoencoderKL(replace(SD_VAE, block_out_channels=(32, 32, 64)))
    text = CLIPTextModel(replace(SD1_TEXT, vocab_size=70, num_hidden_layers=1, intermediate_size=64))
    models = {"unet": unet, "vae": vae, "text": text}
    tensors = {
        **prefixed(UNET, ldm.to_ldm_unet(unet.state_dict(), unet.config)),
        **prefixed(VAE, ldm.to_ldm_vae(vae.state_dict())),
        **prefixed("cond_stage_model.transformer.", text.state_dict()),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "betas": torch.zeros(10),
        "alphas_cumprod": torch.zeros(10),
        "model_ema.decay": torch.tensor(0.5),
        "model_ema.num_updates": torch.tensor(3),
    }
    return {name: tensor.clone() for name, tensor in tensors.items()}, models


def assert_foreign(file, models) -> None:
    [text] = file.text_encoders
    for (config, tensors), model in ((file.unet, models["unet"]), (file.vae, models["vae"]), (text, models["text"])):
        assert config == model.config
        assert_same(loaded(type(model), config, tensors), model.state_dict())


@pytest.mark.parametrize("save", ["safetensors", "ckpt", "lightning", "legacy"])
def test_a_checkpoint_without_configs_is_read(foreign, tmp_path, save):
    tensors, models = foreign
    path = tmp_path / ("x.safetensors" if save == "safetensors" else "x.ckpt")
    if save == "safetensors":
        save_file(tensors, path)
    else:
        extra = {"state_dict": tensors, "global_step": 470000, "epoch": 1, "lr_schedulers": [], "hparams": None}
        torch.save(extra if save != "ckpt" else tensors, path, _use_new_zipfile_serialization=save != "legacy")
    file = read_single_file(path)
    assert_foreign(file, models)
    assert (file.family, file.schedule, file.tokenizers) == ("sd1", ScheduleConfig(), ())


def test_spellings_of_other_times_are_read(foreign, tmp_path):
    """Text names without text_model., wrappers, channels_last, a whole CLIP's leftovers."""
    tensors, models = foreign
    old = {}
    for name, tensor in tensors.items():
        name = name.replace("transformer.text_model.", "transformer.").replace(UNET, UNET + "_orig_mod.")  # noqa: PLW2901
        old[name] = tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
    old["cond_stage_model.transformer.text_projection.weight"] = torch.zeros(768, 768)
    old["cond_stage_model.logit_scale"] = torch.tensor(1.0)
    torch.save({"state_dict": old}, tmp_path / "x.ckpt")
    file = read_single_file(tmp_path / "x.ckpt")
    assert_foreign(file, models)
    unet = UNet(file.unet[0])
    load_into(unet, file.unet[1], "x")
    assert unet.conv_in.weight.is_contiguous()


def test_the_average_is_taken_when_asked_for(foreign, tmp_path):
    tensors, models = foreign
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith(UNET)}
    average = {"model_ema." + name.removeprefix("model.").replace(".", ""): t + 1 for name, t in unet.items()}
    assert "model_ema.diffusion_modelinput_blocks00weight" in average and len(average) == len(unet)
    save_file(tensors | average, tmp_path / "x.safetensors")
    assert_foreign(read_single_file(tmp_path / "x.safetensors"), models)
    found = read_single_file(tmp_path / "x.safetensors", ema=True).unet[1]
    assert_same(found, {name: tensor + 1 for name, tensor in models["unet"].state_dict().items()})
    theirs = oracle.convert_ldm_unet_checkpoint(tensors | average, models["unet"].config.to_dict(), extract_ema=True)
    assert_same(found, theirs)
    del average["model_ema.diffusion_modelinput_blocks00weight"]
    save_file(tensors | average, tmp_path / "x.safetensors")
    assert "input_blocks.0.0.weight" in refused(lambda: read_single_file(tmp_path / "x.safetensors", ema=True))
    save_file(tensors, tmp_path / "x.safetensors")
    assert "no EMA weights" in refused(lambda: read_single_file(tmp_path / "x.safetensors", ema=True))


@pytest.mark.parametrize("spelling", ["diffusers", "ldm", "prefixed", "prefixed diffusers"])
def test_a_unet_alone_is_read(foreign, tmp_path, spelling):
    unet = foreign[1]["unet"]
    tensors = unet.state_dict()
    if "diffusers" not in spelling:
        tensors = ldm.to_ldm_unet(tensors, unet.config)
    save_file(prefixed(UNET if "prefixed" in spelling else "", tensors), tmp_path / "x.safetensors")
    file = read_single_file(tmp_path / "x.safetensors")
    assert file.unet[0] == unet.config
    assert_same(file.unet[1], unet.state_dict())
    assert (file.family, file.vae, file.text_encoders, file.schedule) == ("sd1", None, (), None)


def sd2_parts(spread: float) -> dict[str, torch.Tensor]:
    """The weights that decide what an SD 2.x predicts."""
    return {"up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias": torch.tensor([-spread, spread])}


def test_what_a_network_predicts_is_told_by_the_usual_signs():
    v, eps, spec = "v_prediction", "epsilon", "modelspec.prediction_type"
    assert infer_prediction(SD21, sd2_parts(0.1), (), {}) == v
    assert infer_prediction(SD21, sd2_parts(0.05), (), {}) == eps
    assert infer_prediction(SD21, sd2_parts(0.05).copy(), (), {spec: "v"}) == v
    assert infer_prediction(SD21, sd2_parts(0.1), (), {spec: "epsilon"}) == eps
    assert infer_prediction(replace(SD21, in_channels=9), sd2_parts(0.1), (), {}) == eps
    assert infer_prediction(SD15, sd2_parts(0.1), (), {}) == eps
    assert infer_prediction(SDXL, {}, {"v_pred"}, {spec: "epsilon"}) == v
    assert infer_prediction(SDXL, {}, (), {}) == eps


def test_an_sd2_file_gives_its_size_its_prediction_and_no_unused_layer(tmp_path):
    torch.manual_seed(0)
    config = replace(
        SD21, block_out_channels=(64, 64), layers_per_block=1, attention_head_dim=1,
        transformer_layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    unet = UNet(config)
    torch.nn.init.normal_(unet.up_blocks[1].attentions[1].transformer_blocks[0].norm1.bias, std=0.2)
    vocab = torch.zeros(9, 1024)
    tensors = prefixed(UNET, ldm.to_ldm_unet(unet.state_dict(), config))
    text = {"token_embedding.weight": vocab, "positional_embedding": torch.zeros(77, 1024)}
    for n in (0, 23):
        text[f"transformer.resblocks.{n}.mlp.c_fc.weight"] = torch.zeros(4, 1024)
    text |= {"text_projection": torch.zeros(1024, 1024), "logit_scale": torch.tensor(1.0)}
    for prefix in ("cond_stage_model.model.", "conditioner.embedders.0.model."):
        save_file(tensors | prefixed(prefix, text), tmp_path / "x.safetensors")
        file = read_single_file(tmp_path / "x.safetensors")
        assert (file.family, file.schedule.prediction_type) == ("sd2", "v_prediction")
        assert file.unet[0] == config and config.sample_size == 96
        assert (file.text_encoders[0][0].hidden_act, file.text_encoders[0][0].num_hidden_layers) == ("gelu", 1)
        assert not [name for name in file.text_encoders[0][1] if ".23." in name or "projection" in name]


@pytest.mark.parametrize("marks", [(), ("v_pred",), ("v_pred", "ztsnr")])
def test_an_sdxl_file_gives_both_encoders_its_vaes_scale_and_its_marks(foreign, tmp_path, marks):
    config = replace(
        SDXL, block_out_channels=(64, 64), layers_per_block=1, attention_head_dim=1,
        transformer_layers_per_block=(1, 2), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    first = {name: torch.zeros_like(tensor) for name, tensor in foreign[1]["text"].state_dict().items()}
    second = {"token_embedding.weight": torch.zeros(9, 1280), "positional_embedding": torch.zeros(77, 1280)}
    second |= {"transformer.resblocks.0.mlp.c_fc.weight": torch.zeros(4, 1280), "logit_scale": torch.tensor(1.0)}
    second["text_projection"] = torch.randn(1280, 20, generator=torch.Generator().manual_seed(0))
    tensors = {
        **prefixed(UNET, ldm.to_ldm_unet(UNet(config).state_dict(), config)),
        **{name: tensor for name, tensor in foreign[0].items() if name.startswith(VAE)},
        **prefixed("conditioner.embedders.0.transformer.", first),
        **prefixed("conditioner.embedders.1.model.", second),
        **{mark: torch.zeros(0) for mark in marks},
    }
    save_file(tensors, tmp_path / "x.safetensors")
    file = read_single_file(tmp_path / "x.safetensors")
    assert (file.family, file.unet[0], file.vae[0].scaling_factor) == ("sdxl", config, 0.13025)
    assert [one.hidden_size for one, _ in file.text_encoders] == [768, 1280]
    assert [one.hidden_act for one, _ in file.text_encoders] == ["quick_gelu", "gelu"]
    assert torch.equal(file.text_encoders[1][1]["text_projection.weight"], second["text_projection"].T)
    assert file.text_encoders[1][0].projection_dim == 20 and len(file.text_encoders[0][1]) == len(first)
    prediction = "v_prediction" if marks else "epsilon"
    assert file.schedule == ScheduleConfig(prediction_type=prediction, rescale_betas_zero_snr="ztsnr" in marks)
    only_one = {name: tensor for name, tensor in tensors.items() if not name.startswith("conditioner.embedders.1")}
    save_file(only_one, tmp_path / "x.safetensors")
    assert "1 text encoders, sdxl has 2" in refused(read_single_file, tmp_path / "x.safetensors")


# a VAE alone


@pytest.mark.parametrize("spelling", ["diffusers", "old", "ldm", "first_stage_model.", "training"])
def test_a_vae_alone_is_read(foreign, tmp_path, spelling):
    vae = foreign[1]["vae"]
    tensors = vae.state_dict()
    if spelling == "old":
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            tensors = {name.replace(f".0.{new}.", f".0.{old}."): tensor for name, tensor in tensors.items()}
        assert any("proj_attn" in name for name in tensors)
    elif spelling != "diffusers":
        tensors = ldm.to_ldm_vae(tensors)
    if spelling == "first_stage_model.":
        tensors = prefixed(spelling, tensors)
    if spelling == "training":
        tensors |= {"loss.discriminator.main.0.weight": torch.zeros(2), "model_ema.decay": torch.zeros(1)}
    torch.save({"state_dict": tensors}, tmp_path / "x.ckpt")
    base = replace(SDXL_VAE, sample_size=64)
    config, found = read_vae_file(tmp_path / "x.ckpt", base)
    assert config == replace(vae.config, scaling_factor=0.13025, sample_size=64)
    assert_same(loaded(AutoencoderKL, config, found), vae.state_dict())


def test_a_file_that_is_no_vae_is_refused(foreign, tmp_path):
    save_file(foreign[1]["unet"].state_dict(), tmp_path / "x.safetensors")
    assert "not a VAE" in refused(read_vae_file, tmp_path / "x.safetensors")
    save_file(foreign[1]["vae"].state_dict() | {"encoder.surprise": torch.zeros(1)}, tmp_path / "x.safetensors")
    config, tensors = read_vae_file(tmp_path / "x.safetensors")
    assert "encoder.surprise" in refused(load_into, AutoencoderKL(config), tensors, "x")


# what is refused


OTHERS = {
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "--lora",
    "unet.down_blocks.0.attentions.0.to_q.lora_A.weight": "--lora",
    "unet.down_blocks.0.attn1.processor.to_q_lora.up.weight": "--lora",
    "first_stage_model.decoder.conv_in.weight": "--vae",
    "decoder.layers.0.weight": "--vae",
    "cond_stage_model.model.token_embedding.weight": "text encoder",
    "double_blocks.0.img_attn.norm.key_norm.scale": "Flux",
    "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": "Stable Diffusion 3",
    "control_model.input_blocks.0.0.weight": "ControlNet",
    "edm_mean": "EDM",
    "emb_params": "something else (1 tensors: emb_params)",
}


def test_another_kind_of_file_is_called_what_it_is(tmp_path):
    for name, kind in OTHERS.items():
        save_file({name: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
        message = refused(read_single_file, tmp_path / "x.safetensors")
        assert kind in message and str(tmp_path / "x.safetensors") in message


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"surprise": 1, "other": 2}, "2 of 210 tensors belong to no known part (other, surprise)"),
        ({"cond_stage_model.model.token_embedding.weight": 1}, "text encoders"),
        ({"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": 1}, "two spellings"),
    ],
)
def test_a_tensor_that_nothing_explains_is_named(foreign, tmp_path, extra, said):
    tensors, _ = foreign
    extra = {name: torch.zeros(1) for name in extra}
    save_file(tensors | extra, tmp_path / "x.safetensors")
    said = said.replace("210", str(len(tensors) + len(extra)))
    message = refused(read_single_file, tmp_path / "x.safetensors")
    assert said in message and "x.safetensors" in message


@pytest.mark.parametrize(
    ("prefix", "name"), [(UNET, "input_blocks.1.9.weight"), (UNET, "foo.bar"), (VAE, "encoder.foo"),
                         ("cond_stage_model.transformer.", "text_model.foo")],
)  # fmt: skip
def test_a_tensor_of_a_part_that_nothing_explains_is_named_by_the_strict_loader(foreign, tmp_path, prefix, name):
    save_file(foreign[0] | {prefix + name: torch.zeros(1)}, tmp_path / "x.safetensors")
    file = read_single_file(tmp_path / "x.safetensors")
    kind, part = {UNET: (UNet, file.unet), VAE: (AutoencoderKL, file.vae)}.get(
        prefix, (CLIPTextModel, file.text_encoders[0])
    )
    assert f"tensors are not expected ({name})" in refused(loaded, kind, *part)


def test_wrong_shapes_are_refused(foreign, tmp_path):
    tensors, _ = foreign
    for name, tensor, said in (
        ("input_blocks.0.0.weight", torch.zeros(32, 4), "conv_in.weight"),
        ("input_blocks.1.0.in_layers.2.weight", torch.zeros(30, 32, 3, 3), "fit no config"),
        ("input_blocks.1.0.in_layers.2.weight", torch.zeros(0, 32, 3, 3), "resnets.0.conv1"),
    ):
        save_file(tensors | {UNET + name: tensor}, tmp_path / "x.safetensors")
        assert said in refused(read_single_file, tmp_path / "x.safetensors")
    save_file(tensors | {UNET + "out.2.bias": torch.zeros(7)}, tmp_path / "x.safetensors")
    file = read_single_file(tmp_path / "x.safetensors")
    assert "conv_out.bias is (7,)" in refused(load_into, UNet(file.unet[0]), file.unet[1], "x")


@pytest.mark.parametrize("key", ["unet_config", "vae_config", "text_configs", "schedule", "tokenizers"])
def test_a_header_that_is_not_right_is_refused(foreign, tmp_path, key):
    for text in ("{", "3", "[3]", '{"layers_per_block": {}, "beta_schedule": 3}', '[{"vocab": 3}, 1]', "[" * 99999):
        save_file(foreign[0], tmp_path / "x.safetensors", metadata={f"minidistill.{key}": text})
        message = refused(read_single_file, tmp_path / "x.safetensors")
        assert f"minidistill.{key}" in message and "x.safetensors" in message


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_file_cut_short_is_refused_by_name(foreign, tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(foreign[0], path)
    path.write_bytes(path.read_bytes()[:9999])
    for read in (read_single_file, read_vae_file):
        assert str(path) in refused(read, path)


class Callback:
    """As Lightning's, of a package that is not installed where the file is read."""

    def __init__(self):
        self.best, self.path = np.float64(0.5), Path("x")


class Settings(dict):
    """As Lightning's hyperparameters: a mapping with a name of its own."""


def test_a_checkpoint_with_a_training_programs_objects_is_read_without_them(foreign, tmp_path, monkeypatch):
    beside = {"callbacks": {Callback: Callback()}, "loss": np.float32(3), "best": np.zeros(2), "hparams": Settings(a=1)}
    beside["defaults"] = defaultdict(list, x=[1])
    for class_ in (Callback, Settings):
        monkeypatch.setattr(class_, "__module__", "not_installed")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "not_installed", sys.modules[__name__])
        torch.save({"state_dict": foreign[0], **beside}, tmp_path / "x.ckpt")
    assert_foreign(read_single_file(tmp_path / "x.ckpt"), foreign[1])
    torch.save({"state_dict": foreign[0] | {"a": np.float64(1)}}, tmp_path / "x.ckpt")
    assert "is not a state dict" in refused(read_single_file, tmp_path / "x.ckpt")


class RunsCode:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_checkpoint_is_refused_unrun_wherever_it_is(foreign, tmp_path):
    for place in ("callbacks", "state_dict"):
        content = {"state_dict": dict(foreign[0])}
        bomb = {"x": RunsCode(tmp_path / "it_ran")}
        content[place] = content.get(place, {}) | bomb
        torch.save(content, tmp_path / "x.ckpt")
        assert "run code" in refused(read_single_file, tmp_path / "x.ckpt")
    assert not (tmp_path / "it_ran").exists()
