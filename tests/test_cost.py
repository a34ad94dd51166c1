"""Memory counted on fake tensors: against counts by hand, and against the same computation on real tensors."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import SMALL, TINY, TINY_SDXL
from torch import nn

from minidistill.distill.block_removal import RECIPES, feature_pairs, plan_removal, weight_shapes
from minidistill.distill.lightning import Phase
from minidistill.distill.memory import image_peak, memory_rows, phase_memory, step_peak
from minidistill.metrics.cost import MemoryCount, format_bytes, on_device, peak_bytes
from minidistill.models.taesd import AutoencoderTiny, TinyConfig
from minidistill.models.unet import UNet, random_inputs
from minidistill.models.vae import AutoencoderKL, VAEConfig
from minidistill.training import parallel

INPUTS = (2, 16, 16, 7)
SHALLOW_SDXL = replace(TINY_SDXL, transformer_layers_per_block=1)


def test_allocated_storages_are_counted_and_views_are_not():
    x = torch.randn(1000)
    with MemoryCount([x]) as count:
        a = x.exp()  # 4000 bytes
        b = a[:500] * 1  # 2000 more
        _ = a.view(10, 100), x[:10]
        del a, _
        assert (count.now, count.peak) == (2000, 6000)
        c = b.double()  # 4000 more
    assert (count.now, count.peak) == (6000, 6000) and len(c) == 500


def test_after_a_backward_pass_only_gradients_are_allocated():
    layers = nn.Sequential(nn.Linear(30, 50), nn.SiLU(), nn.Linear(50, 20))
    with MemoryCount(layers.parameters()) as count:
        layers(torch.randn(64, 30)).square().mean().backward()
    assert count.now == 4 * sum(p.numel() for p in layers.parameters()) < count.peak


def one_step(config, checkpointing=False):
    def build():
        torch.manual_seed(0)
        unet = UNet(config)
        unet.gradient_checkpointing = checkpointing
        inputs = random_inputs(config, *INPUTS)
        return [unet], lambda: unet(*inputs).square().mean().backward()

    return build


@pytest.mark.parametrize(("config", "checkpointing"), [(SMALL, False), (SHALLOW_SDXL, True)], ids=["sd", "sdxl"])
def test_fake_tensors_take_as_much_memory_as_real_ones(config, checkpointing):
    networks, run = one_step(config, checkpointing)()
    with MemoryCount(networks[0].parameters()) as count:
        run()
    assert peak_bytes(one_step(config, checkpointing)) == pytest.approx(count.peak, rel=0.01)


def test_checkpointing_half_precision_and_smaller_batches_save_memory():
    removal = plan_removal(replace(SMALL, block_out_channels=(32, 64), layers_per_block=2), ("down.0.1", "up.1.1"))
    pairs = feature_pairs(removal, "nota")

    def peak(batch=4, half=False, checkpointing=False):
        return step_peak(removal, pairs, (batch, *INPUTS[1:]), half=half, checkpointing=checkpointing)

    usual = peak()
    assert peak(checkpointing=True) < 0.8 * usual
    assert peak(half=True) < 0.9 * usual
    assert peak(batch=8) > 1.5 * usual


def test_networks_that_do_not_train_take_half_the_memory_in_half_precision():
    removal = plan_removal(TINY, RECIPES["bk-tiny"].remove)
    with torch.device("meta"):
        size, small = (4 * sum(p.numel() for p in UNet(config).parameters()) for config in (TINY, SMALL))
    rows = [dict(memory_rows(removal, [], 0, 0, False, half))["teacher's weights"] for half in (False, True)]
    assert rows == [format_bytes(size), format_bytes(size / 2)]
    about = {"first": False, "guided": False, "rank": 2, "shared": False, "checkpointing": False}
    phase = Phase(1, 1.0, mse=1)  # beside the student, the first teacher and that of the stage
    for half in (False, True):
        assert phase_memory(SMALL, SMALL, phase, (1, 8, 8, 4), half=half, **about)[0] == (2 if half else 3) * small


def test_the_table_adds_up():
    removal = plan_removal(TINY, RECIPES["bk-tiny"].remove)
    with torch.device("meta"):
        teacher, student = UNet(removal.teacher), UNet(removal.student)
    other = nn.Linear(1000, 1000)
    rows = dict(memory_rows(removal, [other], 10 * 2**20, 0, averaged=True))
    bytes_of = [4 * sum(p.numel() for p in network.parameters()) for network in (teacher, student, other)]
    assert rows["AdamW's two averages"] == format_bytes(2 * bytes_of[1])
    assert rows["in all, about"] == format_bytes(bytes_of[0] + 4 * bytes_of[1] + bytes_of[2] + 10 * 2**20)
    assert "averaged weights" not in dict(memory_rows(removal, [other], 0, 0, averaged=False))


def test_of_what_is_shared_out_a_process_needs_its_part(monkeypatch):
    monkeypatch.setattr(parallel, "count", lambda: 4)
    removal = plan_removal(replace(TINY, block_out_channels=(64,) * 4), RECIPES["bk-tiny"].remove)
    pairs, parts, needed = feature_pairs(removal, "nota"), {}, {}
    for mode in parallel.MODES:
        held = parallel.held(mode)
        peak = step_peak(removal, pairs, (1, 8, 8, 4), half=False, checkpointing=False, share=held.states)
        parts[mode] = dict(memory_rows(removal, [], peak, 0, True, held=held))
        about = {"first": True, "guided": False, "rank": 2, "shared": False, "half": False, "checkpointing": False}
        phase = Phase(1, 1.0, mse=1)
        needed[mode] = phase_memory(removal.teacher, removal.teacher, phase, (1, 8, 8, 4), **about, share=held.states)
    teacher, student = (4 * sum(map(math.prod, weight_shapes(c).values())) for c in (removal.teacher, removal.student))
    for mode, frozen, trained, states in (("ddp", 1, 1, 1), ("zero1", 1, 1.25, 0.25), ("fsdp", 0.25, 0.25, 0.25)):
        assert parts[mode]["teacher's weights"] == format_bytes(teacher * frozen), mode
        assert parts[mode]["student's weights"] == format_bytes(student * trained), mode
        assert parts[mode]["AdamW's two averages"] == format_bytes(2 * student * states), mode
        assert parts[mode]["averaged weights"] == format_bytes(student * states), mode
    assert needed["ddp"][2] > needed["zero1"][2] == needed["fsdp"][2] > teacher / 4


@pytest.mark.parametrize("vae", [AutoencoderKL(VAEConfig()), AutoencoderTiny(TinyConfig())], ids=["kl", "taesd"])
def test_an_image_that_takes_more_than_a_step_determines_the_estimate(vae):
    latents = torch.zeros(1, 4, 24, 24)
    with MemoryCount(vae.parameters()) as count, torch.no_grad():
        vae.from_latents(latents)
    peak = image_peak(vae, 24)
    assert peak == pytest.approx(count.peak, rel=0.05)
    removal = plan_removal(TINY, RECIPES["bk-tiny"].remove)
    own = 4 * sum(p.numel() for p in UNet(removal.student).parameters())
    for averaged in (False, True):  # decoded with the averaged weights, the student's own being kept
        row = dict(memory_rows(removal, [], 1, peak, averaged))["activations, gradients"]
        assert row == format_bytes(peak + own * averaged)


def test_networks_are_on_the_device_within_the_context_only(monkeypatch):
    network, seen = nn.Linear(1, 1), []
    monkeypatch.setattr(network, "to", lambda device: seen.append(str(device)))
    with on_device([network], torch.device("cuda")):
        assert seen == ["cuda"]
    assert seen == ["cuda", "cpu"]
