"""LoRA: live equals merged equals peft, and files go both ways between us, kohya's names, peft and diffusers.

diffusers and peft are the oracles: what they write has to give their own output here, what we write ours there.
"""

import copy
import json
import re
from dataclasses import replace

import diffusers
import peft
import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from minidistill.distill.block_removal import RECIPES, plan_removal
from minidistill.errors import InputError
from minidistill.interop import lora_files
from minidistill.interop.ldm import swap, unet_pairs
from minidistill.interop.lora_files import every_name, matched_line, merge_into, read_lora, rewrite_lora, write_lora
from minidistill.models import lora
from minidistill.models.clip import CLIPTextConfig, CLIPTextModel
from minidistill.models.lora import LoRAWeights
from minidistill.models.unet import SD15, SD21, SDXL, UNet, UNetConfig
from minidistill.weights.files import read_metadata, write_safetensors

TINY_SD1 = replace(
    SD15,
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=2,
    transformer_layers_per_block=1,
    attention_head_dim=2,
    norm_num_groups=4,
    cross_attention_dim=12,
)
TINY_SDXL = replace(
    SDXL,
    block_out_channels=(8, 16, 16),
    attention_head_dim=(1, 2, 2),
    transformer_layers_per_block=(1, 1, 2),
    norm_num_groups=4,
    cross_attention_dim=20,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 12,
)
TEXT = {
    "vocab_size": 50,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "projection_dim": 12,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
FIRST = "lora_unet_down_blocks_0_attentions_0_proj_in"
RANK, ALPHA = 4, 0.5  # the ratio of SDXL-Lightning's files, 8 / 64


def refused(call, *args) -> str:
    """The message of the InputError that a call ends in; it must be one line."""
    with pytest.raises(InputError) as info:
        call(*args)
    message = str(info.value)
    assert "\n" not in message
    return message


def make_unet(config: UNetConfig) -> UNet:
    """Ours alone, with random weights."""
    torch.manual_seed(0)
    return UNet(config).eval()


def make_unets(config: UNetConfig) -> tuple[UNet, UNet2DConditionModel]:
    """Ours and diffusers' with the same random weights."""
    torch.manual_seed(0)
    theirs = UNet2DConditionModel.from_config(config.to_dict()).eval()
    ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def make_text_encoders(width: int, projection: bool) -> tuple[CLIPTextModel, nn.Module]:
    """Ours and transformers' with the same random weights."""
    torch.manual_seed(width)
    config = CLIPTextConfig(**TEXT, hidden_size=width)
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    theirs = kind(transformers.CLIPTextConfig(**TEXT, hidden_size=width, hidden_act="quick_gelu")).eval()
    ours = CLIPTextModel(config, projection).eval()
    state = {name if "text_" in name else f"text_model.{name}": t for name, t in theirs.state_dict().items()}
    ours.load_state_dict({name: t for name, t in state.items() if "position_ids" not in name})
    return ours, theirs


def make_pipelines(kind: str) -> tuple[dict[str, nn.Module], StableDiffusionPipeline | StableDiffusionXLPipeline]:
    """Our networks by part, and a pipeline of diffusers with the same weights; without VAE and tokenizers."""
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    nothing = {"vae": None, "tokenizer": None, "scheduler": scheduler, "feature_extractor": None}
    text, their_text = make_text_encoders(8, projection=False)
    if kind == "sd1":
        unet, their_unet = make_unets(TINY_SD1)
        pipe = StableDiffusionPipeline(
            unet=their_unet, text_encoder=their_text, safety_checker=None, requires_safety_checker=False, **nothing
        )
        return {"unet": unet, "text_encoder": text}, pipe
    unet, their_unet = make_unets(TINY_SDXL)
    text_2, their_text_2 = make_text_encoders(12, projection=True)
    pipe = StableDiffusionXLPipeline(
        unet=their_unet, text_encoder=their_text, text_encoder_2=their_text_2, tokenizer_2=None, **nothing
    )
    return {"unet": unet, "text_encoder": text, "text_encoder_2": text_2}, pipe


def make_sdxl() -> dict[str, nn.Module]:
    """Our networks of an SDXL by part, with random weights."""
    torch.manual_seed(0)
    return {
        "unet": make_unet(TINY_SDXL),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT, hidden_size=8)),
        "text_encoder_2": CLIPTextModel(CLIPTextConfig(**TEXT, hidden_size=12), projection=True),
    }


def unet_inputs(config: UNetConfig, dtype=torch.float32) -> tuple:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=g).to(dtype)
    context = torch.randn(2, 5, config.cross_attention_dim, generator=g).to(dtype)
    added = None
    if config.addition_embed_type:
        sizes = torch.tensor([[64, 48, 0, 8, 64, 64], [33, 99, 7, 0, 32, 48]])
        added = {"text_embeds": torch.randn(2, 12, generator=g).to(dtype), "time_ids": sizes.float()}
    return x, torch.tensor([3, 999]), context, added


@torch.no_grad()
def output(network: nn.Module) -> torch.Tensor:
    """What a network of ours or theirs makes of fixed inputs; for text encoders all the states there are."""
    if isinstance(network, UNet):
        return network(*unet_inputs(network.config, network.dtype))
    if isinstance(network, UNet2DConditionModel):
        config = UNetConfig.from_dict({k: v for k, v in network.config.items() if not k.startswith("_")})
        x, t, context, added = unet_inputs(config, network.dtype)
        return network(x, t, context, added_cond_kwargs=added).sample
    ids = torch.tensor([[0, 7, 9, 49, 1, 1, 1, 1], [0, 3, 49, 1, 1, 1, 1, 1]])
    if isinstance(network, CLIPTextModel):
        out = network(ids)
        return torch.cat([*(s.flatten() for s in out.hidden_states), out.pooled.flatten()])
    out = network(ids, output_hidden_states=True)
    pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
    return torch.cat([*(s.flatten() for s in out.hidden_states), pooled.flatten()])


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """The largest difference, relative to the largest value."""
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


def assert_moved(found: torch.Tensor, before: torch.Tensor) -> None:
    """The LoRA shows: two outputs that are equal because it does nothing prove nothing."""
    assert (found - before).abs().max() / before.abs().max() > 0.01


def random_lora(network: nn.Module, targets=lora.ALL, rank=RANK, alpha=ALPHA, seed=0) -> dict[str, LoRAWeights]:
    """Weights that show in the output, for the layers that end in the targets."""
    g = torch.Generator().manual_seed(seed)
    weights = {}
    for name in lora.find_targets(network, targets):
        shape = network.get_submodule(name).weight.shape
        down = torch.randn(rank, *shape[1:], generator=g) / shape[1:].numel() ** 0.5
        up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=g)
        weights[name] = LoRAWeights(down, up, alpha)
    return weights


def assert_same_weights(found: dict[str, LoRAWeights], expected: dict[str, LoRAWeights]) -> None:
    assert found.keys() == expected.keys()
    for name, (down, up, alpha) in expected.items():
        assert torch.equal(found[name].down, down) and torch.equal(found[name].up, up)
        assert found[name].alpha == alpha


def peft_unet(config: UNetConfig, **settings) -> tuple[UNet, UNet2DConditionModel]:
    """Ours, plain, and diffusers' with a random adapter of peft on every layer of the blocks."""
    ours, theirs = make_unets(config)
    settings = {"r": RANK, "lora_alpha": 1, "target_modules": list(lora.ALL)} | settings
    peft.inject_adapter_in_model(peft.LoraConfig(**settings), theirs)
    randomise(theirs)
    return ours, theirs


def attach(networks: dict[str, nn.Module], loras: lora_files.Loras) -> None:
    for part, weights in loras.items():
        assert lora.attach_lora(networks[part], weights) == len(weights)


def random_loras(networks: dict[str, nn.Module], text_alpha: float = 2.5) -> lora_files.Loras:
    """For every layer, with two ranks and alphas in each network. text_alpha: of some layers of the text encoders."""
    loras = {}
    for part, network in networks.items():
        every, some, alpha = (lora.ALL, "conv1", 2.5) if part == "unet" else (lora.TEXT_ALL, "q_proj", text_alpha)
        loras[part] = random_lora(network, every) | random_lora(network, [some], rank=3, alpha=alpha)
    return loras


def randomise(network: nn.Module) -> None:
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=g) * (0.5 if "lora_B" in name else 0.2))


# live and merged


def test_live_equals_merged_at_any_scale_and_alpha_counts():
    live = make_unet(TINY_SDXL)
    merged, stronger = copy.deepcopy(live), copy.deepcopy(live)
    before, weights = output(live), random_lora(live)
    assert any(w.down.shape[2:] == (3, 3) for w in weights.values()) and any(
        w.down.dim() == 2 for w in weights.values()
    )
    assert "down_blocks.0.downsamplers.0.conv" in weights  # of stride 2
    assert lora.attach_lora(live, weights, scale=0.7) == len(weights)
    assert lora.merge_weights(merged, weights, scale=0.7) == len(weights)
    assert_moved(output(live), before)
    assert_close(output(merged), output(live))
    # scale * alpha / r is all there is: W + 0.7 * 0.5 / 4 * up @ down
    doubled = {name: w._replace(alpha=2 * w.alpha) for name, w in weights.items()}
    lora.merge_weights(stronger, doubled, scale=0.35)
    assert_close(output(stronger), output(merged))
    name = "down_blocks.0.resnets.0.conv1"
    down, up, _ = weights[name]
    change = 0.7 * 0.5 / 4 * torch.einsum("orxy,rikl->oikl", up, down)
    original = make_unet(TINY_SDXL).get_submodule(name).weight
    assert_close(merged.get_submodule(name).weight, original + change, 1e-6)


def test_scale_can_be_set_and_zero_is_the_base():
    unet = make_unet(TINY_SD1)
    before, weights = output(unet), random_lora(unet)
    expected = copy.deepcopy(unet)
    lora.merge_weights(expected, weights, scale=-0.5)
    lora.attach_lora(unet, weights)
    lora.set_scale(unet, 0)
    assert torch.equal(output(unet), before)
    lora.set_scale(unet, -0.5)
    assert_close(output(unet), output(expected))
    with torch.no_grad():
        for layer in lora.lora_layers(unet).values():
            layer.lora_up.zero_()
    assert all(w.up.any() for w in weights.values())  # a network trains its own copy


def test_a_fresh_lora_changes_nothing_and_removing_gives_the_base_back():
    unet = make_unet(TINY_SD1)
    before, names = output(unet), list(unet.state_dict())
    modules = {name: (type(m), str(m)) for name, m in unet.named_modules()}
    count = lora.add_lora(unet, lora.ALL, rank=3)
    assert count == len(lora.lora_layers(unet)) == len(lora.lora_state(unet)) // 2
    assert torch.equal(output(unet), before)
    assert all(w.alpha == 3 and w.down.std() > 0 and not w.up.any() for w in lora.lora_weights(unet).values())
    assert list(lora.base_state(unet)) == names
    assert {**lora.base_state(unet), **lora.lora_state(unet)}.keys() == unet.state_dict().keys()
    UNet(TINY_SD1).load_state_dict(lora.base_state(unet), strict=True)
    assert lora.remove_lora(unet) == count
    assert {name: (type(m), str(m)) for name, m in unet.named_modules()} == modules
    assert torch.equal(output(unet), before) and list(unet.state_dict()) == names


def test_merging_a_live_lora_gives_a_plain_network_with_the_same_output():
    unet = make_unet(TINY_SDXL)
    names = list(unet.state_dict())
    lora.attach_lora(unet, random_lora(unet), scale=0.8)
    expected = output(unet)
    lora.merge_lora(unet)
    assert list(unet.state_dict()) == names and not lora.lora_layers(unet)
    assert_close(output(unet), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_in_low_precision_sums_in_float32_and_rounds_once(dtype):
    layer = nn.Sequential(nn.Linear(64, 64)).to(dtype)
    weights = random_lora(layer, ("0",), rank=16)
    exact = layer[0].weight.float() + ALPHA / 16 * weights["0"].up @ weights["0"].down
    lora.merge_weights(layer, {"0": LoRAWeights(weights["0"].down, weights["0"].up, ALPHA)})
    assert torch.equal(layer[0].weight, exact.to(dtype))


def test_a_bfloat16_network_runs_with_a_live_float32_lora():
    unet = make_unet(TINY_SD1)
    weights = random_lora(unet)
    merged = copy.deepcopy(unet)
    lora.merge_weights(merged, weights)
    unet = unet.bfloat16()
    lora.attach_lora(unet, weights, dtype=torch.float32)
    assert all(w.down.dtype == torch.float32 for w in lora.lora_weights(unet).values())
    assert output(unet).dtype == torch.bfloat16
    assert_close(output(unet).float(), output(merged), 0.05)
    lora.remove_lora(unet)
    lora.attach_lora(unet, weights)  # without a dtype it takes the layers'
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}


# which layers


def test_the_full_set_is_that_of_lightning_788_layers_of_sdxl():
    with torch.device("meta"):
        unet = UNet(SDXL)
    names = lora.find_targets(unet, lora.ALL)
    blocks = ("down_blocks.", "mid_block.", "up_blocks.")
    assert names == [name for name in lora.candidates(unet) if name.startswith(blocks)]
    assert lora.add_lora(unet, lora.ALL, rank=64, alpha=8) == 788
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == 196_751_360
    assert len(lora.find_targets(UNet(TINY_SDXL), lora.ATTENTION)) == 4 * sum(
        name.endswith(("attn1", "attn2")) for name, _ in UNet(TINY_SDXL).named_modules()
    )


def test_targets_are_whole_ends_of_names_and_unknown_ones_are_refused():
    unet = UNet(replace(TINY_SD1, mid_block_type=None))
    assert lora.find_targets(unet, ["attentions.1.proj_in"]) == [
        "down_blocks.0.attentions.1.proj_in",
        "up_blocks.1.attentions.1.proj_in",
    ]
    for targets, named in ((["onv1"], "onv1"), (["to_q", "to_qq"], "to_qq"), (["q_proj"], "q_proj")):
        with pytest.raises(ValueError, match=rf"no layer of UNet is called {named}$"):
            lora.find_targets(unet, targets)
    text = make_sdxl()["text_encoder_2"]
    assert len(lora.find_targets(text, lora.TEXT_ATTENTION)) == 8
    assert len(lora.find_targets(text, lora.TEXT_ALL)) == 12


def test_wrong_settings_and_a_second_live_lora_are_refused_with_nothing_changed():
    unet = make_unet(TINY_SD1)
    for settings in ({"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}):
        with pytest.raises(ValueError, match="must be positive"):
            lora.add_lora(unet, lora.ATTENTION, **settings)
    assert not lora.lora_layers(unet)
    lora.add_lora(unet, ["attn1.to_q"])
    live = list(lora.lora_layers(unet))
    with pytest.raises(ValueError, match="has a live one already"):
        lora.add_lora(unet, ["to_k", "to_q"])
    assert list(lora.lora_layers(unet)) == live
    bad = {"conv_in": LoRAWeights(torch.ones(2, 4), torch.ones(8, 2), 1.0)}  # a 3x3 convolution
    for call in (lora.attach_lora, lora.merge_weights):
        with pytest.raises(ValueError, match="do not fit a weight of"):
            call(unet, bad)
    lora.add_lora(unet, ["to_k"], rank=2)  # another layer may have one of its own
    assert all(p.requires_grad == ("lora_" in name) for name, p in unet.named_parameters())


# training


def loss_of(network: nn.Module) -> torch.Tensor:
    x, t, context, added = unet_inputs(TINY_SDXL)
    if isinstance(network, UNet2DConditionModel):
        return network(x, t, context, added_cond_kwargs=added).sample.square().mean()
    return network(x, t, context, added).square().mean()


def gradients(network: nn.Module) -> dict[str, torch.Tensor]:
    network.zero_grad()
    loss_of(network).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def test_training_steps_equal_pefts_and_touch_nothing_but_the_lora():
    ours, theirs = peft_unet(TINY_SDXL)
    base = {name: t.clone() for name, t in ours.state_dict().items()}
    lora.add_lora(ours, lora.ALL, RANK, alpha=1)
    state = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, layer in lora.lora_layers(ours).items():
            layer.lora_down.copy_(state[f"{name}.lora_A.default.weight"])
            state[f"{name}.lora_B.default.weight"].zero_()  # a fresh start, as ours is
    for network in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
        for _ in range(2):  # the first moves up alone, the second both
            optimizer.zero_grad()
            loss_of(network).backward()
            optimizer.step()
    for name, layer in lora.lora_layers(ours).items():
        for found, key in ((layer.lora_down, "lora_A"), (layer.lora_up, "lora_B")):
            assert found.grad is not None and found.any()
            torch.testing.assert_close(found, state[f"{name}.{key}.default.weight"], rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for name, p in ours.named_parameters() if "lora_" not in name)
    for name, tensor in lora.base_state(ours).items():
        assert torch.equal(tensor, base[name])


def test_a_fresh_lora_is_drawn_as_pefts_is():
    ours, theirs = peft_unet(TINY_SD1)
    lora.add_lora(ours, ["conv1"], rank=RANK, generator=torch.Generator().manual_seed(3))
    again = make_unet(TINY_SD1)
    lora.add_lora(again, ["conv1"], rank=RANK, generator=torch.Generator().manual_seed(3))
    for name, layer in lora.lora_layers(ours).items():
        theirs_layer = theirs.get_submodule(name)
        torch.manual_seed(3)
        theirs_layer.reset_lora_parameters("default", True)
        bound = theirs_layer.lora_A["default"].weight.abs().max()
        assert 0.8 < layer.lora_down.abs().max() / bound < 1.25  # both uniform, between the same limits
        assert torch.equal(layer.lora_down, again.get_submodule(name).lora_down)


def test_gradients_survive_checkpointing_copying_and_autocast():
    unet = make_unet(TINY_SDXL)
    lora.attach_lora(unet, random_lora(unet))
    expected = gradients(unet)
    twin = copy.deepcopy(unet)
    twin.gradient_checkpointing = True
    found = gradients(twin)
    assert found.keys() == expected.keys() == lora.lora_state(unet).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    with torch.no_grad():
        twin.get_submodule("mid_block.resnets.0.conv1").lora_up.zero_()
    assert unet.get_submodule("mid_block.resnets.0.conv1").lora_up.any()  # a copy has its own
    with torch.autocast("cpu", torch.bfloat16):
        low = gradients(unet)
    largest = max(g.abs().max() for g in expected.values())
    assert all((low[name] - gradient).abs().max() < 0.05 * largest for name, gradient in expected.items())
    assert {g.dtype for g in low.values()} == {torch.float32}


def test_trains_under_ddp(tmp_path):
    unet = make_unet(TINY_SDXL)
    lora.attach_lora(unet, random_lora(unet))
    expected = gradients(unet)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = gradients(nn.parallel.DistributedDataParallel(unet))
    finally:
        torch.distributed.destroy_process_group()
    assert found.keys() == {f"module.{name}" for name in expected}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"module.{name}"], gradient)


def test_training_goes_on_from_a_saved_state():
    unet = make_unet(TINY_SD1)
    lora.attach_lora(unet, random_lora(unet))
    other = make_unet(TINY_SD1)
    lora.add_lora(other, lora.ALL, RANK, ALPHA)
    other.load_state_dict({**lora.base_state(other), **lora.lora_state(unet)}, strict=True)
    assert torch.equal(output(other), output(unet))


# what peft and diffusers write


# No two of alpha_pattern fit one layer: PEFT takes the first, and diffusers writes them sorted.
PATTERNS = {
    "rank_pattern": {"conv1": 2, "attn1.to_q": 3},
    "alpha_pattern": {"mid_block.*conv2": 3, "to_k": 5, "conv1": 2.5},
}


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (TINY_SD1, {"init_lora_weights": "orthogonal", "target_modules": list(lora.ATTENTION)}),  # linear layers only
        (TINY_SD1, {"use_rslora": True}),
        (TINY_SDXL, PATTERNS),
    ],
    ids=["orthogonal", "rslora", "patterns"],
)
def test_adapters_saved_by_diffusers_give_its_output(config, settings, tmp_path):
    ours, theirs = peft_unet(config, **settings)
    before = output(ours)
    theirs.save_lora_adapter(tmp_path)  # the settings go in the header
    loras = read_lora(tmp_path / "pytorch_lora_weights.safetensors", {"unet": ours})
    merge_into({"unet": ours}, loras)
    assert_moved(output(ours), before)
    assert_close(output(ours), output(theirs))


@pytest.mark.parametrize("settings", [{}, PATTERNS], ids=["plain", "patterns"])
def test_adapters_saved_by_peft_give_its_output(settings, tmp_path):
    ours, theirs = make_unets(TINY_SD1)
    config = peft.LoraConfig(**{"r": RANK, "lora_alpha": 1, "target_modules": list(lora.ALL)} | settings)
    model = peft.get_peft_model(theirs, config)
    randomise(model)
    model.save_pretrained(tmp_path)  # base_model.model.*, and adapter_config.json
    attach({"unet": ours}, read_lora(tmp_path / "adapter_model.safetensors", {"unet": ours}))
    assert_close(output(ours), output(theirs))


def test_a_raw_state_of_peft_with_its_adapters_name_is_read(tmp_path):
    ours, theirs = peft_unet(TINY_SD1, lora_alpha=RANK)
    raw = {name: p.detach() for name, p in theirs.named_parameters() if ".lora_" in name}
    assert any(name.endswith(".lora_A.default.weight") for name in raw)
    save_file(raw, tmp_path / "x.safetensors")
    merge_into({"unet": ours}, read_lora(tmp_path / "x.safetensors", {"unet": ours}))
    assert_close(output(ours), output(theirs))


@pytest.mark.parametrize(
    ("kind", "with_metadata", "spelling"),
    [("sd1", True, "peft"), ("sd1", False, "diffusers"), ("sdxl", True, "diffusers")],
)
def test_pipelines_saved_by_diffusers_give_their_output(kind, with_metadata, spelling, tmp_path):
    networks, pipe = make_pipelines(kind)
    alpha = 1 if with_metadata else RANK  # without metadata nobody can know another
    settings = {"r": RANK, "lora_alpha": alpha}
    layers, header = {}, {}
    for part in networks:
        theirs = getattr(pipe, part)
        targets = lora.ALL if part == "unet" else lora.TEXT_ALL
        peft.inject_adapter_in_model(peft.LoraConfig(**settings, target_modules=list(targets)), theirs)
        randomise(theirs)
        state = get_peft_model_state_dict(theirs)
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(state) if spelling == "diffusers" else state
        header[f"{part}_lora_adapter_metadata"] = theirs.peft_config["default"].to_dict() if with_metadata else None
    type(pipe).save_lora_weights(tmp_path, **layers, **header)
    loras = read_lora(tmp_path / "pytorch_lora_weights.safetensors", networks)
    before = {part: output(network) for part, network in networks.items()}
    assert merge_into(networks, loras).keys() == networks.keys()
    for part, network in networks.items():
        assert_moved(output(network), before[part])
        assert_close(output(network), output(getattr(pipe, part)))


# what we write


@pytest.mark.parametrize("form", ["kohya", "peft"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_diffusers_reads_what_we_write(kind, form, tmp_path):
    networks, pipe = make_pipelines(kind)
    # of kohya's form diffusers loses the alphas of a text encoder's layers where they differ
    loras = random_loras(networks, text_alpha=2.5 if form == "peft" else ALPHA)
    write_lora(tmp_path / "x.safetensors", loras, form)
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    before = {part: output(network) for part, network in networks.items()}
    attach(networks, loras)
    for part, network in networks.items():
        assert_moved(output(network), before[part])
        assert_close(output(getattr(pipe, part)), output(network))


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_what_is_written_comes_back(form, tmp_path):
    networks = make_sdxl()
    targets = {"unet": (*lora.ALL, "conv_in", "linear_1"), "text_encoder": lora.TEXT_ALL}
    targets["text_encoder_2"] = (*lora.TEXT_ALL, "text_projection")
    loras = {part: random_lora(network, targets[part]) for part, network in networks.items()}
    loras["unet"]["conv_in"] = random_lora(networks["unet"], ["conv_in"], rank=2, alpha=1.5)["conv_in"]
    write_lora(tmp_path / "deep" / "x.safetensors", loras, form, metadata={"steps": "4"})
    found = read_lora(tmp_path / "deep" / "x.safetensors", networks)
    assert found.keys() == loras.keys()
    for part, weights in loras.items():
        assert_same_weights(found[part], weights)
    assert read_metadata(tmp_path / "deep" / "x.safetensors")["steps"] == "4"


def test_a_live_lora_is_written_in_the_dtype_asked_for(tmp_path):
    unet = make_unet(TINY_SD1)
    weights = random_lora(unet)
    lora.attach_lora(unet, weights, scale=0.3)  # a wish of this moment: the file holds the LoRA itself
    write_lora(tmp_path / "x.safetensors", {"unet": unet}, dtype=torch.float16)
    found = read_lora(tmp_path / "x.safetensors", {"unet": make_unet(TINY_SD1)})["unet"]
    assert {w.down.dtype for w in found.values()} == {torch.float16}
    assert torch.equal(found["mid_block.resnets.0.conv1"].up, weights["mid_block.resnets.0.conv1"].up.half())


def test_kohya_files_have_kohyas_names_and_header(tmp_path):
    networks = make_sdxl()
    with torch.device("meta"):
        sdxl = UNet(SDXL)
    one = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": LoRAWeights(
            torch.ones(4, 2048), torch.ones(640, 4), 2
        )
    }
    text = {"text_model.encoder.layers.0.mlp.fc1": random_lora(networks["text_encoder"], ["fc1"]).popitem()[1]}
    write_lora(tmp_path / "xl.safetensors", {"unet": one, "text_encoder": text, "text_encoder_2": {}})
    names = load_file(tmp_path / "xl.safetensors")
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    assert {f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"} < names.keys()
    assert names[f"{key}.alpha"].item() == 2 and names[f"{key}.alpha"].shape == ()
    assert "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha" in names
    header = read_metadata(tmp_path / "xl.safetensors")
    assert header["ss_network_module"] == "networks.lora" and header["ss_v2"] == "False"
    assert header["ss_base_model_version"].startswith("sdxl_")  # or A1111 lists it among those for SD 1.x
    assert read_lora(tmp_path / "xl.safetensors", {**networks, "unet": sdxl}).keys() == {"unet", "text_encoder"}
    write_lora(tmp_path / "sd.safetensors", {"text_encoder": text})
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha" in load_file(tmp_path / "sd.safetensors")
    assert "there is no LoRA" in refused(write_lora, tmp_path / "no.safetensors", {"unet": networks["unet"]})
    assert not (tmp_path / "no.safetensors").exists()


# kohya's names, and older ones


def sgm_file(path, weights: dict[str, LoRAWeights], config: UNetConfig) -> None:
    """A kohya file with the block names of Stability AI's code."""
    pairs, tensors = unet_pairs(config), {}
    for name, (down, up, alpha) in weights.items():
        key = "lora_unet_" + swap(name, pairs).replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    write_safetensors(path, tensors)


def test_sgm_style_files_give_the_output_they_give_in_diffusers(tmp_path):
    networks, pipe = make_pipelines("sdxl")
    weights = random_lora(networks["unet"])
    sgm_file(tmp_path / "x.safetensors", weights, TINY_SDXL)
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    found = read_lora(tmp_path / "x.safetensors", networks)
    assert_same_weights(found["unet"], weights)
    attach(networks, found)
    assert_close(output(pipe.unet), output(networks["unet"]))


@pytest.mark.parametrize("style", ["diffusers", "sgm"])
def test_a_file_like_lightnings_matches_788_of_788(style, tmp_path):
    with torch.device("meta"):
        unet = UNet(SDXL)
    weights = {}
    for name in lora.find_targets(unet, lora.ALL):
        shape = unet.get_submodule(name).weight.shape
        up = torch.zeros(shape[0], 1, *[1] * (len(shape) - 2))
        weights[name] = LoRAWeights(torch.zeros(1, *shape[1:]).half(), up.half(), 8.0)
    path = tmp_path / "lightning.safetensors"
    if style == "sgm":
        sgm_file(path, weights, SDXL)
    else:
        write_lora(path, {"unet": weights})
    loras = read_lora(path, {"unet": unet})
    assert len(load_file(path)) == 2364
    assert matched_line(loras, merge_into({"unet": unet}, loras)) == "788/788 modules matched"
    attach({"unet": unet}, loras)
    parts = {"unet": loras["unet"], "text_encoder": {"a": None}}
    assert matched_line(parts, {"unet": 788, "text_encoder": 1}) == "789/789 modules matched (unet 788, text_encoder 1)"


def test_no_two_layers_share_a_spelling():
    with torch.device("meta"):
        names = list(lora.candidates(UNet(SDXL)))
    pairs = unet_pairs(SDXL)
    spelled = [s for name in names for s in set(lora_files._spellings("unet", name, pairs))]
    assert len(spelled) == len(set(spelled))


UNET_TO_OLD = {"to_q": "processor.to_q_lora", "to_out.0": "processor.to_out_lora"}
TEXT_TO_OLD = {"q_proj": "to_q_lora", "out_proj": "to_out_lora", "fc1": "fc1.lora_linear_layer"}


def test_diffusers_first_spellings_are_read(tmp_path):
    networks = make_sdxl()
    loras = {
        "unet": random_lora(networks["unet"], tuple(UNET_TO_OLD), alpha=float(RANK)),
        "text_encoder": random_lora(networks["text_encoder"], tuple(TEXT_TO_OLD), alpha=float(RANK)),
    }
    tensors = {}
    for part, table in (("unet", UNET_TO_OLD), ("text_encoder", TEXT_TO_OLD)):
        for name, (down, up, _) in loras[part].items():
            end = next(end for end in table if name.endswith(end))
            key = f"{part}.{name.removesuffix(end)}{table[end]}"
            tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_lora(tmp_path / "x.safetensors", networks)
    for part, weights in loras.items():
        assert_same_weights(found[part], weights)


@pytest.mark.parametrize("program", ["comfyui", "lycoris"])
def test_the_spellings_of_comfyui_and_lycoris_are_read(program, tmp_path):
    """The first extracts LoRAs under the names its checkpoints have, the second names layers after its wrapper."""
    networks, pairs = make_sdxl(), unet_pairs(TINY_SDXL)
    if program == "lycoris":
        networks = {"unet": networks["unet"]}
    loras, tensors = random_loras(networks), {}
    encoders = {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
    }
    for part, weights in loras.items():
        for name, (down, up, alpha) in weights.items():
            key = encoders[part] + name if part in encoders else "diffusion_model." + swap(name, pairs)
            if program == "lycoris":
                key = "lycoris_" + name.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_lora(tmp_path / "x.safetensors", networks)
    for part, weights in loras.items():
        assert_same_weights(found[part], weights)


def kohya_tensors(unet: UNet, targets=("attn2.to_k", "proj_in")) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (down, up, _) in random_lora(unet, targets).items():
        key = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(ALPHA)}
    return tensors


def test_an_absent_alpha_is_the_rank_and_a_half_precision_one_counts(tmp_path):
    unet = make_unet(TINY_SD1)
    tensors = kohya_tensors(unet)
    half = {name: t.half() for name, t in tensors.items()}
    save_file(half, tmp_path / "half.safetensors")
    assert {w.alpha for w in read_lora(tmp_path / "half.safetensors", {"unet": unet})["unet"].values()} == {ALPHA}
    save_file({n: t for n, t in tensors.items() if not n.endswith("alpha")}, tmp_path / "none.safetensors")
    assert {w.alpha for w in read_lora(tmp_path / "none.safetensors", {"unet": unet})["unet"].values()} == {RANK}


def test_a_1x1_convolution_may_be_stored_as_a_linear_layer(tmp_path):
    unet = make_unet(TINY_SD1)
    tensors = kohya_tensors(unet)
    assert any(t.dim() == 4 for t in tensors.values())
    flat = {name: t[:, :, 0, 0] if t.dim() == 4 else t for name, t in tensors.items()}
    save_file(tensors, tmp_path / "conv.safetensors")
    save_file(flat, tmp_path / "linear.safetensors")
    conv, linear = (read_lora(tmp_path / f"{name}.safetensors", {"unet": unet})["unet"] for name in ("conv", "linear"))
    assert_same_weights(linear, conv)


# from form to form, without the model


@pytest.mark.parametrize(
    ("teacher", "recipe"),
    [(SD15, None), (SD21, None), (SDXL, None), (SD15, "bk-tiny"), (SD15, "segmind-tiny"), (SDXL, "koala-700m")],
    ids=["sd15", "sd21", "sdxl", "bk-tiny", "segmind-tiny", "koala-700m"],
)
def test_every_spelling_of_every_layer_is_known_without_the_model(teacher, recipe):
    config = plan_removal(teacher, RECIPES[recipe].remove).student if recipe else teacher
    with torch.device("meta"):
        names = list(lora.candidates(UNet(config)))
    pairs = {} if recipe else unet_pairs(config)
    for name in names:
        for spelling in lora_files._spellings("unet", name, pairs):
            assert every_name()[spelling] == ("unet", name)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_from_kohyas_form_to_pefts_and_back_all_is_as_it_was_and_diffusers_reads_it(kind, tmp_path):
    networks, pipe = make_pipelines(kind)
    kohya, in_peft, again = (tmp_path / f"{name}.safetensors" for name in ("kohya", "peft", "again"))
    write_lora(kohya, random_loras(networks), dtype=torch.float16, metadata={"ss_output_name": "x"})
    rewrite_lora(kohya, in_peft, "peft", metadata={"new": "text"})
    rewrite_lora(in_peft, again, "kohya")
    one, other = load_file(again), load_file(kohya)
    assert one.keys() == other.keys()
    assert all(one[name].dtype == tensor.dtype and torch.equal(one[name], tensor) for name, tensor in other.items())
    assert read_metadata(again) == read_metadata(kohya) | {"new": "text"}
    assert read_metadata(in_peft)["ss_output_name"] == "x" and not any("lora_down" in n for n in load_file(in_peft))
    merge_into(networks, read_lora(kohya, networks))
    before = {part: output(getattr(pipe, part)) for part in networks}
    pipe.load_lora_weights(tmp_path, weight_name="peft.safetensors")
    pipe.fuse_lora(components=list(networks))
    pipe.unload_lora_weights()
    theirs = pipe.unet.state_dict()
    for name, weight in networks["unet"].state_dict().items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-4, atol=1e-5)
    for part, network in networks.items():
        assert_moved(output(network), before[part])
        assert_close(output(network), output(getattr(pipe, part)))


@pytest.mark.parametrize(("config", "form"), [(TINY_SD1, "kohya"), (TINY_SDXL, "peft")], ids=["sd1", "sdxl"])
def test_sgm_names_become_diffusers_names(config, form, tmp_path):
    unet = make_unet(config)
    weights = random_lora(unet, (*lora.ALL, "conv_in", "conv_out", "time_embedding.linear_1"))
    sgm_file(tmp_path / "sgm.safetensors", weights, config)
    rewrite_lora(tmp_path / "sgm.safetensors", tmp_path / "x.safetensors", form)
    assert not any("input_blocks" in name or "middle_block" in name for name in load_file(tmp_path / "x.safetensors"))
    assert_same_weights(read_lora(tmp_path / "x.safetensors", {"unet": unet})["unet"], weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
def test_values_and_shapes_stay_those_of_the_file_whatever_the_type_of_alpha(dtype, tmp_path):
    tensors = {name: t[:, :, 0, 0] if t.dim() == 4 else t for name, t in kohya_tensors(make_unet(TINY_SD1)).items()}
    tensors = {n: torch.tensor(8).to(dtype) if n.endswith(".alpha") else t.half() for n, t in tensors.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    rewrite_lora(tmp_path / "x.safetensors", tmp_path / "again.safetensors", "kohya")
    found = load_file(tmp_path / "again.safetensors")
    assert found.keys() == tensors.keys() and all(
        torch.equal(found[name], t.to(found[name].dtype)) for name, t in tensors.items()
    )
    rewrite_lora(tmp_path / "x.safetensors", tmp_path / "full.safetensors", "kohya", dtype=torch.float32)
    assert {tensor.dtype for tensor in load_file(tmp_path / "full.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("sign", ["header", "width", "none"])
def test_the_first_text_encoder_is_te1_where_anything_says_sdxl(sign, tmp_path):
    loras = {"text_encoder": random_lora(make_sdxl()["text_encoder"], ["q_proj"])}
    if sign == "width":
        key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
        loras["unet"] = {key: LoRAWeights(torch.ones(4, 2048), torch.ones(640, 4), 2)}
    metadata = {"ss_base_model_version": "sdxl_base_v1-0"} if sign == "header" else {}
    write_lora(tmp_path / "peft.safetensors", loras, "peft", metadata=metadata)
    rewrite_lora(tmp_path / "peft.safetensors", tmp_path / "kohya.safetensors", "kohya")
    prefixes = {name.split("_text_model")[0] for name in load_file(tmp_path / "kohya.safetensors") if "text" in name}
    assert prefixes == {"lora_te" if sign == "none" else "lora_te1"}
    tensors = load_file(tmp_path / "kohya.safetensors").items()
    renamed = {name.replace("lora_te_", "lora_te1_"): tensor for name, tensor in tensors}
    save_file(renamed, tmp_path / "te1.safetensors")  # its own names are a sign too
    rewrite_lora(tmp_path / "te1.safetensors", tmp_path / "again.safetensors", "kohya")
    assert load_file(tmp_path / "again.safetensors").keys() == renamed.keys()


# refusals


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{FIRST}.lora_up.weight"), r"of 1 of 12 modules a half.* is missing or .*proj_in"),
        (lambda t: t.update({f"{FIRST}.lora_up.weight": torch.ones(8, 3)}), "does not fit the other"),
        (lambda t: t.update({f"{FIRST}.lora_down.weight": torch.tensor(1.0)}), "does not fit the other"),
        (lambda t: t.update({f"{FIRST}_extra.lora_up.weight": torch.ones(2)}), r"1 of 13 modules do not exist .*extra"),
        (lambda t: t.update({f"{FIRST}.bias": torch.ones(2)}), r"1 of 37 tensors are no part of .*LoRA .*proj_in.bias"),
        (lambda t: t.update({f"{FIRST}.alpha": torch.tensor(float("nan"))}), "alpha of .* is nan"),
        (lambda t: t.update({f"{FIRST}.alpha": torch.ones(2)}), "alpha of .* cannot be read"),
        (lambda t: t.update({f"{FIRST}.dora_scale": torch.ones(2)}), r"plain LoRA .*dora_scale"),
        (lambda t: t.update({f"{FIRST}.hada_w1_a": torch.ones(2)}), r"plain LoRA .*hada_w1_a"),
        (lambda t: t.update({f"{FIRST}.lora_mid.weight": torch.ones(2)}), r"plain LoRA .*lora_mid"),
        (lambda t: t.update({f"{FIRST}.diff": torch.ones(2)}), r"plain LoRA .*diff"),
        (lambda t: [t.pop(name) for name in list(t)], "is not a LoRA"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_used_to_its_last_tensor_is_refused(edit, message, tmp_path):
    unet, path = make_unet(TINY_SD1), tmp_path / "x.safetensors"
    tensors = kohya_tensors(unet)
    edit(tensors)
    save_file(tensors, path)
    for found in (
        refused(read_lora, path, {"unet": unet}),
        refused(rewrite_lora, path, tmp_path / "new.safetensors", "peft"),
    ):
        assert found.startswith(str(path)) and re.search(message, found), found
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_lora_of_other_shapes_is_refused(tmp_path):
    unet = make_unet(TINY_SD1)
    save_file(kohya_tensors(unet) | {f"{FIRST}.lora_down.weight": torch.ones(4, 9)}, tmp_path / "x.safetensors")
    found = refused(read_lora, tmp_path / "x.safetensors", {"unet": unet})
    assert re.search(r"1 of 12 modules have another shape .*proj_in", found)


def test_one_layer_in_two_spellings_is_refused(tmp_path):
    unet = make_unet(TINY_SD1)
    name = "down_blocks.0.attentions.0.proj_in"
    down, up, _ = random_lora(unet, [name])[name]
    tensors = kohya_tensors(unet) | {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    save_file(tensors, tmp_path / "x.safetensors")
    assert "is there twice" in refused(read_lora, tmp_path / "x.safetensors", {"unet": unet})
    save_file(
        {f"{name}.lora_A.{a}.weight": down.clone() for a in ("one", "two")} | {f"{name}.lora_B.one.weight": up},
        tmp_path / "y.safetensors",
    )
    assert "of two adapters" in refused(read_lora, tmp_path / "y.safetensors", {"unet": unet})


def test_what_is_no_lora_is_said_to_be_none(tmp_path):
    unet = make_unet(TINY_SD1)
    write_safetensors(tmp_path / "unet.safetensors", unet.state_dict())
    write_safetensors(tmp_path / "whole.safetensors", {"model.diffusion_model.out.2.weight": torch.ones(2)})
    save_file({}, tmp_path / "empty.safetensors")
    for name, shown in (("unet", "conv_in"), ("whole", "model.diffusion_model"), ("empty", "none")):
        found = refused(read_lora, tmp_path / f"{name}.safetensors", {"unet": unet})
        assert "is not a LoRA" in found and shown in found
    assert "no such file" in refused(read_lora, tmp_path / "absent.safetensors", {"unet": unet})


def test_a_lora_for_another_model_is_told_from_its_shapes_and_names(tmp_path):
    with torch.device("meta"):
        sd15, sd21, sdxl = UNet(SD15), UNet(SD21), UNet(SDXL)
        student = UNet(replace(SD15, mid_block_type=None))
    path = tmp_path / "x.safetensors"
    sgm_file(path, random_lora(sdxl, ["attn2.to_k"], rank=1), SDXL)
    found = refused(read_lora, path, {"unet": sd15})
    assert re.search(r"\d+ of 70 modules do not exist in this model \(lora_unet_input_blocks_", found)
    assert found.endswith("): it is a LoRA for SDXL, this model is SD 1.x")
    # SD 1.x and 2.x have the same names, and differ in shapes alone
    write_lora(path, {"unet": random_lora(sd21, ["attn2.to_k"], rank=1)})
    found = refused(read_lora, path, {"unet": sd15})
    assert "16 of 16 modules have another shape" in found
    assert found.endswith("it is a LoRA for SD 2.x, this model is SD 1.x")
    write_lora(path, {"unet": random_lora(sd15, ["attn2.to_k"], rank=1)})
    found = refused(read_lora, path, {"unet": student})
    assert "1 of 16 modules do not exist in this model (lora_unet_mid_block_" in found
    assert found.endswith("it is a LoRA for SD 1.x, as this model is, but for one with other layers")
    both = {"lora_A.weight": torch.ones(1, 3), "lora_B.weight": torch.ones(3, 1)}
    save_file({f"transformer.blocks.0.to_q.{end}": t for end, t in both.items()}, path)
    found = refused(read_lora, path, {"unet": sd15})
    assert found.endswith("0 of 1 modules matched (transformer.blocks.0.to_q)"), "of what is not known nothing is said"
    other = {name.replace("lora_unet", "other"): tensor for name, tensor in kohya_tensors(sd15, ["attn2.to_k"]).items()}
    save_file(other, path)
    found = refused(read_lora, path, {"unet": sd15})
    assert re.search(r"0 of 16 modules matched \(other_down_blocks_[^)]*\)$", found), "SD 1.x's layers, but other names"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "lora_adapter_metadata in its header cannot be read"),
        ("[]", "a dict is needed"),
        ({"lora_alpha": "much"}, "alpha of .* cannot be read"),
        ({"lora_alpha": 1, "alpha_pattern": {"(": 2}}, "alpha of .* cannot be read"),
        ({"lora_alpha": 1, "init_lora_weights": "pissa"}, "LORA started by pissa, which is not supported"),
        ({"peft_type": "LOHA"}, "LOHA .*not supported"),
    ],
)
def test_settings_of_peft_that_cannot_be_honoured_are_refused(config, message, tmp_path):
    unet = make_unet(TINY_SD1)
    path = tmp_path / "x.safetensors"
    text = config if isinstance(config, str) else json.dumps(config)
    write_lora(path, {"unet": random_lora(unet)}, "peft", metadata={"lora_adapter_metadata": text})
    assert re.search(message, refused(read_lora, path, {"unet": unet}))
