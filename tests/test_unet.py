"""The U-Net against diffusers: outputs, gradients and features with the same weights, for each architecture.

Also the exact sizes of the official models, configs of all versions, and activation checkpointing.
"""

import functools
import inspect
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from tiny import SMALL, TINY, TINY_SD21, TINY_SDXL, TINY_SSD, assert_close, randomize, run_hooked
from tiny import run_diffusers as run_theirs
from tiny import unet_inputs as make_inputs
from torch import nn

from minidistill.distill.block_removal import RECIPES, plan_removal
from minidistill.metrics.cost import count_macs
from minidistill.models import layers
from minidistill.models.layers import Attention, timestep_embedding
from minidistill.models.unet import SD15, SD21, SDXL, UNet, UNetConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def bk(config, recipe):
    """The BK-SDM student of a config."""
    return plan_removal(config, RECIPES[f"bk-{recipe}"].remove).student


KINDS = {
    "sd15": TINY,
    "sd21": TINY_SD21,
    "sdxl": TINY_SDXL,
    "bk-base": bk(TINY, "base"),
    "bk-small": bk(TINY, "small"),
    "bk-tiny": bk(TINY, "tiny"),
    "bk-v2-tiny": bk(TINY_SD21, "tiny"),
    "inpainting": replace(TINY, in_channels=9),
    "uneven-layers": replace(TINY, layers_per_block=(1, 2, 1, 3)),
    "ssd-1b": TINY_SSD,
    "koala": replace(TINY_SDXL, layers_per_block=1, mid_block_type=None, transformer_layers_per_block=(0, 2, 3)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def make_pair(kind, dtype=torch.float32):
    """Our U-Net and diffusers' with the same random weights, norms included; not to be changed."""
    # Large enough that each part of the network affects the output.
    theirs = randomize(UNet2DConditionModel.from_config(KINDS[kind].to_dict()), spread=1.2)
    ours = UNet(KINDS[kind])
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def diffusers_features(unet, inputs):
    """diffusers' prediction, and the outputs of its blocks under our names."""
    modules = {"mid": "mid_block"} if unet.mid_block is not None else {}
    for side in ("down", "up"):
        for i, block in enumerate(getattr(unet, f"{side}_blocks")):
            modules[f"{side}.{i}"] = f"{side}_blocks.{i}"
            if hasattr(block, "attentions"):
                modules[f"{side}.{i}.proj_out"] = f"{side}_blocks.{i}.attentions.{len(block.attentions) - 1}.proj_out"
    out, caught = run_hooked(unet, modules.values(), inputs)
    return out, {ours: caught[theirs] for ours, theirs in modules.items()}


@every_kind
@torch.no_grad()
def test_outputs_and_features_equal_diffusers_at_even_and_odd_sizes(kind):
    ours, theirs = make_pair(kind)
    for size in ((8, 8), (17, 10)):
        inputs = make_inputs(KINDS[kind], size)
        assert_close(ours(*inputs), run_theirs(theirs, *inputs), 1e-5)
    inputs = make_inputs(KINDS[kind], (9, 7))
    out, features = ours(*inputs, return_features=True)
    expected_out, expected = diffusers_features(theirs, inputs)
    assert_close(out, expected_out, 1e-5)
    assert torch.equal(out, ours(*inputs)) and set(features) == set(expected)
    for name, feature in features.items():
        want = expected[name]
        if want.dim() == 3:  # a linear proj_out: (B, h*w, C)
            want = want.transpose(1, 2).reshape(feature.shape)
        assert_close(feature, want, 1e-5)


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
@torch.no_grad()
def test_half_precision_equals_diffusers_and_weights_decide_the_dtype(kind, dtype, tolerance):
    ours, theirs = make_pair(kind, dtype)
    x, t, context, added = make_inputs(KINDS[kind], dtype=dtype)
    out = ours(x, t, context, added)
    assert_close(out, run_theirs(theirs, x, t, context, added), tolerance)
    assert out.dtype == dtype and torch.equal(out, ours(x.float(), t, context.float(), added))


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "bk-tiny", "ssd-1b"])
def test_every_gradient_equals_diffusers(kind):
    ours, theirs = make_pair(kind, torch.float64)
    x, t, context, added = make_inputs(KINDS[kind], (9, 7), torch.float64)
    pixels = {}
    for name, call in (("ours", ours), ("theirs", lambda *a: run_theirs(theirs, *a))):
        pixels[name] = x.clone().requires_grad_()
        call(pixels[name], t, context, added).square().mean().backward()
    assert_close(pixels["ours"].grad, pixels["theirs"].grad, 1e-9)
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert expected[name].grad.abs().max() > 0, name
        # The gradient of a key bias is 0 but for rounding, and has no relative error: hence 1e-12.
        error = (p.grad - expected[name].grad).abs().max()
        assert error <= 1e-9 * expected[name].grad.abs().max() + 1e-12, name


@pytest.mark.parametrize("kind", ["sd15", "bk-tiny"])
def test_encode_is_the_encoder_of_forward(kind):
    ours, _ = make_pair(kind)
    inputs = make_inputs(KINDS[kind])
    with torch.no_grad():
        h, skips, _, features = ours.encode(*inputs)
        _, all_features = ours(*inputs, return_features=True)
    assert set(features) == {name for name in all_features if not name.startswith("up")}
    assert all(torch.equal(features[name], all_features[name]) for name in features)
    assert torch.equal(h, features["mid" if kind == "sd15" else "down.2"])
    assert len(skips) == {"sd15": 12, "bk-tiny": 6}[kind]


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_batch_equals_its_samples_one_by_one(kind):
    ours, _ = make_pair(kind)
    x, t, context, added = make_inputs(KINDS[kind])
    with torch.no_grad():
        batch = ours(x, t, context, added)
        for i in range(2):
            one = slice(i, i + 1)
            added_one = added and {name: value[one] for name, value in added.items()}
            assert_close(ours(x[one], t[i], context[one], added_one), batch[one], 1e-5)  # t is 0-d here
        assert torch.equal(ours(x, t[1], context, added), ours(x, t[1:].expand(2).float(), context, added))


@pytest.mark.parametrize("kind", ["bk-tiny", "sdxl"])
def test_checkpointing_gives_identical_gradients_through_every_feature(kind):
    ours, _ = make_pair.__wrapped__(kind)
    inputs = make_inputs(KINDS[kind])
    calls = Counter()
    ours.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.update(["resnet"]))

    def gradients(name, checkpointing):
        ours.zero_grad()
        ours.gradient_checkpointing = checkpointing
        out, features = ours(*inputs, return_features=True)
        (out if name == "out" else features[name]).square().mean().backward()
        return {key: p.grad for key, p in ours.named_parameters()}

    with torch.no_grad():
        names = ["out", *ours(*inputs, return_features=True)[1]] if kind == "bk-tiny" else ["mid", "up.0.proj_out"]
    for name in names:
        calls.clear()
        expected = gradients(name, checkpointing=False)
        assert calls["resnet"] == 1
        got = gradients(name, checkpointing=True)
        assert calls["resnet"] == 3  # once in this forward pass, once in its backward pass
        assert expected["conv_in.weight"].abs().max() > 0
        for key, gradient in expected.items():
            assert (gradient is None) == (got[key] is None), (name, key)
            assert gradient is None or torch.equal(gradient, got[key]), (name, key)


def test_compiles_without_graph_breaks():
    ours, inputs = UNet(SMALL), make_inputs(SMALL)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.no_grad():
        out, features = compiled(*inputs, return_features=True)
        expected, expected_features = ours(*inputs, return_features=True)
    assert torch.equal(out, expected) and set(features) == set(expected_features)


SIZES = {  # parameters and tensors of the official files; those of students are in test_block_removal.py
    "sd15": (SD15, 859_520_964, 686),
    "sd21": (SD21, 865_910_724, 686),
    "sdxl": (SDXL, 2_567_463_684, 1680),
}
HEADS = {"sd15": [8] * 4, "sd21": [5, 10, 20, 20], "sdxl": [None, 10, 20]}  # per down stage


@pytest.mark.parametrize("model", SIZES)
def test_full_size_models_have_the_official_sizes_names_and_heads(model):
    config, parameters, tensors = SIZES[model]
    with torch.device("meta"):
        ours = UNet(config)
        shapes = {name: tuple(value.shape) for name, value in ours.state_dict().items()}
        assert sum(p.numel() for p in ours.parameters()) == parameters and len(shapes) == tensors
        theirs = UNet2DConditionModel.from_config(config.to_dict())
        assert shapes == {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
        for block, count in zip(ours.down_blocks, HEADS[model], strict=True):
            assert {m.heads for m in block.modules() if isinstance(m, Attention)} <= {count}
    if model == "sd15":
        assert Counter(m.eps for m in ours.modules() if isinstance(m, nn.GroupNorm)) == {1e-5: 45, 1e-6: 16}
        assert Counter(m.eps for m in ours.modules() if isinstance(m, nn.LayerNorm)) == {1e-5: 48}


@pytest.mark.parametrize(
    ("config", "expected"),  # of one call, in 10^9
    [(SD15, (338.6, 63.0)), (bk(SD15, "base"), (223.7, 37.8)), (bk(SD15, "tiny"), (205.0, 37.8))],
)
def test_macs_are_those_of_the_paper(config, expected):
    macs = count_macs(config, 64, 64)
    assert (round(macs["conv_linear"] / 1e9, 1), round(macs["attention"] / 1e9, 1)) == expected


def test_timesteps_and_sizes_are_embedded_in_float32_under_bfloat16_weights():
    ours, _ = make_pair.__wrapped__("sdxl", torch.bfloat16)
    seen = []
    for module in (ours.time_embedding, ours.add_embedding):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, _, context, added = make_inputs(TINY_SDXL)
    t = torch.tensor([999, 1000])  # equal in bfloat16, as are 1999 and 2000
    ours(x, t, context, added)
    assert torch.equal(seen[0], timestep_embedding(t, 16).bfloat16())
    assert not torch.equal(seen[0][0], seen[0][1])
    sizes = timestep_embedding(added["time_ids"].flatten(), 8).reshape(2, 48)
    assert torch.equal(seen[1], torch.cat([added["text_embeds"], sizes], dim=1).bfloat16())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("upcast", [False, True])
def test_upcast_attention_attends_in_float32(upcast, autocast, monkeypatch):
    torch.manual_seed(0)
    attention = Attention(8, 2, upcast=upcast).to(torch.float32 if autocast else torch.bfloat16)
    seen = set()

    def spy(q, k, v):
        seen.update((q.dtype, k.dtype, v.dtype, torch.is_autocast_enabled("cpu")))
        return F.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v

    monkeypatch.setattr(layers.F, "scaled_dot_product_attention", spy)
    x = torch.randn(1, 300, 8).bfloat16()  # long enough for the fused kernel on a CPU
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attention(x)
    assert out.dtype == torch.bfloat16
    assert seen == ({torch.float32, False} if upcast else {torch.bfloat16, autocast})


@pytest.mark.parametrize("positions", [60, 260])  # plain products, the fused kernel
def test_training_in_bfloat16_on_a_cpu_attends_as_float32_does(positions):
    torch.manual_seed(0)
    attention = Attention(64, 2, context_dim=48)
    x, context = torch.randn(2, positions, 64), torch.randn(2, 20, 48)
    results = {}
    for half in (False, True):
        attention.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = attention(x, context)
        out.float().square().sum().backward()
        results[half] = [out.detach().float(), *(p.grad.clone() for p in attention.parameters())]
    for exact, found in zip(results[False], results[True], strict=True):
        assert 0 < (exact - found).norm() <= 0.02 * exact.norm()


ERA_06 = {  # the config.json of Stable Diffusion 1.5, from before most keys existed
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip


def test_old_configs_are_read_with_defaults():
    assert UNetConfig.from_dict(ERA_06) == SD15
    tiny = ERA_06 | {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 1,
        "mid_block_type": None,  # null is "none", but an absent key is "with attention"
    }
    assert UNetConfig.from_dict(tiny) == bk(SD15, "tiny")
    assert UNetConfig.from_dict(SDXL.to_dict() | {"upcast_attention": None}) == SDXL
    assert UNetConfig.from_dict(ERA_06 | {"a_later_option": None, "another": False, "_note": 3}) == SD15


@every_kind
def test_configs_round_trip_through_diffusers(kind):
    config, theirs = KINDS[kind], make_pair(kind)[1]
    assert UNetConfig.from_dict(dict(theirs.config)) == config
    assert UNetConfig.from_dict(config.to_dict()) == config
    theirs = {name: value for name, value in theirs.config.items() if not name.startswith("_")}
    assert set(config.to_dict()) == {"_class_name", *theirs}


def test_defaults_are_those_of_diffusers():
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    expected = {name: p.default for name, p in parameters.items() if name != "self"}
    assert UNetConfig() == UNetConfig.from_dict(expected) == UNetConfig.from_dict({})


UNSUPPORTED = [
    {"an_unheard_of_key": 3}, {"class_embed_type": "timestep"}, {"flip_sin_to_cos": False}, {"time_cond_proj_dim": 256},
    {"addition_embed_type": "image"}, {"addition_embed_type": "text_time"}, {"norm_num_groups": None},
    {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4}, {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
    {"attention_head_dim": [5, 10, 20]}, {"attention_head_dim": 7}, {"cross_attention_dim": [768, 768, 768, 1024]},
    {"transformer_layers_per_block": [1, [1, 1], [1, 1], 1]},
    {"reverse_transformer_layers_per_block": [1, [1, 1], 1, 1]},
]  # fmt: skip


@pytest.mark.parametrize("edit", UNSUPPORTED, ids=str)
def test_unsupported_configs_are_refused_by_name(edit):
    # Two of the messages name the layers of the depths, not the key.
    name = "transformer" if "transformer" in next(iter(edit)) else next(iter(edit))
    with pytest.raises(ValueError, match=name):
        UNetConfig.from_dict(ERA_06 | edit)


def test_inputs_that_do_not_fit_are_refused():
    x, t, context, added = make_inputs(TINY_SDXL)
    with torch.device("meta"):
        sd, xl = UNet(TINY), UNet(TINY_SDXL)
    with pytest.raises(ValueError, match="needs added_cond"):
        xl(x, t, context)
    with pytest.raises(ValueError, match="takes no added_cond"):
        sd(x, t, context, added)
    with pytest.raises(ValueError, match="x must be"):
        sd(x[:, :3], t, context)
    with pytest.raises(ValueError, match="context must be"):
        sd(x, t, context[..., :9])
