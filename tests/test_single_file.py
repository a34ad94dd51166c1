"""Single files: LDM names against diffusers' converters (full-size ones on `meta`), whole checkpoints round trip."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import diffusers
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
from minidistill.interop.configs import infer_prediction, infer_unet_config, tokenizer_entry
from minidistill.interop.single_file import BK_TINY, TEXT_ENCODERS, read_single_file, read_vae_file, write_single_file
from minidistill.models.clip import SD1_TEXT, SD2_TEXT, SDXL_TEXT_2, CLIPTextConfig, CLIPTextModel
from minidistill.models.taesd import AutoencoderTiny
from minidistill.models.unet import SD15, SD21, SDXL, UNet, UNetConfig
from minidistill.models.vae import SD_VAE, SDXL_VAE, AutoencoderKL, VAEConfig
from minidistill.pipeline import load_pipeline
from minidistill.weights import folders
from minidistill.weights.files import read_metadata
from minidistill.weights.loading import load_into, on_meta

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


def loaded(kind, config, tensors, *options) -> dict[str, torch.Tensor]:
    """The state dict of a model after the strict loader has filled it, in the dtypes of the file."""
    with on_meta():
        model = kind(config, *options)
    return load_into(model, tensors, "x", dtype=None).state_dict()


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def settings_of(tokenizer) -> tuple:
    return tokenizer.vocab, tokenizer.merges, tokenizer.max_length, tokenizer.pad_token


def assert_same(found, expected) -> None:
    """The same names, and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


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


OFFICIAL = {  # where a reader would accept more than one spelling
    "sd1": {
        "down_blocks.0.attentions.0.proj_in": "input_blocks.1.1.proj_in",
        "down_blocks.2.downsamplers.0.conv": "input_blocks.9.0.op",
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.3.resnets.2.conv_shortcut": "output_blocks.11.0.skip_connection",
    },
    "sdxl": {
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "down_blocks.2.attentions.1.transformer_blocks.9.attn1": "input_blocks.8.1.transformer_blocks.9.attn1",
        "mid_block.attentions.0.transformer_blocks.0.ff": "middle_block.1.transformer_blocks.0.ff",
    },
    "bk-base-v1": {"up_blocks.3.resnets.1.conv_shortcut": "output_blocks.7.0.skip_connection"},
}


def test_names_and_their_number_are_those_of_official_files():
    for name, table in OFFICIAL.items():
        pairs = ldm.unet_pairs(FULL_SIZE[name])
        assert {ours: ldm.swap(ours, pairs) for ours in table} == table
    names = ("sd1", "sd2", "sdxl", "bk-base-v1", "bk-small-v1", "bk-tiny-v2")
    assert [len(empty(UNet, FULL_SIZE[name])) for name in names] == [686, 686, 1680, 442, 396, 358]
    assert len(ldm.to_ldm_vae(empty(AutoencoderKL, SD_VAE))) == 248
    assert len(empty(CLIPTextModel, SD1_TEXT)) == 196
    assert len(ldm.to_open_clip(empty(CLIPTextModel, SDXL_TEXT_2, True))) == 389  # and logit_scale


@pytest.mark.parametrize("name", STUDENTS)
def test_students_numbered_with_gaps_are_written_and_read(name):
    """diffusers' script leaves the attentions of up_blocks.0, which SD 1.x does not have, in its own names."""
    ours, teacher = empty(UNet, FULL_SIZE[name]), STUDENTS[name][0]
    file = ldm.to_ldm_unet(ours, teacher)
    assert len(file) == len(ours) and file.keys() != ldm.to_ldm_unet(ours, FULL_SIZE[name]).keys()
    left = {n: t for n, t in ours.items() if "up_blocks.0.attentions" in n}
    left |= ldm.to_ldm_unet({n: t for n, t in ours.items() if n not in left}, teacher)
    for back in (ldm.from_ldm_unet(file), ldm.from_ldm_unet(left)):
        assert back.keys() == ours.keys() and all(back[n] is ours[n] for n in ours)


def test_stable_diffusion_cpp_knows_bk_tiny_by_the_numbers_of_its_teacher():
    """The tensors its source asks for: input and output blocks 0, 1, 3, 4, 6, 7, upsamplers apart."""
    config = FULL_SIZE["bk-tiny-v1"]
    names = ldm.to_ldm_unet(empty(UNet, config), SD15)
    blocks = {side: {int(n.split(".")[1]) for n in names if n.startswith(side)} for side in ("input_", "output_")}
    assert blocks == {"input_": {0, 1, 3, 4, 6, 7}, "output_": {0, 1, 2, 3, 4, 5, 6, 7}}
    upsamplers = {n for n in names if n.startswith(("output_blocks.2.", "output_blocks.5."))}
    assert upsamplers == {f"output_blocks.{p}.conv.{end}" for p in ("2.1", "5.2") for end in ("weight", "bias")}
    assert not any(n.startswith("middle_block.1") for n in names) and any("output_blocks.7.1." in n for n in names)
    assert BK_TINY.items() <= vars(config).items()


def test_the_vaes_names_and_shapes_are_those_diffusers_converts():
    config = VAEConfig(block_out_channels=(8, 16, 16, 24), layers_per_block=2, norm_num_groups=4)
    torch.manual_seed(0)
    ours = AutoencoderKL(config).state_dict()
    written = ldm.to_ldm_vae(ours)
    assert written["decoder.mid.attn_1.q.weight"].shape == (24, 24, 1, 1)
    assert written["decoder.up.3.block.0.conv1.weight"] is ours["decoder.up_blocks.0.resnets.0.conv1.weight"]
    assert_same(oracle.convert_ldm_vae_checkpoint(prefixed(VAE, written), config.to_dict()), ours)
    assert_same(loaded(AutoencoderKL, config, ldm.from_ldm_vae(written)), ours)


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
    name = "transformer.resblocks.0.attn.in_proj_weight"
    assert name in refused(ldm.from_open_clip, {name: torch.zeros(8, 4)})


def test_small_unets_have_the_heads_of_their_family_and_incomplete_and_unknown_ones_are_refused():
    two = replace(SD21, block_out_channels=(64, 64, 128, 128), attention_head_dim=(1, 1, 2, 2))
    assert infer_unet_config(empty(UNet, two)) == two
    small = replace(SD15, block_out_channels=(32,) * 4)
    assert infer_unet_config(empty(UNet, small)) == small
    tensors = empty(UNet, small)
    for left_out, said in (("down_blocks.1.", "not complete"), ("conv_in", "no conv_in.weight"), ("attn", "no text")):
        assert said in refused(infer_unet_config, {n: t for n, t in tensors.items() if left_out not in n})
    class_embedding = tensors | {"add_embedding.linear_1.weight": torch.empty(128, 1280, device="meta")}
    assert "width 768 and an added embedding" in refused(infer_unet_config, class_embedding)
    narrow = empty(UNet, replace(small, cross_attention_dim=96))
    assert "text states of width 96 and carries no config" in refused(infer_unet_config, narrow)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_diffusers_and_we_find_in_the_file_what_was_in_the_folder(sources, tmp_path, kind):
    pipe, path = load_pipeline(sources[kind]), tmp_path / "x.safetensors"
    pipe.unet.half()  # every tensor keeps its own dtype
    write_single_file(path, pipe)
    file = read_single_file(path)
    models = [pipe.unet, pipe.vae, *pipe.text_encoders]
    for model, (config, tensors) in zip(models, [file.unet, file.vae, *file.text_encoders], strict=True):
        assert config == model.config
        projection = (True,) if getattr(model, "text_projection", None) else ()
        assert_same(loaded(type(model), config, tensors, *projection), model.state_dict())
    assert (file.family, file.schedule) == (kind, pipe.schedule)
    if kind == "sd2":  # nothing is copied: the pieces of a stack are one after the other in the mapped file
        layer, tensors = "text_model.encoder.layers.0.self_attn", file.text_encoders[0][1]
        q, k = tensors[f"{layer}.q_proj.weight"], tensors[f"{layer}.k_proj.weight"]
        assert k.data_ptr() == q.data_ptr() + q.nbytes
    assert [settings_of(t) for t in file.tokenizers] == [settings_of(t) for t in pipe.tokenizers]
    if kind == "sdxl":  # diffusers' script leaves the text projection as the linear layer it is
        tensors, prefix = load_file(path), "conditioner.embedders.1.model.text_projection"
        tensors[f"{prefix}.weight"] = tensors.pop(prefix).T.contiguous()
        save_file(tensors, tmp_path / "y.safetensors", read_metadata(path))
        _, found = read_single_file(tmp_path / "y.safetensors").text_encoders[1]
        assert_same(found, pipe.text_encoders[1].state_dict())
    loader = diffusers.StableDiffusionXLPipeline if kind == "sdxl" else diffusers.StableDiffusionPipeline
    options = {"add_watermarker": False} if kind == "sdxl" else {}
    theirs = loader.from_single_file(str(path), config=str(sources[kind]), local_files_only=True, **options)
    expected = loader.from_pretrained(sources[kind], **options)
    expected.unet.half().float()
    for part in ("unet", "vae", "text_encoder", *["text_encoder_2"] * (kind == "sdxl")):
        assert_same(getattr(theirs, part).state_dict(), getattr(expected, part).state_dict())


@pytest.fixture(params=["bk-base", "bk-small", "bk-tiny"])
def student(request, tiny_sd1, tmp_path):
    """A student's folder, and its single file, student.safetensors, beside it."""
    pipe = load_pipeline(tiny_sd1)
    removal = plan_removal(pipe.unet.config, RECIPES[request.param].remove)
    pipe.unet = build_student(removal, pipe.unet)
    pipe.save(tmp_path / "student")
    write_single_file(tmp_path / "student.safetensors", pipe)
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


def test_a_file_for_stable_diffusion_cpp_has_the_same_weights_and_other_students_are_refused(
    student, tmp_path, monkeypatch
):
    dest = tmp_path / "x.safetensors"
    config = convert.Config(source=str(student), dest=str(dest), layout="stable-diffusion.cpp")
    assert "bk-tiny of SD 1.x" in refused(convert.main, config) and not dest.exists()
    unet = folders.load_unet(student)
    monkeypatch.setattr(single_file, "BK_TINY", {})
    convert.main(config)
    assert_same(read_single_file(dest).unet[1], unet.state_dict())
    assert any("output_blocks.2.1.conv" in name for name in load_file(dest))


def test_what_has_no_place_in_the_layout_is_refused_and_clips_own_vocabulary_is_not_carried(sources, tmp_path):
    pipe = load_pipeline(sources["sd1"])
    assert ".safetensors" in refused(write_single_file, tmp_path / "x.ckpt", pipe)
    pipe.vae = AutoencoderTiny()
    assert "TAESD" in refused(write_single_file, tmp_path / "x.safetensors", pipe)
    assert list(tmp_path.iterdir()) == []
    clip = SimpleNamespace(vocab={f"{i}": i for i in range(49407)} | {"cat</w>": 2368})
    assert tokenizer_entry([clip, clip]) == {}
    assert len(tokenizer_entry(pipe.tokenizers)["minidistill.tokenizers"]) == 1


@pytest.fixture(scope="module")
def foreign():
    """An SD 1.x as others save it, with a small U-Net, and a small text encoder and VAE in place of those that all
    official files have: {name: tensor}, and our models."""
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single_file, "SD_VAE", vae.config)
        patch.setitem(TEXT_ENCODERS, 768, text.config)
        yield {name: tensor.clone() for name, tensor in tensors.items()}, models


def assert_foreign(file, models) -> None:
    [text] = file.text_encoders
    for (config, tensors), model in ((file.unet, models["unet"]), (file.vae, models["vae"]), (text, models["text"])):
        assert config == model.config
        assert_same(loaded(type(model), config, tensors), model.state_dict())


def test_a_checkpoint_without_configs_is_read_in_the_spellings_of_all_times(foreign, tmp_path):
    tensors, models = foreign
    save_file(tensors, tmp_path / "x.safetensors")
    file = read_single_file(tmp_path / "x.safetensors")
    assert_foreign(file, models)
    assert (file.family, file.schedule, file.tokenizers) == ("sd1", ScheduleConfig(), ())
    old = {}  # text names without text_model., wrappers, channels_last, a whole CLIP's leftovers
    for name, tensor in tensors.items():
        name = name.replace("transformer.text_model.", "transformer.").replace(UNET, UNET + "_orig_mod.")  # noqa: PLW2901
        old[name] = tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
    old["cond_stage_model.transformer.text_projection.weight"] = torch.zeros(768, 768)
    old["cond_stage_model.logit_scale"] = torch.tensor(1.0)
    for legacy in (False, True):
        content = {"state_dict": old, "global_step": 470000, "epoch": 1, "lr_schedulers": [], "hparams": None}
        torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=not legacy)
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
    message = refused(read_single_file, tmp_path / "x.safetensors", ema=True)
    assert "no EMA weights of 1 tensors (input_blocks.0.0.weight)" in message


def test_a_unet_alone_is_read(foreign, tmp_path):
    unet, path = foreign[1]["unet"], tmp_path / "x.safetensors"
    in_ldm = ldm.to_ldm_unet(unet.state_dict(), unet.config)
    for tensors in (unet.state_dict(), in_ldm, prefixed(UNET, in_ldm), prefixed(UNET, unet.state_dict())):
        save_file(tensors, path)
        file = read_single_file(path)
        assert file.unet[0] == unet.config
        assert_same(file.unet[1], unet.state_dict())
        assert (file.family, file.vae, file.text_encoders, file.schedule) == ("sd1", None, (), None)


def test_what_a_network_predicts_is_told_by_the_usual_signs():
    v, eps, spec = "v_prediction", "epsilon", "modelspec.prediction_type"
    bias = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
    wide, narrow = {bias: torch.tensor([-0.1, 0.1])}, {bias: torch.tensor([-0.05, 0.05])}
    for config, weights, names, header, expected in (
        (SD21, wide, (), {}, v),
        (SD21, narrow, (), {}, eps),
        (SD21, narrow, (), {spec: "v"}, v),
        (SD21, wide, (), {spec: "epsilon"}, eps),
        (replace(SD21, in_channels=9), wide, (), {}, eps),
        (SD15, wide, (), {}, eps),
        (SDXL, {}, {"v_pred"}, {spec: "epsilon"}, v),
        (SDXL, {}, (), {}, eps),
    ):
        assert infer_prediction(config, weights, names, header) == expected


def test_an_sd2_file_gives_its_size_its_prediction_and_no_unused_layer(tmp_path):
    torch.manual_seed(0)
    few = {"block_out_channels": (64, 64), "layers_per_block": 1, "transformer_layers_per_block": 1}
    few |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 1}
    config = replace(SD21, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **few)
    unet = UNet(config)
    torch.nn.init.normal_(unet.up_blocks[1].attentions[1].transformer_blocks[0].norm1.bias, std=0.2)
    text = {"token_embedding.weight": torch.zeros(9, 1024), "logit_scale": torch.tensor(1.0)}
    text |= {f"transformer.resblocks.{n}.mlp.c_fc.weight": torch.zeros(4, 1024) for n in (0, 23)}
    text["text_projection"] = torch.zeros(1024, 1024)
    tensors = prefixed(UNET, ldm.to_ldm_unet(unet.state_dict(), config))
    for prefix in ("cond_stage_model.model.", "conditioner.embedders.0.model."):
        save_file(tensors | prefixed(prefix, text), tmp_path / "x.safetensors")
        file = read_single_file(tmp_path / "x.safetensors")
        assert (file.family, file.schedule.prediction_type) == ("sd2", "v_prediction")
        assert file.unet[0] == config and config.sample_size == 96
        assert file.text_encoders[0][0] == SD2_TEXT
        assert not [name for name in file.text_encoders[0][1] if ".23." in name or "projection" in name]


@pytest.mark.parametrize("marks", [(), ("v_pred",), ("v_pred", "ztsnr")])
def test_an_sdxl_file_gives_both_encoders_its_vaes_scale_and_its_marks(foreign, tmp_path, marks):
    config = replace(
        SDXL, block_out_channels=(64, 64), layers_per_block=1, attention_head_dim=1,
        transformer_layers_per_block=(1, 2), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    first = {name: torch.zeros_like(tensor) for name, tensor in foreign[1]["text"].state_dict().items()}
    second = {"token_embedding.weight": torch.zeros(9, 1280), "logit_scale": torch.tensor(1.0)}
    second["text_projection"] = torch.randn(1280, 20, generator=torch.Generator().manual_seed(0))
    tensors = {
        **prefixed(UNET, ldm.to_ldm_unet(UNet(config).state_dict(), config)),
        **{name: tensor for name, tensor in foreign[0].items() if name.startswith(VAE)},
        **prefixed("conditioner.embedders.0.transformer.", first),
        **{mark: torch.zeros(0) for mark in marks},
    }
    save_file(tensors, tmp_path / "x.safetensors")
    assert "1 text encoders, sdxl has 2" in refused(read_single_file, tmp_path / "x.safetensors")
    save_file(tensors | prefixed("conditioner.embedders.1.model.", second), tmp_path / "x.safetensors")
    file = read_single_file(tmp_path / "x.safetensors")
    assert (file.family, file.unet[0], file.vae[0]) == ("sdxl", config, SDXL_VAE)
    assert [one for one, _ in file.text_encoders] == [TEXT_ENCODERS[768], SDXL_TEXT_2]
    assert torch.equal(file.text_encoders[1][1]["text_projection.weight"], second["text_projection"].T)
    assert len(file.text_encoders[0][1]) == len(first)
    prediction = "v_prediction" if marks else "epsilon"
    assert file.schedule == ScheduleConfig(prediction_type=prediction, rescale_betas_zero_snr="ztsnr" in marks)


def test_a_vae_alone_and_that_of_a_whole_file_are_read(foreign, tmp_path):
    vae = foreign[1]["vae"]
    old, in_ldm = vae.state_dict(), ldm.to_ldm_vae(vae.state_dict())
    for new, name in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        old = {key.replace(f".0.{new}.", f".0.{name}."): tensor for key, tensor in old.items()}
    assert any("proj_attn" in name for name in old)
    training = {"loss.discriminator.main.0.weight": torch.zeros(2), "model_ema.decay": torch.zeros(1)}
    base = replace(vae.config, scaling_factor=0.13025)
    alone = (vae.state_dict(), old, in_ldm, prefixed("first_stage_model.", in_ldm), in_ldm | training)
    for tensors in (*alone, foreign[0]):
        torch.save({"state_dict": tensors}, tmp_path / "x.ckpt")
        config, found = read_vae_file(tmp_path / "x.ckpt", base)
        assert config == base
        assert_same(loaded(AutoencoderKL, config, found), vae.state_dict())


OTHERS = {
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "--lora",
    "unet.down_blocks.0.attentions.0.to_q.lora_A.weight": "--lora",
    "unet.down_blocks.0.attn1.processor.to_q_lora.up.weight": "--lora",
    "first_stage_model.decoder.conv_in.weight": "--vae",
    "decoder.layers.0.weight": "--vae",
    "cond_stage_model.model.token_embedding.weight": "text encoder",
    "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": "not complete",
    "emb_params": "something else (1 tensors: emb_params)",
}


def test_another_kind_of_file_is_called_what_it_is(foreign, tmp_path):
    path = tmp_path / "x.safetensors"
    for name, kind in OTHERS.items():
        save_file({name: torch.zeros(2, 2)}, path)
        message = refused(read_single_file, path)
        assert kind in message and str(path) in message
    save_file(foreign[1]["unet"].state_dict(), path)
    assert "not a VAE" in refused(read_vae_file, path)


def test_tensors_that_nothing_explains_or_of_wrong_shapes_are_named(foreign, tmp_path):
    path, clip = tmp_path / "x.safetensors", "cond_stage_model.transformer."
    for extra, said in (
        (["surprise", "other"], f"2 of {len(foreign[0]) + 2} tensors belong to no known part (other, surprise)"),
        (["cond_stage_model.model.token_embedding.weight"], "2 text encoders, sd1 has 1"),
        (["conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"], "two spellings"),
    ):
        save_file(foreign[0] | {name: torch.zeros(1, 1024) for name in extra}, path)
        message = refused(read_single_file, path)
        assert said in message and "x.safetensors" in message
    for prefix, name in ((UNET, "input_blocks.1.9.weight"), (UNET, "foo.bar"), (VAE, "encoder.foo"), (clip, "foo")):
        save_file(foreign[0] | {prefix + name: torch.zeros(1)}, path)  # of a part: by the strict loader
        file = read_single_file(path)
        kind, part = {UNET: (UNet, file.unet), VAE: (AutoencoderKL, file.vae)}.get(
            prefix, (CLIPTextModel, file.text_encoders[0])
        )
        assert f"tensors are not expected ({name})" in refused(loaded, kind, *part)
    for name, shape, said in (
        ("input_blocks.0.0.weight", (32, 4), "conv_in.weight"),
        ("input_blocks.1.0.in_layers.2.weight", (30, 32, 3, 3), "fit no config"),
        ("input_blocks.1.0.in_layers.2.weight", (0, 32, 3, 3), "resnets.0.conv1"),
    ):
        save_file(foreign[0] | {UNET + name: torch.zeros(shape)}, path)
        assert said in refused(read_single_file, path)
    save_file(foreign[0] | {UNET + "out.2.bias": torch.zeros(7)}, path)
    assert "conv_out.bias is (7,)" in refused(loaded, UNet, *read_single_file(path).unet)


@pytest.mark.parametrize("key", ["unet_config", "vae_config", "text_configs", "schedule", "tokenizers"])
def test_a_header_that_is_not_right_is_refused(foreign, tmp_path, key):
    for text in ("{", "3", "[3]", '{"layers_per_block": {}, "beta_schedule": 3}', '[{"vocab": 3}, 1]', "[" * 99999):
        save_file(foreign[0], tmp_path / "x.safetensors", metadata={f"minidistill.{key}": text})
        assert f"x.safetensors: minidistill.{key}" in refused(read_single_file, tmp_path / "x.safetensors")


@pytest.mark.parametrize(("stages", "layers", "said"), [(17, 1, "17 stages, more than 16"), (2, 501, "1002 layers")])
def test_a_unet_of_more_stages_or_layers_than_any_has_is_refused(stages, layers, said):
    names = [f"down_blocks.{i}.resnets.{j}.conv1.weight" for i in range(stages) for j in range(layers)]
    assert said in refused(infer_unet_config, dict.fromkeys(names, torch.empty(4, 4, 3, 3)))
