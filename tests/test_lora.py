"""LoRA: live equals merged equals peft; files of kohya, peft and diffusers, there and back, with both as oracles."""

import copy
import re
from dataclasses import replace

import peft
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_pipeline import refused
from torch import nn

from minidistill.distill.block_removal import RECIPES, plan_removal
from minidistill.interop import lora_files
from minidistill.interop.ldm import swap, unet_pairs
from minidistill.interop.lora_files import every_name, matched_line, merge_into, read_lora, rewrite_lora, write_lora
from minidistill.models import lora
from minidistill.models.clip import CLIPTextModel
from minidistill.models.lora import LoRAWeights
from minidistill.models.unet import SD15, SD21, SDXL, UNet, UNetConfig
from minidistill.pipeline import load_pipeline
from minidistill.weights.files import read_metadata

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
    tiny.TINY_SDXL,
    block_out_channels=(8, 16, 16),
    attention_head_dim=(1, 2, 2),
    transformer_layers_per_block=(1, 1, 2),
    norm_num_groups=4,
)
FIRST, DOTTED = "lora_unet_down_blocks_0_attentions_0_proj_in", "unet.down_blocks.0.attentions.0.proj_in"
RANK, ALPHA = 4, 0.5  # the ratio of SDXL-Lightning's files, 8 / 64


def make_unet(config: UNetConfig) -> UNet:
    torch.manual_seed(0)
    return UNet(config).eval()


def make_unets(config: UNetConfig) -> tuple[UNet, UNet2DConditionModel]:
    """Ours and diffusers' with the same random weights."""
    torch.manual_seed(0)
    theirs = UNet2DConditionModel.from_config(config.to_dict()).eval()
    ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


FOLDERS = {}  # of pipelines by diffusers


@pytest.fixture(scope="module", autouse=True)
def folders(sources):
    FOLDERS.update(sources)


def make_pipelines(kind: str) -> tuple[dict[str, nn.Module], StableDiffusionPipeline | StableDiffusionXLPipeline]:
    """Our networks by part, and a pipeline of diffusers with the same weights."""
    theirs = {"sd1": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[kind]
    return load_pipeline(FOLDERS[kind]).networks, theirs.from_pretrained(FOLDERS[kind])


def make_sdxl() -> dict[str, nn.Module]:
    return make_pipelines("sdxl")[0]


def unet_inputs(config: UNetConfig, dtype=torch.float32) -> tuple:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=g).to(dtype)
    context = torch.randn(2, 5, config.cross_attention_dim, generator=g).to(dtype) / 16  # the weights are large there
    added = None
    if config.addition_embed_type:
        sizes = torch.tensor([[64, 48, 0, 8, 64, 64], [33, 99, 7, 0, 32, 48]])
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(2, pooled, generator=g).to(dtype), "time_ids": sizes.float()}
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


def spelled(weights: dict[str, LoRAWeights], spell) -> dict[str, torch.Tensor]:
    """The tensors of a file in kohya's form, with the layers' names as `spell` makes them."""
    tensors = {}
    for name, (down, up, alpha) in weights.items():
        key = spell(name)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    return tensors


def flat(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def sgm_file(path, weights: dict[str, LoRAWeights], config: UNetConfig) -> None:
    """A kohya file with the block names of Stability AI's code."""
    pairs = unet_pairs(config)
    save_file(spelled(weights, lambda name: flat(swap(name, pairs))), path)


def kohya_tensors(unet: UNet) -> dict[str, torch.Tensor]:
    return spelled(random_lora(unet, ("attn2.to_k", "proj_in")), flat)


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
    lora.set_scale(live, 0)
    assert torch.equal(output(live), before)
    lora.set_scale(live, 0.7)
    # scale * alpha / r is all there is: W + 0.7 * 0.5 / 4 * up @ down
    doubled = {name: w._replace(alpha=2 * w.alpha) for name, w in weights.items()}
    lora.merge_weights(stronger, doubled, scale=0.35)
    assert_close(output(stronger), output(merged))
    name = "down_blocks.0.resnets.0.conv1"
    down, up, _ = weights[name]
    change = 0.7 * 0.5 / 4 * torch.einsum("orxy,rikl->oikl", up, down)
    original = make_unet(TINY_SDXL).get_submodule(name).weight
    assert_close(merged.get_submodule(name).weight, original + change, 1e-6)
    expected = output(live)
    assert lora.merge_lora(live) == len(weights)
    assert live.state_dict().keys() == merged.state_dict().keys() and not lora.lora_layers(live)
    assert_close(output(live), expected)


def test_the_lora_of_a_change_is_the_nearest_of_its_rank():
    base, tuned = make_unet(TINY_SDXL), make_unet(TINY_SDXL)
    lora.merge_weights(tuned, random_lora(base, rank=3))
    with torch.no_grad():
        tuned.conv_in.bias.add_(1)  # left out
    whole, less = (lora.extract_lora(tuned, base, rank) for rank in (3, 2))
    assert list(whole) == lora.find_targets(base, lora.ALL)
    again = copy.deepcopy(base)
    lora.merge_weights(again, whole)
    for name in whole:
        assert_close(again.get_submodule(name).weight, tuned.get_submodule(name).weight)
    name = "down_blocks.0.resnets.0.conv1"
    change = (tuned.get_submodule(name).weight - base.get_submodule(name).weight).flatten(1)
    missed = (change - less[name].up.flatten(1) @ less[name].down.flatten(1)).norm()
    assert_close(missed, torch.linalg.svdvals(change.detach())[2], 1e-4)
    wider = make_unet(replace(TINY_SDXL, cross_attention_dim=TINY_SDXL.cross_attention_dim + 8))
    with pytest.raises(ValueError, match=r"attn2\.to_k"):
        lora.extract_lora(wider, base, 2)


def test_a_fresh_lora_changes_nothing_and_removing_gives_the_base_back():
    unet = make_unet(TINY_SD1)
    before, names = output(unet), list(unet.state_dict())
    modules = {name: (type(m), str(m)) for name, m in unet.named_modules()}
    count = lora.add_lora(unet, lora.ALL, rank=3)
    assert count == len(lora.lora_layers(unet)) == len(lora.lora_state(unet)) // 2
    assert torch.equal(output(unet), before)
    assert all(w.alpha == 3 and w.down.std() > 0 and not w.up.any() for w in lora.lora_weights(unet).values())
    assert list(lora.base_state(unet)) == names
    other = make_unet(TINY_SD1)
    lora.attach_lora(other, random_lora(other, rank=3, alpha=3))
    unet.load_state_dict({**lora.base_state(unet), **lora.lora_state(other)}, strict=True)
    assert torch.equal(output(unet), output(other)), "training continues from a saved state"
    assert lora.remove_lora(unet) == count
    assert {name: (type(m), str(m)) for name, m in unet.named_modules()} == modules
    assert torch.equal(output(unet), before) and list(unet.state_dict()) == names


def test_low_precision_is_merged_in_float32_and_rounded_once_and_runs_with_a_float32_lora():
    for dtype in (torch.bfloat16, torch.float16):
        layer = nn.Sequential(nn.Linear(64, 64)).to(dtype)
        [found] = random_lora(layer, ("0",), rank=16).values()
        exact = layer[0].weight.float() + ALPHA / 16 * found.up @ found.down
        lora.merge_weights(layer, {"0": found})
        assert torch.equal(layer[0].weight, exact.to(dtype))
    unet = make_unet(TINY_SD1)
    weights, merged = random_lora(unet), copy.deepcopy(unet)
    lora.merge_weights(merged, weights)
    lora.attach_lora(unet.bfloat16(), weights, dtype=torch.float32)
    assert all(w.down.dtype == torch.float32 for w in lora.lora_weights(unet).values())
    assert output(unet).dtype == torch.bfloat16
    assert_close(output(unet).float(), output(merged), 0.05)
    lora.remove_lora(unet)
    lora.attach_lora(unet, weights)  # without a dtype it takes the layers'
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}


@pytest.fixture(scope="module")
def sdxl() -> UNet:
    """On meta; not to be changed."""
    with torch.device("meta"):
        return UNet(SDXL)


def test_the_full_set_is_that_of_lightning_788_layers_of_sdxl(sdxl, tmp_path):
    names = lora.find_targets(sdxl, lora.ALL)
    blocks = ("down_blocks.", "mid_block.", "up_blocks.")
    assert names == [name for name in lora.candidates(sdxl) if name.startswith(blocks)]
    unet, path = copy.deepcopy(sdxl), tmp_path / "lightning.safetensors"
    assert lora.add_lora(unet, lora.ALL, rank=64, alpha=8) == 788
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == 196_751_360
    weights = {}
    for name in names:
        shape = sdxl.get_submodule(name).weight.shape
        up = torch.zeros(shape[0], 1, *[1] * (len(shape) - 2))
        weights[name] = LoRAWeights(torch.zeros(1, *shape[1:]).half(), up.half(), 8.0)
    write_lora(path, {"unet": weights})
    assert len(load_file(path)) == 2364
    counts = merge_into({"unet": sdxl}, read_lora(path, {"unet": sdxl}))
    assert matched_line(counts) == "788/788 modules matched"
    assert matched_line(counts | {"text_encoder": 1}) == "789/789 modules matched (unet 788, text_encoder 1)"


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
    assert len(lora.find_targets(text, lora.TEXT_ATTENTION)) == 12
    assert len(lora.find_targets(text, lora.TEXT_ALL)) == 18


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


def test_gradients_survive_checkpointing_copying_autocast_and_ddp(tmp_path):
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
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = gradients(nn.parallel.DistributedDataParallel(unet))
    finally:
        torch.distributed.destroy_process_group()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"module.{name}"], gradient)


# No two of alpha_pattern fit one layer: PEFT takes the first, and diffusers writes them sorted.
PATTERNS = {
    "rank_pattern": {"conv1": 2, "attn1.to_q": 3},
    "alpha_pattern": {"mid_block.*conv2": 3, "to_k": 5, "conv1": 2.5},
}


@pytest.mark.parametrize(
    ("config", "settings", "form"),
    [
        (TINY_SD1, {"init_lora_weights": "orthogonal", "target_modules": list(lora.ATTENTION)}, "diffusers"),
        (TINY_SD1, {"use_rslora": True}, "diffusers"),
        (TINY_SDXL, PATTERNS, "diffusers"),
        (TINY_SD1, PATTERNS, "peft"),
        (TINY_SD1, {"lora_alpha": RANK}, "raw"),
    ],
    ids=["orthogonal", "rslora", "patterns", "peft", "raw"],
)
def test_adapters_of_peft_give_their_output(config, settings, form, tmp_path):
    ours, theirs = peft_unet(config, **settings)
    before = output(ours)
    if form == "diffusers":
        theirs.save_lora_adapter(tmp_path)  # the settings go in the header
    elif form == "peft":
        ours, theirs = make_unets(config)
        settings = {"r": RANK, "lora_alpha": 1, "target_modules": list(lora.ALL), **settings}
        model = peft.get_peft_model(theirs, peft.LoraConfig(**settings))
        randomise(model)
        model.save_pretrained(tmp_path)  # base_model.model.*, and adapter_config.json
    else:  # with the adapter's name, as in a state dict
        raw = {name: p.detach() for name, p in theirs.named_parameters() if ".lora_" in name}
        assert any(name.endswith(".lora_A.default.weight") for name in raw)
        save_file(raw, tmp_path / "x.safetensors")
    [path] = tmp_path.glob("*.safetensors")
    merge_into({"unet": ours}, read_lora(path, {"unet": ours}))
    assert_moved(output(ours), before)
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


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_diffusers_reads_what_we_write(kind, tmp_path):
    """In kohya's form; PEFT's is below. In this diffusers loses the alphas of a text encoder where they differ."""
    networks, pipe = make_pipelines(kind)
    loras = random_loras(networks, text_alpha=ALPHA)
    write_lora(tmp_path / "x.safetensors", loras)
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    before = {part: output(network) for part, network in networks.items()}
    attach(networks, loras)
    for part, network in networks.items():
        assert_moved(output(network), before[part])
        assert_close(output(getattr(pipe, part)), output(network))


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_what_is_written_comes_back(form, tmp_path):
    networks, path = make_sdxl(), tmp_path / "deep" / "x.safetensors"
    targets = {"unet": (*lora.ALL, "conv_in", "linear_1"), "text_encoder": lora.TEXT_ALL}
    targets["text_encoder_2"] = (*lora.TEXT_ALL, "text_projection")
    loras = {part: random_lora(network, targets[part]) for part, network in networks.items()}
    loras["unet"]["conv_in"] = random_lora(networks["unet"], ["conv_in"], rank=2, alpha=1.5)["conv_in"]
    write_lora(path, loras, form, metadata={"steps": "4"})
    found = read_lora(path, networks)
    assert found.keys() == loras.keys()
    for part, weights in loras.items():
        assert_same_weights(found[part], weights)
    assert read_metadata(path)["steps"] == "4"
    unet = networks["unet"]  # a live one: the file holds the LoRA itself, without the scale set here
    lora.attach_lora(unet, loras["unet"], scale=0.3)
    write_lora(path, {"unet": unet}, form, dtype=torch.float16)
    half = {name: LoRAWeights(down.half(), up.half(), alpha) for name, (down, up, alpha) in loras["unet"].items()}
    assert_same_weights(read_lora(path, make_sdxl())["unet"], half)
    assert "there is no LoRA" in refused(write_lora, tmp_path / "no.safetensors", make_sdxl())
    assert not (tmp_path / "no.safetensors").exists()


def test_kohya_files_have_kohyas_names_and_header(tmp_path, sdxl):
    networks, path = make_sdxl() | {"unet": sdxl}, tmp_path / "x.safetensors"
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    one = {name: LoRAWeights(torch.ones(4, 2048), torch.ones(640, 4), 2)}
    text = random_lora(networks["text_encoder"], ["layers.0.mlp.fc1"])
    write_lora(path, {"unet": one, "text_encoder": text, "text_encoder_2": {}})
    names, key = load_file(path), "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    assert {f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"} < names.keys()
    assert names[f"{key}.alpha"].item() == 2 and names[f"{key}.alpha"].shape == ()
    assert "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha" in names
    header = read_metadata(path)
    assert header["ss_network_module"] == "networks.lora" and header["ss_v2"] == "False"
    assert header["ss_base_model_version"].startswith("sdxl_")  # or A1111 lists it among those for SD 1.x
    assert read_lora(path, networks).keys() == {"unet", "text_encoder"}
    write_lora(path, {"text_encoder": text})
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha" in load_file(path)


OLD = {  # of diffusers
    "unet": {"to_q": "processor.to_q_lora", "to_out.0": "processor.to_out_lora"},
    "text_encoder": {"q_proj": "to_q_lora", "out_proj": "to_out_lora", "fc1": "fc1.lora_linear_layer"},
}
CLIP = {"text_encoder": "text_encoders.clip_l.transformer.", "text_encoder_2": "text_encoders.clip_g.transformer."}


@pytest.mark.parametrize("program", ["diffusers", "comfyui", "lycoris"])
def test_the_spellings_of_other_programs_are_read(program, tmp_path):
    """diffusers' first; ComfyUI's, under the names its checkpoints have; those of LyCORIS' wrapper."""
    networks, pairs = make_sdxl(), unet_pairs(make_sdxl()["unet"].config)
    loras, tensors = random_loras(networks if program == "comfyui" else {"unet": networks["unet"]}), {}
    if program == "diffusers":
        loras = {part: random_lora(networks[part], tuple(table), alpha=float(RANK)) for part, table in OLD.items()}
    for part, weights in loras.items():
        for name, (down, up, _) in weights.items() if program == "diffusers" else ():
            end = next(end for end in OLD[part] if name.endswith(end))
            key = f"{part}.{name.removesuffix(end)}{OLD[part][end]}"
            tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
        if program == "comfyui":
            prefix = CLIP.get(part, "diffusion_model.")
            tensors |= spelled(weights, lambda n, p=prefix, unet=part == "unet": p + (swap(n, pairs) if unet else n))
        if program == "lycoris":
            tensors |= spelled(weights, lambda name: "lycoris_" + name.replace(".", "_"))
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_lora(tmp_path / "x.safetensors", networks)
    for part, weights in loras.items():
        assert_same_weights(found[part], weights)


def test_alphas_and_1x1_convolutions_are_read_as_others_store_them(tmp_path):
    unet, path = make_unet(TINY_SD1), tmp_path / "x.safetensors"
    tensors = kohya_tensors(unet)
    assert any(t.dim() == 4 for t in tensors.values())
    save_file(tensors, path)
    conv = read_lora(path, {"unet": unet})["unet"]
    save_file({name: t[:, :, 0, 0] if t.dim() == 4 else t for name, t in tensors.items()}, path)
    assert_same_weights(read_lora(path, {"unet": unet})["unet"], conv)
    save_file({name: t.half() for name, t in tensors.items()}, path)
    assert {w.alpha for w in read_lora(path, {"unet": unet})["unet"].values()} == {ALPHA}
    save_file({n: t for n, t in tensors.items() if not n.endswith("alpha")}, path)
    assert {w.alpha for w in read_lora(path, {"unet": unet})["unet"].values()} == {RANK}, "if absent it is the rank"


@pytest.mark.parametrize(
    ("teacher", "recipe"),
    [(SD15, None), (SD21, None), (SDXL, None), (SD15, "bk-tiny"), (SD15, "segmind-tiny"), (SDXL, "koala-700m")],
    ids=["sd15", "sd21", "sdxl", "bk-tiny", "segmind-tiny", "koala-700m"],
)
def test_every_spelling_of_every_layer_is_known_without_the_model(teacher, recipe):
    config = plan_removal(teacher, RECIPES[recipe].remove).student if recipe else teacher
    with torch.device("meta"):
        names = list(lora.candidates(UNet(config)))
    pairs, seen = {} if recipe else unet_pairs(config), set()
    for name in names:
        spellings = set(lora_files._spellings("unet", name, pairs))
        assert not spellings & seen, "no two layers share one"
        assert {every_name()[spelling] for spelling in spellings} == {("unet", name)}
        seen |= spellings


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


def test_values_and_shapes_stay_those_of_the_file_whatever_the_type_of_alpha(tmp_path):
    path, again = tmp_path / "x.safetensors", tmp_path / "again.safetensors"
    flat = {name: t[:, :, 0, 0] if t.dim() == 4 else t for name, t in kohya_tensors(make_unet(TINY_SD1)).items()}
    for dtype in (torch.bfloat16, torch.int64):
        tensors = {n: torch.tensor(8).to(dtype) if n.endswith(".alpha") else t.half() for n, t in flat.items()}
        save_file(tensors, path)
        rewrite_lora(path, again, "kohya")
        found = load_file(again)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], t.to(found[name].dtype)) for name, t in tensors.items())
    rewrite_lora(path, again, "kohya", dtype=torch.float32)
    assert {tensor.dtype for tensor in load_file(again).values()} == {torch.float32}


def test_the_first_text_encoder_is_te1_where_anything_says_sdxl(tmp_path):
    in_peft, kohya = tmp_path / "peft.safetensors", tmp_path / "kohya.safetensors"
    text = {"text_encoder": random_lora(make_sdxl()["text_encoder"], ["q_proj"])}
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    wide = {"unet": {name: LoRAWeights(torch.ones(4, 2048), torch.ones(640, 4), 2)}}
    header = {"ss_base_model_version": "sdxl_base_v1-0"}
    for loras, metadata, prefix in ((text, header, "lora_te1"), (text | wide, {}, "lora_te1"), (text, {}, "lora_te")):
        write_lora(in_peft, loras, "peft", metadata=metadata)
        rewrite_lora(in_peft, kohya, "kohya")
        assert {name.split("_text_model")[0] for name in load_file(kohya) if "text" in name} == {prefix}
    renamed = {name.replace("lora_te_", "lora_te1_"): tensor for name, tensor in load_file(kohya).items()}
    save_file(renamed, kohya)  # its own names are a sign too
    rewrite_lora(kohya, in_peft, "kohya")
    assert load_file(in_peft).keys() == renamed.keys()


EDITS = [  # what is put in the file in place of None, a tensor left out; what is said
    ({f"{FIRST}.lora_up.weight": None}, r"of 1 of 12 modules a half.* is missing or .*proj_in"),
    ({f"{FIRST}.lora_up.weight": torch.ones(8, 3)}, "does not fit the other"),
    ({f"{FIRST}.lora_down.weight": torch.tensor(1.0)}, "does not fit the other"),
    ({f"{FIRST}_extra.lora_up.weight": torch.ones(2)}, r"12 of 13 modules matched, others do not exist .*extra"),
    ({f"{FIRST}.bias": torch.ones(2)}, r"1 of 37 tensors are no part of .*LoRA .*proj_in.bias"),
    ({f"{FIRST}.alpha": torch.tensor(float("nan"))}, "alpha of .* is nan"),
    ({f"{FIRST}.alpha": torch.ones(2)}, "alpha of .* cannot be read"),
    ({f"{FIRST}.alpha": torch.tensor(1j)}, "alpha of .* cannot be read"),
    *(({f"{FIRST}.{end}": torch.ones(2)}, rf"plain LoRA .*{end}") for end in ("dora_scale", "hada_w1_a", "diff")),
    ({f"{FIRST}.lora_mid.weight": torch.ones(2)}, r"plain LoRA .*lora_mid"),
    ({f"{DOTTED}.lora_A.weight": torch.ones(4, 8), f"{DOTTED}.lora_B.weight": torch.ones(8, 4)}, "is there twice"),
    ({f"{FIRST}.lora_A.{name}.weight": torch.ones(2) for name in ("one", "two")}, "of two adapters"),
]


def test_a_file_that_is_not_used_to_its_last_tensor_is_refused(tmp_path):
    unet, path = make_unet(TINY_SD1), tmp_path / "x.safetensors"
    for edit, message in EDITS:
        tensors = kohya_tensors(unet) | edit
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
        for found in (
            refused(read_lora, path, {"unet": unet}),
            refused(rewrite_lora, path, tmp_path / "new.safetensors", "peft"),
        ):
            assert found.startswith(str(path)) and re.search(message, found), found
        assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_is_no_lora_is_said_to_be_none(tmp_path):
    unet, path = make_unet(TINY_SD1), tmp_path / "x.safetensors"
    whole = {"model.diffusion_model.out.2.weight": torch.ones(2)}
    for tensors, shown in ((unet.state_dict(), "conv_in"), (whole, "model.diffusion"), ({}, "none")):
        save_file(tensors, path)
        found = refused(read_lora, path, {"unet": unet})
        assert "is not a LoRA" in found and shown in found
    assert "no such file" in refused(read_lora, tmp_path / "absent.safetensors", {"unet": unet})


def test_a_lora_for_another_model_is_told_from_its_shapes_and_names(tmp_path, sdxl):
    with torch.device("meta"):
        sd15, sd21, student = UNet(SD15), UNet(SD21), UNet(replace(SD15, mid_block_type=None))
    path = tmp_path / "x.safetensors"
    sgm_file(path, random_lora(sdxl, ["attn2.to_k"], rank=1), SDXL)
    assert refused(read_lora, path, {"unet": sd15}).endswith("the LoRA is SDXL, the model SD 1.x")
    # SD 1.x and 2.x have the same names, and differ in shapes alone
    write_lora(path, {"unet": random_lora(sd21, ["attn2.to_k"], rank=1)})
    assert refused(read_lora, path, {"unet": sd15}).endswith("the LoRA is SD 2.x, the model SD 1.x")
    tensors = spelled(random_lora(sd15, ["attn2.to_k"], rank=1), flat)
    save_file(tensors, path)
    found = refused(read_lora, path, {"unet": student})
    assert "15 of 16 modules matched, others do not exist in this model (lora_unet_mid_block_" in found
    down = [name for name in tensors if name.endswith("lora_down.weight")][-1]
    save_file(tensors | {down: torch.ones(1, 769)}, path)
    assert "has another shape in this model" in refused(read_lora, path, {"unet": sd15})
    save_file({name.replace("lora_unet", "other"): tensor for name, tensor in tensors.items()}, path)
    found = refused(read_lora, path, {"unet": sd15})
    assert "0 of 16 modules matched, others do not exist in this model (other_down" in found


SETTINGS = [
    ("{", "lora_adapter_metadata in its header cannot be read"),
    ("[]", "lora_adapter_metadata in its header cannot be read"),
    ('{"lora_alpha": "much"}', "alpha of .* cannot be read"),
    ('{"lora_alpha": 1, "alpha_pattern": {"(": 2}}', "alpha of .* cannot be read"),
    ('{"lora_alpha": 1, "alpha_pattern": {"(to_q|to_k)*": 2}}', "no name of a layer, nor a plain pattern"),
    ('{"lora_alpha": 1, "alpha_pattern": {"(a)(b)": 2}}', "no name of a layer, nor a plain pattern"),
    ('{"lora_alpha": 1, "init_lora_weights": "pissa"}', "LORA started by pissa, which is not supported"),
    ('{"peft_type": "LOHA"}', "LOHA .*not supported"),
]


def test_settings_of_peft_that_cannot_be_honoured_are_refused(tmp_path):
    unet, path = make_unet(TINY_SD1), tmp_path / "x.safetensors"
    for text, message in SETTINGS:
        write_lora(path, {"unet": random_lora(unet)}, "peft", metadata={"lora_adapter_metadata": text})
        assert re.search(message, refused(read_lora, path, {"unet": unet})), text
